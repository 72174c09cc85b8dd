"""From what a user asked for to the settings of a run: what was left open is filled in, a resumed run keeps its own."""

import dataclasses
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

import data
import flags
from bsim import ViewRecipe
from flags import Given, UserError, defaults_of, first_line, flags_of, interval
from loading import channels
from loading.pixels import text
from methods.networks import SMALL_STEM
from methods.networks import backbone as build_backbone
from training import folder as run_folder
from training import state_dicts
from training.settings import DRY_RUN, MIXTURES, Pretraining
from training.weights import Backbone, load_backbone

LOOP = ("optimizer", "lr", "weight_decay", "warmup_epochs")  # of a method's defaults, those its network does not take
FROM_WEIGHTS = 0.1  # of a method's learning rate, where a run begins from weights: docs/weights.md
HEADS = ("temperature", "momentum", "queue", "hidden_dim", "embedding_dim", "predictor_dim")
COLOURS = ("brightness", "contrast", "saturation", "hue")  # strengths; --jitter is the share of views
VIEWS = "brightness contrast saturation hue jitter grayscale blur solarize vertical_flip rotate90".split()
ON_RESUME = [field.name for field in flags_of(Pretraining) if field.metadata["on_resume"]]


class Began(NamedTuple):
    """The data that a resumed run began with."""

    images: int | None
    fingerprint: str | None
    moved: bool  # whether it is named anew
    way: data.Way  # how it is read
    given: dict[str, Any]  # the flags that the run was started with
    normal: dict[str, Any] | None  # what was asked of mean and std
    held_out: bool  # whether images without labels were
    shapes: dict[str, torch.Size] | None  # of its backbone's weights, where it has a checkpoint


@dataclass(frozen=True, kw_only=True)
class Run(Pretraining):
    """The settings of a run: nothing is left open, and what follows from the data stands beside them."""

    workers: int
    backbone: str
    image_size: int
    mix_until: float
    min_crop: float
    flip: float
    mean: str  # three numbers
    std: str
    brightness: str
    contrast: str
    saturation: str
    hue: str
    jitter: str
    grayscale: str
    blur: str
    solarize: str
    vertical_flip: str
    rotate90: str
    steps: int
    batch_size: int
    mixed_precision: str
    optimizer: str
    lr: float
    weight_decay: float
    warmup_epochs: float
    batch_norm: str
    eval_every: int
    heads: dict[str, Any]  # what the method's network takes: the flags of HEADS that it has, and what only it knows
    given: dict[str, Any]  # the flags that were typed
    normal: dict[str, str | None]  # what was asked of mean and std
    images: int | None  # to train on; None for a stream
    held_out: bool  # whether images without labels are measured in the place of trained on
    fingerprint: str | None  # of the relative names and sizes of local data
    small_images: bool  # whether images are decoded once and made image_shape; the others when they are asked for
    image_shape: tuple[int, int] | None
    steps_per_epoch: int | None
    peak_lr: float
    warmup_steps: int

    def __post_init__(self) -> None:
        """Everything was checked when it was asked for."""

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["pixel_range"] = interval(self.pixel_range)
        found |= {"mean": flags.channels(self.mean), "std": flags.channels(self.std)}
        return found | found.pop("heads")


