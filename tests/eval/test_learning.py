"""Is it learning? Few labels and none: values against independent computations, and what a run leaves of them."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from PIL import Image
from torch.nn import functional as F

import data
import eval.knn
from bsim import ViewRecipe
from eval.knn import few_labels
from eval.learning import figures, rankme
from methods.networks import backbone
from tests.test_data import picture
from train import pretrain
from training import pictures
from training.folder import read_metrics


def test_the_nearest_mean_of_few_labels():
    """By loops: all draws of one and of two images a class, whose mean the drawn ones come near."""
    rng = np.random.default_rng(0)
    bank, classes = rng.normal(size=(6, 5)), np.array([0, 1, 0, 1, 0, 1])
    bank[:, 0] += 2.0 * classes
    queries, truth = rng.normal(size=(40, 5)), rng.integers(0, 2, 40)
    queries[:, 0] += 2.0 * truth

    def unit(x):
        return x / np.linalg.norm(x)

    def accuracy(zero, one):
        means = [unit(np.mean([unit(bank[i]) for i in rows], 0)) for rows in (zero, one)]
        return np.mean([np.argmax([unit(q) @ m for m in means]) == y for q, y in zip(queries, truth)]) * 100

    of = [[i for i in range(6) if classes[i] == c] for c in (0, 1)]
    one = [accuracy([i], [j]) for i in of[0] for j in of[1]]
    two = [accuracy([i, k], [j, m]) for i in of[0] for k in of[0] if k > i for j in of[1] for m in of[1] if m > j]
    given = (torch.tensor(x) for x in (bank, classes, queries, truth))
    given = [x.float() if x.is_floating_point() else x for x in given]
    for shots, wanted in ((1, one), (2, two)):
        found, error = few_labels(*given, shots, seed=0, draws=2000)
        assert found == pytest.approx(np.mean(wanted), abs=4 * error)
        assert error == pytest.approx(np.std(wanted) / math.sqrt(2000), rel=0.1)
    assert few_labels(*given, 3, seed=0)[1] == pytest.approx(0, abs=1e-9)  # there is one draw of all
    assert few_labels(*given, 4, seed=0) is None
    assert few_labels(*given, 1, seed=3) == few_labels(*given, 1, seed=3) != few_labels(*given, 1, seed=4)


def test_few_labels_ask_queries_of_all_classes(monkeypatch):
    """Queries in order of class, as folders are, of which only every tenth is asked; the last half is wrong."""
    monkeypatch.setattr(eval.knn, "FEW_QUERIES", 10)
    bank, classes = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    truth = torch.arange(4).repeat_interleave(25)
    wrong = torch.where(truth < 2, truth, 5 - truth)
    assert few_labels(bank, classes, torch.eye(4)[truth], wrong, 1, seed=0)[0] == pytest.approx(50)


def test_rankme():
    """Garrido et al., 2023, equation 1, of matrices whose singular values are known."""
    q, _ = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert rankme(q[:, :6]) == pytest.approx(6, abs=1e-4)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.125, 0.125]
    assert rankme(q[:, :4] * values) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-5)
    assert rankme(torch.ones(20, 5)) == pytest.approx(1) and rankme(torch.zeros(20, 5)) == pytest.approx(1)


OPTIONS = dict(backbone="resnet_tiny", batch_size=32, image_size=16, log_every=2, steps=4)


def flat(place, count):
    rng = np.random.default_rng(1)
    (place / "flat").mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(place / "flat" / f"{i:03d}.png")


def test_a_run_without_labels_is_measured_on_images_that_it_does_not_train_on(place, capsys):
    flat(place, 200)
    run = pretrain(dataset="flat", out="run", eval_every=2, **OPTIONS)
    config = json.loads((run / "config.json").read_text())
    assert config["images"] == 180 and config["held_out"] is True
    lines = [line for line in read_metrics(run) if "effective_rank" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 1 < line["effective_rank"] <= 20 and line["uniformity"] < 0 < line["alignment"] and "knn" not in line
    said = capsys.readouterr().out
    assert "accuracy is left out: no labels. Effective rank, alignment and uniformity of 20 held-out images" in said
    assert "effective rank" in said.split("finished")[1] and (run / "neighbours.png").exists()
    whole = pretrain(dataset="flat", out="whole", eval_every=0, **OPTIONS)
    assert json.loads((whole / "config.json").read_text())["images"] == 200
    assert not (whole / "neighbours.png").exists()
    longer = pretrain(resume="whole", steps=6, eval_every=2)  # what it trains on stays what it was
    assert all("effective_rank" not in line for line in read_metrics(longer))
    assert "nothing is evaluated: no labels, and none was held out when the run began" in capsys.readouterr().out


def test_few_labels_are_in_the_metrics_first_with_pixels_and_the_random_network(place, capsys):
    run = pretrain(out="run", eval_every=2, split="train[:400]", **OPTIONS)
    lines = [line for line in read_metrics(run) if "knn" in line]
    first = [f"{k}_{end}" for k in ("one_label", "five_labels", "knn") for end in ("pixels", "random")]
    assert all(name in lines[0] and name not in lines[1] for name in first)
    for line in lines:
        assert 10 < line["one_label"] < line["five_labels"] <= 100 and 0 < line["one_label_se"] < 5
    said = capsys.readouterr().out.split("finished")[1]
    assert said.index("1 label a class") < said.index("5 labels a class") < said.index("k-NN, all labels")


def test_neighbours_are_the_most_alike_and_wrong_classes_are_marked(place, monkeypatch):
    """A method that does not train: what lies nearest is told by the pixels of the random network's features."""
    drawn = []
    monkeypatch.setattr(pictures, "draw_neighbours", lambda path, *given: drawn.append(given))
    run = pretrain(out="run", eval_every=4, split="train[:300]", lr=1e-9, **OPTIONS)
    (queries, near, names) = drawn[0]
    assert queries.shape == (10, 3, 8, 8) and near.shape == (10, 8, 3, 8, 8)
    assert [len(row) for row in names] == [9] * 10 and {x for row in names for x in row} <= set("0123456789")
    same = np.mean([row[0] == other for row in names for other in row[1:]])
    assert same > 0.5  # of ten classes
    for image, others in zip(queries, near):  # nothing that is held out is in the bank
        assert not (others == image).flatten(1).all(1).any()
    assert F.mse_loss(near[:, 0].float(), queries.float()) < F.mse_loss(near.flip(0)[:, 0].float(), queries.float())
    assert run.exists()


def test_images_without_a_label_count_where_none_is_needed(place):
    """The label-free figures of a split are the same whether its column of labels says -1 or is not there."""
    kinds = Features(img=datasets.Image(), label=Value("int64"))
    rows = Dataset.from_dict({"img": [picture(i, 16, 16) for i in range(300)], "label": [-1] * 300}, kinds)
    rows.to_parquet(place / "unknown.parquet")
    rows.remove_columns("label").to_parquet(place / "none.parquet")
    torch.manual_seed(0)
    network, recipes, found = backbone("resnet_tiny", 16), (ViewRecipe(16),) * 2, []
    for name in ("unknown", "none"):
        source = data.open_source(f"{name}.parquet", hold_out=True)
        found.append(figures(Accelerator(cpu=True), source, network, recipes, image_size=16, workers=0, seed=0))
    assert found[0] == found[1] and found[0]["effective_rank"] > 1
