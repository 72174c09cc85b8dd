"""A protocol as a command: the backbone and the labelled images are opened, and a line of results is left."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import data
import flags
from eval.results import check_writable, table, write_result
from eval.settings import Computing, Evaluation, Images, Weights
from flags import Given, UserError
from loading.files import counted
from training.devices import open_accelerator
from training.weights import Backbone, load_backbone

DATA = "subset split eval_split image_column label_column skip_bad_images max_pixels".split()


class Task(NamedTuple):
    """What a protocol is given: nothing in it is left open."""

    accelerator: Accelerator
    backbone: Backbone
    train: data.Labelled
    test: data.Labelled
    seed: int
    workers: int
    chosen: dict[str, Any]  # what the protocol chose itself, for the line of results

    @property
    def say(self):
        return self.accelerator.print


def protocol(settings: type[Evaluation]) -> Callable[[Callable[[Task, Any], dict]], Callable[..., dict]]:
    """Make function(task, s) -> metrics a command with the flags of `settings`, a table, and a line of results."""

    def made(function: Callable[[Task, Any], dict]) -> Callable[..., dict]:
        name = function.__name__

        def run(s: Evaluation, given: Given) -> dict:
            accelerator, workers = start(s)
            loaded = backbone_of(s, accelerator.print)
            check_writable(loaded.folder)
            images = images_of(s, loaded.config)
            way = data.way_of(loaded.config, images.pop("own"), s.pixel_range)
            opened = {k: v for k, v in images.items() if k != "dataset"} | {"way": way}
            opened |= dict(seed=loaded.config.get("seed", s.seed), remembered=not accelerator.is_local_main_process)
            with accelerator.local_main_process_first():  # it lists the folder, and fills the caches, for the others
                parts = data.open_labelled(images["dataset"], **opened)
            for line in (*parts[0].found, *data.changed(parts[0], images["dataset"], loaded.config)):
                accelerator.print(line)
            loaded.network.to(accelerator.device, memory_format=torch.channels_last).eval()
            task = Task(accelerator, loaded, *parts, seed=s.seed, workers=workers, chosen={})
            task.say(
                f"{name} of {s.run} ({loaded.name}, {loaded.image_size} pixels) on {images['dataset']}: "
                f"{len(parts[0].rows)} images to train on, {len(parts[1].rows)} to evaluate on, "
                f"{len(parts[0].names)} classes"
            )
            for of, part in (("training", parts[0]), ("evaluation", parts[1])):
                if part.images.bad and (of == "training" or part.images is not parts[0].images):
                    task.say(f"left out {counted(len(part.images.bad), 'image')} of the {of} split that cannot be read")
            metrics = function(task, s)
            resolved = {**dataclasses.asdict(s), **images, "workers": workers, "pixel_range": way.pixel_range}
            resolved |= {"backbone": loaded.name, "image_size": loaded.image_size, **task.chosen}
            finish(accelerator, loaded.folder, name, resolved, metrics)
            return metrics

        run.__name__, run.__doc__ = name, settings.__doc__
        return flags.command(settings)(run)

    return made


def start(s: Computing) -> tuple[Accelerator, int]:
    """An Accelerator, with torch's generator at the seed; and how many workers decode."""
    accelerator = open_accelerator(s.mixed_precision)
    set_seed(s.seed)
    return accelerator, min(8, os.cpu_count() or 1) if s.workers is None else s.workers


def backbone_of(s: Weights, say: Callable[[str], None]) -> Backbone:
    """What --run and --weights name; a line says what was taken from a file, or downloaded."""
    loaded = load_backbone(s.run, architecture=s.backbone, image_size=s.image_size, weights=s.weights)
    if loaded.found and not Path(s.run).expanduser().is_dir():
        say(loaded.found)
    return loaded


def images_of(s: Images, config: dict) -> dict[str, Any]:
    """The dataset and what is said of it; where it is the run's, the settings of the run fill in what is left open.

    "own": whether the images are those of the run, and are read as it read them.
    """
    found: dict[str, Any] = {k: getattr(s, k, None) for k in ("dataset", *DATA)}
    own = s.dataset is None
    if s.dataset is not None:
        same = bool(config) and data.absolute(s.dataset) == data.absolute(config.get("dataset", ""))
        own = same or data.is_moved(s.dataset, config)
    elif not config:
        raise UserError("--dataset: name the images to evaluate on; a run's own are known, those of a file are not")
    if own:  # the run's own images, as the run read them
        found |= {k: config.get(k) for k in found if found[k] is None}
        found["skip_bad_images"] = s.skip_bad_images or config.get("skip_bad_images", False)
    return found | {"own": own, "split": found["split"] or "train"}


def finish(accelerator: Accelerator, folder: Path, name: str, settings: dict, metrics: dict) -> None:
    """Print the one table, and append the line of results."""
    if accelerator.is_main_process:
        shown = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        wide = len(shown) > 5
        print(
            table([[*item] for item in shown.items()], [name, ""])
            if wide
            else table([[name, *shown.values()]], ["", *shown])
        )
        write_result(folder, name, settings["dataset"], settings, metrics)
        print(f"added to {folder / 'results.jsonl'}")
