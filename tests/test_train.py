"""Whole runs on the digits: what they leave, what they refuse, and that how they are cut up changes nothing."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file
from torch import nn

from flags import RunError, UserError
from methods import METHODS
from methods.networks import backbone
from tests.test_data import table
from train import pretrain
from training import folder as run_folder
from training.optimize import learning_rate

ROOT = Path(__file__).parent.parent
SHORT = dict(dataset="digits", split="train[:200]", batch_size=32, steps=6, log_every=2, eval_every=3)


def weights(folder):
    return load_file(Path(folder) / "backbone.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def lines(folder):
    return run_folder.read_metrics(Path(folder))


@pytest.mark.pictures
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(place, method, capsys):
    folder = pretrain(method=method, sim_weight=0.5, **SHORT)
    assert folder == Path(f"runs/{method}-digits-001")
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == method and config["backbone"] == "resnet_tiny" and config["steps"] == 6
    assert config["lr"] > 0 and config["hidden_dim"] > 0 and config["versions"]["torch"] == version("torch")
    assert [line["step"] for line in lines(folder)] == [2, 3, 4, 6]
    for line in lines(folder):
        assert line["loss"] == pytest.approx((line["sim"] + line["bsim"]) / 2, abs=1e-6)
        assert line["images_per_second"] > 0 and 0 < line["feature_std"] < 1.2
    evaluated = [line for line in lines(folder) if "knn" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert ["knn_pixels" in line for line in evaluated] == [True, False]
    assert 80 < evaluated[0]["knn_pixels"] <= 100 and 0 <= evaluated[0]["knn_random"] <= 100
    assert backbone("resnet_tiny", 16).load_state_dict(weights(folder))
    for picture in ("views.png", "curves.png"):
        assert (folder / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000006"]
    assert not list(folder.rglob(".*"))
    said = capsys.readouterr().out
    for part in (
        str(folder),
        "k-NN",
        "raw pixels",
        "random weights",
        "next: accelerate launch bsim.py --method " + method,
    ):
        assert part in said


def test_a_second_run_takes_the_next_folder_and_is_the_same(place):
    first, second = (pretrain(method="simclr", **SHORT) for _ in range(2))
    assert (first.name, second.name) == ("simclr-digits-001", "simclr-digits-002")
    assert same(weights(first), weights(second))
    other = pretrain(method="simclr", **SHORT, seed=1)
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("sim_weight, missing", [(1.0, "bsim"), (0.0, "sim")])
def test_what_is_not_used_is_not_computed(place, sim_weight, missing):
    folder = pretrain(method="byol", sim_weight=sim_weight, **{**SHORT, "eval_every": 0})
    for line in lines(folder):
        assert line[missing] is None and "knn" not in line
        assert line["loss"] == line["sim" if missing == "bsim" else "bsim"]


def test_parts_of_a_batch_add_up(place, monkeypatch):
    """Without batch norm, whose statistics are a part's own, two parts take the step of the whole batch."""
    monkeypatch.setattr("train.make_view", lambda images, recipe, generator: images[..., :8, :8].float() / 255)
    monkeypatch.setattr("training.resolve.build_backbone", lambda name, size, shapes: Plain())
    monkeypatch.setattr("methods.networks.nn.BatchNorm1d", lambda width, affine: nn.Identity())
    options = dict(method="simsiam", sim_weight=1.0, lr=0.5, image_size=8, **{**SHORT, "eval_every": 0})
    one, two = (weights(pretrain(**options, accumulate=n, out=f"parts{n}")) for n in (1, 2))
    start = Plain().state_dict()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
        assert (one[name] - start[name]).abs().max() > 1e-4


