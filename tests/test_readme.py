"""The README is right: its example runs, its commands and flags exist."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flags import _kinds
from train import pretrain

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_moco_example_runs_and_learns():
    block = next(block for block in BLOCKS if "info_nce" in block)
    assert len(block.strip().splitlines()) <= 12
    space = {}
    exec(block, space)
    torch.manual_seed(0)
    query, key = (nn.Sequential(nn.Flatten(), nn.Linear(192, 16)) for _ in range(2))
    key.load_state_dict(query.state_dict())
    queue = nn.functional.normalize(torch.randn(32, 16), dim=1)
    a, b = torch.randn(2, 24, 3, 8, 8)
    b = a + 0.1 * b
    optimizer = torch.optim.SGD(query.parameters(), lr=0.3)
    values = []
    for i in range(30):
        loss, keys = space["step"](query, key, queue, a, b, torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert keys.shape == (24, 16) and not keys.requires_grad
    assert all(parameter.grad is None for parameter in key.parameters())
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_the_example_in_lightly_runs_and_learns():
    pytest.importorskip("lightly")
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    torch.manual_seed(0)
    random.seed(0)
    space, two = {}, SimCLRTransform(input_size=16)
    exec(next(block for block in BLOCKS if "def training_step" in block), space)
    pictures = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (32, 20, 20, 3), dtype=np.uint8)]
    batch = (torch.utils.data.default_collate([two(picture) for picture in pictures]), None, None)
    backbone, head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32)), SimCLRProjectionHead(32, 32, 16)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.3)
    values = []
    for i in range(30):
        loss = space["training_step"](backbone, head, batch, torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


@pytest.mark.slow
def test_a_method_is_one_file_and_one_row(place):
    """Added to a copy of this repository, the README's method trains, is resumed, and is evaluated."""
    block = next(block for block in BLOCKS if "class Method" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 31
    root = Path(__file__).parent.parent
    copy = place / "copy"
    copy.mkdir()
    for path in root.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("methods", "eval"):
        shutil.copytree(root / folder, copy / folder)
    (copy / "methods" / "spread.py").write_text(block)
    table = (copy / "methods" / "__init__.py").read_text()
    line, entry = re.search(r"the line `(.+?)` and the entry\n`(.+?)`", TEXT).groups()
    table = table.replace("import methods.simsiam\n", f"import methods.simsiam\n{line}\n").replace("}", f", {entry}}}")
    (copy / "methods" / "__init__.py").write_text(table)

    def run(*words):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = ("--method", "spread", "--sim_weight", "0.5", "--out", "run", "--resume")
    run("bsim.py", *flags, "--steps", "60", "--eval_every", "0")
    run("bsim.py", *flags, "--steps", "120", "--eval_every", "0")
    lines = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 121, 10))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1 and lines[-1]["feature_std"] > 0.5
    assert "knn" in run("-m", "eval.knn", "--run", "run")
    run("-m", "eval.geometry", "--run", "run", "--images", "100")
    metrics = json.loads((copy / "run" / "results.jsonl").read_text().splitlines()[-1])["metrics"]
    assert metrics["embedding_uniformity"] < -1


EVALUATIONS = ("knn", "linear", "semi", "voc07", "detect", "geometry", "compare", "export")


def test_every_flag_it_names_exists():
    launchers = {"--multi_gpu", "--num_processes", "--num_cpu_threads_per_process", "--nproc-per-node", "--help"}
    launchers |= {"--config_file", "--machine_rank", "--main_process_ip"}
    scripts = "".join(path.read_text() for path in (Path(__file__).parent.parent / "benchmarks").glob("*.py"))
    elsewhere = launchers | set(re.findall(r'add_argument\("(--[a-z_]+)"', scripts))
    known = set(_kinds(pretrain))
    for name in EVALUATIONS:
        known |= set(_kinds(getattr(import_module(f"eval.{name}"), name)))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - elsewhere:
        assert flag[2:] in known, flag


def test_it_names_every_evaluation():
    files = {path.stem for path in (Path(__file__).parent.parent / "eval").glob("*.py")}
    assert files - {"__init__", "weights", "features", "results", "command", "supervised", "boxes", "detector"} == set(
        EVALUATIONS
    )
    assert all(f"| `eval.{name}` |" in TEXT for name in EVALUATIONS)


def test_its_two_commands_are_those_that_users_and_ci_run():
    commands = re.findall(r"^ +(pip install .*)$", TEXT, re.M)
    assert commands == [
        "pip install -r requirements.txt && accelerate launch bsim.py --method byol",
        "pip install -r requirements.txt && pytest",
    ]


def test_every_file_it_points_to_exists():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (root / target).exists(), target


def test_every_script_that_it_runs_exists():
    root = Path(__file__).parent.parent
    for path in ("README.md", "benchmarks/README.md", "recipes/README.md"):
        for script in re.findall(r"(?:benchmarks|docs|recipes)/[\w-]+\.(?:py|sh)", (root / path).read_text()):
            assert (root / script).exists(), (path, script)


def test_every_test_that_is_promised_exists():
    root = Path(__file__).parent.parent
    promised = (root / "docs" / "trust.md").read_text()
    names = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", promised)
    assert len(names) >= 12
    for file, name in names:
        assert not name or f"def {name}(" in (root / "tests" / file).read_text(), (file, name)
    everything = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", promised):
        assert f"def {name}(" in everything, name
