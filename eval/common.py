"""What the protocols share: a backbone, labelled images and their features, a command line, a line of results."""

import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import batches
import data
import flags
import runs
from bsim import ViewRecipe, make_view
from flags import UserError, first_line, nearest, one_of
from methods import METHODS
from methods.networks import backbone, backbone_names
from settings import LOOP

# ---------------------------------------------------------------------------------------------------------------------
# A backbone.


class Backbone(NamedTuple):
    network: nn.Module  # images [N, 3, image_size, image_size] to features [N, network.num_features]
    name: str
    image_size: int
    folder: Path  # where its results go
    config: dict  # the run's settings; of a timm name or a bare file none


def load_backbone(run: str, *, architecture: str | None = None, image_size: int | None = None) -> Backbone:
    """The backbone of a finished run (its folder), of a checkpoint (its folder), of a file, or a timm model's name.

    A timm name gets random weights, from torch's generator. A file's architecture is that of the config.json beside it,
    else `architecture`. Raises UserError where a run is not finished, or where the weights do not fit.
    """
    if not run:
        raise UserError("--run: want a run's folder, a backbone.safetensors, or a timm name for random weights")
    path = Path(run).expanduser()
    if not path.exists():
        if path.parent != Path() or run not in backbone_names():
            raise UserError(f"--run {run}: no such folder or file, and no timm model{nearest(run, backbone_names())}")
        size = image_size or (32 if run == "resnet_tiny" else 224)
        return Backbone(backbone(run, size), run, size, Path(), {})
    file, prefix, folder = path, "", path.parent
    if path.is_dir() and (path / "method.safetensors").exists():  # a checkpoint
        file, prefix, folder = path / "method.safetensors", "backbone.", path.parent.parent
    elif path.is_dir():
        file, folder = path / "backbone.safetensors", path
    config = runs.config_of(folder, "--run") if path.is_dir() or (folder / "config.json").exists() else {}
    if not file.exists():
        last = runs.last_checkpoint(path)
        usable = f"evaluate its last checkpoint: --run {last}" if last else "it has no checkpoint yet"
        raise UserError(f"--run {run}: is not finished; {usable}")
    name, size = architecture or config.get("backbone"), image_size or config.get("image_size")
    if name is None or size is None:
        raise UserError(f"--run {run}: has no config.json beside it; say --backbone NAME and --image_size PIXELS")
    one_of("backbone", name, backbone_names())
    network = backbone(name, size)
    try:
        weights = {k[len(prefix) :]: v for k, v in load_file(file).items() if k.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--run {run}: {file} is damaged ({first_line(error)})") from error
    wanted = network.state_dict()
    wrong = [
        k for k in {**weights, **wanted} if k not in weights or k not in wanted or weights[k].shape != wanted[k].shape
    ]
    if wrong:
        raise UserError(
            f"--run {run}: {len(wrong)} of its weights do not fit {name} at {size} pixels, such as "
            + ", ".join(sorted(wrong)[:3])
        )
    network.load_state_dict(weights)
    return Backbone(network, name, size, folder, config)


def load_method(loaded: Backbone) -> nn.Module:
    """The whole method of the run's last checkpoint, projector included, around the backbone."""
    config = loaded.config
    heads = {k: config[k] for k in config["of_method"] if k not in LOOP}
    method = METHODS[config["method"]].Method(loaded.network, **heads)
    method.load_state_dict(load_file(runs.last_checkpoint(loaded.folder) / "method.safetensors"))
    return method


# ---------------------------------------------------------------------------------------------------------------------
# Features.


@torch.no_grad()
def features(accelerator, network, part, *, image_size, workers=0):
    """Features and labels (-1: none, or a bad image) of (images, rows) on every process; each computes its share."""
    images, rows = part
    rank, world = accelerator.process_index, accelerator.num_processes
    padded = rows[torch.arange(-(-len(rows) // world) * world) % len(rows)]
    clean = ViewRecipe(image_size, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
    found, readable = [], []
    for batch, good in batches.whole_images(images, padded[rank::world], image_size, workers=workers):
        view = make_view(batch.to(accelerator.device), clean, generator=torch.Generator())
        with accelerator.autocast():
            found.append(network(view).float())
        readable.append(good.to(accelerator.device))

    def everyones(parts):
        return accelerator.gather(torch.cat(parts)).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(rows)]

    labels = images.labels(rows).to(accelerator.device)
    return everyones(found), labels.masked_fill(~everyones(readable), -1)


def labelled_features(task, part: data.Labelled, network=None):
    """(features [N, D], classes [N]) of all readable images of `part`, on every process."""
    network = network or task.backbone.network.eval()
    found, known = features(
        task.accelerator, network, part[:2], image_size=task.backbone.image_size, workers=task.settings["workers"]
    )
    good = known >= 0
    return found[good], part.labels.to(found.device)[good]


def topk_accuracy(scores, labels) -> dict:
    """{"top1", "top5"} in per cent of scores [N, C] for labels [N]; no top5 for five classes or fewer."""
    ranks = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    found = {"top1": float(ranks[:, :1].any(1).float().mean() * 100)}
    return found | ({"top5": float(ranks.any(1).float().mean() * 100)} if scores.shape[1] > 5 else {})


# ---------------------------------------------------------------------------------------------------------------------
# Results.


def write_result(folder: Path, protocol: str, dataset: str, settings: dict, metrics: dict) -> None:
    """Append a line to `folder`/results.jsonl; what stands there stays as it is."""
    line = {"protocol": protocol, "dataset": dataset, "settings": settings, "metrics": metrics}
    line |= {"seed": settings.get("seed"), "versions": runs.versions()}
    path = folder / "results.jsonl"
    half = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a") as file:
        file.write("\n" * half + json.dumps(line) + "\n")


def read_results(folder: Path) -> list[dict]:
    """The lines of `folder`/results.jsonl. One that a kill or a full disk cut off is named and left out."""
    path, found = folder / "results.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            print(f"{path}: line {number} was cut off and is left out", file=sys.stderr)
    return found


def table(rows: list[list], head: list[str]) -> str:
    """A Markdown table; numbers with two digits."""
    words = [head] + [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in words) for i in range(len(head))]
    lines = ["| " + " | ".join(word.ljust(width) for word, width in zip(row, widths)) + " |" for row in words]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# A protocol's command line.


class Task(NamedTuple):
    accelerator: Accelerator
    backbone: Backbone
    train: data.Labelled
    test: data.Labelled
    settings: dict  # every flag, resolved; a protocol adds what it chose

    @property
    def say(self):
        return self.accelerator.print


def opened(
    run: str = "",
    dataset: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad_images: bool = False,
    workers: int | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    mixed_precision: str | None = None,
    seed: int = 0,
):
    """
    The backbone
      run: a run's folder, a checkpoint's folder, a backbone.safetensors, or a timm name
        for random weights
      backbone: the architecture, for a file without its config.json
      image_size: by itself the run's
    The images
      dataset: as in pretraining; by itself the run's
      subset: the Hub dataset's configuration
      split: what to learn from; by itself the run's
      eval_split: what to be judged by; by itself validation or test, else a held-out tenth
      image_column: where several columns hold images
      label_column: where several hold classes
      skip_bad_images: leave out images that cannot be read
      workers: processes that decode large images; by itself up to 8
    The evaluation
      mixed_precision: no, fp16 or bf16
      seed: of what is drawn
    """


POSITIVE = {
    "a number above 0": (lambda v: 0 < v < math.inf, "temperature lr"),
    "0 or more": (lambda v: v >= 0, "weight_decay"),
}
DATA = "subset split eval_split image_column label_column skip_bad_images".split()


def protocol(check):
    """Make `function(task, *, its own flags) -> metrics` a command: `opened`'s flags and its own, a table, a line.

    check(settings) raises UserError for its own flags, before anything is loaded. The function's docstring lists them
    as `pretrain`'s does.
    """
    return lambda function: _command(function, check)


def _command(function, check):
    own = {k: p for k, p in inspect.signature(function).parameters.items() if k != "task"}
    common = inspect.signature(opened).parameters
    name = function.__name__

    def command(**given):
        s = {k: p.default for k, p in {**common, **own}.items()} | given
        check(s)
        accelerator = start(s)
        loaded = _backbone_of(s)
        parts = data.open_labelled(s["dataset"], **{k: s[k] for k in DATA}, seed=loaded.config.get("seed", s["seed"]))
        loaded.network.to(accelerator.device, memory_format=torch.channels_last).eval()
        task = Task(accelerator, loaded, *parts, s)
        task.say(
            f"{name} of {s['run']} ({loaded.name}, {loaded.image_size} pixels) on {s['dataset']}: "
            f"{len(parts[0].rows)} images to learn from, {len(parts[1].rows)} to be judged by, "
            f"{len(parts[0].names)} classes"
        )
        metrics = function(task, **{k: s[k] for k in own})
        finish(accelerator, loaded.folder, name, s, metrics)
        return metrics

    command.__signature__ = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*common.values(), *own.values())]
    )
    command.__annotations__ = {**inspect.get_annotations(opened), **inspect.get_annotations(function)}
    for key in ("task", "return"):
        command.__annotations__.pop(key, None)
    command.__name__ = name
    command.__doc__ = inspect.cleandoc(function.__doc__) + "\n" + inspect.cleandoc(opened.__doc__)
    return command


