"""recipes/: each file's flags are accepted and come to the published numbers; its figures follow from the formula."""

import functools
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import flags
from methods import METHODS
from tests.test_data import table
from train import pretrain
from training import settings

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(path.stem for path in RECIPES.glob("*.sh"))
KINDS = flags._kinds(pretrain)

# epochs, batch, optimizer, the learning rate at its peak, weight decay, warm-up epochs, temperature, momentum, queue
PUBLISHED = {
    "imagenet-simclr": (200, 4096, "lars", 4.8, 1e-6, 10, 0.1, None, None),
    "imagenet-moco": (200, 256, "sgd", 0.03, 1e-4, 0, 0.2, 0.999, 65536),
    "imagenet-byol": (300, 4096, "lars", 4.8, 1e-6, 10, None, 0.99, None),
    "imagenet-simsiam": (100, 512, "sgd", 0.1, 1e-4, 0, None, None, None),
    "cifar10-simclr": (1000, 512, "lars", 2.0, 1e-6, 10, 0.5, None, None),
    "cifar10-moco": (200, 512, "sgd", 0.06, 5e-4, 0, 0.1, 0.99, 4096),
    "cifar10-byol": (800, 256, "sgd", 0.2, 5e-4, 1, None, 0.996, None),
    "cifar10-simsiam": (800, 512, "sgd", 0.06, 5e-4, 0, None, None, None),
}
HEADS = {  # hidden_dim, embedding_dim, predictor_dim
    "imagenet-simclr": (2048, 128, None),
    "imagenet-moco": (2048, 128, None),
    "imagenet-byol": (4096, 256, None),
    "imagenet-simsiam": (2048, 2048, 512),
    "cifar10-simsiam": (2048, 2048, 512),
}
# of an image: views with gradient of the plain method, and those that BSIM adds; views without
PASSES = {"simclr": (2, 1, 0), "moco": (1, 1, 1), "byol": (2, 2, 2), "simsiam": (2, 2, 0)}


def run(name, place, *words, **variables):
    """What the recipe does, with a stand-in for `accelerate` that writes down its arguments."""
    (place / "accelerate").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > said\n")
    (place / "accelerate").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("DATA", "OUT", "CONFIG")}
    environment = {**clean, "PATH": f"{place}:{clean['PATH']}", **variables}
    return subprocess.run([RECIPES / f"{name}.sh", *words], env=environment, cwd=place, capture_output=True, text=True)


def given(name, place, *words, **variables):
    """The arguments for Accelerate, and those for bsim.py with their values."""
    done = run(name, place, *words, **{"DATA": "my images", **variables})
    assert (done.returncode, done.stderr) == (0, "")
    said = (place / "said").read_text().splitlines()
    script = next(i for i, word in enumerate(said) if word.endswith("/bsim.py"))
    pairs = (word[2:].partition("=") for word in flags.check(pretrain, said[script + 1 :]))
    return said[: script + 1], {name: flags._parser(name, KINDS[name])(text) for name, _, text in pairs}


@functools.lru_cache
def network(name, size):
    return real_network(name, size)


real_network = settings._network


def settled(monkeypatch, values, images, side, world):
    """The settings that a run on `world` GPUs comes to."""
    monkeypatch.setattr(settings, "_network", network)
    defaults = dict(zip(KINDS, pretrain.__defaults__))
    s, folder = settings.read({**defaults, **values}, defaults)
    assert folder is None
    settings.recipes(s, METHODS[s["method"]])
    settings.resolve(s, SimpleNamespace(images=images, side=side), METHODS[s["method"]], "cuda", world)
    return s