class Plain(nn.Module):
    """A network without batch norm, the same each time."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 12)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(12, 192, generator=torch.Generator().manual_seed(1)) / 14)
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x.flatten(1)).tanh()


def test_labels_are_not_needed(place):
    folder = pretrain(**SHORT, label_column="none")
    assert all("knn" not in line for line in lines(folder)) and (folder / "curves.png").exists()


def test_large_images_and_streams_train(place):
    from tests.test_data import folder as pets

    path = str(pets(place, 60, (70, 90)))
    for options in (dict(), dict(streaming=True)):
        folder = pretrain(
            dataset=path,
            backbone="resnet_tiny",
            image_size=32,
            batch_size=8,
            steps=2,
            workers=2,
            log_every=1,
            **options,
        )
        assert lines(folder)[-1]["knn"] >= 0
        assert json.loads((folder / "config.json").read_text())["image_size"] == 32


@pytest.mark.slow
def test_collapse_shows(place, monkeypatch):
    """BYOL without its predictor: the alarm falls to a tenth of a healthy run's."""
    options = dict(method="byol", sim_weight=1.0, steps=60, batch_size=64, eval_every=0, lr=0.5, momentum=0.5)
    healthy = pretrain(**options, out="healthy")
    byol = METHODS["byol"].Method
    whole = byol.__init__

    def without_predictor(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        self.predictor = nn.Identity()

    monkeypatch.setattr(byol, "__init__", without_predictor)
    collapsed = pretrain(**options, out="collapsed")
    last = [lines(folder)[-1]["feature_std"] for folder in (healthy, collapsed)]
    assert last[1] < last[0] / 10, last


def test_learning_rate_warms_up_and_falls_to_nothing():
    s = SimpleNamespace(peak_lr=2.0, warmup_steps=10, steps=110)
    assert learning_rate(0, s) == pytest.approx(0.2) and learning_rate(9, s) == 2.0 and learning_rate(10, s) == 2.0
    assert learning_rate(60, s) == pytest.approx(1.0) and 0 < learning_rate(109, s) < 0.001
    assert learning_rate(0, SimpleNamespace(peak_lr=2.0, warmup_steps=0, steps=5)) == 2.0


def test_an_overflow_in_the_first_step_of_half_precision_leaves_no_trace():
    """torch 2.14's fused SGD keeps uninitialised memory as its momentum then."""
    from training.optimize import optimizer_of

    settings = SimpleNamespace(optimizer="sgd", peak_lr=0.1, weight_decay=0.0, mixed_precision="fp16")
    model = torch.nn.Linear(400, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer, scaler = optimizer_of(model, settings), torch.amp.GradScaler("cpu")
    for gradient in (float("inf"), 1.0, 1.0):
        scaler.scale(torch.zeros(())).item()
        model.weight.grad = torch.full_like(model.weight, gradient) * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(model.weight, torch.full_like(model.weight, -0.1 - 0.19))


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_optimisers_decay_what_they_should(place, optimizer):
    from training.optimize import optimizer_of

    method = METHODS["simsiam"]
    defaults = method.defaults(image_size=16, width=192, steps=9, images=99)
    heads = {k: v for k, v in defaults.items() if k.endswith("dim")}
    model = method.Method(backbone("resnet_tiny", 16), **heads)
    groups = optimizer_of(
        model, SimpleNamespace(optimizer=optimizer, peak_lr=1.0, weight_decay=0.5, mixed_precision="no")
    ).param_groups
    total = sum(len(group["params"]) for group in groups)
    assert total == len(list(model.parameters()))
    if optimizer == "lars":  # without weight decay too
        assert all(group["always_adapt"] == (group["weight_decay"] > 0) for group in groups)
    for group in groups:
        vectors = {p.ndim == 1 for p in group["params"]}
        if optimizer == "sgd":
            assert group["weight_decay"] == 0.5
        else:
            assert vectors == {group["weight_decay"] == 0}
    fixed = {id(p) for group in groups if group["constant"] for p in group["params"]}
    assert fixed == {id(p) for p in model.predictor.parameters()}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="byole"), "--method byole: want simclr, moco, mocov3, byol, simsiam; did you mean byol?"),
        (dict(dataset="nobody/none"), "--dataset nobody/none: is no file or folder here, and the Hub"),
        (dict(dataset="./nowhere"), "--dataset ./nowhere: no such file or folder"),
        (dict(backbone="resnet51"), "--backbone resnet51: no such timm model; did you mean resnet"),
        (dict(mix="cutmx"), "--mix cutmx: want cutmix, mixup, either; did you mean cutmix?"),
        (dict(optimizer="adam"), "--optimizer adam: want sgd, lars, adamw; did you mean adamw?"),
        (dict(batch_size=2000), "--batch_size 2000: the dataset has 1618 images to train on; want at most that"),
        (dict(batch_size=33, accumulate=2), "--batch_size 33: want a multiple of 1 processes x --accumulate 2"),
        (dict(alpha=0.0), "--alpha 0.0: want a number above 0"),
        (dict(alpha=-1.0), "--alpha -1.0: want a number above 0"),
        (dict(sim_weight=1.5), "--sim_weight 1.5: want a share from 0 to 1"),
        (dict(sim_weight=float("nan")), "--sim_weight nan: want a share from 0 to 1"),
        (dict(lr=-0.1), "--lr -0.1: want a number above 0"),
        (dict(epochs=0), "--epochs 0: want 1 or more"),
        (dict(seed=2**32), "--seed 4294967296: want from 0 to 4294967295"),
        (dict(backbone="inception_v3"), "--backbone inception_v3: does not take images of 16 pixels ("),
        (dict(split="train[:40]", batch_size=64), "--batch_size 64: the dataset has 36 images to train on"),
        (dict(resume="a", epochs=1, steps=1), "--epochs and --steps: give one of them"),
        (dict(epochs=3, steps=3), "--epochs and --steps: give one of them"),
        (dict(streaming=True), "--streaming: the length of a stream is not known; say how long to train"),
        (dict(method="byol", temperature=0.1), "--temperature: byol has none"),
        (dict(method="simclr", queue=9), "--queue: simclr has none"),
        (dict(log_with="wandb"), "--log_with wandb: is not installed; pip install wandb"),
        (dict(mixed_precision="fp16"), "--mixed_precision fp16: "),
        (dict(batch_norm="group"), "--batch_norm group: want sync, shuffle, local"),
        (dict(method="byol", batch_norm="shuffle"), "--batch_norm shuffle: only moco has keys to shuffle; byol takes"),
        (dict(resume=True), "--resume: name the run's folder"),
        (dict(resume="nothing"), "--resume nothing: no run there"),
    ],
)
def test_refusals_write_nothing(place, options, message):
    if options.get("mixed_precision") and torch.cuda.is_available():
        pytest.skip("fp16 runs here")
    with pytest.raises(UserError) as caught:
        pretrain(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list(place.iterdir()) == []


def test_a_folder_in_use_is_refused_and_left_alone(place):
    pretrain(**SHORT, out="run")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    with pytest.raises(UserError, match="--out run: holds a finished run; write to another .* --resume run --epochs N"):
        pretrain(**SHORT, out="run")
    with pytest.raises(UserError, match=r"--resume run: keeps the settings of that run.*\n.*\n  method +byol +moco$"):
        pretrain(resume="run", method="moco")
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    Path("run/backbone.safetensors").unlink()
    with pytest.raises(UserError, match="--out run: holds an unfinished run; resume it: --resume run"):
        pretrain(**SHORT, out="run")
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="--out other: is not empty and no run"):
        pretrain(**SHORT, out="other")
    with pytest.raises(UserError, match="--out other/thesis.tex: .*thesis.tex is a file"):
        pretrain(**SHORT, out="other/thesis.tex")