def read(asked: Pretraining, given: Given) -> tuple[Pretraining, Path | None, Began | None]:
    """The settings, checked as far as they can be without the data; of a resumed run its folder and data too."""
    init = Path(asked.init).expanduser() if asked.init else None
    views: dict[str, Any] = {name: _both(getattr(asked, name)) for name in VIEWS}
    asked = dataclasses.replace(
        asked,
        dataset=data.absolute(asked.dataset),
        pixel_range=text(asked.pixel_range),
        **views,
        init=os.path.abspath(init) if init and init.exists() else asked.init,
    )
    if not asked.resume:
        return asked, None, None
    folder = Path(str(asked.out if asked.resume is True else asked.resume)).expanduser()
    if asked.resume is True and (asked.dry_run or not (folder / "config.json").exists()):
        return asked, None, None  # --resume --out FOLDER: the same command starts a run and, after a kill, resumes it
    if asked.init is not None and asked.resume is not True:
        raise UserError(f"--init {asked.init}: a resumed run continues from its own weights; drop --init, or --resume")
    if asked.dry_run is not None:
        raise UserError(f"--dry_run {asked.dry_run}: times a new run, and --resume resumes {folder}; drop --resume")
    if asked.out is not None and Path(asked.out).expanduser() != folder:
        raise UserError(f"--out {asked.out}: a run is resumed in its own folder; drop --out, or drop --resume")
    config, defaults = run_folder.config_of(folder), defaults_of(Pretraining)
    if not {"method", "dataset", "steps"} <= config.keys():
        raise UserError(f"--resume {folder}: its config.json has no method or no dataset, so it is no run of bsim.py")
    config["pixel_range"] = text(config.get("pixel_range"))
    said = flags.said(asked, given)
    dataset = said.pop("dataset", config["dataset"])  # data that moved is named anew, and compared when it is open
    had = config | config.get("normal", {})
    differ = [k for k, v in said.items() if k not in ON_RESUME and had.get(k) != v]
    if differ:
        rows = "".join(f"\n  {k:<18} {had.get(k)!s:<18} {said[k]}" for k in differ)
        raise UserError(
            f"--resume {folder}: keeps the settings of that run; drop these flags, or start another run"
            f"\n  {'flag':<18} {'the run has':<18} you gave{rows}"
        )
    merged = {k: config.get(k, default) for k, default in defaults.items()}
    merged |= {k: v for k, v in said.items() if k in ON_RESUME}
    merged |= {k: ",".join(map(str, config[k])) for k in ("mean", "std") if config.get(k)}
    merged |= {"dataset": dataset, "mix_until": config.get("mix_until", 1.0)}
    merged["epochs" if "steps" in said or merged["epochs"] is None else "steps"] = None  # the other one follows from it
    moved = dataset != data.absolute(config["dataset"])
    began = Began(
        config.get("images"),
        config.get("fingerprint"),
        moved,
        data.way_of(config),
        config.get("given", {}),
        config.get("normal"),
        config.get("held_out", False),
        run_folder.backbone_shapes(folder),
    )
    return Pretraining(**merged), folder, began


