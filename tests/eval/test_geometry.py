"""Measures of the sphere against closed forms, and the picture that lays runs side by side."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from bsim import ViewRecipe, make_view
from eval.geometry import effective_rank, geometry, measures, name_of, unit, variance_shares
from eval.results import read_results
from eval.weights import load_method
from flags import UserError
from loading.batches import generator
from methods.networks import backbone
from tests.test_data import picture
from train import pretrain
from training.weights import Backbone, load_backbone


def test_effective_rank_and_shares_of_known_spectra():
    axes = torch.eye(6)[:4].repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # 4 even directions
    assert effective_rank(axes) == pytest.approx(4)
    torch.testing.assert_close(variance_shares(axes)[:5], torch.tensor([0.25] * 4 + [0.0]).double())
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[3.0, 4.0]])
    assert effective_rank(line) == pytest.approx(1)
    values = torch.tensor([3.0, 1.0])  # singular values 3 and 1: entropy of (3/4, 1/4)
    two = torch.stack([values[0] * torch.tensor([1.0, 0]), values[1] * torch.tensor([0, 1.0])])
    two = torch.cat([two, -two])
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(two @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])) == pytest.approx(effective_rank(two))


def test_measures_of_known_clouds():
    """Opposite pairs on a circle: alignment 4; two points at right angles: uniformity log(e^-4) = -4."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = measures(x, x, -x)
    assert found["alignment"] == pytest.approx(4)
    assert found["uniformity"] == pytest.approx(-4)
    assert found["variance_1"] == pytest.approx(100) and sum(found["variance_shares"]) == pytest.approx(100)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place = tmp_path_factory.mktemp("geometry")
    options = dict(method="byol", batch_size=64, steps=12, eval_every=0, checkpoint_every=6)
    return [str(pretrain(**options, sim_weight=w, out=str(place / f"w{w:g}"))) for w in (1.0, 0.0)]


@pytest.mark.pictures
def test_a_run_is_measured_and_drawn_beside_another(pair, place):
    metrics = geometry(run=pair[0], beside=f"{pair[1]}, resnet_tiny", images=150, out="side.png")
    again = geometry(run=pair[0], images=150)
    assert again == metrics and "variance_shares" in metrics
    assert read_results(Path(pair[0]))[-1]["metrics"] == metrics
    # The same numbers from the features themselves.
    loaded = load_backbone(pair[0])
    _, test = data.open_labelled("digits", seed=0)
    rows = test.rows[torch.randperm(179, generator=generator(0, 3))[:150].sort().values]
    clean = ViewRecipe(16, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
    view = make_view(test.images.whole(rows, None)[0], clean, generator=torch.Generator())
    with torch.no_grad():
        x = F.normalize(loaded.network.eval()(view), dim=1)
        z = F.normalize(load_method(loaded).eval().projector(loaded.network(view)), dim=1)
    for name, features in (("", x), ("embedding_", z)):
        distances = torch.pdist(features.double()) ** 2
        assert metrics[name + "uniformity"] == pytest.approx(float((-2 * distances).exp().mean().log()), abs=1e-4)
    assert 0 < metrics["alignment"] < 4 and metrics["alignment"] < -metrics["uniformity"] + 4
    picture = np.asarray(Image.open("side.png").convert("RGB"))
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x66, 0x66, 0x66)):  # SIM, BSIM, no run
        assert (np.abs(picture.astype(int) - colour).max(-1) < 8).sum() > 100, colour
    with pytest.raises(UserError, match="--out side.png: exists; name another picture"):
        geometry(run=pair[0], out="side.png")


@pytest.mark.pictures
def test_it_never_draws_over_a_picture(pair):
    folder = Path(pair[1])
    geometry(run=pair[1], images=120)
    first = (folder / "geometry.png").read_bytes()
    geometry(run=pair[1], images=130)
    assert (folder / "geometry.png").read_bytes() == first and (folder / "geometry-2.png").exists()


def test_what_stands_above_a_run(pair):
    assert [name_of(load_backbone(run), run) for run in pair] == ["byol, SIM", "byol, BSIM"]


