"""results.jsonl in a run's folder, and tables."""

import json
import sys
from pathlib import Path

from training import folder as run_folder


def write_result(folder: Path, protocol: str, dataset: str, settings: dict, metrics: dict) -> None:
    """Append a line to `folder`/results.jsonl; what stands there stays as it is."""
    line = {"protocol": protocol, "dataset": dataset, "settings": settings, "metrics": metrics}
    line |= {"seed": settings.get("seed"), "versions": run_folder.versions()}
    path = folder / "results.jsonl"
    half = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    run_folder.append(path, "\n" * bool(half) + json.dumps(line))


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
