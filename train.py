"""The one training loop, read from top to bottom: open the data, build the network, resume, loop, finish."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object, set_seed

import data
from bsim import Mixture, make_view, sample_mixture
from eval.knn import SHOTS, pixels
from eval.learning import figures, nearest
from flags import Given, UserError, command, progress
from loading.batches import VIEW, Batches, Feed, StreamBatches, generator, places_of
from loading.images import after_crop
from methods import METHODS
from methods.networks import Losses, average_statistics
from training import dry_run, guards, left_out, lock, pictures, trackers
from training import folder as run_folder
from training.devices import mover, open_accelerator, synchronised
from training.optimize import learning_rate, optimizer_of
from training.peers import Peers, agreement
from training.report import COLLAPSE, Clock, accuracies, measured, spread, summary, without_labels
from training.resolve import Began, read, resolve, view_recipes
from training.settings import Pretraining
from training.state import Training


@command(Pretraining)
@lock.releasing()
def pretrain(asked: Pretraining, given: Given) -> Path | None:
    """Pretrain a backbone as `Pretraining` says; returns the run folder, or None after a dry run."""
    asked, folder, began = read(asked, given)
    accelerator = start(asked, folder)
    if folder is not None:
        lock.take_for_all(folder)
    elif not asked.dry_run:
        run_folder.choose(asked.out, asked.method, asked.dataset)  # refuses a folder in use, in every process alike
    peers = Peers()

    source = open_data(asked, accelerator, began)
    for line in source.found:
        accelerator.print(line)
    t = build(asked, given, source, accelerator, began)
    resumes = folder is not None and run_folder.last_checkpoint(folder) is not None  # else it ended before its first
    if folder is not None and resumes:
        resume(t, folder)
    distribute(t)
    if t.s.eval_every and not t.s.dry_run:
        for line in without_labels(t):
            accelerator.print(line)
    if source.queries and t.s.eval_every and not t.start and not t.s.dry_run:
        before_training(t)
    if not t.s.dry_run:
        open_folder(t, folder, peers)
    describe(t)
    open_feed(t)

    if t.s.dry_run:
        time_steps(t, peers)
        return None
    finished = loop(t, peers)
    if finished:
        leave(t)
    return t.folder


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop.


def start(asked: Pretraining, folder: Path | None) -> Accelerator:
    for word in ("all_gather is deprecated", "`broadcast_buffers` is deprecated"):  # what is to replace them is private
        warnings.filterwarnings("ignore", f".*{word}", FutureWarning)
    accelerator = open_accelerator(
        asked.mixed_precision,
        gradient_accumulation_steps=asked.accumulate,
        log_with=asked.log_with,
        project_dir=str(folder or asked.out or "runs") if asked.log_with else None,
        handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    logging.getLogger("datasets").setLevel(logging.ERROR)
    return accelerator


def open_data(asked: Pretraining, accelerator: Accelerator, began: Began | None) -> data.Source:
    with accelerator.local_main_process_first():
        return data.open_source(
            asked.dataset,
            subset=asked.subset,
            split=asked.split,
            eval_split=asked.eval_split,
            image_column=asked.image_column,
            label_column=asked.label_column,
            streaming=asked.streaming,
            skip_bad_images=asked.skip_bad_images,
            max_pixels=asked.max_pixels,
            seed=asked.seed,
            remembered=not accelerator.is_local_main_process,
            way=began.way if began else data.way_of({}, pixel_range=asked.pixel_range),
            hold_out=began.held_out if began else asked.eval_every != 0,
        )


def build(
    asked: Pretraining, given: Given, source: data.Source, accelerator: Accelerator, began: Began | None
) -> Training:
    """The method's network around the backbone, and its optimizer, with the weights that the seed gives."""
    method_file = METHODS[asked.method]
    set_seed(asked.seed)
    s, network, lines = resolve(
        asked,
        given,
        source,
        method_file,
        device=accelerator.device.type,
        world=accelerator.num_processes,
        mixed_precision=str(accelerator.mixed_precision),
        began=began,
    )
    for line in lines:
        accelerator.print(line)
    method = method_file.Method(network, **s.heads)
    draw_mixture = getattr(method_file, "sample_mixture", sample_mixture)
    views = view_recipes(vars(s), method_file.views(s.image_size))
    return Training(s, accelerator, source, method, method, optimizer_of(method, s), views, views, draw_mixture)


