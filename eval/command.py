"""A protocol's command line: the flags that all of them share, the table, the line of results."""

import inspect
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import data
import flags
from eval.results import table, write_result
from eval.weights import Backbone, load_backbone
from flags import UserError, one_of


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
    max_pixels: int | None = None,
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
      max_pixels: of an image; by itself the run's; one that claims more is a bad image
      workers: processes that decode large images; by itself up to 8
    The evaluation
      mixed_precision: no, fp16 or bf16
      seed: of what is drawn
    """


POSITIVE = {
    "a number above 0": (lambda v: 0 < v < math.inf, "temperature lr"),
    "0 or more": (lambda v: v >= 0, "weight_decay"),
}
DATA = "subset split eval_split image_column label_column skip_bad_images max_pixels".split()


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
        with accelerator.local_main_process_first():  # it lists the folder, and fills the caches, for the others
            more = dict(seed=loaded.config.get("seed", s["seed"]), remembered=not accelerator.is_local_main_process)
            parts = data.open_labelled(s["dataset"], **{k: s[k] for k in DATA}, **more)
        for line in (*parts[0].found, *data.changed(parts[0], s["dataset"], loaded.config)):
            accelerator.print(line)
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
        s |= {k: loaded.config.get(k) for k in ("dataset", *DATA) if s[k] is None or k == "dataset"}
    elif data.is_moved(s["dataset"], loaded.config):  # the run's own images: as the run read them
        s |= {k: loaded.config.get(k) for k in DATA if s[k] is None}
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
