"""Batches do not depend on who makes them, nor on where a run begins."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import data
from flags import UserError
from loading import batches, images
from loading.batches import ORDER, Batches, Feed, Place, StreamBatches, generator, places_of
from tests.test_data import RECIPES, encoded, every_source, folder, picture, spoiled, table


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_large_image_names_its_row_or_is_replaced(place, workers):
    path = spoiled(place, size=(70, 90))
    for skip in (False, True):
        source = data.open_source(str(path), skip_bad_images=True, label_column="none")
        source.train.skip_bad = skip
        batches = Batches(source, RECIPES, batch_size=20, part_size=20, rank=0, world=1, seed=0)
        found = next(Feed(batches, 0, 1, workers, pin=False).made)
        if skip:
            assert found[0].shape == found[1].shape == (20, 3, 16, 16) and len(set(found[2])) == 2
        else:
            assert isinstance(found, UserError) and "row" in str(found)


def shares(source, world, accumulate, step):
    found = []
    for micro in range(accumulate):
        for rank in range(world):
            size = 16 // (world * accumulate)
            batches = Batches(source, RECIPES, batch_size=16, part_size=size, rank=rank, world=world, seed=5)
            found.append(batches.rows(step * accumulate + micro))
    return torch.cat(found)


def test_the_images_of_a_step_do_not_depend_on_processes_or_parts():
    source = data.open_source("digits")
    for step in (0, 3, 100, 101, 250):  # 101 steps an epoch
        alone = shares(source, 1, 1, step)
        assert len(set(alone.tolist())) == 16
        for world, accumulate in ((2, 1), (1, 2), (4, 2)):
            assert torch.equal(shares(source, world, accumulate, step), alone)


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    source = data.open_source("digits")
    epochs = [torch.cat([shares(source, 1, 1, e * 101 + i) for i in range(101)]) for e in (0, 1)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 101 * 16 and set(rows.tolist()) <= set(source.rows.tolist())
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_start_anywhere_and_are_the_same_with_workers(place, workers):
    source = data.open_source(str(folder(place, 20, (80, 100))))
    assert source.train.in_workers and source.side == 100
    batches = Batches(source, RECIPES, batch_size=6, part_size=6, rank=0, world=1, seed=1)
    whole = [batches[i] for i in range(7)]
    for i, (a, b) in enumerate(Feed(batches, 3, 7, workers, pin=False), 3):
        assert torch.equal(a, whole[i][0]) and torch.equal(b, whole[i][1])
    assert not torch.equal(whole[0][0], whole[0][1]) and not torch.equal(whole[0][0], whole[3][0])


def record(*picture, **options):
    return {"bytes": encoded(*picture, **options), "path": None}


def test_workers_crop_as_the_device_would(place):
    """A worker's crop of a large image against the core's of the same box."""
    from bsim import random_crop_box, resized_crop

    image = picture(4, 90, 120)
    for kind, size in (("PNG", 16), ("JPEG", 64)):  # a JPEG at its own scale: 64 is more than half of any side
        recipes = [recipe._replace(size=size) for recipe in RECIPES]
        a, _ = images.crops(record(image, kind), recipes, generator(1))
        box = random_crop_box(1, 90, 120, RECIPES[0].scale, RECIPES[0].ratio, generator=generator(1))
        pixels = np.array(images.decode(record(image, kind)))
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        assert float((resized_crop(pixels, box, size) - a / 255).abs().max()) < 2 / 255


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_that_no_crop_notices(monkeypatch):
    smooth = picture(4, 12, 16).resize((640, 480), Image.Resampling.BICUBIC)
    asked = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *a: asked.append(draft(*a)) or asked[-1])
    close, whole = RECIPES[0]._replace(scale=(0.01, 0.01)), RECIPES[0]._replace(scale=(1, 1))
    for recipes, shrinks in (((whole, whole), True), ((whole, close), True), ((close, close._replace(size=64)), False)):
        asked.clear()
        found = images.crops(record(smooth, "JPEG", quality=95), recipes, generator(1))
        wanted = images.crops(record(smooth, "PNG"), recipes, generator(1))
        assert bool(asked) == shrinks
        for one, other in zip(found, wanted):
            assert float((one.float() - other.float()).abs().mean()) < 3


def test_what_a_broken_jpeg_is_refused_with_says_nothing_of_torchvision():
    broken = record(picture(4, 90, 120), "JPEG")
    broken["bytes"] = broken["bytes"][: len(broken["bytes"]) // 2]
    recipes = [recipe._replace(size=64) for recipe in RECIPES]  # so large that torchvision decodes it
    with pytest.raises(ValueError, match="^Image is incomplete or truncated$"):
        images.crops(broken, recipes, generator(1))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_without_torchvisions_decoder_the_crops_are_the_same(monkeypatch, subsampling):
    jpeg = record(picture(4, 190, 220), "JPEG", quality=90, subsampling=subsampling)
    recipes = [recipe._replace(size=64) for recipe in RECIPES]  # so large that torchvision decodes it
    wanted = images.crops(jpeg, recipes, generator(1))
    monkeypatch.setattr(images, "decode_jpeg", None)
    assert all(torch.equal(a, b) for a, b in zip(images.crops(jpeg, recipes, generator(1)), wanted))


def test_a_jpeg_that_lies_on_its_side_is_cropped_upright():
    image, turn = picture(4, 90, 120), Image.Exif()
    turn[0x0112] = 6
    found = images.crops(record(image, "JPEG", quality=100, exif=turn), RECIPES, generator(1))
    wanted = images.crops(record(image.rotate(-90, expand=True), "PNG"), RECIPES, generator(1))
    assert all(float((a.float() - b.float()).abs().mean()) < 4 for a, b in zip(found, wanted))


def test_generators_depend_on_every_number():
    draws = {float(torch.rand((), generator=generator(*key))) for key in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1))}
    assert len(draws) == 4
    assert json.dumps(generator(1, 2).initial_seed()) == json.dumps(generator(1, 2).initial_seed())


# Streams.


def parquets(place, rows, shards):
    each = len(rows) // shards
    for shard in range(shards):
        rows.select(range(shard * each, shard * each + each)).to_parquet(place / f"part-{shard}.parquet")
    return place / "part-*.parquet"


def feed(source, workers=0, start=0, places=None, **changed):
    readers = max(1, workers)
    options = dict(part_size=3, rank=0, world=1, readers=readers, seed=2, skip_bad=False) | changed
    return Feed(StreamBatches(source, RECIPES, **options, start=start, places=places), start, 99, workers, pin=False)


def epoch_of(source, number, reader=0, **changed):
    """The images of one epoch of a reader, as bytes."""
    options = dict(part_size=1, rank=0, world=1, readers=1, seed=2, skip_bad=False) | changed
    seen = []
    for place, block in StreamBatches(source, RECIPES, **options).blocks(reader, Place(number)):
        if place.epoch > number:
            return seen
        seen += [image["bytes"] for image in block]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "rows.parquet", "saved", "folder", "shard.tar", "digits"])
def test_streams_go_on_anywhere(place, monkeypatch, kind, workers):
    """From the places after any batch: mid-block, mid-epoch, at an epoch's edge; however the images are stored."""
    monkeypatch.setattr("loading.batches.BLOCK", 5)
    if kind in ("shard.tar", "rows.parquet") and workers:
        pytest.skip("one file is one shard, for one worker")
    made = {"shards": parquets(place, table(60), 4), "digits": "digits", **every_source(place)}
    source = data.open_source(str(made[kind]), streaming=True, label_column="none")
    whole, places = [], []
    stream = feed(source, workers)
    for _ in range(36):
        whole.append(next(stream)[0])
        places.append(json.loads(json.dumps(stream.places)))
    assert len({batch.numpy().tobytes() for batch in whole}) == 36
    for done in (1, 2, 5, 16, 17, 30):
        saved, _ = places_of([places[done - 1]], 0, 1, max(1, workers))
        again = feed(source, workers, done, saved)
        for i in range(done, done + 6):
            assert torch.equal(next(again)[0], whole[i])
            assert [list(p) for p in again.places] == places[i]


