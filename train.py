"""The one training loop. `pretrain`'s signature is the configuration, its docstring the manual."""

import logging
import math
import shlex
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from timm.optim import Lars
from torch import nn

import data
from bsim import make_view, sample_mixture
from eval.knn import knn_accuracy, pixels
from flags import UserError, progress
from loading.batches import VIEW, Batches, Feed, StreamBatches, generator, places_of
from loading.images import after_crop
from methods import METHODS
from methods.networks import average_statistics
from training import dry_run as dry
from training import folder as run_folder
from training import guards, left_out, pictures, settings
from training.peers import Peers, agreement

NOT_AGAIN = ("out", "resume", "sim_weight")  # flags that the command that is proposed does not repeat
COLLAPSE = "their spread fell under a tenth of what it was. See curves.png; try a lower --lr or another --momentum"


def pretrain(
    method: str = "byol",
    sim_weight: float = 0.0,
    mix: str = "cutmix",
    alpha: float = 1.0,
    per_sample: bool = True,
    dataset: str = "digits",
    subset: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    skip_bad_images: bool = False,
    max_pixels: int = 100_000_000,
    workers: int | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    min_crop: float | None = None,
    flip: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    mixed_precision: str | None = None,
    compile: bool = False,
    batch_norm: str | None = None,
    temperature: float | None = None,
    momentum: float | None = None,
    queue: int | None = None,
    hidden_dim: int | None = None,
    embedding_dim: int | None = None,
    predictor_dim: int | None = None,
    out: str | None = None,
    resume: bool | str = False,
    seed: int = 0,
    log_every: int = 10,
    eval_every: int | None = None,
    checkpoint_every: int = 1000,
    keep: int = 2,
    log_with: str | None = None,
    dry_run: int | None = None,
) -> Path | None:
    """Pretrain a backbone with SIM, BSIM or both. Leaves a run folder; defaults stand in brackets.

    What is learned
      method: simclr, moco, byol or simsiam
      sim_weight: share of the plain loss: 1 the method itself, 0 pure BSIM, both between
      mix: cutmix, mixup, or either, by a coin
      alpha: shares of a mixture are drawn from Beta(alpha, alpha)
      per_sample: a share for each image; --noper_sample: one for the batch
    Data
      dataset: digits, a Hub id, a folder, .parquet .arrow .tar files, a saved dataset
      subset: the Hub dataset's configuration, where it has several
      split: what to train on; train[:5000] takes a part
      eval_split: k-NN queries; by itself validation or test, else a tenth is held out
      image_column: where several columns hold images
      label_column: where several hold classes; none: do not evaluate
      streaming: read as it trains, for what does not fit the disk; wants --steps
      skip_bad_images: leave out and count images that cannot be read
      max_pixels: of an image; one that claims more is a bad image
      workers: processes that decode large images; by itself up to 8
    Network and schedule
      backbone: any timm model, or resnet_tiny; by itself resnet50, for 64 pixels or
        fewer resnet18, and there on a CPU resnet_tiny
      image_size: by itself the images' own up to 64 pixels, at least 16; else 224
      min_crop: smallest share of an image that a view shows; by itself the method's
      flip: share of views that are mirrored; by itself the method's
      epochs: passes over the data; by itself 50
      steps: optimiser steps, in place of epochs
      batch_size: images a step, over all processes and parts; by itself 256, for under
        16,384 images 128 or 64
      accumulate: parts into which a process cuts its share of a step's batch
      mixed_precision: no, fp16 or bf16; by itself as `accelerate config` says
      compile: torch.compile
    By itself what the method's paper says (methods/*.py)
      optimizer: sgd, lars or adamw
      lr: for each 256 images of the batch; then warm-up and cosine
      weight_decay: on all but what LARS and AdamW exclude
      warmup_epochs: epochs of linear warm-up; in a stream a tenth of the steps
      batch_norm: statistics over many GPUs: sync, of all; shuffle, each GPU's own, keys
        changing places (moco); local, each GPU's own. On CPUs sync means local
      temperature: simclr, moco
      momentum: moco, byol: of the slow encoder
      queue: moco: keys that are kept
      hidden_dim: width of the heads' hidden layers
      embedding_dim: width of the embedding
      predictor_dim: simsiam: the predictor's bottleneck
    The run
      out: its folder; by itself the next free runs/METHOD-DATASET-NUMBER
      resume: go on with a run: --resume FOLDER; or --resume --out FOLDER, which starts it
        where there is none
      seed: of the weights, the data's order, views and mixtures
      log_every: steps between lines of metrics.jsonl
      eval_every: steps between k-NN evaluations; by itself ten a run; 0: none
      checkpoint_every: steps between checkpoints; there is always one at the end
      keep: checkpoints to keep
      log_with: tensorboard, wandb or trackio beside metrics.jsonl
      dry_run: take so many steps of this run, time the second half of them, print memory,
        images/s and the run's hours; leaves no run
    """
    given = dict(locals())
    s, folder = settings.read(given, dict(zip(given, pretrain.__defaults__)))
    accelerator = _accelerator(s, folder)
    say = accelerator.print
    rank, world = accelerator.process_index, accelerator.num_processes
    peers = Peers()
    if folder is None and not s["dry_run"]:
        run_folder.choose(s["out"], s["method"], s["dataset"])  # refuses a folder in use, in every process alike

    # The data, and what depends on it.
    s["dataset"] = data.absolute(s["dataset"])
    names = "dataset subset split eval_split image_column label_column streaming skip_bad_images max_pixels"
    with accelerator.local_main_process_first():
        source = data.open_source(
            **{name: s[name] for name in [*names.split(), "seed"]}, remembered=not accelerator.is_local_main_process
        )
    for line in source.found:
        say(line)
    method_file = METHODS[s["method"]]
    draw_mixture = getattr(method_file, "sample_mixture", sample_mixture)
    set_seed(s["seed"])
    network = settings.resolve(s, source, method_file, accelerator.device.type, world)
    part = s["batch_size"] // (world * s["accumulate"])
    recipes = settings.recipes(s, method_file)
    model = method_file.Method(network, **{k: s[k] for k in s["of_method"] if k not in settings.LOOP})
    made_by = {"method": s["method"], "backbone": s["backbone"], "format": run_folder.FORMAT}
    start, window, places, baselines, health = 0, {}, None, {}, {}
    optimizer = _optimizer(model, s)
    resumes = (
        folder is not None and run_folder.last_checkpoint(folder) is not None
    )  # else it was stopped before its first
    if resumes:
        optimizer_state, state = run_folder.load_checkpoint(folder, model, made_by)
        for saved, group in zip(optimizer_state["param_groups"], optimizer.param_groups):
            saved |= {k: v for k, v in group.items() if k == "fused"}  # of this machine and version, not of that run
        optimizer.load_state_dict(optimizer_state)
        start, baselines, health = (state[name] for name in ("step", "baselines", "health"))
        own = state["processes"][rank if len(state["processes"]) == world else 0]
        window, places = own["window"], [process["places"] for process in state["processes"]]
    if resumes and start >= s["steps"] and (folder / "backbone.safetensors").exists():
        raise UserError(f"--resume {folder}: is finished at step {start}; to train longer raise --epochs or --steps")

    # Processes, precision, compilation.
    model.batch_norm = s["batch_norm"]
    if world > 1 and s["batch_norm"] == "sync":
        if accelerator.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            say("note: on CPUs batch norm's statistics are each process's own")
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if s["compile"]:
        model.compile()
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if resumes and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])

    if source.note and s["eval_every"]:
        say(f"k-NN is left out: {source.note}")

    # k-NN of what is there before training: before anything is written, since it meets unreadable images.
    def evaluate(features):
        return knn_accuracy(accelerator, source, features, image_size=s["image_size"], workers=s["workers"])

    if source.queries and s["eval_every"] and not start and not s["dry_run"]:
        baselines = {"knn_pixels": evaluate(pixels), "knn_random": evaluate(bare.backbone)}
        say(
            "k-NN before training: raw pixels {knn_pixels:.1f} %, random network {knn_random:.1f} %".format(**baselines)
        )

    # The run folder.
    if not s["dry_run"]:
        if accelerator.is_main_process:
            folder = folder or run_folder.create(s["out"], s["method"], s["dataset"])
            run_folder.cut_metrics(folder, start)
            left_out.add(folder, source.left_out)
            run_folder.write_json(folder / "config.json", {**s, "out": str(folder), "versions": run_folder.versions()})
        folder = peers.folder = Path(broadcast_object_list([str(folder)])[0])
        if s["log_with"]:
            accelerator.project_configuration.logging_dir = str(folder)
            plain = {k: v for k, v in s.items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("bsim", plain)
    say(
        f"{s['method']} on {s['dataset']}: {source.images or 'a stream of'} images of {s['image_size']} pixels, "
        f"{s['backbone']}, {s['steps']} steps of {s['batch_size']} on {world} x {accelerator.device.type}, "
        f"sim_weight {s['sim_weight']:g} -> {folder or 'nothing, a dry run'}"
    )

    batches, feed = _batches(source, recipes, s, part, start, places, accelerator)
    if source.rows is None or source.train.in_workers:  # cropped by the workers
        recipes = tuple(after_crop(recipe) for recipe in recipes)

    to_device = _mover(accelerator.device)

    def train_step(step):
        """Take step `step`; returns the losses of its last part, and adds those of all to `window`."""
        for group in optimizer.param_groups:
            group["lr"] = s["peak_lr"] if group["constant"] else _lr(step, s)
        for micro in range(s["accumulate"]):
            pair = next(feed)
            draws = generator(s["seed"], VIEW, step * s["accumulate"] + micro, rank)
            a, b = (make_view(to_device(images), recipe, generator=draws) for images, recipe in zip(pair, recipes))
            mixture = None
            if s["sim_weight"] < 1:
                views = torch.cat([a, b], 1) if bare.both_views else a
                rule = dict(kind=s["mix"], alpha=s["alpha"], per_sample=s["per_sample"])
                mixture = draw_mixture(views, **rule, generator=draws)
            if step == 0 and micro == 0 and accelerator.is_main_process and not s["dry_run"]:
                shown = pair[0] if source.rows is None else source.train.whole(batches.rows(0)[:8], s["image_size"])[0]
                pictures.draw_views(folder / "views.png", shown, a, b, mixture, recipes)
            with accelerator.accumulate(model):
                losses = model(a, b, mixture, s["sim_weight"] > 0)
                loss = _objective(losses, s["sim_weight"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            _add(window, loss=loss, sim=losses.sim, bsim=losses.bsim)
        bare.after_step((step + 1) / s["steps"])
        return losses

    if s["dry_run"]:
        with peers:
            found = dry.measure(train_step, accelerator, s)
        accelerator.end_training()
        say(dry.report(found, bare, accelerator.device.type, feed.ahead, s))
        return None

    # The loop.
    bar = progress(s["steps"], start=start, shown=accelerator.is_main_process)
    knn, clock, since = None, time.perf_counter(), start
    with guards.asked_to_stop() as asked, guards.leaves_nothing(folder, start), peers:
        stop_asked = agreement(asked)
        for step in range(start, s["steps"]):
            losses = train_step(step)
            done = step + 1

            last = done == s["steps"]
            evaluates = source.queries and s["eval_every"] and (last or done % s["eval_every"] == 0)
            stops = stop_asked()
            logs = last or evaluates or done % s["log_every"] == 0
            saves = last or stops or done % s["checkpoint_every"] == 0
            if logs or saves:
                guards.check_finite(accelerator, window["loss"], folder, done, s, _lr, batches)
            if logs:
                line = _line(accelerator, window, losses, done, s)
                line["images_per_second"] = round((done - since) * s["batch_size"] / (time.perf_counter() - clock), 1)
                if evaluates:
                    average_statistics(bare)
                    line["knn"] = knn = evaluate(bare.backbone)
                    line |= {} if "said" in baselines else baselines
                    baselines["said"] = True
                if guards.collapsed(health, line["feature_std"]):
                    say(f"warning: step {done}: the embeddings collapse; {COLLAPSE}")
                if accelerator.is_main_process:
                    run_folder.append_metrics(folder, line)
                accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=done)
                shown = {"loss": f"{line['loss']:.3f}", "img/s": f"{line['images_per_second']:.0f}"}
                bar.set_postfix(shown | ({"knn": f"{knn:.1f}%"} if knn is not None else {}), refresh=False)
                clock, since = time.perf_counter(), done
            bar.update()
            if saves:
                average_statistics(bare)
                own = {name: [float(v) for v in values] for name, values in window.items()}
                processes = gather_object([{"window": own, "places": feed.places}])
                bad = set(gather_object(sorted(feed.bad)))
                if accelerator.is_main_process:
                    left_out.add(folder, [f"{name}: cannot be read" for name in sorted(bad)])
                    state = {"made_by": made_by, "processes": processes, "baselines": baselines, "health": health}
                    state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
                    run_folder.save_checkpoint(folder, done, bare, optimizer.state_dict(), state, s["keep"])
                accelerator.wait_for_everyone()
            if stops and not last:
                bar.close()
                accelerator.end_training()
                say(f"stopped at step {done}; go on with: accelerate launch bsim.py --resume {folder}")
                return folder
    bar.close()

    # What is left behind.
    if accelerator.is_main_process:
        run_folder.save_backbone(folder, bare.backbone)
        pictures.draw_curves(folder)
    accelerator.end_training()
    say(_summary(folder, s, knn, baselines, bad, health))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop.


def _accelerator(s, folder):
    for word in ("all_gather is deprecated", "`broadcast_buffers` is deprecated"):  # what is to replace them is private
        warnings.filterwarnings("ignore", f".*{word}", FutureWarning)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else it would not see torchrun's processes on a CPU
            mixed_precision=s["mixed_precision"],
            gradient_accumulation_steps=s["accumulate"],
            log_with=s["log_with"],
            project_dir=str(folder or s["out"] or "runs") if s["log_with"] else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),  # the others wait while one decodes; see Peers
            ],
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {s['mixed_precision']}: {error}") from None
    logging.getLogger("datasets").setLevel(logging.ERROR)
    s["mixed_precision"] = str(accelerator.mixed_precision)
    return accelerator