def test_a_flag_that_repeats_a_default_counts_on_the_command_line(place, monkeypatch):
    """On a resume --method byol is refused for a MoCo run although byol is the default."""
    import flags

    pretrain(method="moco", **SHORT, out="run")
    monkeypatch.setattr(sys, "argv", ["bsim.py", "--resume", "run", "--method", "byol", "--log_every", "10"])
    seen = []
    monkeypatch.setattr("builtins.print", lambda *words, **options: seen.append(words))
    with pytest.raises(SystemExit) as caught:
        flags.launch(pretrain, "bsim.py")
    assert caught.value.code == 2 and "method             moco               byol" in seen[0][0]
    assert "log_every" not in seen[0][0]


def test_the_proposed_command_repeats_the_flags(place, capsys):
    from tests.test_data import table

    table(60).to_parquet("my rows.parquet")
    pretrain(dataset="my rows.parquet", label_column="none", steps=2, batch_size=16, sim_weight=1.0, out="run")
    said = capsys.readouterr().out.splitlines()[-1]
    assert "--dataset 'my rows.parquet' --label_column none --steps 2 --batch_size 16 --sim_weight 0 " in said
    assert "--out" not in said


def test_wide_and_narrow_backbones(place):
    folder = pretrain(**{**SHORT, "eval_every": 0}, backbone="mobilenetv3_small_050", image_size=32)
    assert json.loads((folder / "config.json").read_text())["hidden_dim"] == 2 * 1024