def test_an_epoch_of_a_stream_shows_every_image_once_in_another_order(place, monkeypatch):
    monkeypatch.setattr("loading.batches.BLOCK", 7)
    rows = table(48)
    source = data.open_source(str(parquets(place, rows, 4)), streaming=True, label_column="none")
    every = sorted(record["image"]["bytes"] for record in source.train)
    one, two = epoch_of(source, 0), epoch_of(source, 1)
    assert sorted(one) == sorted(two) == every and one != two
    shared = [epoch_of(source, 0, rank=rank, world=2, readers=2, reader=i) for rank in (0, 1) for i in (0, 1)]
    assert sorted(sum(shared, [])) == every and all(len(part) == 12 for part in shared)


def test_more_processes_than_shards_share_the_rows(place):
    rows = table(20)
    rows.to_parquet(place / "one.parquet")
    source = data.open_source("one.parquet", streaming=True, label_column="none")
    assert source.train.num_shards == 1
    parts = [epoch_of(source, 0, rank=rank, world=3) for rank in range(3)]
    assert sorted(sum(parts, [])) == sorted(record["image"]["bytes"] for record in source.train)


def test_a_stream_goes_on_without_what_it_skips(place, monkeypatch):
    """Far into an epoch it opens no shard but those of its block, and decodes no image twice."""
    source = data.open_source(str(parquets(place, table(64), 16)), streaming=True, label_column="none")
    monkeypatch.setattr("loading.batches.BLOCK", 4)
    stream = feed(source, part_size=4)
    for _ in range(14):
        next(stream)
    opened, decoded = [], []
    shard = type(source.train).shard
    monkeypatch.setattr(type(source.train), "shard", lambda self, n, i, **k: opened.append(i) or shard(self, n, i, **k))
    crops = images.crops
    monkeypatch.setattr("loading.batches.crops", lambda *given: decoded.append(1) or crops(*given))
    again = feed(source, start=14, places=stream.places, part_size=4)
    next(again)
    order = torch.randperm(16, generator=generator(2, ORDER, 0)).tolist()
    assert opened == order[11:] and len(decoded) == 4  # a block is 16 rows; the 14th batch is in the last


