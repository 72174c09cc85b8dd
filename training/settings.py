"""Settings: the flags checked, the ones left open filled in, and those of a run that is resumed."""

import math
import os
from importlib.util import find_spec
from pathlib import Path

import torch

import data
import flags
from flags import UserError, first_line, nearest, one_of
from methods import METHODS
from methods.networks import SMALL, backbone_names
from methods.networks import backbone as build_backbone
from training import dry_run
from training import folder as run_folder

OPTIMIZERS = ("sgd", "lars", "adamw")
LOOP = ("optimizer", "lr", "weight_decay", "warmup_epochs")  # of a method's defaults, those its network does not take
NETWORK = ("temperature", "momentum", "queue", "hidden_dim", "embedding_dim", "predictor_dim")
MAY_CHANGE = "epochs steps log_every eval_every checkpoint_every keep log_with workers out resume".split()


def read(given: dict, defaults: dict) -> tuple[dict, Path | None]:
    """The settings, checked as far as they can be without the data; and, where a run goes on, its folder."""
    s, folder = {**given, "given": {k: v for k, v in given.items() if v != defaults[k]}}, None
    if given["epochs"] is not None and given["steps"] is not None:
        raise UserError("--epochs and --steps: give one of them")
    if given["resume"] == "" or given["resume"] is True and given["out"] is None:
        raise UserError("--resume: name the run's folder, as in --resume runs/byol-digits-001")
    if given["resume"]:
        folder = Path(given["out"] if given["resume"] is True else given["resume"]).expanduser()
        if given["resume"] is True and (given["dry_run"] or not (folder / "config.json").exists()):
            folder = None  # --resume --out DIR: the same command starts a run and, after a kill, goes on with it
    if folder and given["dry_run"] is not None:
        raise UserError(
            f"--dry_run {given['dry_run']}: times a new run, and --resume goes on with {folder}; drop --resume"
        )
    if folder:
        if given["out"] is not None and Path(given["out"]).expanduser() != folder:
            raise UserError(f"--out {given['out']}: a run goes on in its own folder; drop --out, or drop --resume")
        s = _resumed(folder, {k: v for k, v in given.items() if v != defaults[k] or k in flags.given}, defaults)
    check(s)
    return s, folder


def _resumed(folder, changed, defaults):
    """The settings of the run in `folder`, with those of `changed` that may change."""
    config = run_folder.config_of(folder)
    moved = data.absolute(changed.pop("dataset", config["dataset"]))
    differ = [k for k, v in changed.items() if k not in MAY_CHANGE and config.get(k) != v]
    if differ:
        rows = "".join(f"\n  {k:<18} {config.get(k)!s:<18} {changed[k]}" for k in differ)
        raise UserError(
            f"--resume {folder}: goes on with that run's settings; drop these flags, or start another run"
            f"\n  {'flag':<18} {'the run has':<18} you gave{rows}"
        )
    s = {k: config.get(k, defaults.get(k)) for k in (*defaults, "given", "images", "fingerprint")}
    s |= {"dataset": moved, "moved": moved != config["dataset"]}
    s |= {k: v for k, v in changed.items() if k in MAY_CHANGE}
    if "epochs" in changed:
        s["steps"] = None
    elif "steps" in changed:
        s["epochs"] = None
    return s


def check(s: dict) -> None:
    """Raise UserError for the first setting that no data could make right."""
    one_of("method", s["method"], METHODS)
    one_of("mix", s["mix"], ("cutmix", "mixup", "either"))
    if s["optimizer"] is not None:
        one_of("optimizer", s["optimizer"], OPTIMIZERS)
    if s["batch_norm"] is not None:
        one_of("batch_norm", s["batch_norm"], ("sync", "shuffle", "local"))
        if s["batch_norm"] == "shuffle" and getattr(METHODS[s["method"]].Method, "batch_norm", "sync") != "shuffle":
            raise UserError(f"--batch_norm shuffle: only moco has keys to shuffle; {s['method']} takes sync or local")
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
        "0 or more": (lambda v: 0 <= v < math.inf, "weight_decay warmup_epochs workers eval_every"),
        "1 or more": (
            lambda v: v >= 1,
            "epochs steps batch_size accumulate queue hidden_dim embedding_dim predictor_dim log_every checkpoint_every"
            " keep max_pixels",
        ),
        "from 0 to 4294967295": (lambda v: 0 <= v < 2**32, "seed"),
        "8 or more": (lambda v: v >= 8, "image_size"),
        f"{dry_run.LEAST} or more": (lambda v: v >= dry_run.LEAST, "dry_run"),
    }
    flags.in_range(s, ranges)
    if s["streaming"] and s["steps"] is None:
        raise UserError("--streaming: the length of a stream is not known; say how long to train, as in --steps 10000")


