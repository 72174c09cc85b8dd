"""Parquet, Arrow files, saved datasets, the Hub: no copy that is not needed, and no word of Python's in an error."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from huggingface_hub import constants

import data
from flags import UserError
from loading import decoded, images
from tests.test_data import encoded, folder, picture, table

LARGE = 40  # images of 70 x 90 pixels: too large for the cache of small ones


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def disk(place):
    """Bytes of images in a cache: tables of names are small."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and path.stat().st_size > 50_000)


def noise(i):
    return np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def rows():
    features = Features(img=datasets.Image(), label=ClassLabel(names=["cat", "dog"]))
    images = [{"bytes": encoded(data.sources.Image.fromarray(noise(i))), "path": None} for i in range(LARGE)]
    return Dataset.from_dict({"img": images, "label": [i % 2 for i in range(LARGE)]}, features)


# No second copy.


def test_parquet_is_converted_once_and_a_part_costs_nothing(place, cache, rows):
    rows.to_parquet("rows.parquet")
    shutil.rmtree(cache, ignore_errors=True)
    data.open_source("rows.parquet")
    once = disk(cache)
    size = os.path.getsize("rows.parquet")
    assert 0.9 * size < once < 1.1 * size
    part = data.open_source("rows.parquet", split="train[:30]")
    assert disk(cache) == once and len(part.train) == 30
    parts = data.open_labelled("rows.parquet", split="train[:20]", eval_split="train[20:]")
    assert disk(cache) == once and [len(x.rows) for x in parts] == [20, 20]


def test_parts_of_a_split_of_small_images_share_what_was_decoded(place, cache, monkeypatch):
    monkeypatch.setattr(decoded, "BLOCK", 10)
    whole, calls = decoded.decoded, []
    monkeypatch.setattr(decoded, "decoded", lambda *given: calls.append(1) or whole(*given))
    table(48).to_parquet("rows.parquet")
    first = data.open_source("rows.parquet", split="train[:25]")  # three blocks of ten
    assert len(calls) == 30 and len(first.train) == 25
    every = data.open_source("rows.parquet")
    assert len(calls) == 48 and len(every.train) == 48
    last, _ = data.open_labelled("rows.parquet", split="train[17:]", eval_split="train[:17]")
    assert len(calls) == 48
    rows = torch.arange(31)
    assert torch.equal(last.images.whole(rows, None)[0], every.train.whole(rows + 17, None)[0])
    assert torch.equal(last.images.labels(rows), every.train.labels(rows + 17))
    assert torch.equal(first.train.whole(rows[:25], None)[0], every.train.whole(rows[:25], None)[0])


def test_a_bad_row_outside_a_part_is_not_in_its_way_and_a_passing_fault_is_forgotten(place, cache, monkeypatch):
    monkeypatch.setattr(decoded, "BLOCK", 30)
    whole = decoded.decoded
    table(48).to_parquet("rows.parquet")

    def fails(record, *given):
        if record["bytes"] == broken:
            raise ValueError("Input/output error")
        return whole(record, *given)

    broken = encoded(picture(27))
    monkeypatch.setattr(decoded, "decoded", fails)
    assert len(data.open_source("rows.parquet", split="train[:25]").train) == 25
    with pytest.raises(UserError, match=r"row 2 of train\[25:\] is not an image that can be read"):
        data.open_source("rows.parquet", split="train[25:]")
    kept = data.open_source("rows.parquet", split="train[25:]", skip_bad_images=True)
    assert len(kept.train) == 22 and kept.left_out == ("row 2 of train[25:]: cannot be read",)
    with pytest.raises(UserError, match="row 27 of train is not"):
        data.open_source("rows.parquet")
    monkeypatch.setattr(decoded, "decoded", whole)
    assert len(data.open_source("rows.parquet").train) == 48