def resolve(
    asked: Pretraining,
    given: Given,
    source: data.Source,
    method_file: ModuleType,
    *,
    device: str,
    world: int,
    mixed_precision: str,
    began: Began | None = None,
) -> tuple[Run, nn.Module, list[str]]:
    """Fill in every setting that was left open; build the backbone. Returns lines on what was loaded or measured too.

    began: the data that a resumed run began with. Raises UserError where settings and data do not fit.
    """
    size = asked.image_size or (max(16, source.side) if source.side <= SMALL_STEM else 224)
    batch_size = _batch_size(asked, source.images, world)
    if began is not None and began.images not in (None, source.images):
        raise UserError(
            f"--resume: the dataset has {source.images} images now, and had {began.images} when the run began"
        )
    if began is not None:
        data.check_same(source, asked.dataset, began.fingerprint, began.moved)
    each = source.images // batch_size if source.images else None
    epochs = asked.epochs if asked.steps else asked.epochs or 50
    steps = asked.steps or (epochs or 0) * (each or 0)
    if not steps:
        raise UserError(f"--epochs {epochs}: the length of a stream is not known; say --steps")
    if asked.dry_run and steps < DRY_RUN:
        raise UserError(f"--dry_run {asked.dry_run}: the run has {steps} steps; want {DRY_RUN} or more")

    network, backbone, loaded = _network(asked, size, device, began)
    scale = {"image_size": size, "width": network.num_features, "steps": steps, "images": source.images}
    published = method_defaults(method_file, network, **scale)
    for name in LOOP + HEADS:
        if name not in published and getattr(asked, name) is not None:
            raise UserError(f"--{name}: {asked.method} has none")
    own = {k: v if (said := getattr(asked, k, None)) is None else said for k, v in published.items()}
    loop = {name: own.pop(name) for name in LOOP}
    if asked.init is not None and asked.lr is None:
        loop["lr"] *= FROM_WEIGHTS
    warmup = round(loop["warmup_epochs"] * each) if each else steps // 10 * (loop["warmup_epochs"] > 0)
    recipes = method_file.views(size)
    crop = data.DIGITS if asked.dataset == "digits" else {"min_crop": recipes[0].scale[0], "flip": recipes[0].flip}
    normal, lines = _normal(asked, source, loaded)
    lines += _unused(asked, given, stream=each is None)
    filled = dict(
        pixel_range=text(source.way.pixel_range),
        mix_until=_mix_until(asked, given, method_file),
        workers=min(8, max(1, (os.cpu_count() or 1) // world)) if asked.workers is None else asked.workers,
        backbone=backbone,
        image_size=size,
        min_crop=crop["min_crop"] if asked.min_crop is None else asked.min_crop,
        flip=crop["flip"] if asked.flip is None else asked.flip,
        **{k: getattr(asked, k) or _both([getattr(recipe, k) for recipe in recipes]) for k in VIEWS},
        **normal,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        **loop,
        batch_norm=asked.batch_norm or getattr(method_file.Method, "batch_norm", "sync"),
        eval_every=max(1, steps // 10) if asked.eval_every is None else asked.eval_every,
    )
    typed = {k: v for k, v in given.typed.items() if v != defaults_of(Pretraining)[k]}
    derived = dict(
        heads=own,
        given=(began.given if began else {}) | typed,
        normal=(began.normal if began else None) or {"mean": asked.mean, "std": asked.std},
        images=source.images,
        held_out=source.held_out is not None,
        fingerprint=source.fingerprint,
        small_images=source.way.small,
        image_shape=source.way.shape,
        steps_per_epoch=each,
        peak_lr=loop["lr"] * batch_size / 256,
        warmup_steps=min(steps - 1, warmup),
    )
    return Run(**{**vars(asked), **filled, **derived}), network, [*([loaded.found] if loaded else []), *lines]


def _mix_until(asked, given, method_file):
    if asked.mix_until not in (None, 1) and asked.sim_weight == 1:
        if "mix_until" in given.typed:
            raise UserError(f"--mix_until {asked.mix_until:g}: the plain method, --sim_weight 1, has no mixtures")
        return 1.0  # a recipe's, of which the plain method is run
    usual = getattr(method_file.Method, "mix_until", 1.0) if asked.sim_weight == 0 else 1.0
    return usual if asked.mix_until is None else asked.mix_until


def _unused(asked: Pretraining, given: Given, stream: bool) -> list[str]:
    """A line on flags that were given and have no effect beside the others."""
    usual = {**defaults_of(Pretraining), "mix_until": 1}
    unlike = {k for k in given.typed | given.recipe if getattr(asked, k) != usual[k]}

    def listed(names):
        return ", ".join(f"--{k} {getattr(asked, k)}" for k in names if k in unlike)

    lines = []
    if asked.sim_weight == 1 and (said := listed(MIXTURES)):
        lines.append(f"note: {said}: not used, as the plain method, --sim_weight 1, has no mixtures")
    if asked.jitter is not None and not any(flags.one_or_two(asked.jitter) or ()) and (said := listed(COLOURS)):
        lines.append(f"note: {said}: not used, as --jitter {asked.jitter} changes the colours of no view")
    if stream and "warmup_epochs" in unlike and asked.warmup_epochs:
        lines.append(f"note: --warmup_epochs {asked.warmup_epochs:g}: the warm-up of a stream is a tenth of the steps")
    return lines


def method_defaults(method_file: ModuleType, network: Any, **scale: Any) -> dict[str, Any]:
    """The defaults of a method; one that asks for it is shown the backbone, as MoCo v3's differ for a transformer."""
    if "network" in inspect.signature(method_file.defaults).parameters:
        scale["network"] = network
    return method_file.defaults(**scale)


def _batch_size(asked, images, world):
    parts = world * asked.accumulate
    size = asked.batch_size
    if size is None:  # few images: smaller steps and more of them, which short runs gain by (docs/study.md)
        few = 256 if images is None else min(256, max(64, 2 ** int(math.log2(images / 64))))
        size = max(2 * parts, min(few, images or 256))
        size -= size % parts
    if size % parts or size < 2 * parts:
        said = f"{world} processes x --accumulate {asked.accumulate}"
        raise UserError(f"--batch_size {size}: want a multiple of {said}, with 2 images or more for each")
    if images is not None and size > images:
        raise UserError(f"--batch_size {size}: the dataset has {images} images to train on; want at most that")
    return size


def _network(asked: Pretraining, size: int, device: str, began: Began | None) -> tuple[nn.Module, str, Backbone | None]:
    """The backbone, its name, and what --init loaded; one image has gone through it, as not all take every size."""
    small = "resnet_tiny" if device == "cpu" else "resnet18"
    name, loaded = asked.backbone or (small if size <= SMALL_STEM else "resnet50"), None
    shapes = began.shapes if began else None
    if asked.init is not None and shapes is None:  # else the checkpoint has weights of its own
        loaded = load_backbone(
            asked.init, architecture=asked.backbone, image_size=size, flag="--init", may_be_random=False
        )
        name = loaded.name
        state_dicts.refuse_not_finite(loaded.network, f"--init {asked.init}")
    try:
        network = loaded.network if loaded else build_backbone(name, size, shapes)
        with torch.no_grad():
            width = network.eval()(torch.zeros(1, 3, size, size)).shape[1:]
    except Exception as error:
        raise UserError(f"--backbone {name}: does not take images of {size} pixels ({first_line(error)})") from error
    if width != (network.num_features,):
        raise UserError(f"--backbone {name}: gives {list(width)} numbers an image, not {network.num_features} features")
    return network.train(), name, loaded


def _normal(asked: Pretraining, source: data.Source, loaded: Backbone | None) -> tuple[dict[str, str], list[str]]:
    """({"mean": three numbers, "std": three numbers} of the images' channels, a line where they were measured)."""
    usual, found, lines = ViewRecipe(), {}, []
    words = {"mean": asked.mean, "std": asked.std}
    if "data" in words.values():
        measured, count = channels.measured(source.train, source.rows, source.side)
        lines.append(
            f"mean {_three(measured['mean'])}, standard deviation {_three(measured['std'])}, measured on {count:,} "
            "images of the training set"
        )
    for name, word in words.items():
        values = flags.channels(word) or getattr(usual if word or not loaded else loaded, name)
        found[name] = ",".join(map(str, measured[name] if word == "data" else values))
    return found, lines


def _three(values):
    return ", ".join(f"{value:.3f}" for value in values)


def _both(values: Any) -> str | None:
    """A number for both views, or one for each, as text: 0.1 or 0.1,0.2."""
    if values is None:
        return None
    return ",".join(f"{value:g}" for value in dict.fromkeys(flags.one_or_two(values) or ()))


def view_recipes(config: Mapping[str, Any], recipes: tuple[ViewRecipe, ...]) -> tuple[ViewRecipe, ...]:
    """The method's view recipes with what the settings of a run say; a run of before has not all of them."""
    said = {k: flags.one_or_two(config[k]) or () for k in VIEWS if config.get(k) is not None}
    normal: dict[str, Any] = {k: flags.channels(config[k]) for k in ("mean", "std") if config.get(k) is not None}
    normal |= {"scale": (config["min_crop"], 1.0), "flip": config["flip"]}
    each: Iterator[Any] = ({k: values[i % len(values)] for k, values in said.items()} for i in range(len(recipes)))
    return tuple(recipe._replace(**normal, **own) for recipe, own in zip(recipes, each))
