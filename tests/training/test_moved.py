"""A run and its data: found from anywhere, named anew when it moves, refused when it is another."""

import json
import os
from pathlib import Path

import pytest

from eval.knn import knn
from eval.results import read_results
from flags import UserError
from tests.test_data import encoded, folder, picture
from train import pretrain

RUN = dict(backbone="resnet_tiny", batch_size=8, steps=1, log_every=1, eval_every=0, seed=3)


@pytest.fixture
def run(place):
    """A run of one step on pets/, seen from another folder."""
    folder(place, 24)
    run = pretrain(dataset="pets", out="run", **RUN).absolute()
    (place / "elsewhere").mkdir()
    os.chdir(place / "elsewhere")
    return run


def config(run):
    return json.loads((run / "config.json").read_text())


def test_a_run_finds_its_data_from_another_folder(run, capsys):
    assert config(run)["dataset"] == str(run.parent / "pets")
    pretrain(resume=str(run), steps=2)
    assert knn(run=str(run))["top1"] >= 0
    assert f"found 24 images in 2 classes under {run.parent}/pets; all used" in capsys.readouterr().out


def test_data_that_moved_is_named_anew(run):
    os.rename(run.parent / "pets", "animals")
    with pytest.raises(
        UserError, match="pets: no such file or folder; if it moved, name where it is now: --dataset NEW"
    ):
        pretrain(resume=str(run), steps=2)
    assert knn(run=str(run), dataset="animals") is not None  # the run's own columns, seed and held-out tenth
    pretrain(resume=str(run), dataset="animals", steps=2)
    assert config(run)["dataset"] == str(Path("animals").absolute())
    assert knn(run=str(run)) is not None


@pytest.mark.parametrize("change", ["another name", "another size"])
def test_data_that_is_another_is_refused_though_it_is_as_much(run, change, capsys):
    pets = run.parent / "pets"
    if change == "another name":
        (pets / "dog" / "1.png").unlink()
        (pets / "dog" / "99.png").write_bytes(encoded(picture(1)))
    else:
        (pets / "dog" / "1.png").write_bytes(encoded(picture(70)) + b"\0" * 5)
    said = "is not what the run began with: names or sizes of files differ"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        pretrain(resume=str(run), steps=2)
    os.rename(pets, "animals")
    with pytest.raises(UserError, match=said):
        pretrain(resume=str(run), dataset="animals", steps=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    os.rename("animals", pets)
    knn(run=str(run))
    assert "is not what the run trained on: names or sizes of files differ" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(12, 12), (70, 90)])
def test_the_run_folder_lists_what_is_left_out(place, size):
    pets = folder(place, 40, size)
    for i in (6, 13):
        (pets / ("cat", "dog")[i % 2] / f"{i}.png").write_bytes(b"no image")
    (pets / ".hidden.png").write_bytes(encoded(picture(0)))
    run = pretrain(dataset="pets", out="run", image_size=16, skip_bad_images=True, **{**RUN, "steps": 12})
    listed = (run / "left_out.txt").read_text().splitlines()
    assert ".hidden.png: hidden" in listed
    bad = [line for line in listed if line.endswith(": cannot be read")]
    assert len(listed) == 3 and sorted(line.split("/")[-1] for line in bad) == [
        "13.png: cannot be read",
        "6.png: cannot be read",
    ]


def test_the_runs_own_data_is_read_as_the_run_read_it_whoever_names_it(place):
    folder(place, 60)
    pretrain(dataset="pets", split="train[:50]", out="run", **RUN)
    accuracy = knn(run="run")
    assert knn(run="run", dataset="pets") == knn(run="run", dataset=str(place / "pets")) == accuracy
    settings = [line["settings"] for line in read_results(Path("run"))]
    assert [s["split"] for s in settings] == ["train[:50]"] * 3
    knn(run="run", dataset="pets", split="train")
    assert read_results(Path("run"))[-1]["settings"]["split"] == "train"