def start(s: dict) -> Accelerator:
    """Check what any evaluation has; an Accelerator, with torch's generator at the seed."""
    if s["mixed_precision"] is not None:
        one_of("mixed_precision", s["mixed_precision"], ("no", "fp16", "bf16"))
    if s["workers"] is None:
        s["workers"] = min(8, os.cpu_count() or 1)
    flags.in_range(s, {"from 0 to 4294967295": (lambda v: 0 <= v < 2**32, "seed workers")})
    flags.in_range(s, {"8 or more": (lambda v: v >= 8, "image_size")})
    try:
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=s["mixed_precision"])
    except ValueError as error:
        raise UserError(f"--mixed_precision {s['mixed_precision']}: {error}") from None
    set_seed(s["seed"])
    return accelerator


def _backbone_of(s):
    """The backbone that `s` asks for; of the data that `s` leaves open the run's settings are filled in."""
    loaded = load_backbone(s["run"], architecture=s["backbone"], image_size=s["image_size"])
    s |= {"backbone": loaded.name, "image_size": loaded.image_size}
    if s["dataset"] is None:
        if not loaded.config:
            raise UserError("--dataset: name the images to evaluate on; a run's own are known, those of a file are not")
        s |= {k: loaded.config[k] for k in ("dataset", *DATA) if s[k] is None or k == "dataset"}
    s["split"] = s["split"] or "train"
    return loaded


def finish(accelerator, folder: Path, name: str, settings: dict, metrics: dict) -> None:
    """Print the one table, and append the line of results."""
    if accelerator.is_main_process:
        shown = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        wide = len(shown) > 5
        print(table(list(shown.items()), [name, ""]) if wide else table([[name, *shown.values()]], ["", *shown]))
        write_result(folder, name, settings["dataset"], settings, metrics)
        print(f"added to {folder / 'results.jsonl'}")


def launch(function) -> None:
    flags.launch(function, f"eval.{function.__name__}")