def resolve(s: dict, source: data.Source, method_file, device: str, world: int):
    """Fill in every setting that was left open; build and return the backbone."""
    images = source.images
    if s["image_size"] is None:
        s["image_size"] = max(16, source.side) if source.side <= SMALL else 224
    if s["backbone"] is None:
        small = "resnet_tiny" if device == "cpu" else "resnet18"
        s["backbone"] = small if s["image_size"] <= SMALL else "resnet50"
    if s["batch_size"] is None:  # few images: smaller steps and more of them, which short runs gain by (README)
        few = images is not None and min(256, max(64, 2 ** int(math.log2(images / 64))))
        s["batch_size"] = max(2 * world * s["accumulate"], min(few or 256, images or 256))
        s["batch_size"] -= s["batch_size"] % (world * s["accumulate"])
    if s["batch_size"] % (world * s["accumulate"]) or s["batch_size"] < 2 * world * s["accumulate"]:
        parts = f"{world} processes x --accumulate {s['accumulate']}"
        raise UserError(f"--batch_size {s['batch_size']}: want a multiple of {parts}, with 2 images or more for each")
    if images is not None and s["batch_size"] > images:
        raise UserError(
            f"--batch_size {s['batch_size']}: the dataset has {images} images to train on; want at most that"
        )
    if s.get("images", images) != images:
        raise UserError(f"--resume: the dataset has {images} images now, and had {s['images']} when the run began")
    data.check_same(source, s["dataset"], s.get("fingerprint"), s.pop("moved", False))
    s |= {"images": images, "fingerprint": source.fingerprint}
    s["steps_per_epoch"] = images // s["batch_size"] if images else None
    if s["steps"] is None:
        s["epochs"] = s["epochs"] or 50
        s["steps"] = s["epochs"] * s["steps_per_epoch"]
    if s["dry_run"] and s["steps"] < dry_run.LEAST:
        raise UserError(f"--dry_run {s['dry_run']}: the run has {s['steps']} steps; want {dry_run.LEAST} or more")
    if s["eval_every"] is None:
        s["eval_every"] = max(1, s["steps"] // 10)
    if s["workers"] is None:
        s["workers"] = min(8, max(1, (os.cpu_count() or 1) // world))

    network = _network(s["backbone"], s["image_size"])
    scale = dict(image_size=s["image_size"], width=network.num_features, steps=s["steps"], images=images)
    defaults = method_file.defaults(**scale)
    for name in LOOP + NETWORK:
        if name not in defaults and s.get(name) is not None:
            raise UserError(f"--{name}: {s['method']} has none")
    s["of_method"] = list(defaults)
    for name, value in defaults.items():
        if s.get(name) is None:
            s[name] = value
    s["batch_norm"] = s["batch_norm"] or getattr(method_file.Method, "batch_norm", "sync")
    s["peak_lr"] = s["lr"] * s["batch_size"] / 256
    warmup = round(s["warmup_epochs"] * s["steps_per_epoch"]) if images else s["steps"] // 10 * (s["warmup_epochs"] > 0)
    s["warmup_steps"] = min(s["steps"] - 1, warmup)
    return network


def _network(name, size):
    """The backbone, after one image has gone through it: not every timm model takes every size."""
    try:
        network = build_backbone(name, size)
        with torch.no_grad():
            width = network.eval()(torch.zeros(1, 3, size, size)).shape[1:]
    except Exception as error:
        raise UserError(f"--backbone {name}: does not take images of {size} pixels ({first_line(error)})") from error
    if width != (network.num_features,):
        raise UserError(f"--backbone {name}: gives {list(width)} numbers an image, not {network.num_features} features")
    return network.train()


def recipes(s: dict, method_file):
    """The method's two recipes, with the crop and the flip that the flags or the data ask for."""
    recipes = method_file.views(s["image_size"])
    own = data.DIGITS if s["dataset"] == "digits" else dict(min_crop=recipes[0].scale[0], flip=recipes[0].flip)
    for name, value in own.items():
        s[name] = value if s[name] is None else s[name]
    return tuple(recipe._replace(scale=(s["min_crop"], 1.0), flip=s["flip"]) for recipe in recipes)
