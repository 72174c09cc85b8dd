"""recipes/: each file parses, its keys are flags, its values are the published ones and name their sources."""

import functools
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import data
import flags
from methods import METHODS
from methods.networks import backbone
from tests.test_data import table
from train import pretrain
from training import resolve
from training.settings import Pretraining

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(path.stem for path in RECIPES.glob("*.yaml"))

# epochs, batch, optimizer, the learning rate at its peak, weight decay, warm-up epochs, temperature, momentum, queue
PUBLISHED = {
    "imagenet-simclr": (200, 4096, "lars", 4.8, 1e-6, 10, 0.1, None, None),
    "imagenet-moco": (200, 256, "sgd", 0.03, 1e-4, 0, 0.2, 0.999, 65536),
    "imagenet-byol": (300, 4096, "lars", 4.8, 1e-6, 10, None, 0.99, None),
    "imagenet-simsiam": (100, 512, "sgd", 0.1, 1e-4, 0, None, None, None),
    "imagenet-mocov3": (300, 4096, "adamw", 0.0024, 0.1, 40, 0.2, 0.99, None),
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
    "imagenet-mocov3": (4096, 256, None),
    "cifar10-simsiam": (2048, 2048, 512),
}
# of an image: views with gradient of the plain method, and those that BSIM adds; views without
PASSES = {"simclr": (2, 1, 0), "moco": (1, 1, 1), "byol": (2, 2, 2), "simsiam": (2, 2, 0), "mocov3": (2, 2, 2)}
TEXTS = {name: (RECIPES / f"{name}.yaml").read_text() for name in FILES}


def test_there_is_one_for_each_method_and_each_dataset():
    assert sorted(PUBLISHED) == FILES
    assert sorted(path.suffix for path in RECIPES.iterdir()) == [".md"] + 9 * [".yaml"]


@pytest.mark.parametrize("name", FILES)
def test_it_holds_the_published_numbers(name):
    s, (data, method) = yaml.safe_load(TEXTS[name]), name.split("-")
    peak = s["lr"] * s["batch_size"] / 256
    names = "weight_decay warmup_epochs temperature momentum queue".split()
    found = (s["epochs"], s["batch_size"], s["optimizer"], peak, *map(s.get, names))
    assert found == pytest.approx(PUBLISHED[name])
    if name in HEADS:
        assert tuple(map(s.get, ("hidden_dim", "embedding_dim", "predictor_dim"))) == HEADS[name]
    large = ("vit_small_patch16_224" if method == "mocov3" else "resnet50", 224)
    assert (s["backbone"], s["image_size"]) == (large if data == "imagenet" else ("resnet18", 32))
    if data == "imagenet":
        assert s["batch_norm"] == ("shuffle" if method == "moco" else "sync")
    assert (s["method"], s["sim_weight"], s["mix"], s["alpha"]) == (method, 0.5, "cutmix", 1.0)
    defaults = METHODS[method].defaults(image_size=s["image_size"], width=512, steps=1000, images=50_000)
    assert {*defaults, "min_crop", "flip"} <= s.keys()  # other defaults would not change the recipe


@pytest.mark.parametrize("name", FILES)
def test_its_keys_are_flags_and_each_value_has_its_source(name):
    s, lines = yaml.safe_load(TEXTS[name]), TEXTS[name].splitlines()
    assert s.keys() <= inspect.signature(pretrain).parameters.keys() - {"dataset", "out", "resume"}
    assert all(type(value) in (int, float, str) for value in s.values())
    words = {"method", "mix", "backbone", "optimizer", "batch_norm"}
    assert {key for key, value in s.items() if isinstance(value, str)} <= words  # 1e-4 would be a string in YAML
    rows = [re.fullmatch(r"(\w+): \S+ +# (\S.+)", line) for line in lines[lines.index("") + 1 :]]
    assert all(rows) and [row[1] for row in rows] == list(s)  # no key twice
    source = r"paper|section|appendix|figure|table|code|notebook|arXiv|ours|\bv[12]\b|own size"
    assert all(re.search(source, row[2]) for row in rows)


