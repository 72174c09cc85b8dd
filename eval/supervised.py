"""Training a classifier on crops and flips of labelled images: the part that `linear` and `semi` share."""

import math

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from bsim import ViewRecipe, make_view
from data import Source
from flags import RunError, UserError, progress
from loading.batches import VIEW, Batches, Feed, generator
from loading.files import counted
from loading.images import after_crop


def check_batch(batch_size: int, images: int, world: int, each: int = 1) -> None:
    """Raise UserError where a process would get fewer than `each` images: batch norm that learns wants two."""
    if batch_size % world or not each * world <= batch_size <= images:
        many = f", {each} images or more for each" * (each > 1)
        said = f"want a multiple of {world} processes{many}, up to the {images} images"
        raise UserError(f"--batch_size {batch_size}: {said}")


def fit(task, model, rows, descent, *, epochs: int, batch_size: int) -> None:
    """Train `model`, images [N, 3, H, W] to scores [N, classes], on `rows` of task.train; the rate falls as a cosine.

    What of the model takes no gradient stays as it is; whether batch statistics are updated is the caller's to say, by
    `train` and `eval`. Raises RunError where it diverges.
    """
    accelerator, train, seed, size = task.accelerator, task.train, task.seed, task.backbone.image_size
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    labels = torch.zeros(int(train.rows.max()) + 1, dtype=torch.int64)
    labels[train.rows] = train.labels
    recipe = ViewRecipe(size, scale=(0.08, 1) if size > 64 else (0.2, 1), jitter=0, grayscale=0, blur=0)
    recipe = recipe._replace(mean=task.backbone.mean, std=task.backbone.std)
    share = dict(part_size=batch_size // world, rank=rank, world=world, seed=seed)
    source = Source(train.images, rows, None, None, size, None)
    batches = Batches(source, (recipe, recipe), batch_size=batch_size, **share)
    steps = epochs * batches.steps_per_epoch
    workers = task.workers if train.images.in_workers else 0
    feed = Feed(batches, 0, steps, workers, pin=device.type == "cuda")
    recipe = after_crop(recipe) if train.images.in_workers else recipe
    peaks = [group["lr"] for group in descent.param_groups]
    model, descent = accelerator.prepare(model, descent)
    bar, losses = progress(steps, shown=accelerator.is_main_process), []
    for step in range(steps):
        for group, peak in zip(descent.param_groups, peaks):
            group["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
        images, _ = next(feed)
        view = make_view(images.to(device), recipe, generator=generator(seed, VIEW, step, rank))
        truth = labels[feed.rows]  # those of the images that were read
        loss = F.cross_entropy(model(view).float(), truth.to(device))
        accelerator.backward(loss)
        descent.step()
        descent.zero_grad()
        losses.append(loss.detach())
        if step % 50 == 0 or step == steps - 1:
            refuse_diverged(
                accelerator.gather(torch.stack(losses)), len(train.names), step + 1, bar, ended=step == steps - 1
            )
            losses.clear()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
    bar.close()
    bad = sorted(set(gather_object(sorted(feed.bad - train.images.bad))))  # small ones were said
    if bad:
        task.say(
            f"left out {counted(len(bad), 'image')} that cannot be read: {'; '.join(bad[:4])}{'; ...' * (len(bad) > 4)}"
        )


# Times the loss of chance: at the end, and ever. Published rates of linear classifiers reach some hundred times it.
DIVERGED, ABSURD = 1e3, 1e6


def refuse_diverged(losses, classes: int, step: int, bar, *, ended: bool) -> None:
    """Raise RunError where the losses [N] up to `step` are those of a classifier that does not converge."""
    finite, chance = bool(losses.isfinite().all()), math.log(classes)
    worst = float(losses.mean()) if ended else 0.0
    if finite and worst <= DIVERGED * chance and float(losses.max()) <= ABSURD * chance:
        return
    bar.close()  # before the message, which has a line of its own
    if not finite and step == 1:  # nothing was learnt yet
        raise RunError("the network's features are NaN or infinite: no classifier can be trained on them")
    said = f"is {float(losses.max()):.3g}, where chance has {chance:.3g}" if finite else "is NaN or infinite"
    raise RunError(f"the classifier has diverged: its loss {said}, at step {step}; try a lower --lr")