def test_places_of_other_processes_begin_the_next_epoch():
    saved = [[[3, 1, 0, 2], [4, 0, 0, 1]], [[3, 0, 0, 0], [3, 2, 1, 0]]]
    assert places_of(saved, 1, 2, 2) == ([Place(3, 0, 0, 0), Place(3, 2, 1, 0)], True)
    for world, readers in ((1, 2), (2, 1), (4, 2)):
        assert places_of(saved, 0, world, readers) == ([Place(5)] * readers, False)
    assert places_of(None, 0, 1, 1) == (None, True)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_of_a_stream_do_not_shift_a_resume(place, monkeypatch, workers):
    monkeypatch.setattr("loading.batches.BLOCK", 5)
    path = spoiled(place, 40, bad=range(0, 40, 7))
    source = data.open_source(str(path), streaming=True, label_column="none", skip_bad_images=True)
    stream = feed(source, workers, skip_bad=True)
    whole = []
    for i in range(12):
        whole.append(next(stream)[0])
        if i == 6:
            places = list(stream.places)
    assert stream.bad
    again = feed(source, workers, 7, places, skip_bad=True)
    for i in range(7, 12):
        assert torch.equal(next(again)[0], whole[i])
    with pytest.raises(UserError, match="of the stream is not an image that can be read"):
        list(feed(source, workers, 7, places))


def test_a_stream_of_bad_images_only_ends(place):
    source = data.open_source(str(folder(place, 20)), streaming=True, label_column="none")
    for path in (place / "pets").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="the stream has no image that can be read"):
        next(feed(source, skip_bad=True))