def _optimizer(model, s):
    """Momentum SGD as published decays everything; LARS and AdamW leave biases and norms out."""
    constant = getattr(model, "constant_lr", None)
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = s["optimizer"] == "sgd" or parameter.ndim > 1
            groups.setdefault((decayed, name.split(".")[0] == constant), []).append(parameter)
    adapts = s["optimizer"] == "lars"  # timm's LARS would take steps of plain SGD where the weight decay is 0
    groups = [
        dict(params=params, constant=fixed, weight_decay=s["weight_decay"] * decayed, always_adapt=adapts and decayed)
        for (decayed, fixed), params in groups.items()
    ]
    if s["optimizer"] == "lars":
        return Lars(groups, lr=s["peak_lr"], momentum=0.9)
    if s["optimizer"] == "sgd":
        # Fused, its momentum would begin with whatever lies in memory where fp16's first step overflows (torch 2.14).
        return torch.optim.SGD(groups, lr=s["peak_lr"], momentum=0.9, fused=s.get("mixed_precision") != "fp16")
    return torch.optim.AdamW(groups, lr=s["peak_lr"], fused=True)


def _lr(step, s):
    """Linear warm-up, then half a cosine down to 0."""
    if step < s["warmup_steps"]:
        return s["peak_lr"] * (step + 1) / s["warmup_steps"]
    progress = (step - s["warmup_steps"]) / (s["steps"] - s["warmup_steps"])
    return s["peak_lr"] * (1 + math.cos(math.pi * progress)) / 2


