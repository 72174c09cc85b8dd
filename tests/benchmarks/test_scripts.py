"""The scripts of benchmarks/ run: a change of what they measure must not leave them behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))]
TINY = {
    "steps.py": "--threads 1 --repeats 1 --batch_size 8 --methods simclr moco byol simsiam",
    "views.py": "--threads 1 --repeats 1 --sizes 32",
    "cost.py": "--threads 1 --repeats 1 --batch_size 4 --methods simsiam moco",
}


def said_by(*words: str, place: Path = ROOT) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_script_can_be_imported():
    assert said_by("-c", f"import {', '.join(MODULES)}; print('all')", place=ROOT / "benchmarks") == "all\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_a_tiny_run_ends_in_a_table(script, tmp_path):
    out = ["--out", str(tmp_path / "cost.jsonl")] if script == "cost.py" else []
    rows = [row for row in said_by(f"benchmarks/{script}", *TINY[script].split(), *out).splitlines() if row[:1] == "|"]
    assert len(rows) >= 4 and all(row.count("|") == rows[0].count("|") for row in rows)
    assert all(float(re.search(r"\| ([\d,.]+) \|", row)[1].replace(",", "")) > 0 for row in rows[2:] if "ours" in row)
    if out:
        lines = {(x["method"], x["sim_weight"]): x for x in map(json.loads, Path(out[1]).read_text().splitlines())}
        assert lines["simsiam", 0.5]["passes"] == [4, 0] and lines["keymix", 0.5]["passes"] == [1, 2]
        assert lines["moco", 1.0]["ratio"] == 1