def test_images_in_an_archive_are_read(place):
    with zipfile.ZipFile(place / "a.zip", "w") as archive:
        archive.writestr("cat/0.png", encoded(picture(1)))
    found = images.decode({"bytes": None, "path": f"zip://cat/0.png::{place}/a.zip"})
    assert np.array_equal(found, picture(1))
    for path in ("/dev/zero", str(place), "http://localhost/a.png", "zip://a.png::http://localhost/a.zip", None):
        with pytest.raises(ValueError):
            images.decode({"bytes": None, "path": path})


def test_a_stream_holds_out_the_same_images_whoever_reads(place):
    source = data.open_source(str(parquets(place, table(80), 4)), streaming=True)
    held = {source.queries[0].table[i]["image"]["bytes"] for i in source.queries[1].tolist()}
    assert held
    for world in (1, 2, 4):
        seen = sum((epoch_of(source, 0, rank=rank, world=world) for rank in range(world)), [])
        assert len(seen) == len(set(seen)) == 80 - len(held) and not held & set(seen)


@pytest.mark.slow
def test_workers_end_with_a_program_that_still_holds_them(place):
    """They ignore the SIGTERM with which multiprocessing would end them, and it would wait for them for ever."""
    table(40, (80, 80)).to_parquet(place / "rows.parquet")
    program = """
import sys
import data
from loading.batches import Batches, Feed
from tests.test_data import RECIPES
source = data.open_source("rows.parquet", label_column="none")
made = Batches(source, RECIPES, batch_size=4, part_size=4, rank=0, world=1, seed=0)
sys.modules["held"] = feed = Feed(made, 0, 1000, 2, pin=False)
next(feed)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def open_ends():
    """Open files, threads and child processes of this process, when what is ending has ended."""
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "QueueFeeder" in thread.name:
            thread.join(5)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(multiprocessing.active_children())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_evaluations_and_feeds_leave_nothing_open(place):
    source = data.open_source(str(folder(place, 24, (70, 80))))
    made = Batches(source, RECIPES, batch_size=4, part_size=4, rank=0, world=1, seed=0)

    def use(ends):
        for _ in batches.whole_images(source.train, source.rows, 16, workers=2, chunk=4):
            pass
        stream = Feed(made, 0, 3, 2, pin=False)
        next(stream)
        if ends:
            assert len(list(stream)) == 2

    use(True)
    once = open_ends()
    for i in range(4):
        use(i % 2)
    assert all(after <= before for after, before in zip(open_ends(), once))


def test_the_place_of_a_bad_image_is_taken_among_the_rows_and_said(place):
    """Not by an image that is held out; and `rows` are those that were read."""
    source = data.open_source(str(spoiled(place, 40, (70, 90), bad=(6, 13))), skip_bad_images=True)
    files = source.train.table.with_format("arrow")[:]["image"].to_pylist()
    bad = {i for i, record in enumerate(files) if Path(record["path"]).stem in ("6", "13")}
    rows = torch.tensor([i for i in range(0, 40, 2) if i not in bad] + sorted(bad)).unique()
    few = source._replace(rows=rows)
    made = Batches(few, RECIPES, batch_size=len(rows), part_size=len(rows), rank=0, world=1, seed=0)
    stream = Feed(made, 0, 1, 0, pin=False)
    a, _ = next(stream)
    asked = made.rows(0).tolist()
    for wanted, read in zip(asked, stream.rows.tolist()):
        after = [x for x in rows.tolist() if x > wanted and x not in bad] + [x for x in rows.tolist() if x not in bad]
        assert read == (after[0] if wanted in bad else wanted)
    assert len(stream.bad) == 2 and len(a) == len(rows)


class Limit:
    """A dataset that says which limit a worker has."""

    def __getitem__(self, row):
        return images.PIXELS


@pytest.mark.slow
def test_the_limit_of_pixels_reaches_workers_that_are_not_forked(monkeypatch):
    """As on macOS, and on Linux from Python 3.14 on."""
    monkeypatch.setattr(images, "PIXELS", 1_000)
    for way in ("fork", "spawn"):
        options = dict(batch_size=None, num_workers=1, sampler=range(1), multiprocessing_context=way)
        assert list(batches.iterate(Limit(), **options)) == [1_000]