@pytest.mark.parametrize("kind", ["folder", "saved", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("labels", ["numbers", "names"])
def test_folders_arrow_files_and_saved_datasets_are_read_in_place(place, cache, rows, kind, labels):
    spec = place / "data" / kind
    spec.parent.mkdir()
    if labels == "names":
        rows = rows.remove_columns("label").add_column("label", [("cat", "dog")[i % 2] for i in range(LARGE)])
    if kind == "folder":
        for i in range(LARGE):
            path = spec / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.sources.Image.fromarray(noise(i)).save(path)
    elif kind == "saved":
        rows.save_to_disk(str(spec))
    else:
        arrow = rows.data.table if labels == "numbers" else rows.data.table.combine_chunks()
        new = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with pa.OSFile(str(spec), "wb") as file, new(file, arrow.schema) as writer:
            writer.write_table(arrow)
    shutil.rmtree(cache, ignore_errors=True)
    before = {path: path.stat().st_mtime_ns for path in spec.parent.rglob("*")}
    source = data.open_source(str(spec))
    data.open_source(str(spec), split="train[:30]")
    data.open_labelled(str(spec), split="train[5:]")
    assert disk(cache) == 0
    assert {path: path.stat().st_mtime_ns for path in spec.parent.rglob("*")} == before
    labels = source.train.labels(torch.arange(LARGE)).tolist()
    seen = [np.asarray(images.decode(source.train.table[i]["image"])) for i in range(LARGE)]
    index = [int(np.flatnonzero([(x == noise(i)).all() for i in range(LARGE)])[0]) for x in seen]
    assert sorted(index) == list(range(LARGE)) and labels == [i % 2 for i in index]


def test_small_images_of_a_saved_dataset_are_not_cached_beside_it(place, cache):
    DatasetDict(train=table(24), test=table(6)).save_to_disk("saved")
    before = sorted(Path("saved").rglob("*"))
    assert data.open_source("saved").images == 24
    assert sorted(Path("saved").rglob("*")) == before and list((cache / "bsim").glob("pixels-*"))


def test_a_parquet_file_that_changes_under_its_old_time_is_read_anew(place, cache):
    table(24).to_parquet("rows.parquet")
    data.open_source("rows.parquet")
    times = os.stat("rows.parquet").st_atime_ns, os.stat("rows.parquet").st_mtime_ns
    table(30).to_parquet("rows.parquet")
    os.utime("rows.parquet", ns=times)
    assert "found 30 images" in data.open_source("rows.parquet").found[0]


# What is not there.


@pytest.mark.parametrize("kind", ["folder", "parquet", "by datasets"])
def test_what_is_gone_is_not_answered_from_a_cache(place, cache, monkeypatch, kind):
    if kind == "folder":
        folder(place, 24)
    else:
        (place / "pets").mkdir()
        table(24).to_parquet("pets/train.parquet")
    if kind == "by datasets":  # as another program would have read it
        datasets.load_dataset("pets")
    data.open_source("pets")
    (place / "new").mkdir()
    monkeypatch.chdir(place / "new")
    for spec in ("pets", "imagefolder", "parquet", "one/pets"):
        with pytest.raises(
            UserError, match=f"--dataset {spec}: is no file or folder here, and the Hub did not serve it"
        ):
            data.open_source(spec)
    with pytest.raises(UserError, match="pets: no such file or folder; if it moved, name where it is now: --dataset"):
        data.open_source(str(place / "new" / "pets"))


def test_the_hubs_own_cache_is_asked(place, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(a) or {"train": table(24)})
    (place / "hub" / "datasets--pets" / "snapshots" / "abc").mkdir(parents=True)
    assert data.open_source("pets").images == 22 and asked == [("hf://datasets/pets", None)]


# What is in the way.


def bare(path, images, **columns):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    records = pa.array([image and {"bytes": image, "path": None} for image in images], kind)
    pq.write_table(pa.table({"image": records, **columns}), path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [(12, 12), (70, 90)])
def test_a_null_image_is_said(place, size, streaming):
    files = [encoded(picture(i, *size)) for i in range(40)]
    bare("rows.parquet", [*files[:3], None, *files[4:]], label=[i % 2 for i in range(40)])
    if not streaming:
        source = data.open_source("rows.parquet", skip_bad_images=True, label_column="none")
        with pytest.raises(UserError, match="row 3 of train is not .* read .the row has no image: it is null"):
            data.open_source("rows.parquet")
            images.LargeImages(source.train.table, "train", False).whole(torch.tensor([3]), 12)
    else:
        with pytest.raises(UserError, match="the row has no image: it is null"):
            data.open_source("rows.parquet", streaming=True)


def test_bytes_without_a_type_are_offered(place):
    pq.write_table(pa.table({"jpg": [encoded(picture(i)) for i in range(20)], "cls": [0, 1] * 10}), "raw.parquet")
    with pytest.raises(UserError, match="no column holds images; it has jpg .binary., .*: --image_column jpg"):
        data.open_source("raw.parquet")
    assert data.open_source("raw.parquet", image_column="jpg").found[0].startswith("found 20 images in 2 classes")


@pytest.mark.parametrize("name", ["label", "class", "Label"])
def test_names_of_classes_are_found_and_numbered_by_their_sorted_list(place, name):
    words = ["plumless", "buckeroo"] * 15  # of the same crc32
    files = [encoded(picture(i)) for i in range(30)]
    bare("rows.parquet", files, **{name: words, "id": list(range(30)), "caption": words[::-1]})
    source = data.open_source("rows.parquet")
    assert source.train.labels(torch.arange(30)).tolist() == [1, 0] * 15
    train, test = data.open_labelled("rows.parquet")
    assert train.names == test.names == ["buckeroo", "plumless"]
    stream = data.open_source("rows.parquet", streaming=True)
    assert set(stream.bank[0].labels(stream.bank[1]).tolist()) == {0, 1}


def test_a_class_that_is_only_in_the_test_split_is_named(place):
    (place / "rows").mkdir()
    files = [encoded(picture(i)) for i in range(24)]
    bare("rows/train.parquet", files, label=["cat", "eel"] * 12)
    bare("rows/test.parquet", files, label=["cat", "dog"] * 12)
    with pytest.raises(UserError, match="class dog is only in the split to evaluate"):
        data.open_labelled("rows")


@pytest.mark.parametrize("streaming", [False, True])
def test_minus_one_is_no_label_and_other_negatives_are_refused(place, streaming):
    files = [encoded(picture(i)) for i in range(40)]
    bare("rows.parquet", files, label=[-1, None] * 5 + [0, 1] * 15)
    source = data.open_source("rows.parquet", streaming=streaming)
    assert any("images without a label (-1 or null)" in line for line in source.found)
    if not streaming:
        assert "split train: 10 of 40 images" in source.found[1]
        train, test = data.open_labelled("rows.parquet")
        assert len(train.rows) + len(test.rows) == 30 and "10 of 40 images without a label" in train.found[0]
    bare("rows.parquet", files, label=[-2, -1] + [0, 1] * 19)
    with pytest.raises(UserError, match="label -2 in 1 row; -1 means no label, and no other negative"):
        data.open_source("rows.parquet", streaming=streaming)


def test_files_that_do_not_fit_are_named(place):
    (place / "two").mkdir()
    files = [encoded(picture(i)) for i in range(20)]
    bare("two/a.parquet", files, label=[0, 1] * 10)
    bare("two/b.parquet", files, label=["x"] * 20)
    with pytest.raises(
        UserError, match=r"two: cannot be read \(.*two/b.parquet has label as string, .*two/a.parquet as"
    ):
        data.open_source("two")
    bare("two/b.parquet", files, label=[0, 1] * 10, extra=[1] * 20)
    with pytest.raises(
        UserError, match=r"two/b.parquet has columns image, label, extra; .*two/a.parquet has image, la"
    ):
        data.open_source("two")
    Path("two/b.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"two/b.parquet: it is empty: 0 bytes"):
        data.open_source("two")
    Path("two/b.parquet").unlink()
    Path("two/notes.csv").write_text("a,b\n")
    assert "not read: notes.csv" in data.open_source("two").found[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "saved", "one file"])
def test_a_split_without_rows_is_named(place, kind, streaming):
    none, some = table(24).select([]), table(24)
    if kind == "saved":
        DatasetDict(train=none, test=some).save_to_disk("rows")
    elif kind == "parquet":
        Path("rows").mkdir()
        none.to_parquet("rows/train.parquet")
        some.to_parquet("rows/test.parquet")
    else:
        none.to_parquet("rows")
        shutil.move("rows", "rows.parquet")
    spec = "rows.parquet" if kind == "one file" else "rows"
    with pytest.raises(UserError, match=f"split 'train' of {spec} has no rows"):
        data.open_source(spec, streaming=streaming)


def test_a_clone_with_several_configurations(place):
    for name in ("one", "two"):
        (place / "clone" / name).mkdir(parents=True)
        rows = table(24 if name == "one" else 30)
        rows = rows if name == "one" else rows.add_column("more", list(range(30)))
        rows.to_parquet(f"clone/{name}/train-00000-of-00001.parquet")
    table(6).to_parquet("clone/one/test-00000-of-00001.parquet")
    (place / "clone" / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: one/train-*\n"
        "  - split: test\n    path: one/test-*\n- config_name: two\n  data_files: two/*.parquet\n---\n# Pets\n"
    )
    with pytest.raises(UserError, match="--dataset clone: has configurations one, two; choose: --subset one"):
        data.open_source("clone")
    one = data.open_source("clone", subset="one")
    assert one.images == 24 and len(one.queries[1]) == 6
    assert data.open_source("clone", subset="two").found[0].startswith("found 30 images")
    with pytest.raises(UserError, match="--subset three: clone has one, two"):
        data.open_source("clone", subset="three")
    (place / "clone" / "README.md").unlink()
    with pytest.raises(UserError, match="--subset one: clone is a folder without configurations"):
        data.open_source("clone", subset="one")


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_an_arrow_stream_that_is_cut_between_batches_is_refused(place, kind):
    path = place / "set" / "data.arrow"
    path.parent.mkdir()
    if kind == "saved":
        table(24).save_to_disk("set")
        path = next((place / "set").glob("*.arrow"))
    rows = table(24).data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=8):
            writer.write_batch(batch)
            end = file.tell()
    assert data.open_source("set").found[0].startswith("found 24 images")
    with open(path, "r+b") as file:
        file.truncate(end)
    with pytest.raises(UserError, match=f"set: cannot be read .*{'' if kind == 'saved' else 'data.arrow'}.*is cut"):
        data.open_source("set")


def test_a_configuration_may_list_splits_as_a_mapping(place):
    (place / "clone" / "data").mkdir(parents=True)
    table(24).to_parquet("clone/data/a.parquet")
    table(6).to_parquet("clone/data/b.parquet")
    head = "configs:\n- config_name: x\n  data_files: {train: data/a.parquet, test: data/b.parquet}\n"
    (place / "clone" / "README.md").write_text(f"---\n{head}---\n")
    assert len(data.open_source("clone").queries[1]) == 6


def test_files_of_a_clone_are_splits_by_the_word_before_their_number(place):
    (place / "clone" / "data").mkdir(parents=True)
    for name, count in (("train", 24), ("unlabeled", 30), ("test", 6)):
        table(count).to_parquet(f"clone/data/{name}-00000-of-00001.parquet")
    source = data.open_source("clone", split="unlabeled")
    assert source.images == 30 and len(source.queries[1]) == 6


def test_a_limit_of_pixels_can_be_raised(place, monkeypatch):
    monkeypatch.setattr("loading.images.PIXELS", images.PIXELS)  # a module's: put back when the test ends
    folder(place, 24)
    with pytest.raises(UserError, match=r"claims 12 x 12 pixels; the limit is 100 in all.*--max_pixels 144"):
        data.open_source("pets", max_pixels=100)
    assert data.open_source("pets", max_pixels=144).images == 22
