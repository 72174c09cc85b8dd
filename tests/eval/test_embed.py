"""Features in a file: one row an image, in the dataset's order, whole or absent."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

import data
from eval import embed as module
from eval.embed import embed
from eval.features import features
from flags import RunError, UserError
from tests.test_data import encoded, folder, picture, spoiled, table
from train import pretrain
from training.weights import load_backbone

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("embed") / "run"
    return str(pretrain(backbone="resnet_tiny", image_size=16, batch_size=32, steps=2, eval_every=0, out=str(out)))


def wanted(run, dataset, rows, **options):
    """By eval.features, of the images one by one."""
    loaded = load_backbone(run)
    images = data.open_images(dataset, **options).images
    found, _ = features(Accelerator(cpu=True), loaded.network.eval(), (images, rows), image_size=16)
    return found.numpy()


@pytest.mark.parametrize("size", [(12, 12), (70, 90)])
def test_a_folder_gives_files_classes_and_features_in_its_order(place, run, size, monkeypatch, capsys):
    monkeypatch.setattr(module, "ROWS", 7)
    path = str(folder(place / "pets", 20, size))
    out = embed(run=run, dataset=path, out="new/features.parquet")
    found = pandas.read_parquet(out)
    assert list(found.columns) == ["file", "label", "feature"] and len(found) == 20
    assert [Path(path, name).is_file() for name in found.file] == [True] * 20
    assert [name.split("/")[0] for name in found.file] == list(found.label) and found.file.is_monotonic_increasing
    right = wanted(run, path, torch.arange(20))
    np.testing.assert_allclose(np.stack(found.feature), right, atol=1e-5)
    assert found.feature[0].dtype == np.float32
    again = datasets.load_dataset("parquet", data_files=str(out), split="train")
    assert again["file"][:] == list(found.file)
    assert "features of 20 images, 192 numbers each -> new/features.parquet" in capsys.readouterr().out
    embed(run=run, dataset=path, out="features.npy", normalize=True, half=True)
    array = np.load("features.npy")
    assert array.dtype == np.float16 and array.shape == (20, 192)
    np.testing.assert_allclose(array, right / np.linalg.norm(right, axis=1, keepdims=True), atol=2e-3)
    listed = pandas.read_csv("features.csv")
    assert list(listed.file) == list(found.file) and list(listed.label) == list(found.label)
    assert sorted(place.rglob(".*")) == []


def test_rows_without_names_are_numbered_and_half_is_read_by_others(place, run):
    table(20).remove_columns("label").to_parquet("rows.parquet")
    out = embed(run=run, dataset="rows.parquet", out="features.parquet", half=True)
    found = pq.read_table(out)
    assert found.column_names == ["row", "feature"] and found["row"].to_pylist() == list(range(20))
    assert found["feature"].type.value_type == "halffloat"
    assert pandas.read_parquet(out).feature[3].dtype == np.float16


@pytest.mark.parametrize("size", [(12, 12), (70, 90)])
def test_a_bad_image_is_refused_or_a_row_without_a_feature(place, run, size, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    path = str(spoiled(place, 40, size))
    with pytest.raises(UserError, match=r"is not an image that can be read \(.*, /.*\.png\).*--skip_bad_images"):
        embed(run=run, dataset=path, out="features.parquet")
    assert not Path("features.parquet").exists() and sorted(place.glob(".*")) == []
    out = embed(run=run, dataset=path, out="features.parquet", skip_bad_images=True)
    found = pandas.read_parquet(out)
    bad = found[found.feature.isna()]
    assert len(found) == 40 and len(bad) == 2
    assert {os.path.getsize(Path(path, name)) for name in bad.file} == {40}  # those that were cut
    embed(run=run, dataset=path, out="features.npy", skip_bad_images=True)
    assert list(np.isnan(np.load("features.npy")).all(1)) == list(found.feature.isna())
    good = found[found.feature.notna()]
    clean = wanted(run, str(folder(place / "clean", 40, size)), torch.tensor(good.index.to_numpy()))
    np.testing.assert_allclose(np.stack(good.feature), clean, atol=1e-5)


def test_what_is_there_is_left_alone(place, run):
    path = str(folder(place / "pets", 20, (12, 12)))
    Path("features.parquet").write_text("mine")
    Path("other.csv").write_text("mine")
    for out, named in (("features.parquet", "features.parquet"), ("other.npy", "other.csv")):
        with pytest.raises(UserError, match=f"{named} exists, and nothing is overwritten; name another: --out .*-2"):
            embed(run=run, dataset=path, out=out)
    with pytest.raises(UserError, match="--out f.txt: want a file that ends in .parquet or .npy"):
        embed(run=run, dataset=path, out="f.txt")
    assert Path("features.parquet").read_text() == Path("other.csv").read_text() == "mine"


@pytest.mark.parametrize("out", ["features.parquet", "features.npy"])
def test_what_is_interrupted_or_has_no_room_leaves_nothing(place, run, out, monkeypatch):
    path = str(folder(place / "pets", 20, (12, 12)))
    monkeypatch.setattr(module, "ROWS", 4)
    before = sorted(place.iterdir())
    real = module.in_batches
    for error, raised in ((OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)):
        calls = []

        def fails(*given, error=error, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise error
            yield from real(*given)

        monkeypatch.setattr(module, "in_batches", fails)
        with pytest.raises(raised, match="No space left" if raised is RunError else ""):
            embed(run=run, dataset=path, out=out)
        assert sorted(place.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["parquet", "npy"])
def test_two_processes_write_what_one_does(place, run, ending):
    path = str(folder(place / "pets", 21, (12, 12)))
    embed(run=run, dataset=path, out=f"one.{ending}")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "--",
        "eval.embed",
    ]
    words = ["--run", run, "--dataset", path, "--out", str(place / f"two.{ending}")]
    subprocess.run([*command, *words], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ending == "parquet":
        one, two = (pandas.read_parquet(f"{n}.parquet") for n in ("one", "two"))
        assert list(one.file) == list(two.file)
        np.testing.assert_allclose(np.stack(one.feature), np.stack(two.feature), atol=1e-5)
    else:
        assert Path("one.csv").read_text() == Path("two.csv").read_text()
        np.testing.assert_allclose(np.load("one.npy"), np.load("two.npy"), atol=1e-5)


@pytest.mark.parametrize("out", ["features.parquet", "features.npy"])
def test_parts_without_labels_or_names_are_of_the_same_kind(place, run, out, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    rows = table(20)
    kinds = datasets.Features(img=datasets.Image(), label=rows.features["label"])
    files = [{"bytes": encoded(picture(i)), "path": f"{i}.png" if i < 9 else None} for i in range(20)]
    some = {"img": files, "label": [i % 2 if i < 9 else None for i in range(20)]}
    datasets.Dataset.from_dict(some, kinds).to_parquet("some.parquet")
    found = embed(run=run, dataset="some.parquet", out=out)
    read = pandas.read_parquet(found) if out.endswith("parquet") else pandas.read_csv("features.csv")
    assert list(read["file"]) == [f"{i}.png" for i in range(9)] + [f"row {i}" for i in range(9, 20)]
    assert list(read["label"][:9]) == ["cat", "dog"] * 4 + ["cat"] and read["label"][9:].isna().all()
