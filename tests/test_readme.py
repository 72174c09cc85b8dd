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

from flags import kinds_of
from train import pretrain

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost_curve  # noqa: E402

TEXT = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("[bdr]*/*.md"))}  # benchmarks docs recipes
NEW_METHOD = (ROOT / "docs" / "new_method.md").read_text()
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```python\n(.*?)```", text, re.S)]


def test_every_block_is_run():
    assert len(BLOCKS) == 3
    assert sum(text.count("<!-- a test runs this block -->\n```python\n") for text in PAGES.values()) == 3


def test_the_readme_is_short_and_begins_with_what_it_gives():
    assert len(TEXT.splitlines()) <= 150
    order = ("docs/bsim.png", "| SIM, the plain method |", "pip install -r requirements.txt && accelerate", "&& pytest")
    order += ("docs/views.png", "docs/curves.png", "## Your own images", "## A loss in your own trainer")
    order += ("## The flags that matter", "## Where the rest is", "## Cite", "Apache-2.0")
    places = [TEXT.index(words) for words in order]
    assert places == sorted(places)
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in TEXT, page


def test_its_table_is_of_the_committed_results():
    """Means and standard deviations over the seeds, the measured cost of a step times the epochs."""
    found = cost_curve.points_of([line for file in cost_curve.DEFAULT for line in cost_curve.lines_of(file)])
    names = {"SIM, the plain method": "SIM", "SIM with a third plain view": "SIM, third view"}
    row = r"^\| ([^|]+) \| (\d+) \| ([\d.]+) \| (\d+) \| (\d) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \|$"
    rows = re.findall(row, TEXT, re.M)
    assert len(rows) == 5
    for name, epochs, cost, passes, seeds, *said in rows:
        kind = names.get(name, name)
        ((own, _, metrics),) = [point for point in found[kind] if point[1] == int(epochs)]
        wanted = []
        for metric in ("knn top1", "linear features top1"):
            values = list(metrics[metric].values())
            assert len(values) == int(seeds)
            wanted += [np.mean(values), np.std(values, ddof=1)]
        assert [float(x) for x in said] == pytest.approx(wanted, abs=0.051)
        assert float(cost) == pytest.approx(own / 120, abs=0.006)
        assert int(passes) == int(epochs) * (3 if kind in ("SIM, third view", "half SIM, half BSIM") else 2)


def test_what_it_says_of_1000_images_is_of_the_committed_results():
    """Pure BSIM minus SIM of 1,200 epochs, paired by seed, with the 95 % interval of three seeds."""
    found = cost_curve.points_of(cost_curve.lines_of(ROOT / "benchmarks" / "results" / "few.jsonl"))
    plain, pure = (next(m for _, epochs, m in found[kind] if epochs == 1200) for kind in ("SIM", "BSIM"))
    bullet = next(line for line in TEXT.split("\n- ") if line.startswith("*Few images"))
    bullet = bullet.replace("\n ", "")
    for metric, words in (
        ("linear features top1", r"([\d.]+) of linear more than SIM after 1,200 epochs \(([\d.]+) to ([\d.]+)\)"),
        ("knn five_labels", r"([\d.]+) with five labels \(([\d.]+) to ([\d.]+)\)"),
        ("knn top1", r"([\d.]+) of k-NN \(([\d.]+) to ([\d.]+)\)"),
    ):
        gains = np.array([pure[metric][seed] - plain[metric][seed] for seed in (0, 1, 2)])
        half = 4.302653 * gains.std(ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom
        said = [float(x) for x in re.search(words, bullet).groups()]
        assert said == pytest.approx([gains.mean(), gains.mean() - half, gains.mean() + half], abs=0.051)


def test_both_versions_of_the_paper_have_their_authors():
    paper = PAGES[ROOT / "docs" / "paper.md"]
    assert re.search(r"Xiangxiang Chu, Xiaohang Zhan and Xiaolin Wei, \*Beyond Single Instance", paper)
    assert re.search(r"Xiangxiang Chu, Xiaohang Zhan and Bo Zhang, \*A Unified Mixture-View", paper)
    cited = dict(re.findall(r"title=\{(\w+) .*\n +author=\{([^}]+)\}", TEXT))
    assert cited["Beyond"].endswith("Wei, Xiaolin") and cited["A"].endswith("Zhang, Bo")


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
    for folder in ("methods", "eval", "loading", "training"):
        shutil.copytree(root / folder, copy / folder)
    (copy / "methods" / "spread.py").write_text(block)
    table = (copy / "methods" / "__init__.py").read_text()
    line, entry = re.search(r"the line `(.+?)` and the entry\n`(.+?)`", NEW_METHOD).groups()
    table = table.replace("import methods.simsiam\n", f"import methods.simsiam\n{line}\n")
    table = table.replace("METHODS = {", f"METHODS = {{\n    {entry},")
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


EVALUATIONS = ("knn", "linear", "semi", "voc07", "detect", "geometry", "compare", "embed", "export")


def test_every_flag_it_names_exists():
    launchers = {"--multi_gpu", "--num_processes", "--num_cpu_threads_per_process", "--nproc-per-node", "--help"}
    launchers |= {"--logdir", "--config_file", "--machine_rank", "--main_process_ip"}
    scripts = "".join(path.read_text() for path in (Path(__file__).parent.parent / "benchmarks").glob("*.py"))
    elsewhere = launchers | set(re.findall(r'add_argument\(\s*"(--[a-z_0-9]+)"', scripts))
    known = set(kinds_of(pretrain.settings))
    for name in EVALUATIONS:
        known |= set(kinds_of(getattr(import_module(f"eval.{name}"), name).settings))
    for path, text in PAGES.items():
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - elsewhere:
            assert flag[2:] in known, (path, flag)


def test_it_names_every_evaluation():
    files = {path.stem for path in (Path(__file__).parent.parent / "eval").glob("*.py")}
    shared = {"__init__", "settings", "weights", "features", "results", "command", "supervised"}
    shared |= {"learning", "boxes", "detector", "voc", "coco", "hub_boxes"}
    assert files - shared == set(EVALUATIONS)
    assert all(f"| `eval.{name}` |" in PAGES[ROOT / "docs" / "evaluate.md"] for name in EVALUATIONS)


def test_its_two_commands_are_those_that_users_and_ci_run():
    commands = re.findall(r"^ +(pip install .*)$", TEXT, re.M)
    assert commands == [
        "pip install -r requirements.txt && accelerate launch bsim.py --method byol",
        "pip install -r requirements.txt && pytest",
    ]


def test_every_file_they_point_to_exists():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text):
            assert target.startswith("https://") or (path.parent / target).exists(), (path, target)


def test_every_script_that_they_run_exists():
    for path, text in PAGES.items():
        for script in re.findall(r"(?:benchmarks|docs|recipes|configs|tests)/[\w/-]+\.(?:py|sh|yaml|jsonl)", text):
            assert (ROOT / script).exists(), (path, script)


def test_every_test_that_is_promised_exists():
    root = Path(__file__).parent.parent
    promised = (root / "docs" / "trust.md").read_text()
    names = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", promised)
    assert len(names) >= 12
    for file, name in names:
        assert (root / "tests" / file).exists(), file
        assert not name or f"def {name}(" in (root / "tests" / file).read_text(), (file, name)
    everything = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", promised):
        assert f"def {name}(" in everything, name
