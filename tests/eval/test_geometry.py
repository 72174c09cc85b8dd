"""Measures of the sphere against closed forms, and the picture that lays runs side by side."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from bsim import ViewRecipe, make_view
from eval.geometry import effective_rank, geometry, measures, name_of, variance_shares
from eval.results import read_results
from eval.weights import load_backbone, load_method
from flags import UserError
from loading.batches import generator
from train import pretrain


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
    options = dict(method="byol", batch_size=64, steps=12, eval_every=0)
    return [str(pretrain(**options, sim_weight=w, out=str(place / f"w{w:g}"))) for w in (1.0, 0.0)]


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
    ):
        with pytest.raises(UserError, match=message):
            geometry(run=pair[0], **options)