def resume(t: Training, folder: Path) -> None:
    """Put the last checkpoint of the run into `t`: weights, optimizer, and where everything stood."""
    optimizer_state, state = run_folder.load_checkpoint(folder, t.method, t.made_by)
    for saved, group in zip(optimizer_state["param_groups"], t.optimizer.param_groups):
        saved |= {k: v for k, v in group.items() if k == "fused"}  # of this machine and version, not of that run
    t.optimizer.load_state_dict(optimizer_state)
    t.start, t.baselines, t.health = (state[name] for name in ("step", "baselines", "health"))
    rank, world = t.accelerator.process_index, t.accelerator.num_processes
    t.window = state["processes"][rank if len(state["processes"]) == world else 0]["window"]
    t.places = [process["places"] for process in state["processes"]]
    if t.accelerator.scaler:
        t.accelerator.scaler.load_state_dict(state["scaler"])
    if t.start > t.s.steps or t.start == t.s.steps and (folder / "backbone.safetensors").exists():
        at = "finished at" if t.start == t.s.steps else "at"
        longer = "--epochs or --steps" if t.s.images else "--steps"
        raise UserError(f"--resume {folder}: is {at} step {t.start}; to train longer raise {longer}")


def distribute(t: Training) -> None:
    """Batch norm over many processes, the device, compilation, and Accelerate's wrapping."""
    model, accelerator = t.method, t.accelerator
    model.batch_norm = t.s.batch_norm
    if t.s.batch_norm == "sync":
        model = synchronised(model, accelerator)
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if t.s.compile:
        model.compile()
    t.method = model
    t.model, t.optimizer = accelerator.prepare(model, t.optimizer)


def evaluate(t: Training, network: Any) -> dict[str, Any]:
    options = dict(image_size=t.s.image_size, workers=t.s.workers, seed=t.s.seed)
    return figures(t.accelerator, t.source, network, t.recipes, **options)


def before_training(t: Training) -> None:
    """Accuracy of pixels and of the first weights, before anything is written, since it meets unreadable images."""
    first = "initial" if t.s.init else "random"
    for name, network in (("pixels", pixels), (first, t.method.backbone)):
        found = evaluate(t, network)
        t.baselines |= {f"{k}_{name}": found[k] for k in ("knn", *SHOTS)}
    t.accelerator.print(f"before training:\n{accuracies(t.baselines, t.figures)}")


def open_folder(t: Training, folder: Path | None, peers: Peers) -> None:
    t.new = folder is None
    if t.accelerator.is_main_process:
        folder = folder or run_folder.create(t.s.out, t.s.method, t.s.dataset)
        with guards.leaves_no_half(folder, t.new):
            if t.new:
                lock.take(folder, "--out")
            run_folder.cut_metrics(folder, t.start)
            left_out.add(folder, t.source.left_out)
            config = {**t.s.config(), "out": str(folder), "versions": run_folder.versions()}
            run_folder.write_json(folder / "config.json", config)
    t.folder = peers.folder = Path(broadcast_object_list([str(folder)])[0])
    if t.s.log_with:
        trackers.begin(t)


def describe(t: Training) -> None:
    s, accelerator = t.s, t.accelerator
    accelerator.print(
        f"{s.method} on {s.dataset}: {t.source.images or 'a stream of'} images of {s.image_size} pixels, "
        f"{s.backbone}, {s.steps} steps of {s.batch_size} on {accelerator.num_processes} x {accelerator.device.type}, "
        f"sim_weight {s.sim_weight:g} -> {t.folder or 'nothing, a dry run'}"
    )