def test_refusals(pair):
    for options, message in (
        (dict(images=5), "--images 5: want 100 or more"),
        (dict(beside="nowhere/x"), "nowhere/x: no such folder"),
        (dict(out="nowhere/a.png"), "--out nowhere/a.png: there is no folder nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            geometry(run=pair[0], **options)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-20, 1e20])
def test_a_collapsed_network_has_rank_1_and_shares_that_are_numbers(value):
    constant = torch.full((50, 8), value) * torch.linspace(0.5, 2, 8)
    unequal = constant * (1 + 1e-7 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))  # by rounding
    for x in (constant, unequal, F.normalize(constant.double(), dim=1).float()):
        assert effective_rank(x) == 1
        assert variance_shares(x).tolist() == [1] + [0] * 7
    x = unit(constant)
    found = measures(x, x, x)
    assert found["alignment"] == found["uniformity"] == 0 or value != 0
    assert (found["effective_rank"], found["variance_1"], found["variance_10"]) == (1, 100, 100)


def test_features_of_any_size_have_length_1():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0]])  # whose squares float32 cannot hold
    torch.testing.assert_close(unit(x)[[0, 2]], torch.tensor([[0.6, 0.8]] * 2))


def test_a_checkpoint_is_measured_and_not_the_last_one(pair):
    folder = Path(pair[0])
    numbers = {}
    for name in ("step_000006", "step_000012"):
        path = folder / "checkpoints" / name
        numbers[name] = geometry(run=str(path), images=100)
        saved = load_file(path / "method.safetensors")
        loaded = load_backbone(str(path))
        method = load_method(loaded)
        for key, value in loaded.network.state_dict().items():
            assert torch.equal(value, saved[f"backbone.{key}"])
        for key, value in method.projector.state_dict().items():
            assert torch.equal(value, saved[f"projector.{key}"])
        rows = data.open_labelled("digits", seed=0)[1]
        rows = rows, rows.rows[torch.randperm(179, generator=generator(0, 3))[:100].sort().values]
        clean = ViewRecipe(16, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
        view = make_view(rows[0].images.whole(rows[1], None)[0], clean, generator=torch.Generator())
        with torch.no_grad():
            x = loaded.network.eval()(view)
            both = {"": x, "embedding_": method.projector.eval()(x)}
        for prefix, features in both.items():
            wanted = effective_rank(F.normalize(features, dim=1))
            assert numbers[name][prefix + "effective_rank"] == pytest.approx(wanted, rel=1e-4)
    assert numbers["step_000006"]["effective_rank"] != numbers["step_000012"]["effective_rank"]
    again = geometry(run=pair[0], images=100)
    assert again == numbers["step_000012"]


def test_weights_that_were_replaced_are_measured_as_the_file_says(pair, place, capsys):
    shutil.copytree(pair[0], place / "run")
    other = load_file(Path(pair[1]) / "backbone.safetensors")
    save_file(other, place / "run" / "backbone.safetensors")
    found = geometry(run="run", images=100)
    wanted = geometry(run=pair[1], images=100)
    for name in ("uniformity", "effective_rank", "variance_1"):
        assert found[name] == wanted[name]
    assert not any(name.startswith("embedding_") for name in found)  # the projector is of other weights
    assert "run: embedding_... is left out" in capsys.readouterr().out
    last = place / "run" / "checkpoints" / "step_000012" / "method.safetensors"
    last.write_bytes(last.read_bytes()[:3000])
    lines = read_results(place / "run")
    with pytest.raises(UserError, match="--run run: run/checkpoints/step_000012/method.safetensors is damaged"):
        geometry(run="run", images=100)
    assert read_results(place / "run") == lines


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_neighbours(place, capsys, count):
    for split, each in (("train", 6), ("test", count)):
        for name in ("cat", "dog")[: 1 if count == 1 and split == "test" else 2]:
            for i in range(each):
                path = place / "pets" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(i, 70, 80).save(path)
    found = geometry(run="resnet_tiny", image_size=16, dataset="pets", workers=0, out="few.png")
    assert Path("few.png").exists() == (count == 3)
    assert ("only the alignment" in capsys.readouterr().out) == (count == 1)
    assert list(found) == ["alignment"] if count == 1 else 1 <= found["effective_rank"] <= 5


def test_weights_of_a_file_are_not_called_random(pair, place):
    shutil.copy(Path(pair[0]) / "backbone.safetensors", "mine.safetensors")
    loaded = load_backbone("mine.safetensors", architecture="resnet_tiny", image_size=16)
    assert name_of(loaded, "mine.safetensors") == "mine.safetensors"
    random = Backbone(backbone("resnet_tiny", 16), "resnet_tiny", 16, Path(), {})
    assert name_of(random, "resnet_tiny") == "resnet_tiny, random weights"
