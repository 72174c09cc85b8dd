"""The house: four files at the root, imports that point one way, a core that installs alone."""

import ast
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"bsim", "flags", "data", "train", "loading", "methods", "training", "eval", "benchmarks", "tests"}
BELOW = {  # what a file at the root may import of the project; the contracts of pyproject.toml are on the packages
    "bsim.py": set(),
    "flags.py": set(),
    "data.py": {"bsim", "flags", "loading", "methods"},
    "train.py": OURS - {"train", "benchmarks", "tests"},
}


def imported(path):
    """Names of the top-level modules that a file imports, but for the launcher under `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_four_files_are_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == set(BELOW)


@pytest.mark.parametrize("name", BELOW)
def test_imports_point_one_way(name):
    assert imported(ROOT / name) & OURS <= BELOW[name]


def test_the_core_needs_torch_and_einops_alone():
    assert imported(ROOT / "bsim.py") - set(sys.stdlib_module_names) == {"torch", "einops"}


def test_functions_and_files_stay_readable():
    for path in [*ROOT.glob("*.py"), *(p for folder in OURS - {"tests"} for p in (ROOT / folder).glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


WITHOUT_THE_REST = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"accelerate", "timm", "datasets", "fire", "torchvision", "flags", "train"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
from bsim import info_nce, negative_cosine, nt_xent, sample_mixture
import bsim

draws = torch.Generator().manual_seed(0)
mixture = sample_mixture(torch.rand(4, 3, 8, 8), generator=draws)
print(bsim.__file__, float(nt_xent(torch.eye(4), torch.eye(4), 0.5)))
"""


@pytest.mark.slow
def test_the_core_installs_alone(tmp_path):
    """What pip builds offline is imported where accelerate, timm and datasets are refused."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("bsim.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", site, source], check=True)
    assert sorted(path.name for path in site.glob("*.py")) == ["bsim.py"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    place, loss = done.stdout.split()
    assert place == str(site / "bsim.py")
    # Each anchor has similarity 1 with its pair and 0 with the 6 others, at temperature 0.5.
    assert float(loss) == pytest.approx(math.log(math.e**2 + 6) - 2)