def test_there_is_one_for_each_method_and_each_loss():
    assert sorted(f"{recipe}-{loss}" for recipe in PUBLISHED for loss in ("sim", "bsim")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_it_comes_to_the_published_numbers(name, place, monkeypatch):
    recipe, loss = name.rsplit("-", 1)
    data, method = recipe.split("-")
    images, side, world = (1_281_167, 500, 8) if data == "imagenet" else (50_000, 32, 1)
    launched, values = given(name, place)
    config = "8gpu" if data == "imagenet" else "gpu"
    assert launched[:2] == ["launch", "--config_file"] and launched[2].endswith(f"/configs/{config}.yaml")
    assert Path(launched[2]).exists() and Path(launched[3]).exists()

    s = settled(monkeypatch, values, images, side, world)
    names = "epochs batch_size optimizer peak_lr weight_decay warmup_epochs temperature momentum queue".split()
    assert tuple(s[name] for name in names) == pytest.approx(PUBLISHED[recipe])
    if recipe in HEADS:
        assert tuple(s[name] for name in ("hidden_dim", "embedding_dim", "predictor_dim")) == HEADS[recipe]
    assert s["steps"] == images // s["batch_size"] * s["epochs"]
    assert (s["backbone"], s["image_size"]) == (("resnet50", 224) if data == "imagenet" else ("resnet18", 32))
    assert s["batch_norm"] == ("shuffle" if method == "moco" else "sync")
    assert (s["method"], s["sim_weight"]) == (method, 1 if loss == "sim" else 0.5)
    assert (s["dataset"], s["out"], s["resume"]) == ("my images", f"runs/{name}", True)
    assert {*s["of_method"], "min_crop", "flip"} <= values.keys()  # other defaults would not change the recipe


@pytest.mark.parametrize("name", FILES)
def test_its_hours_and_its_memory_follow_from_the_formula(name, place, monkeypatch):
    recipe, loss = name.rsplit("-", 1)
    data, method = recipe.split("-")
    large = data == "imagenet"
    _, s = given(name, place)
    plain, added, free = PASSES[method]
    views = plain + added * (loss == "bsim")
    second = 16_621 if large else 4.79 * 512 * 4 / 3
    hours = (1_281_167 if large else 50_000) * s["epochs"] * (views + free / 3) / second / 3600
    heads = {k: s[k] for k in s if k.endswith("_dim") or k in ("temperature", "momentum", "queue")}
    model = METHODS[method].Method(network(s["backbone"], s["image_size"]), **heads)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == grad) for grad in (True, False))
    held = s["batch_size"] / (8 if large else 1) / s.get("accumulate", 1)
    memory = held * views * (41.8 if large else 2.25) / 1024 + ((16 if large else 12) * trained + 4 * frozen) / 2**30
    said = re.search(r"([\d.]+) GiB a GPU, ([\d.]+) hours", (RECIPES / f"{name}.sh").read_text()).groups()
    assert tuple(map(float, said)) == pytest.approx((memory, hours), abs=0.06)
    row = re.search(rf"^\| `{recipe}` \|(.*)\|$", (RECIPES / "README.md").read_text(), re.M)[1].split("|")
    lr = f"{s['lr']:g}"
    assert [cell.strip() for cell in row[:4]] == [str(s["epochs"]), str(s["batch_size"]), s["optimizer"], lr]
    at = 4 + (loss == "bsim")
    assert (row[at + 2].strip(), row[at].strip()) == said


@pytest.mark.parametrize("name", FILES)
def test_without_data_it_says_what_to_type(name, place):
    done = run(name, place)
    assert done.returncode == 2 and done.stdout == "" and not Path("said").exists()
    assert re.fullmatch(rf"DATA is not set: want a .*; type DATA=\S+ \S*recipes/{name}.sh\n", done.stderr)


def test_flags_and_variables_are_passed_on(place):
    launched, values = given(
        "cifar10-byol-sim", place, "--workers", "3", CONFIG="my.yaml", OUT="here", DATA="a b.parquet"
    )
    assert launched[:3] == ["launch", "--config_file", "my.yaml"]
    assert (values["workers"], values["out"], values["dataset"]) == (3, "here", "a b.parquet")
    with pytest.raises(flags.UserError, match="--lr: given twice"):
        given("cifar10-byol-sim", place, "--lr", "1")


def test_a_recipe_runs_dry(place, capsys):
    """All of MoCo's on CIFAR-10, but for what a CPU is too slow for, and tiny data too small."""
    table(40, size=(32, 32)).to_parquet("rows.parquet")
    _, values = given("cifar10-moco-bsim", place, "--dry_run", "6", DATA="rows.parquet")
    before = set(place.iterdir())
    assert pretrain(**{**values, "backbone": "resnet_tiny", "batch_size": 8, "queue": 16}) is None
    assert set(place.iterdir()) == before
    assert f"the run       {40 * 9 // 10 // 8 * 200:,} steps" in capsys.readouterr().out
