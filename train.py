"""The one training loop. `pretrain`'s signature is the configuration, its docstring the manual."""

import logging
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from timm.optim import Lars
from torch import nn
from tqdm.auto import tqdm

import data
import pictures
import runs
from bsim import ViewRecipe, make_view, sample_mixture
from eval.knn import knn_predict, neighbours
from flags import UserError, nearest, one_of
from methods import METHODS
from methods.networks import SMALL, backbone_names
from methods.networks import backbone as build_backbone

OPTIMIZERS = ("sgd", "lars", "adamw")
OF_METHODS = ("optimizer", "lr", "weight_decay", "warmup_epochs", "temperature", "momentum", "queue")
OF_METHODS += ("hidden_dim", "embedding_dim", "predictor_dim")
LOOP = ("optimizer", "lr", "weight_decay", "warmup_epochs")  # the rest of a method's defaults its network takes
MAY_CHANGE = "epochs steps log_every eval_every checkpoint_every keep log_with workers out resume".split()


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
    workers: int | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    min_crop: float | None = None,
    flip: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    accumulate: int = 1,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    mixed_precision: str | None = None,
    compile: bool = False,
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
) -> Path:
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
      workers: processes that decode large images; by itself up to 8
    Network and schedule
      backbone: any timm model, or resnet_tiny; by itself resnet50, for 64 pixels or
        fewer resnet18, and there on a CPU resnet_tiny
      image_size: by itself the images' own up to 64 pixels, at least 16; else 224
      min_crop: smallest share of an image that a view shows; by itself the method's
      flip: share of views that are mirrored; by itself the method's
      epochs: passes over the data; by itself 100
      steps: optimiser steps, in place of epochs
      batch_size: images a step, over all processes and parts
      accumulate: parts into which a process cuts its share of a step's batch
      mixed_precision: no, fp16 or bf16; by itself as `accelerate config` says
      compile: torch.compile
    By itself what the method's paper says (methods/*.py)
      optimizer: sgd, lars or adamw
      lr: for each 256 images of the batch; then warm-up and cosine
      weight_decay: on all but what LARS and AdamW exclude
      warmup_epochs: epochs of linear warm-up
      temperature: simclr, moco
      momentum: moco, byol: of the slow encoder
      queue: moco: keys that are kept
      hidden_dim: width of the heads' hidden layers
      embedding_dim: width of the embedding
      predictor_dim: simsiam: the predictor's bottleneck
    The run
      out: its folder; by itself the next free runs/METHOD-DATASET-NUMBER
      resume: go on with a run: --resume FOLDER
      seed: of the weights, the data's order, views and mixtures
      log_every: steps between lines of metrics.jsonl
      eval_every: steps between k-NN evaluations; by itself ten a run; 0: none
      checkpoint_every: steps between checkpoints; there is always one at the end
      keep: checkpoints to keep
      log_with: tensorboard, wandb or trackio beside metrics.jsonl
    """
    given = {name: value for name, value in locals().items()}
    s, folder = _settings(given)
    accelerator = _accelerator(s, folder)
    say = accelerator.print
    rank, world = accelerator.process_index, accelerator.num_processes

    # The data, and what depends on it.
    names = "dataset subset split eval_split image_column label_column streaming skip_bad_images seed".split()
    with accelerator.main_process_first():
        source = data.open_source(**{"dataset": s["dataset"], **{name: s[name] for name in names}})
    method_file = METHODS[s["method"]]
    set_seed(s["seed"])
    network = _resolve(s, source, method_file, accelerator)
    part = s["batch_size"] // (world * s["accumulate"])
    recipes = _recipes(s, method_file)
    model = method_file.Method(network, **{k: s[k] for k in s["of_method"] if k not in LOOP})
    start, window, baselines = 0, {}, {}
    optimizer = _optimizer(model, s)
    if resume:
        optimizer_state, state = runs.load_checkpoint(folder, model)
        optimizer.load_state_dict(optimizer_state)
        start, window, baselines = state["step"], state["window"], state["baselines"]
    if start >= s["steps"]:
        raise UserError(f"--resume {folder}: is finished at step {start}; to train longer raise --epochs or --steps")

    # Processes, precision, compilation.
    if world > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if s["compile"]:
        model.compile()
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)

    # The run folder.
    if not resume:
        folder = Path(broadcast_object_list([str(runs.choose(s["out"], s["method"], s["dataset"]))])[0])
    if accelerator.is_main_process:
        _open_folder(folder, s, start)
    if s["log_with"]:
        plain = {k: v for k, v in s.items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("bsim", plain)
    say(
        f"{s['method']} on {s['dataset']}: {source.images or 'a stream of'} images of {s['image_size']} pixels, "
        f"{s['backbone']}, {s['steps']} steps of {s['batch_size']} on {world} x {accelerator.device.type}, "
        f"sim_weight {s['sim_weight']:g} -> {folder}"
    )

    def evaluate(features):
        return _knn(accelerator, source, s, features)

    if source.queries and s["eval_every"] and not baselines:
        baselines = {"knn_pixels": evaluate(_pixel_features), "knn_random": evaluate(bare.backbone)}
        say(
            "k-NN before training: raw pixels {knn_pixels:.1f} %, random network {knn_random:.1f} %".format(**baselines)
        )

    batches = _batches(source, recipes, s, part, rank, world, start, accelerator)
    if source.rows is None or source.train.in_workers:  # cropped by the workers
        recipes = tuple(data.after_crop(recipe) for recipe in recipes)

    # The loop.
    bar = tqdm(total=s["steps"], initial=start, disable=not accelerator.is_main_process, unit="step")
    knn, clock, since, skipped = None, time.perf_counter(), start, source.skipped
    for step in range(start, s["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = s["peak_lr"] if group["constant"] else _lr(step, s)
        for micro in range(s["accumulate"]):
            batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            *pair, bad = batch
            skipped += bad
            draws = data.generator(s["seed"], data.VIEW, step * s["accumulate"] + micro, rank)
            a, b = (
                make_view(images.to(accelerator.device, non_blocking=True), recipe, generator=draws)
                for images, recipe in zip(pair, recipes)
            )
            mixture = None
            if s["sim_weight"] < 1:
                views = torch.cat([a, b], 1) if bare.both_views else a
                rule = dict(kind=s["mix"], alpha=s["alpha"], per_sample=s["per_sample"])
                mixture = sample_mixture(views, **rule, generator=draws)
            if step == 0 and micro == 0 and accelerator.is_main_process:
                pictures.draw_views(folder / "views.png", pair[0], a, b, mixture, recipes)
            with accelerator.accumulate(model):
                losses = model(a, b, mixture, s["sim_weight"] > 0)
                loss = _objective(losses, s["sim_weight"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            _add(window, loss=loss, sim=losses.sim, bsim=losses.bsim)
        done = step + 1
        bare.after_step(done / s["steps"])

        evaluates = baselines and (done % s["eval_every"] == 0 or done == s["steps"])
        if done % s["log_every"] == 0 or evaluates or done == s["steps"]:
            line = _line(accelerator, window, losses, done, s)
            line["images_per_second"] = round((done - since) * s["batch_size"] / (time.perf_counter() - clock), 1)
            if evaluates:
                line["knn"] = knn = evaluate(bare.backbone)
                if "said" not in baselines:
                    line |= baselines
                    baselines["said"] = True
            if accelerator.is_main_process:
                runs.append_metrics(folder, line)
            accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=done)
            shown = {"loss": f"{line['loss']:.3f}", "img/s": f"{line['images_per_second']:.0f}"}
            bar.set_postfix(shown | ({"knn": f"{knn:.1f}%"} if knn is not None else {}))
            clock, since = time.perf_counter(), done
        bar.update()
        if done % s["checkpoint_every"] == 0 or done == s["steps"]:
            if accelerator.is_main_process:
                state = {"window": {k: float(v) for k, v in window.items()}, "baselines": baselines}
                runs.save_checkpoint(folder, done, bare, optimizer.state_dict(), state, s["keep"])
            accelerator.wait_for_everyone()
    bar.close()

    # What is left behind.
    if accelerator.is_main_process:
        runs.save_backbone(folder, bare.backbone)
        pictures.draw_curves(folder)
    accelerator.end_training()
    say(_summary(folder, s, knn, baselines, skipped))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop: settings.


def _settings(given):
    """Every flag checked as far as it can be without the data; with --resume, the run's own settings."""
    defaults = dict(zip(pretrain.__code__.co_varnames, pretrain.__defaults__))
    folder, s = None, dict(given)
    if given["resume"]:
        if given["resume"] is True and given["out"] is None:
            raise UserError("--resume: name the run's folder, as in --resume runs/byol-digits-001")
        folder = Path(given["out"] if given["resume"] is True else given["resume"]).expanduser()
        config = runs.config_of(folder)
        changed = {k: v for k, v in given.items() if v != defaults[k]}
        differ = [k for k, v in changed.items() if k not in MAY_CHANGE and config.get(k) != v]
        if differ:
            said = ", ".join(f"{k} {config.get(k)} (not {changed[k]})" for k in differ)
            raise UserError(f"--resume {folder}: that run has {said}; drop the flag, or start another run")
        s = {k: config.get(k, defaults[k]) for k in defaults} | {k: changed[k] for k in changed if k in MAY_CHANGE}
        if "epochs" in changed:
            s["steps"] = None
        elif s["epochs"] is not None and "steps" in changed:
            s["epochs"] = None
    elif given["epochs"] is not None and given["steps"] is not None:
        raise UserError("--epochs and --steps: give one of them")
    _check(s)
    if not folder and s["out"]:
        runs.choose(s["out"], s["method"], s["dataset"])
    return s, folder


