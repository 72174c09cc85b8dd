"""The README is right: its example runs, its commands and flags exist."""

import re
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from flags import _kinds
from train import pretrain

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_moco_example_runs_and_learns():
    block = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
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


EVALUATIONS = ("knn", "linear", "semi", "voc07", "detect", "geometry", "compare", "export")


def test_every_flag_it_names_exists():
    launchers = {"--multi_gpu", "--num_processes", "--num_cpu_threads_per_process", "--nproc-per-node", "--help"}
    launchers |= {"--config_file", "--machine_rank", "--main_process_ip"}
    elsewhere = launchers | {"--jobs", "--threads", "--repeats"}
    known = set(_kinds(pretrain))
    for name in EVALUATIONS:
        known |= set(_kinds(getattr(import_module(f"eval.{name}"), name)))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - elsewhere:
        assert flag[2:] in known, flag


def test_it_names_every_evaluation():
    files = {path.stem for path in (Path(__file__).parent.parent / "eval").glob("*.py")}
    assert files - {"__init__", "common", "supervised", "boxes", "detector"} == set(EVALUATIONS)
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
