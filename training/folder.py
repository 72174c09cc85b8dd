"""The run folder: its name, its files, its checkpoints. Whatever is written is complete or absent."""

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from flags import RunError, UserError, first_line

FORMAT = 2  # of a checkpoint; raised when an older one could no longer be read
PACKAGES = "torch torchvision timm accelerate datasets einops fire numpy pillow safetensors scikit-learn".split()
PACKAGES += ["faster-coco-eval"]


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or whatever else keeps `path` from being written, becomes a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        folder, reason = path.parent, error.strerror or first_line(error)
        again = "or name a folder on another disk: --out FOLDER"
        if (folder / "backbone.safetensors").exists():
            again = "then repeat the command"
        elif (folder / "config.json").exists():
            again = f"then --resume {folder}"
        raise RunError(f"{path} cannot be written ({reason}); make room in {folder}, {again}") from error


def write(path: Path, save) -> None:
    """Call save(file beside path), then rename it to `path`: a reader never sees half a file.

    Raises RunError where it cannot be written; what was there before is then still there.
    """
    aside = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            save(aside)
            _flush(aside)
            aside.replace(path)
        except BaseException:
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
            raise


def append(path: Path, line: str) -> None:
    """Add a line to `path`. Raises RunError where it cannot be written; the file is then what it was."""
    with writing(path):
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise


def write_json(path: Path, value) -> None:
    write(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def choose(out: str | None, method: str, dataset: str) -> Path:
    """The folder of a new run: `out`, or the first free runs/METHOD-DATASET-NUMBER. Refuses one that is in use."""
    if out is None:
        _check_place(Path("runs"), "runs")
        word = re.sub(r"[^\w-]+", "-", Path(dataset).stem).strip("-").lower() or "data"
        numbers = (path.name.rpartition("-")[2] for path in Path("runs").glob(f"{method}-{word}-*"))
        taken = [int(number) for number in numbers if number.isdecimal()]
        return Path("runs") / f"{method}-{word}-{max(taken, default=0) + 1:03d}"
    folder = Path(out).expanduser()
    _check_place(folder, f"--out {out}")
    if (folder / "backbone.safetensors").exists():
        raise UserError(
            f"--out {out}: holds a finished run; write to another folder, or train it longer: --resume {out} --epochs N"
        )
    if (folder / "config.json").exists():
        raise UserError(f"--out {out}: holds an unfinished run; resume it: --resume {out}, or write elsewhere")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out}: is not empty and no run; name a folder that does not exist yet")
    return folder


def _check_place(folder, said):
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"{said}: {place} is a file; name a folder that does not exist yet")
    if not os.access(place, os.W_OK):
        raise UserError(f"{said}: {place} may not be written to; name another folder with --out")


def create(out: str | None, method: str, dataset: str) -> Path:
    """Make the folder of a new run. Two runs that start at once never get the same."""
    while True:
        folder = choose(out, method, dataset)
        with writing(folder):
            try:
                folder.mkdir(parents=True, exist_ok=out is not None)
                return folder
            except FileExistsError:  # another run was quicker
                continue


def config_of(folder: Path, flag: str = "--resume") -> dict:
    """The settings of the run in `folder`, which `flag` names."""
    if not (folder / "config.json").exists():
        raise UserError(f"{flag} {folder}: no run there (it has no config.json)")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{flag} {folder}: its config.json is damaged ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{flag} {folder}: its config.json is damaged (want an object of settings)")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: a line of JSON a log step.


def append_metrics(folder: Path, line: dict) -> None:
    append(folder / "metrics.jsonl", json_line(line, folder / "metrics.jsonl"))


def json_line(line: dict, path: Path) -> str:
    """`line` as a line for the file at `path`. Raises RunError, with its name, for a number that JSON has not."""
    wrong = _not_finite(line)
    if wrong:
        raise RunError(f"{wrong} is NaN or infinite, which is no figure; nothing was added to {path}")
    return json.dumps(line, allow_nan=False)


def _not_finite(value, name: str = "") -> str:
    """The name of the first number in `value` that is not finite, as in "metrics top1"; empty where there is none."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, (list, tuple)):
        inner = list(enumerate(value))
    else:
        return name if isinstance(value, float) and not math.isfinite(value) else ""
    return next(filter(None, (_not_finite(v, f"{name} {k}".strip()) for k, v in inner)), "")


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what was logged after `step`, the checkpoint that a run resumes from, and a last line that is half."""
    kept = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except json.JSONDecodeError:
            continue
    write(path, lambda file: file.write_text("".join(line + "\n" for line in kept)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: checkpoints/step_XXXXXX/ with the method's weights, the optimiser's state and the loop's few numbers.


def _checkpoints(folder: Path) -> list[Path]:
    """Those that we wrote, by step; a copy that a user keeps there under another name is none."""
    found = [path for path in (folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[5:]))


def _contiguous(tensors):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def last_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def save_checkpoint(folder: Path, step: int, method, optimizer: dict, state: dict, keep: int) -> None:
    """Write it aside and rename it; then drop all but the last `keep`. Raises RunError where it cannot be written."""
    path = folder / "checkpoints" / f"step_{step:06d}"
    if path.exists():
        return
    aside = path.with_name(f".{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(_contiguous(method.state_dict()), aside / "method.safetensors")
        torch.save(optimizer, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}))
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        aside.rename(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's errors
        shutil.rmtree(aside, ignore_errors=True)
        last = last_checkpoint(folder)
        no_other = f"there is no earlier one; make room in {folder}, then --resume {folder}"
        left = f"{last} is whole; make room in {folder}, then --resume {folder}" if last else no_other
        raise RunError(f"the checkpoint of step {step} cannot be written ({error}); {left}") from error
    _flush(path.parent)
    for old in _checkpoints(folder)[:-keep]:
        gone = old.with_name(f".{old.name}")  # never half a checkpoint under a checkpoint's name
        old.rename(gone)
        shutil.rmtree(gone)


def load_checkpoint(folder: Path, method, made_by: dict) -> tuple[dict, dict]:
    """Put the last checkpoint's weights into `method`; return the optimiser's and the loop's state.

    Raises UserError where it was made by something else than `made_by` says.
    """
    last = last_checkpoint(folder)
    if last is None:
        raise UserError(f"--resume {folder}: has no checkpoint")
    try:
        state = json.loads((last / "state.json").read_text())
        weights = load_file(last / "method.safetensors")
        optimizer = torch.load(last / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"{last}: is damaged ({first_line(error)}); without it --resume takes the one before"
        ) from error
    for name, wanted in made_by.items():
        if state["made_by"].get(name) != wanted:
            raise UserError(f"{last}: was made with {name} {state['made_by'].get(name)}, this run has {wanted}")
    method.load_state_dict(weights)
    return optimizer, state


def backbone_shapes(folder: Path) -> dict[str, torch.Size] | None:
    """Shapes of the backbone's weights in the last checkpoint, by name; None where there is none that can be read."""
    last = last_checkpoint(folder)
    try:
        with safe_open(str(last / "method.safetensors"), "pt") as file:  # type: ignore[operator]
            shapes = {k: torch.Size(file.get_slice(k).get_shape()) for k in [*file.keys()]}
            return {k.removeprefix("backbone."): v for k, v in shapes.items() if k.startswith("backbone.")}
    except (OSError, SafetensorError, TypeError):
        return None


def save_backbone(folder: Path, backbone) -> None:
    weights = save(_contiguous(backbone.state_dict()))
    write(folder / "backbone.safetensors", lambda file: file.write_bytes(weights))
