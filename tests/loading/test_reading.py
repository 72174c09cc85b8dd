"""The way images are read is decided once for all splits, and recorded; the cache knows files that changed."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data
from eval.knn import knn
from flags import RunError
from loading import decoded, reading
from tests.test_data import encoded, picture, table
from train import pretrain


def split_folders(place, sizes, count=24):
    """train/ and test/ with two classes, bright and dark at the border; the last image of a split is of its size."""
    for split, (side, last) in sizes.items():
        for i in range(count):
            size = last if i == count - 1 else side
            path = place / "pets" / split / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((size, size, 3), 128 + i % 8, np.uint8)
            pixels[:3] = pixels[-3:] = pixels[:, :3] = pixels[:, -3:] = 250 * (i % 2)
            Image.fromarray(pixels).save(path)
    return str(place / "pets")


@pytest.mark.parametrize("sizes", [dict(train=(64, 64), test=(64, 65)), dict(train=(64, 65), test=(64, 64))])
def test_one_large_image_in_a_split_decides_for_all(place, sizes):
    path = split_folders(place, sizes)
    source = data.open_source(path)
    assert source.way.small is False and source.train.in_workers and source.queries[0].in_workers
    train, test = data.open_labelled(path)
    assert train.images.in_workers and test.images.in_workers
    again = data.open_labelled(path)  # told by a mark in the cache, not by decoding once more
    assert again[0].images.in_workers


def test_evaluations_follow_the_way_that_the_run_recorded(place, capsys):
    """A run on 64 pixels, whose test split got an image of 65 later: read whole, as the run read its images."""
    path = split_folders(place, dict(train=(64, 64)), count=40)
    options = dict(batch_size=8, steps=2, backbone="resnet_tiny", eval_every=0, image_size=16)
    run = pretrain(dataset=path, out="run", **options)
    config = json.loads((run / "config.json").read_text())
    assert config["small_images"] is True and config["image_shape"] == [64, 64]
    split_folders(place, dict(train=(64, 64), test=(64, 65)), count=40)
    assert data.open_labelled(path)[1].images.in_workers
    train, test = data.open_labelled(path, way=data.way_of(config))
    assert not train.images.in_workers and not test.images.in_workers
    assert test.images.shape == (64, 64) and len(test.rows) == 40
    assert knn(run="run", eval_split="test")["pixels_top1"] == 100  # the border tells the classes; a crop has none
    assert data.way_of(config, own=False).small is None


def test_a_run_on_large_images_is_evaluated_on_crops(place):
    path = split_folders(place, dict(train=(64, 65)))
    run = pretrain(dataset=path, out="run", batch_size=8, steps=1, backbone="resnet_tiny", eval_every=0, image_size=16)
    config = json.loads((run / "config.json").read_text())
    assert config["small_images"] is False and config["image_shape"] is None
    path = split_folders(place, dict(train=(64, 64)))
    assert data.open_labelled(path, way=data.way_of(config))[0].images.in_workers


@pytest.mark.parametrize("kind", ["folder", "parquet", "saved", "arrow"])
def test_files_that_change_under_equal_sizes_and_times_are_read_again(place, kind):
    def write(shade):
        rows = [
            {"bytes": encoded(Image.new("RGB", (12, 12), (shade + i, 0, 0)), "BMP"), "path": None} for i in range(8)
        ]
        made = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))
        shutil.rmtree("rows", ignore_errors=True)
        os.mkdir("rows")
        if kind == "folder":
            for i, row in enumerate(rows):
                with open(f"rows/{i}.bmp", "wb") as file:
                    file.write(row["bytes"])
        elif kind == "parquet":
            made.to_parquet("rows/a.parquet")
        else:
            made.save_to_disk("saved")
            if kind == "saved":
                os.rmdir("rows")
                os.rename("saved", "rows")
            else:
                shutil.copy("saved/data-00000-of-00001.arrow", "rows/a.arrow")
        for folder, _, names in os.walk("rows"):
            for name in names:
                os.utime(os.path.join(folder, name), ns=(10**18, 10**18))

    for shade in (10, 90):
        write(shade)
        reds = data.open_source("rows").train.whole(torch.arange(8), None)[0][:, 0, 0, 0]
        assert reds.tolist() == list(range(shade, shade + 8))


def test_the_sample_is_the_same_for_the_same_rows():
    rows = table(40).rename_column("img", "image")
    picked = [row for row, _ in reading._spread(rows, 16)]
    assert picked == [row for row, _ in reading._spread(rows, 16)] and picked[0] == 0 and len(picked) <= 20


def test_a_full_disk_while_images_are_decoded_is_one_line(place, monkeypatch):
    for i in range(4):
        picture(i).save(place / f"{i}.png")

    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "map", full)
    with pytest.raises(RunError, match=r"^--dataset \.: no space left in .*; Make room|HF_HOME=FOLDER") as caught:
        data.open_source(".")
    assert str(datasets.config.HF_DATASETS_CACHE) in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing_half_in_the_cache(place, monkeypatch):
    for i in range(40):
        picture(i).save(place / f"{i}.png")
    (place / "cache").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    whole, calls = decoded.decoded, []

    def fills(*given):
        calls.append(1)
        if len(calls) > 30:
            raise OSError(122, "Disk quota exceeded")
        return whole(*given)

    monkeypatch.setattr(decoded, "decoded", fills)
    with pytest.raises(RunError, match="no space left in .*/cache"):
        data.open_source(".")
    assert [path.name[:8] for path in place.glob("cache/bsim/*")] == ["listing-"]
    monkeypatch.setattr(decoded, "decoded", whole)
    assert len(data.open_source(".").train) == 40