def test_a_corrupt_image_in_the_middle_of_a_run_leaves_nothing(place):
    from tests.test_data import folder as pets

    path = pets(place, 64, (70, 90))
    options = dict(
        dataset=str(path), label_column="none", image_size=16, backbone="resnet_tiny", batch_size=8, workers=0
    )
    bad = path / "dog" / "3.png"  # none of those that are looked at first
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"row \d+ of train is not an image .* --skip_bad_images"):
        pretrain(**options, steps=8, out="run")
    assert not Path("run").exists()
    pretrain(**options, steps=16, skip_bad_images=True, out="run")


def test_a_corrupt_image_ends_a_run_before_it_writes(place):
    from tests.test_data import spoiled

    path = str(spoiled(place, 40))
    options = dict(dataset=path, batch_size=8, steps=2, eval_every=0)
    with pytest.raises(UserError, match=r"row \d+ of train is not an image"):
        pretrain(**options, out="run")
    assert not Path("run").exists()
    assert (pretrain(**options, skip_bad_images=True, out="run") / "backbone.safetensors").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    run_folder.write_json(path, {"a": 1})

    def fails(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(RunError, match=r"config.json cannot be written \(disk full\); make room in"):
        run_folder.write(path, fails)
    assert json.loads(path.read_text()) == {"a": 1}


def test_splits_of_other_classes_are_not_compared_by_number(place):
    """k-NN would be 0 % of images that are the same."""
    rows = table(40, size=(16, 16))
    (place / "d").mkdir()
    rows.to_parquet("d/train.parquet")
    names = rows.features["label"].names
    swapped = rows.cast_column("label", ClassLabel(names=names[::-1]))
    swapped.to_parquet("d/test.parquet")
    with pytest.raises(UserError, match="--eval_split test: has other classes than train"):
        pretrain(dataset="d", backbone="resnet_tiny", batch_size=8, steps=2)


@pytest.mark.parametrize("flags, until", [(dict(), 6), (dict(mix_until=0.5), 4), (dict(sim_weight=0.5), 8)])
def test_the_end_of_a_run_has_plain_pairs(place, flags, until):
    """By default the last quarter of pure BSIM on SimCLR; what is trained on is then the plain method's loss."""
    options = dict(method="simclr", backbone="resnet_tiny", image_size=16, batch_size=16, split="train[:40]")
    options |= dict(eval_every=0, log_every=1, checkpoint_every=2)
    run = pretrain(out="run", steps=8, **options, **flags)
    lines = run_folder.read_metrics(run)
    assert [line["bsim"] is not None for line in lines] == [step < until for step in range(8)]
    plain = [line for line in lines if line["bsim"] is None]
    assert all(line["loss"] == line["sim"] for line in plain)
    assert json.loads((run / "config.json").read_text())["mix_until"] == until / 8
    with pytest.raises(UserError, match="--mix_until 0.5: the plain method, --sim_weight 1, has no mixtures"):
        pretrain(out="other", steps=8, mix_until=0.5, sim_weight=1, **options)
    config = json.loads((run / "config.json").read_text())
    del config["mix_until"]  # a run of before the flag resumes as it began
    (run / "config.json").write_text(json.dumps(config))
    longer = pretrain(resume="run", steps=12)
    assert all(line["bsim"] is not None for line in run_folder.read_metrics(longer)[8:])
