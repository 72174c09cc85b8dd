"""Features of labelled images, computed by every process for its share, and the accuracy of scores."""

import torch
import torch.nn.functional as F
from torch import nn

import data
from bsim import ViewRecipe, make_view
from flags import RunError, progress
from loading import batches
from loading.files import counted

BAD = -2  # the label of an image that cannot be read
IMAGENET = ViewRecipe().mean, ViewRecipe().std


def clean_view(image_size, mean, std) -> ViewRecipe:
    """The view that evaluates: the whole image, without augmentation."""
    view = ViewRecipe(image_size, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
    return view._replace(mean=mean, std=std)


@torch.no_grad()
def in_batches(accelerator, network, images, rows, image_size, normal, workers):
    """Yield (features [n, D] float32 on the device, clipped values or -1 where bad) of `rows`, some at a time."""
    clean = clean_view(image_size, *normal)
    for batch, clipped in batches.whole_images(images, rows, image_size, workers=workers):
        view = make_view(batch.to(accelerator.device), clean, generator=torch.Generator())
        with accelerator.autocast():
            yield network(view).float(), clipped


@torch.no_grad()
def features(accelerator, network, part, *, image_size, normal=IMAGENET, workers=0, delay=0.0, say=None):
    """Features and labels of (images, rows) on every process; each computes its share.

    A label is -1 where there is none, and BAD where the image is bad; in a dataset without labels it is 0.
    normal: mean and standard deviation of the images that the network is used to. delay: seconds before the progress
    bar is shown. say: prints a line on values beyond the pixel range, if there are any. Raises RunError where a feature
    is not finite.
    """
    images, rows = part
    rank, world = accelerator.process_index, accelerator.num_processes
    padded = rows[torch.arange(-(-len(rows) // world) * world) % len(rows)]
    found, beyond = [], []
    shown = accelerator.is_main_process
    with progress(len(rows), shown=shown, unit=" images", named="features", delay=delay) as bar:
        for values, clipped in in_batches(
            accelerator, network, images, padded[rank::world], image_size, normal, workers
        ):
            found.append(values)
            beyond.append(clipped.to(accelerator.device))
            bar.update(min(len(values) * world, len(rows) - bar.n))

    def everyones(parts):
        return accelerator.gather(torch.cat(parts)).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(rows)]

    labelled = "label" in images.table.column_names
    labels = images.labels(rows).to(accelerator.device) if labelled else values.new_zeros(len(rows), dtype=torch.int64)
    values, clipped = everyones(found), everyones(beyond)
    refuse_not_finite(values[clipped >= 0])
    values_beyond, of = int(clipped.clamp(0).sum()), int((clipped > 0).sum())
    if say and of:
        say(f"clipped: {counted(values_beyond, 'value')} beyond the pixel range, in {counted(of, 'image')}")
    return values, labels.masked_fill(clipped < 0, BAD)


def double(x) -> torch.Tensor:
    """x in float64; on the CPU where its device, an Apple GPU, has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def unit(x) -> torch.Tensor:
    """The rows of x [N, D] at length 1; float64 on the way, where the square of no float32 overflows."""
    return F.normalize(double(x), dim=1).float().to(x.device)


def refuse_not_finite(values, what="features") -> None:
    """Raise RunError where a row of values [N, ...], `what` a network makes of N images, is NaN or infinite."""
    bad = int((~values.isfinite()).flatten(1).any(1).sum()) if len(values) else 0
    if bad:
        raise RunError(
            f"the {what} of {bad} of {len(values)} images are NaN or infinite, and no figure of them has a meaning; "
            "the weights have diverged, or values overflow at this --mixed_precision"
        )


def labelled_features(task, part: data.Labelled, network=None):
    """(features [N, D], classes [N]) of all readable images of `part`, on every process."""
    network = network or task.backbone.network.eval()
    first = isinstance(network, nn.Module)  # pixels come after the network, of the same images
    found, known = features(
        task.accelerator,
        network,
        part[:2],
        image_size=task.backbone.image_size,
        normal=(task.backbone.mean, task.backbone.std),
        workers=task.workers,
        say=task.say if first else None,
    )
    good = known >= 0
    if first and not good.all():
        bad, of = counted(int((~good).sum()), "image"), "training" if part is task.train else "evaluation"
        task.say(f"left out {bad} of the {of} set that cannot be read")
    return found[good], part.labels.to(found.device)[good]


def topk_accuracy(scores, labels) -> dict:
    """{"top1", "top5"} in per cent of scores [N, C] for labels [N]; no top5 for five classes or fewer.

    A class with a score of -inf (without a vote, or never learnt) is not ranked at all.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    ranks = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    found = {"top1": float(ranks[:, :1].any(1).float().mean() * 100)}
    return found | ({"top5": float(ranks.any(1).float().mean() * 100)} if scores.shape[1] > 5 else {})