def _check(s):
    one_of("method", s["method"], METHODS)
    one_of("mix", s["mix"], ("cutmix", "mixup", "either"))
    if s["optimizer"] is not None:
        one_of("optimizer", s["optimizer"], OPTIMIZERS)
    if s["mixed_precision"] is not None:
        one_of("mixed_precision", s["mixed_precision"], ("no", "fp16", "bf16"))
    if s["log_with"] is not None:
        one_of("log_with", s["log_with"], ("tensorboard", "wandb", "trackio"))
        if not find_spec(s["log_with"]):
            raise UserError(f"--log_with {s['log_with']}: is not installed; pip install {s['log_with']}")
    if s["backbone"] is not None and s["backbone"] not in backbone_names():
        names = backbone_names()
        raise UserError(f"--backbone {s['backbone']}: no such timm model{nearest(s['backbone'], names)}")
    ranges = {
        "a share from 0 to 1": (lambda v: 0 <= v <= 1, "sim_weight momentum flip"),
        "a share above 0, up to 1": (lambda v: 0 < v <= 1, "min_crop"),
        "a number above 0": (lambda v: 0 < v < math.inf, "alpha lr temperature"),
        "0 or more": (lambda v: 0 <= v < math.inf, "weight_decay warmup_epochs workers eval_every seed"),
        "1 or more": (
            lambda v: v >= 1,
            "epochs steps batch_size accumulate queue hidden_dim embedding_dim predictor_dim log_every checkpoint_every"
            " keep",
        ),
        "8 or more": (lambda v: v >= 8, "image_size"),
    }
    for wanted, (holds, names) in ranges.items():
        for name in names.split():
            if s[name] is not None and not holds(s[name]):
                raise UserError(f"--{name} {s[name]}: want {wanted}")
    if s["streaming"] and s["steps"] is None:
        raise UserError("--streaming: the length of a stream is not known; say how long to train, as in --steps 10000")