def _batches(source, recipes, s, part, start, places, accelerator):
    rank, world = accelerator.process_index, accelerator.num_processes
    share = dict(part_size=part, rank=rank, world=world, seed=s["seed"])
    first, last = start * s["accumulate"], s["steps"] * s["accumulate"]
    if source.rows is None:
        workers = min(s["workers"], source.train.num_shards // world)
        readers = max(1, workers)
        mine, goes_on = places_of(places, rank, world, readers)
        if not goes_on:
            accelerator.print("note: with another number of processes or workers the stream begins its next epoch")
        share |= dict(readers=readers, skip_bad=s["skip_bad_images"], start=first, places=mine)
        batches = StreamBatches(source, recipes, **share)
    else:
        workers = s["workers"] if source.train.in_workers else 0
        batches = Batches(source, recipes, **share, batch_size=s["batch_size"])
    return batches, Feed(batches, first, last, workers, pin=accelerator.device.type == "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# In the loop.


def _mover(device):
    """A function that moves a batch to `device`; on a GPU while the last step is still computed."""
    if device.type != "cuda":
        return lambda images: images.to(device, non_blocking=True)
    copies = torch.cuda.Stream()

    def move(images):
        with torch.cuda.stream(copies):
            moved = images.to(device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(copies)
        moved.record_stream(torch.cuda.current_stream())  # else its memory could be given away before it is used
        return moved

    return move


def _objective(losses, sim_weight):
    """sim_weight x SIM + (1 - sim_weight) x BSIM; a part of weight 0 was never computed."""
    if losses.bsim is None:
        return losses.sim
    if losses.sim is None:
        return losses.bsim
    return sim_weight * losses.sim + (1 - sim_weight) * losses.bsim


def _add(window, **values):
    """What was seen since the last log line, on the device: nothing waits for it between log lines."""
    for name, value in values.items():
        if value is not None:
            window.setdefault(name, []).append(value.detach().float())


def _line(accelerator, window, losses, done, s):
    """A line of metrics: means over the window, which is emptied, and over the processes."""
    embeddings = F.normalize(losses.embeddings.detach().float(), dim=1)
    # The standard deviation of a unit vector's coordinate, times sqrt(D): 1 when spread (SimSiam, section 4.1).
    values = {"feature_std": embeddings.std(0).mean() * embeddings.shape[1] ** 0.5}
    for name, seen in window.items():
        values[name] = torch.stack([torch.as_tensor(v, device=accelerator.device) for v in seen]).mean()
    values = {k: float(accelerator.reduce(v, reduction="mean")) for k, v in values.items()}
    window.clear()
    epoch = round(done / s["steps_per_epoch"], 3) if s["steps_per_epoch"] else None
    numbers = {k: values.get(k) for k in ("loss", "sim", "bsim")}
    return {"step": done, "epoch": epoch, **numbers, "lr": _lr(done - 1, s), "feature_std": values["feature_std"]}


def _summary(folder, s, knn, baselines, bad, health):
    lines = [f"finished {folder} at step {s['steps']}"]
    if knn is not None:
        lines.append(f"  k-NN          {knn:.1f} %")
    if "knn_pixels" in baselines:
        lines.append(f"  raw pixels    {baselines['knn_pixels']:.1f} %")
        lines.append(f"  random net    {baselines['knn_random']:.1f} %")
    if "warned" in health:
        lines.append(f"  warning       the embeddings collapsed; {COLLAPSE}")
    if bad:
        lines.append(f"  skipped       {len(bad)} bad images")
    lines.append(f"  weights       {folder / 'backbone.safetensors'}  ({s['backbone']}, as timm names them)")
    lines.append(f"  look at       {folder / 'views.png'}, {folder / 'curves.png'}")
    other = 1 if s["sim_weight"] < 1 else 0
    again = {"method": s["method"], **{k: v for k, v in s["given"].items() if k not in NOT_AGAIN}}
    words = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in again.items())
    words += f" --sim_weight {other}"
    lines.append(f"next: accelerate launch bsim.py {words}   ({'plain ' if other else 'BSIM with '}{s['method']})")
    return "\n".join(lines)
