"""The backbone that is evaluated: of a run, a checkpoint, a file, or a timm name for random weights."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flags import UserError, first_line, nearest, one_of
from methods import METHODS
from methods.networks import backbone, backbone_names
from training import folder as run_folder
from training.resolve import LOOP


class Backbone(NamedTuple):
    network: Any  # of timm: images [N, 3, image_size, image_size] to features [N, network.num_features]
    name: str
    image_size: int
    folder: Path  # where its results go
    config: dict  # the run's settings; of a timm name or a bare file none
    file: Path | None = None  # of the weights; None for random ones
    checkpoint: Path | None = None  # the folder, where the weights are a checkpoint's


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
    file, prefix, folder, checkpoint = path, "", path.parent, None
    if path.is_dir() and (path / "method.safetensors").exists():
        file, prefix, folder, checkpoint = path / "method.safetensors", "backbone.", path.parent.parent, path
    elif path.is_dir():
        file, folder = path / "backbone.safetensors", path
    config = run_folder.config_of(folder, "--run") if path.is_dir() or (folder / "config.json").exists() else {}
    config = config if "backbone" in config else {}  # else it is of something else, such as the config.json of the Hub
    if not file.exists():
        last = run_folder.last_checkpoint(path)
        usable = f"evaluate its last checkpoint: --run {last}" if last else "it has no checkpoint yet"
        raise UserError(f"--run {run}: is not finished; {usable}")
    weights = {k.removeprefix(prefix): v for k, v in _read(run, file).items() if k.startswith(prefix)}
    name, side = architecture or config.get("backbone"), image_size or config.get("image_size")
    if name is None or side is None:
        raise UserError(f"--run {run}: has no run's config.json beside it; say --backbone NAME and --image_size PIXELS")
    one_of("backbone", name, backbone_names())
    network = backbone(name, side)
    unfit = _unfit(weights, network.state_dict())
    if unfit:
        raise UserError(f"--run {run}: {unfit[0]} of its weights do not fit {name} at {side} pixels{unfit[1]}")
    network.load_state_dict(weights)
    return Backbone(network, name, side, folder, config, file, checkpoint)


def _read(run: str, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises UserError that says what another file is."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
        # A zip archive or a pickle. A safetensors file begins with any eight bytes, a length, but then with a brace.
        if start[8:] != b"{" and start.startswith((b"PK", b"\x80")):
            raise UserError(
                f"--run {run}: {file} is written by torch.save{_pickled(file)}; want a .safetensors file with the "
                "weights alone, as timm names them"
            )
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--run {run}: {file} is damaged ({first_line(error)})") from error


def _pickled(file: Path) -> str:
    """What a file of torch.save holds, as far as it can be read without running what is in it."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever is in it
        return " and cannot be read as weights"
    if not isinstance(found, dict):
        return f" and holds a {type(found).__name__}"
    for name, inner in [("", found), *found.items()]:
        tensors = [k for k, v in inner.items() if isinstance(v, torch.Tensor)] if isinstance(inner, dict) else []
        if tensors:
            return f" and holds {len(tensors)} tensors{f' in {name}' * bool(name)}, such as {tensors[0]}"
    return f" and holds {', '.join(map(str, list(found)[:5]))}"


def _unfit(weights: dict, wanted: dict) -> tuple[int, str] | None:
    """(how many of `weights` do not fit the `wanted` names and shapes, what the file has instead), or None."""
    wrong = [
        k for k in {**weights, **wanted} if k not in weights or k not in wanted or weights[k].shape != wanted[k].shape
    ]
    if not wrong:
        return None
    prefixes = _prefixes(weights, wanted)
    named = {k.removeprefix(prefixes[0]): v for k, v in weights.items() if k.startswith(prefixes[0])}
    others = [k for k in weights if not k.startswith(tuple(prefixes))]
    missing = [k for k in wanted if k not in named]
    more = [k for k in weights if k not in others and not any(k.removeprefix(p) in wanted for p in prefixes)]
    counters = [k for k in missing if k.endswith("num_batches_tracked")]
    shapes = [k for k in named if k in wanted and named[k].shape != wanted[k].shape]
    said = [f"their names begin with {' or '.join(prefixes)}"] if prefixes[0] else []
    said += [f"{len(others)} others, such as {others[0]}, do not"] if others else []
    if more and len(missing) == len(counters):
        said.append(f"there is a head, {' and '.join(sorted(more)[:2])}")
    if counters:
        said.append(f"{len(counters)} num_batches_tracked of batch norm are not there")
    if shapes:
        has, wants = (" x ".join(map(str, x[shapes[0]].shape)) or "a number" for x in (named, wanted))
        said.append(f"{shapes[0]} is {has}, want {wants}")
    if len(missing) > len(counters) or not said:
        return len(wrong), ", such as " + ", ".join(sorted(wrong)[:3])
    return len(wrong), ": " + "; ".join(said)


def _prefixes(weights: dict, wanted: dict) -> list[str]:
    """What stands before the wanted names in a file, as in module.encoder_q.: of several, those of most weights."""
    found = Counter({"": sum(k in wanted for k in weights)})
    for name in weights:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in wanted:
                found[".".join(parts[:i]) + "."] += 1
    most = max(found.values())
    return [""] if found[""] == most else sorted(k for k, count in found.items() if count == most)


def load_method(loaded: Backbone) -> Any:
    """The whole method, projector included, of the checkpoint that was loaded, else of the run's last one.

    Its backbone is that checkpoint's too, and a copy: `loaded.network` stays as it is. Raises UserError where the
    checkpoint is damaged.
    """
    config, checkpoint = loaded.config, loaded.checkpoint or run_folder.last_checkpoint(loaded.folder)
    if checkpoint is None:
        raise UserError(f"--run {loaded.folder}: has no checkpoint, which the projector would be in")
    file = checkpoint / "method.safetensors"
    weights = _read(str(loaded.folder), file)
    try:
        method_file = METHODS[config["method"]]
        scale = {"image_size": config["image_size"], "width": loaded.network.num_features}
        published = method_file.defaults(**scale, steps=config["steps"], images=config["images"])
        heads = {k: config[k] for k in published if k not in LOOP}
    except KeyError as error:
        raise UserError(f"--run {loaded.folder}: its config.json is damaged (it has no {first_line(error)})") from error
    method = method_file.Method(copy.deepcopy(loaded.network), **heads)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"--run {checkpoint}: {file} is damaged ({' '.join(str(error).split())[:160]})") from error
    return method


def has_weights_of(network: nn.Module, other: nn.Module) -> bool:
    """Whether the two have the same values in all parameters and buffers."""
    theirs = other.state_dict()
    return all(torch.equal(v.cpu(), theirs[k].cpu()) for k, v in network.state_dict().items())