def _accelerator(s, folder):
    try:
        accelerator = Accelerator(
            mixed_precision=s["mixed_precision"],
            gradient_accumulation_steps=s["accumulate"],
            log_with=s["log_with"],
            project_dir=str(folder or s["out"] or "runs") if s["log_with"] else None,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {s['mixed_precision']}: {error}") from None
    logging.getLogger("datasets").setLevel(logging.ERROR)
    s["mixed_precision"] = str(accelerator.mixed_precision)
    return accelerator


def _resolve(s, source, method_file, accelerator):
    """Fill in every setting that was left open; build and return the backbone."""
    world, images = accelerator.num_processes, source.images
    if s["image_size"] is None:
        s["image_size"] = max(16, source.side) if source.side <= SMALL else 224
    if s["backbone"] is None:
        small = "resnet_tiny" if accelerator.device.type == "cpu" else "resnet18"
        s["backbone"] = small if s["image_size"] <= SMALL else "resnet50"
    if s["batch_size"] % (world * s["accumulate"]) or s["batch_size"] < 2 * world * s["accumulate"]:
        parts = f"{world} processes x --accumulate {s['accumulate']}"
        raise UserError(f"--batch_size {s['batch_size']}: want a multiple of {parts}, with 2 images or more for each")
    if images is not None and s["batch_size"] > images:
        raise UserError(
            f"--batch_size {s['batch_size']}: the dataset has {images} images to train on; want at most that"
        )
    s["steps_per_epoch"] = images // s["batch_size"] if images else None
    if s["steps"] is None:
        s["epochs"] = s["epochs"] or 100
        s["steps"] = s["epochs"] * s["steps_per_epoch"]
    if s["eval_every"] is None:
        s["eval_every"] = max(1, s["steps"] // 10)
    if s["workers"] is None:
        s["workers"] = min(8, max(1, (os.cpu_count() or 1) // world))

    network = build_backbone(s["backbone"], s["image_size"])
    scale = dict(image_size=s["image_size"], width=network.num_features, steps=s["steps"], images=images)
    defaults = method_file.defaults(**scale)
    for name in OF_METHODS:
        if name not in defaults and s.get(name) is not None:
            raise UserError(f"--{name}: {s['method']} has none")
    s["of_method"] = list(defaults)
    for name, value in defaults.items():
        if s.get(name) is None:
            s[name] = value
    s["peak_lr"] = s["lr"] * s["batch_size"] / 256
    s["warmup_steps"] = min(s["steps"] - 1, round(s["warmup_epochs"] * (s["steps_per_epoch"] or 0)))
    return network


def _recipes(s, method_file):
    """The method's two recipes, with the crop and the flip that the flags or the data ask for."""
    recipes = method_file.views(s["image_size"])
    own = data.DIGITS if s["dataset"] == "digits" else dict(min_crop=recipes[0].scale[0], flip=recipes[0].flip)
    for name, value in own.items():
        s[name] = value if s[name] is None else s[name]
    return tuple(recipe._replace(scale=(s["min_crop"], 1.0), flip=s["flip"]) for recipe in recipes)


def _optimizer(model, s):
    """Momentum SGD as published decays everything; LARS and AdamW leave biases and norms out."""
    constant = getattr(model, "constant_lr", None)
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = s["optimizer"] == "sgd" or parameter.ndim > 1
            groups.setdefault((decayed, name.split(".")[0] == constant), []).append(parameter)
    groups = [
        dict(params=params, constant=fixed, weight_decay=s["weight_decay"] * decayed)
        for (decayed, fixed), params in groups.items()
    ]
    kinds = {"sgd": torch.optim.SGD, "lars": Lars, "adamw": torch.optim.AdamW}
    return kinds[s["optimizer"]](groups, lr=s["peak_lr"], **({} if s["optimizer"] == "adamw" else {"momentum": 0.9}))


def _lr(step, s):
    """Linear warm-up, then half a cosine down to 0."""
    if step < s["warmup_steps"]:
        return s["peak_lr"] * (step + 1) / s["warmup_steps"]
    progress = (step - s["warmup_steps"]) / (s["steps"] - s["warmup_steps"])
    return s["peak_lr"] * (1 + math.cos(math.pi * progress)) / 2


def _open_folder(folder, s, start):
    folder.mkdir(parents=True, exist_ok=True)
    if start:
        runs.cut_metrics(folder, start)
    runs.write_json(folder / "config.json", {**s, "out": str(folder), "versions": runs.versions()})


def _batches(source, recipes, s, part, rank, world, start, accelerator):
    share = dict(part_size=part, rank=rank, world=world, seed=s["seed"])
    first, last = start * s["accumulate"], s["steps"] * s["accumulate"]
    if source.rows is None:
        batches = data.StreamBatches(source, recipes, **share, skip_bad=s["skip_bad_images"], start=first)
        workers = min(s["workers"], source.train.num_shards // world)
    else:
        batches = data.Batches(source, recipes, **share, batch_size=s["batch_size"])
        workers = s["workers"] if source.train.in_workers else 0
    return iter(data.loader(batches, first, last, workers, pin=accelerator.device.type == "cuda"))


# ---------------------------------------------------------------------------------------------------------------------
# In the loop.


def _objective(losses, sim_weight):
    """sim_weight x SIM + (1 - sim_weight) x BSIM; a part of weight 0 was never computed."""
    if losses.bsim is None:
        return losses.sim
    if losses.sim is None:
        return losses.bsim
    return sim_weight * losses.sim + (1 - sim_weight) * losses.bsim


def _add(window, **values):
    """Sums since the last log line, on the device: nothing waits for it between log lines."""
    for name, value in values.items():
        if value is not None:
            window[name] = window.get(name, 0.0) + value.detach().double()
    window["parts"] = window.get("parts", 0) + 1


def _line(accelerator, window, losses, done, s):
    """A line of metrics: means over the window, which is emptied, and over the processes."""
    parts = window.pop("parts")
    embeddings = F.normalize(losses.embeddings.detach().float(), dim=1)
    # The standard deviation of a unit vector's coordinate, times sqrt(D): 1 when spread (SimSiam, section 4.1).
    spread = embeddings.std(0).mean() * embeddings.shape[1] ** 0.5
    values = {"feature_std": spread.double(), **{k: v / parts for k, v in window.items()}}
    values = {k: float(accelerator.reduce(torch.as_tensor(v), reduction="mean")) for k, v in values.items()}
    window.clear()
    epoch = round(done / s["steps_per_epoch"], 3) if s["steps_per_epoch"] else None
    numbers = {k: values.get(k) for k in ("loss", "sim", "bsim")}
    return {"step": done, "epoch": epoch, **numbers, "lr": _lr(done - 1, s), "feature_std": values["feature_std"]}


def _pixel_features(images):
    """At most 32 x 32 pixels, as one row an image."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1) if images.shape[-1] > 32 else images.flatten(1)


@torch.no_grad()
def _features(accelerator, network, part, s):
    """Features and labels of (images, rows), in the same order on every process; each computes its share."""
    images, rows = part
    rank, world = accelerator.process_index, accelerator.num_processes
    padded = torch.cat([rows, rows[: -len(rows) % world]])
    clean = ViewRecipe(s["image_size"], scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
    found = []
    for batch in data.whole_images(images, padded[rank::world], s["image_size"], workers=s["workers"]):
        view = make_view(batch.to(accelerator.device), clean, generator=torch.Generator())
        with accelerator.autocast():
            found.append(network(view).float())
    found = accelerator.gather(torch.cat(found))
    found = found.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(rows)]
    return found, images.labels(rows).to(found.device)


def _knn(accelerator, source, s, network):
    """k-NN accuracy in per cent; pixels, which have no direction of their own, are centred first."""
    module = isinstance(network, nn.Module)
    if module:
        network.eval()
    bank, labels = _features(accelerator, network, source.bank, s)
    queries, truth = _features(accelerator, network, source.queries, s)
    if module:
        network.train()
    else:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    known, asked = labels >= 0, truth >= 0
    bank, labels, queries, truth = bank[known], labels[known], queries[asked], truth[asked]
    return float((knn_predict(queries, bank, labels, k=neighbours(labels)) == truth).float().mean() * 100)


def _summary(folder, s, knn, baselines, skipped):
    lines = [f"finished {folder} at step {s['steps']}"]
    if knn is not None:
        lines.append(f"  k-NN          {knn:.1f} %")
        lines.append(f"  raw pixels    {baselines['knn_pixels']:.1f} %")
        lines.append(f"  random net    {baselines['knn_random']:.1f} %")
    if skipped:
        lines.append(f"  skipped       {skipped} bad images")
    lines.append(f"  weights       {folder / 'backbone.safetensors'}  ({s['backbone']}, as timm names them)")
    lines.append(f"  look at       {folder / 'views.png'}, {folder / 'curves.png'}")
    other = 1 if s["sim_weight"] < 1 else 0
    words = f"--method {s['method']} --dataset {s['dataset']} --sim_weight {other}"
    lines.append(f"next: accelerate launch bsim.py {words}   ({'plain ' if other else 'BSIM with '}{s['method']})")
    return "\n".join(lines)
