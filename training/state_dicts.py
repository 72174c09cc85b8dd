"""Weights in other people's files: read without running what is in them, unwrapped, and fitted to a network."""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flags import UserError, first_line
from methods.networks import backbone

WEB = (b"<!doctype", b"<html", b"<?xml", b'{"error')
COPIES = re.compile("encoder_k|momentum|target|student|ema")  # of two networks in a file, the one that is not taken
HEADS = ("head", "heads", "fc", "classifier")  # left out, with all that is no part of the backbone
COUNTER = "num_batches_tracked"  # of batch norm, which no evaluation uses


class Fitted(NamedTuple):
    network: Any
    loaded: int
    left_out: int
    missing: int  # counters of batch norm alone: another weight that is missing is refused
    prefix: str  # what stood before the names in the file


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def read(file: Path, said: str) -> dict[str, Tensor]:
    """Every tensor in a file of safetensors or torch.save, named by where it stands: teacher.backbone.conv1.weight.

    said: the flag and its value, for errors. Raises UserError that says what another file is.
    """
    try:
        with open(file, "rb") as opened:
            start = opened.read(512)
    except OSError as error:
        raise UserError(f"{said}: {file} cannot be read ({error.strerror})") from error
    if start.lstrip().lower().startswith(WEB):
        raise UserError(f"{said}: {file} is a web page, not weights; download the file that the page links to")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{said}: {file} is a Git LFS pointer, not weights; fetch the file: git lfs pull")
    # A safetensors file begins with any eight bytes, a length, but then with a brace.
    if start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")):
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{said}: {file} is damaged ({first_line(error)})") from error
    found = _flat(_unpickled(file, said))
    if not found:
        raise UserError(f"{said}: {file} holds no weights; want a state dict, as torch.save(model.state_dict()) writes")
    return found


def _unpickled(file, said):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocols
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        wants = re.search(r"(?:GLOBAL|global|type|class) (\w+\.[\w.]+)", str(error))
        if wants or "weights_only" in str(error) and "Unsupported" in str(error):
            what = f"{wants[1]}, which is no tensor" if wants else "code"
            raise UserError(
                f"{said}: {file} is a pickle that wants to load {what}, and is not opened, since that can run any "
                "code. Where you trust it, save its weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"{said}: {file} is damaged, or is no file of weights ({first_line(error)[:120]})") from error


def _flat(found, name="") -> dict[str, Tensor]:
    if isinstance(found, Tensor):
        return {name: found}
    if not isinstance(found, dict):
        return {}
    parts = (_flat(v, f"{name}.{k}" if name else str(k)) for k, v in found.items() if "optim" not in str(k))
    return {key: value for part in parts for key, value in part.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes.


def fitted(weights: dict[str, Tensor], name: str, image_size: int, said: str, prefix: str | None = None) -> Fitted:
    """The backbone `name` with `weights`, whose stem or patches it keeps; positions are resampled to `image_size`.

    prefix: what stands before the backbone's names; None: it is found. Raises UserError where a weight of the backbone
    is missing or has another shape.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn after this does not depend on it
            plain = backbone(name, image_size)
    except Exception as error:
        raise UserError(
            f"--backbone {name}: does not take images of {image_size} pixels ({first_line(error)})"
        ) from error
    wanted = plain.state_dict()
    if prefix is None:
        weights = _by_name(weights, wanted, [child for child, _ in plain.named_children()])
        prefix = _prefix(weights, wanted)
    named = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    network = backbone(name, image_size, {k: v.shape for k, v in named.items()})
    named = _as_timm_has_it(named, network)
    wanted = network.state_dict()
    tops = {k.partition(".")[0] for k in wanted}.difference(HEADS)
    surplus = [k for k in named if k not in wanted and k.partition(".")[0] in tops and not k.endswith(COUNTER)]
    missing = [k for k in wanted if k not in named]
    others = [k for k in wanted if k in named and named[k].shape != wanted[k].shape]
    wrong = [f"{k} is {_size(named[k])}, want {_size(wanted[k])}" for k in others]
    wrong += [f"{k} is missing" for k in missing if not k.endswith(COUNTER)]
    wrong += [f"{k} is not in {name}" for k in surplus]
    if wrong:
        listed = "; ".join([*wrong[:3], *([f"and {len(wrong) - 3:,} more"] if len(wrong) > 3 else [])])
        raise UserError(
            f"{said}: {len(wrong):,} of its weights do not fit {name} at {image_size} pixels: {listed}. "
            "Name the network that they are of: --backbone NAME, or its --image_size"
        )
    network.load_state_dict({k: v for k, v in named.items() if k in wanted}, strict=False)
    loaded = len(wanted) - len(missing)
    return Fitted(network, loaded, len(weights) - loaded, len(missing), prefix)


def refuse_not_finite(network: nn.Module, said: str) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    bad = [k for k, v in network.state_dict().items() if not v.isfinite().all()]
    if bad:
        raise UserError(f"{said}: {len(bad):,} of its tensors hold NaN or infinity, such as {bad[0]}")


def _size(tensor):
    return " x ".join(map(str, tensor.shape)) or "a number"


def _prefix(weights: dict, wanted: dict) -> str:
    """What stands before the wanted names in a file, as in module.encoder_q.: that of most weights.

    Of a network and its slow copy the network is taken, of a student and a teacher the teacher.
    """
    found = Counter({"": sum(k in wanted for k in weights)})
    for name in weights:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in wanted:
                found[".".join(parts[:i]) + "."] += 1
    return max(found, key=lambda prefix: (found[prefix], not COPIES.search(prefix), -len(prefix)))


def _by_name(weights: dict, wanted: dict, children: list[str]) -> dict:
    """With names in the place of the numbers of nn.Sequential(*network.children()), as in lightly's examples."""
    found = {}
    for key, value in weights.items():
        parts = key.split(".")
        for i, part in enumerate(parts):
            child = children[int(part)] if part.isdecimal() and int(part) < len(children) else ""
            if child and ".".join([child, *parts[i + 1 :]]) in wanted:
                key = ".".join([*parts[:i], child, *parts[i + 1 :]])
                break
        found[key] = value

    def most(names):
        prefix = _prefix(names, wanted)
        return sum(k.removeprefix(prefix) in wanted for k in names if k.startswith(prefix))

    return found if len(found) == len(weights) and most(found) > most(weights) else weights


def _as_timm_has_it(named: dict, network: nn.Module) -> dict:
    """What timm makes of weights when it loads them: other names become its own, positions are resampled."""
    made = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return made(dict(named), network) if made else named
    except Exception:  # of weights of another network, which are refused by name
        return named
