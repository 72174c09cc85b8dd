"""results.jsonl in a run's folder, and tables."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from flags import RunError, UserError
from training import folder as run_folder


def check_writable(folder: Path) -> None:
    """Raise UserError where `folder`/results.jsonl cannot be added to, before the work whose result it is to hold."""
    path = folder / "results.jsonl"
    try:
        if path.exists():
            open(path, "a").close()
        elif not os.access(folder.absolute(), os.W_OK):
            raise PermissionError(None, "the folder may not be written to")
    except OSError as error:
        raise UserError(f"--run: {path}, where the result goes, cannot be written ({error.strerror})") from error


def write_result(folder: Path, protocol: str, dataset: str, settings: dict, metrics: dict) -> None:
    """Append a line to `folder`/results.jsonl; what stands there stays as it is.

    Raises RunError where it cannot be written, or where a metric is NaN or infinite.
    """
    line: dict[str, Any] = {"protocol": protocol, "dataset": dataset, "settings": settings, "metrics": metrics}
    line |= {"seed": settings.get("seed"), "versions": run_folder.versions()}
    path = folder / "results.jsonl"
    text = run_folder.json_line(line, path)
    half = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    try:
        run_folder.append(path, "\n" * bool(half) + text)
    except RunError as error:
        raise RunError(f"{error}; {protocol} gave {metrics}") from error


def read_results(folder: Path) -> list[dict]:
    """The lines of `folder`/results.jsonl. One that a kill or a full disk cut off is named and left out.

    Raises UserError where the file cannot be read, or has a line that is JSON but no object.
    """
    path, found = folder / "results.jsonl", []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError:
            print(f"{path}: line {number} was cut off and is left out", file=sys.stderr)
            continue
        if not isinstance(value, dict):
            raise UserError(
                f"{path}: line {number} is {line.decode()[:40]}, no result; want an object. Delete the line"
            )
        found += [value] if value else []
    return found


def weights_of(run, weights: str | None = "online") -> str:
    """Which weights in a run's folder `run`, as --run was given, names: step_000012, another file's name, or "".

    "" stands for the run's final weights. `weights`: what --weights was.
    """
    path = Path(str(run or ""))
    if weights == "momentum":
        return f"{weights_of(run)} momentum"
    if re.fullmatch(r"step_\d+", path.name) and path.parent.name in ("checkpoints", ""):
        return path.name
    return path.name if path.suffix == ".safetensors" and path.name != "backbone.safetensors" else ""


def table(rows: list[list], head: list[str]) -> str:
    """A Markdown table; numbers with two digits."""
    words = [head] + [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in words) for i in range(len(head))]
    lines = ["| " + " | ".join(word.ljust(width) for word, width in zip(row, widths)) + " |" for row in words]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])