def open_feed(t: Training) -> None:
    """Open the batches of this process, from step `t.start` on."""
    s, source, rank, world = t.s, t.source, t.accelerator.process_index, t.accelerator.num_processes
    share: dict[str, Any] = dict(part_size=s.batch_size // (world * s.accumulate), rank=rank, world=world, seed=s.seed)
    first, last = t.start * s.accumulate, s.steps * s.accumulate
    if source.rows is None:
        workers = min(s.workers, source.train.num_shards // world)
        readers = max(1, workers)
        mine, resumes = places_of(t.places, rank, world, readers)
        if not resumes:
            t.accelerator.print("note: with another number of processes or workers the stream begins its next epoch")
        share |= dict(readers=readers, skip_bad=s.skip_bad_images, start=first, places=mine)
        t.batches = StreamBatches(source, t.views, **share)
    else:
        workers = s.workers if source.train.in_workers else 0
        t.batches = Batches(source, t.views, **share, batch_size=s.batch_size)
    t.feed = Feed(t.batches, first, last, workers, pin=t.accelerator.device.type == "cuda")
    if source.rows is None or source.train.in_workers:  # cropped by the workers
        t.views = tuple(after_crop(recipe) for recipe in t.views)
    t.to_device = mover(t.accelerator.device)


def time_steps(t: Training, peers: Peers) -> None:
    with peers:
        found = dry_run.measure(lambda step: train_step(t, step), t.accelerator, t.s)
    t.accelerator.end_training()
    t.accelerator.print(dry_run.report(found, t.method, t.accelerator.device.type, t.feed.ahead, t.s))


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def loop(t: Training, peers: Peers) -> bool:
    """Train from step `t.start` on; False where the run was asked to stop before its end."""
    s, folder = t.s, t.folder
    assert folder is not None
    bar = progress(s.steps, start=t.start, shown=t.accelerator.is_main_process)
    clock = Clock(t.start)
    with bar, guards.asked_to_stop() as asked, guards.leaves_nothing(folder, t.new), peers:
        stop_asked = agreement(asked)
        for step in range(t.start, s.steps):
            losses = train_step(t, step)

            done, last, stops = step + 1, step + 1 == s.steps, stop_asked()
            held_out = t.source.queries or t.source.held_out
            evaluates = bool(held_out and s.eval_every and (last or done % s.eval_every == 0))
            logs = last or evaluates or done % s.log_every == 0
            saves = last or stops or done % s.checkpoint_every == 0
            if logs or saves:
                check_finite(t, done)
            if logs:
                log(t, losses, done, clock, evaluates, bar)
            bar.update()
            if saves:
                save(t, done)
            if stops and not last:
                bar.close()
                t.accelerator.end_training()
                t.accelerator.print(f"stopped at step {done}; resume it: accelerate launch bsim.py --resume {folder}")
                return False
    bar.close()
    return True


def train_step(t: Training, step: int) -> Losses:
    """Take step `step`: draw the batch, its views and its mixtures; forward, backward, step.

    Returns the losses of its last part, and adds those of all parts to `t.window`.
    """
    s, accelerator = t.s, t.accelerator
    for group in t.optimizer.param_groups:
        group["lr"] = s.peak_lr if group["constant"] else learning_rate(step, s)
    for micro in range(s.accumulate):
        pair = next(t.feed)
        draws = generator(s.seed, VIEW, step * s.accumulate + micro, accelerator.process_index)
        a, b = (make_view(t.to_device(images), recipe, generator=draws) for images, recipe in zip(pair, t.views))
        mixture = None
        mixes = s.sim_weight < 1 and step < s.mix_until * s.steps
        if mixes:
            views = torch.cat([a, b], 1) if t.method.both_views else a
            mixture = t.draw_mixture(views, kind=s.mix, alpha=s.alpha, per_sample=s.per_sample, generator=draws)
        if step == 0 and micro == 0 and accelerator.is_main_process and t.folder is not None:
            show(t, pair[0], a, b, mixture)
        with accelerator.accumulate(t.model):
            losses = t.model(a, b, mixture, s.sim_weight > 0 or not mixes)
            loss = objective(losses, s.sim_weight)
            accelerator.backward(loss)
            t.optimizer.step()
            t.optimizer.zero_grad()
        for name, value in (("loss", loss), ("sim", losses.sim), ("bsim", losses.bsim)):
            if value is not None:  # kept on the device: nothing waits for it between log lines
                t.window.setdefault(name, []).append(value.detach().float())
    if step == 0:  # what the collapse alarm compares with
        t.health["random"] = float(accelerator.reduce(spread(losses.embeddings), reduction="mean"))
    t.method.after_step((step + 1) / s.steps)
    return losses


def objective(losses: Losses, sim_weight: float) -> torch.Tensor:
    """sim_weight x SIM + (1 - sim_weight) x BSIM; a part of weight 0 was never computed."""
    if losses.bsim is None:
        assert losses.sim is not None
        return losses.sim
    if losses.sim is None:
        return losses.bsim
    return sim_weight * losses.sim + (1 - sim_weight) * losses.bsim


def show(t: Training, sources: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mixture: Mixture | None) -> None:
    """views.png, before the first step."""
    if t.source.rows is not None:
        sources = t.source.train.whole(t.batches.rows(0)[:8], t.s.image_size)[0]
    assert t.folder is not None
    pictures.draw_views(t.folder / "views.png", sources, a, b, mixture, t.views)
    trackers.log_picture(t, "views.png", 0)


# ---------------------------------------------------------------------------------------------------------------------
# What the loop writes.


def check_finite(t: Training, done: int) -> None:
    assert t.folder is not None
    losses = t.window["loss"]
    guards.check_finite(
        t.accelerator, losses, t.folder, done, t.s.accumulate, lambda step: learning_rate(step, t.s), t.batches
    )


def log(t: Training, losses: Losses, done: int, clock: Clock, evaluates: bool, bar: Any) -> None:
    """A line of metrics.jsonl, of the tracker and of the progress bar."""
    line = measured(t, losses, done)
    line["images_per_second"] = clock.speed(done, t.s.batch_size)
    if evaluates:
        average_statistics(t.method)
        t.figures = evaluate(t, t.method.backbone)
        line |= t.figures | ({} if "said" in t.baselines else t.baselines)
        t.baselines["said"] = True
    if guards.collapsed(t.health, line["feature_std"]):
        t.accelerator.print(f"warning: step {done}: the embeddings collapse; {COLLAPSE}")
    if t.accelerator.is_main_process:
        assert t.folder is not None
        run_folder.append_metrics(t.folder, line)
    if t.s.log_with:
        trackers.log(t, {k: v for k, v in line.items() if k != "step" and v is not None}, done)
    shown = {"loss": f"{line['loss']:.3f}", "img/s": f"{line['images_per_second']:.0f}"}
    for name, mark in (("five_labels", "%"), ("knn", "%"), ("effective_rank", "")):
        shown |= {name: f"{t.figures[name]:.1f}{mark}"} if t.figures.get(name) is not None else {}
    bar.set_postfix(shown, refresh=False)
    clock.restart(done)


def save(t: Training, done: int) -> None:
    """A checkpoint, with what every process needs to resume."""
    average_statistics(t.method)
    own = {name: [float(v) for v in values] for name, values in t.window.items()}
    processes = gather_object([{"window": own, "places": t.feed.places}])
    bad = sorted(set(gather_object(sorted(t.feed.bad))))
    if t.accelerator.is_main_process:
        assert t.folder is not None
        state = {"made_by": t.made_by, "processes": processes, "baselines": t.baselines, "health": t.health}
        state["scaler"] = t.accelerator.scaler.state_dict() if t.accelerator.scaler else {}
        left_out.add(t.folder, [f"{name}: cannot be read" for name in bad])
        run_folder.save_checkpoint(t.folder, done, t.method, t.optimizer.state_dict(), state, t.s.keep)
    t.accelerator.wait_for_everyone()


# ---------------------------------------------------------------------------------------------------------------------
# After the loop.


def leave(t: Training) -> None:
    """The backbone, the pictures, and a summary."""
    bad, clipped = set(gather_object(sorted(t.feed.bad))), sum(gather_object([t.feed.clipped]))
    near = None
    if t.s.eval_every and (t.source.queries or t.source.held_out):
        normal = t.views[0].mean, t.views[0].std
        options: dict[str, Any] = dict(image_size=t.s.image_size, normal=normal, workers=t.s.workers)
        near = nearest(t.accelerator, t.source, t.method.backbone, **options)
    if t.accelerator.is_main_process:
        assert t.folder is not None
        run_folder.save_backbone(t.folder, t.method.backbone)
        pictures.draw_curves(t.folder)
        if near is not None:
            pictures.draw_neighbours(t.folder / "neighbours.png", *near)
        for name in ("neighbours.png", "curves.png"):
            trackers.log_picture(t, name, t.s.steps)
    t.accelerator.end_training()
    t.accelerator.print(summary(t, bad, clipped))