@pytest.mark.parametrize("name", FILES)
def test_its_head_says_hardware_cost_and_accuracy(name):
    """The cost follows from the formula, and so does the table of recipes/README.md."""
    head, s = TEXTS[name].split("\n\n")[0], yaml.safe_load(TEXTS[name])
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"--recipe recipes/{name}.yaml" in head
    assert "# Hardware: " in head and "computed, not measured" in head
    assert re.search(r"# Accuracy(, published|: no published figure at hand)", head)
    large, (plain, added, free) = name.startswith("imagenet"), PASSES[s["method"]]
    gpus, second = (8, 16_621) if large else (1, 4.79 * 512 * 4 / 3)
    second *= 4.11 / 4.61 if s["method"] == "mocov3" else 1
    mebibytes = {"resnet50": 41.8, "vit_small_patch16_224": 41.7, "resnet18": 2.25}[s["backbone"]]
    each = (16 if large else 12) + 4 * (s["optimizer"] == "adamw")
    heads = {k: s[k] for k in s if k.endswith("_dim") or k in ("temperature", "momentum", "queue")}
    model = METHODS[s["method"]].Method(backbone(s["backbone"], s["image_size"]), **heads)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == grad) for grad in (True, False))
    said = re.findall(r"([\d.]+) hours, ([\d.]+) GPU-hours, ([\d.]+) GiB a GPU", head)
    row = re.search(rf"^\| `{name}` \|(.*)\|$", (RECIPES / "README.md").read_text(), re.M)[1].split("|")
    row = [cell.strip() for cell in row]
    assert row[:4] == [str(s["epochs"]), str(s["batch_size"]), s["optimizer"], f"{s['lr']:g}"]
    for at, (both, parts) in enumerate(((1, s.get("accumulate", 1)), (0, 1))):
        views = plain + both * added
        hours = (1_281_167 if large else 50_000) * s["epochs"] * (views + free / 3) / second / 3600
        memory = s["batch_size"] / gpus / parts * views * mebibytes / 1024
        memory += (each * trained + 4 * frozen) / 2**30
        assert float(said[at][0]) == pytest.approx(hours, abs=0.06)
        assert float(said[at][1]) == pytest.approx(hours * gpus, abs=0.6 if large else 0.06)
        assert float(said[at][2]) == pytest.approx(memory, abs=0.06)
        assert (row[4 + both], row[6 + both]) == (said[at][0], said[at][2])


def network(asked, size, device, began):
    """One for all recipes: it is slow to make."""
    return made(asked.backbone or ("resnet18" if size <= 64 else "resnet50"), size)


@functools.lru_cache
def made(name, size):
    return backbone(name, size), name, None


@pytest.mark.parametrize("sim_weight", [None, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_it_comes_to_a_run(name, sim_weight, monkeypatch):
    """What a run on the published hardware comes to; --sim_weight 1 on the command line is the plain method."""
    monkeypatch.setattr(resolve, "_network", network)
    images, side, world = (1_281_167, 500, 8) if name.startswith("imagenet") else (50_000, 32, 1)
    typed = {"recipe": str(RECIPES / f"{name}.yaml")} | ({} if sim_weight is None else {"sim_weight": sim_weight})
    asked, given = flags.read(Pretraining, typed)
    source = SimpleNamespace(images=images, side=side, fingerprint=None, way=data.OPEN, held_out=None)
    hardware = dict(device="cuda", world=world, mixed_precision="bf16")
    s, *_ = resolve.resolve(asked, given, source, METHODS[asked.method], **hardware)
    kept = {**s.config()}
    names = "epochs batch_size optimizer peak_lr weight_decay warmup_epochs temperature momentum queue".split()
    assert tuple(kept[name] for name in names) == pytest.approx(PUBLISHED[name])
    assert s.steps == images // s.batch_size * s.epochs and s.steps_per_epoch == images // s.batch_size
    assert s.batch_norm == ("shuffle" if s.method == "moco" else "sync")
    assert (s.sim_weight, s.recipe) == (0.5 if sim_weight is None else 1.0, typed["recipe"])
    assert kept["given"] == typed and "heads" not in kept


@pytest.mark.parametrize("name", FILES)
def test_its_first_steps_run(name, place, capsys):
    """On tiny data and a small network, with what a CPU is too slow for lowered; the rest is the recipe's."""
    table(40, size=(32, 32)).to_parquet("rows.parquet")
    small = dict(dataset="rows.parquet", backbone="resnet_tiny", image_size=16, batch_size=8, accumulate=1, epochs=2)
    small |= {"queue": 16} if name.endswith("moco") else {}
    heads = {k: 32 for k in ("hidden_dim", "embedding_dim", "predictor_dim") if f"\n{k}:" in TEXTS[name]}
    assert pretrain(recipe=str(RECIPES / f"{name}.yaml"), **small, **heads, dry_run=6) is None
    assert [path.name for path in place.iterdir()] == ["rows.parquet"]
    assert "the run       8 steps" in capsys.readouterr().out


def test_a_run_names_its_recipe_and_is_resumed_with_it(place):
    table(40, size=(16, 16)).to_parquet("rows.parquet")
    Path("mine.yaml").write_text("method: simclr\nbatch_size: 8\nsteps: 4\neval_every: 0\nlr: 0.1\n")
    options = dict(recipe="mine.yaml", dataset="rows.parquet", backbone="resnet_tiny", out="run", resume=True)
    pretrain(**options, lr=0.2)
    config = json.loads(Path("run/config.json").read_text())
    assert (config["recipe"], config["method"], config["lr"]) == ("mine.yaml", "simclr", 0.2)
    assert set(config["given"]) == {"recipe", "dataset", "backbone", "out", "resume", "lr"}
    pretrain(**options, lr=0.2, steps=6)
    with pytest.raises(flags.UserError, match=r"--resume run: keeps the settings of that run; .*\n.*\n  lr +0.2 +0.1$"):
        pretrain(**options, steps=8)  # the recipe's rate is not the run's
