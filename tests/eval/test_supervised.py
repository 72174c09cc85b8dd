"""Training a classifier on labelled images, some of which cannot be read."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import data
from eval import supervised
from eval.features import labelled_features
from flags import UserError
from training.weights import Backbone


@pytest.mark.parametrize("side", [24, 70])
def test_with_bad_images_the_label_is_that_of_the_image_that_was_read(place, monkeypatch, side):
    """Cats are black and dogs are white, and so is what each label must belong to; small images, and large ones."""
    for i in range(24):
        path = place / "pets" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side, 3), 255 * (i % 2), np.uint8)).save(path)
    for name in ("cat/22.png", "dog/23.png", "cat/04.png", "dog/01.png"):  # the last of a class, and others
        (place / "pets" / name).write_bytes(b"no image")
    train, test = data.open_labelled("pets", skip_bad_images=True)
    shown, said = [], []

    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, images):
            shown.append(images.mean((1, 2, 3)).detach())
            return images.mean((1, 2, 3))[:, None] * self.weight

    true = supervised.F.cross_entropy

    def checked(scores, truth):
        assert torch.equal(truth, (shown[-1] > 0).long())
        return true(scores, truth)

    monkeypatch.setattr(supervised.F, "cross_entropy", checked)
    task = SimpleNamespace(
        accelerator=Accelerator(cpu=True), train=train, test=test, seed=0, workers=0, say=said.append,
        backbone=Backbone(None, "", 16, Path(), {}),
    )  # fmt: skip
    model = Brightness()
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    supervised.fit(task, model, train.rows, descent, epochs=3, batch_size=len(train.rows))
    assert len(shown) == 3
    bad = [line for line in said if "cannot be read" in line]
    if side == 24:
        assert "left out 4 images of split train that cannot be read" in train.found and not bad
    else:
        names = [train.images.table[i]["image"]["path"] for i in train.rows.tolist()]
        count = sum(name.endswith(("22.png", "23.png", "04.png", "01.png")) for name in names)
        assert len(bad) == 1 and bad[0].startswith(f"left out {count} image") and ".png" in bad[0]
        whole = SimpleNamespace(**vars(task) | {"backbone": Backbone(model, "", 16, Path(), {})})
        found, labels = labelled_features(whole, train)
        assert len(found) == len(labels) == len(train.rows) - count
        assert torch.equal(labels, (found[:, 0] > 0).long())
        assert said[-1].startswith(f"left out {count} image") and "of the training set" in said[-1]


def test_batch_norm_that_learns_wants_two_images():
    supervised.check_batch(1, 10, 1)
    supervised.check_batch(4, 10, 2, each=2)
    for size, world in ((1, 1), (2, 2), (3, 2), (12, 2)):
        said = f"--batch_size {size}: want a multiple of {world} processes, 2 images or more for each, up to the 10"
        with pytest.raises(UserError, match=said):
            supervised.check_batch(size, 10, world, each=2)
