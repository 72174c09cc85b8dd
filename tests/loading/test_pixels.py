"""Pixel values mean the same in every file: one range for a dataset, from a sample, in the run and its evaluations."""

import json
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image

import data
from bsim import ViewRecipe
from eval.boxes import Scenes
from eval.boxes import picture as scene_picture
from eval.features import features
from eval.knn import knn
from flags import UserError
from loading import batches, images, pixels, reading
from tests.test_data import encoded
from train import pretrain

RAMP = np.linspace(0, 1, 24 * 24).reshape(24, 24)


def ramps(place, kind, highest, lowest=0, ending="tiff", side=24, count=12):
    """Images whose values go from `lowest` to each of `highest` in turn."""
    ramp = np.linspace(0, 1, side * side).reshape(side, side)
    for i in range(count):
        values = lowest + ramp * (highest[i % len(highest)] - lowest)
        path = place / "scans" / ("a", "b")[i % 2] / f"{i:02d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(kind)).save(path)
    return str(place / "scans")


def colour_png(values):
    """A PNG of 16 bits a value, [H, W, 3 or 4], which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind, low, high, wanted, name",
    [
        (np.uint16, 0, 200, (0, 255), "8-bit"),
        (np.uint16, 0, 1023, (0, 1023), "10-bit"),
        (np.uint16, 0, 4095, (0, 4095), "12-bit"),
        (np.uint16, 0, 9000, (0, 16383), "14-bit"),
        (np.uint16, 0, 40000, (0, 65535), "16-bit"),
        (np.int32, 0, 300, (0, 1023), "10-bit"),
        (np.int32, -1024, 3071, (-1024, 3071), "measured"),
        (np.int32, 0, 100_000, (0, 100_000), "measured"),
        (np.float32, 0, 1, (0, 1), "floats"),
        (np.float32, -0.03, 1.02, (0, 1), "floats"),
        (np.float32, -1, 1, (-1, 1), "floats"),
        (np.float32, 0, 255, (0, 255), "floats"),
        (np.float32, 0, 4000, (0, 4000), "measured"),
        (np.float32, 270, 310, (270, 310), "measured"),
    ],
)
@pytest.mark.parametrize("side", [24, 70])
def test_one_range_for_every_kind_of_values(place, kind, low, high, wanted, name, side):
    """Small images, and large ones: the same gray for the same value, by the range that is said."""
    path = ramps(place, kind, [high], low, side=side, count=2)
    source = data.open_source(path, label_column="none")
    assert source.way.pixel_range == pytest.approx(wanted, abs=1e-3)
    line = next(line for line in source.found if line.startswith("pixel values"))
    assert f"({name}, from a sample of 2 images) become 0 to 255" in line
    found = images.decode({"bytes": None, "path": f"{path}/a/00.tiff"}, source.way.pixel_range)
    values = (low + np.linspace(0, 1, side * side) * (high - low)).astype(kind).astype(float)
    right = ((values - wanted[0]) / (wanted[1] - wanted[0]) * 255).clip(0, 255)
    np.testing.assert_allclose(np.asarray(found)[..., 0].ravel(), right, atol=0.51)
    whole = source.train.whole(torch.tensor([0]), 64)[0]
    if side == 24:
        assert np.array_equal(whole[0].permute(1, 2, 0).numpy(), np.asarray(found))
    else:
        assert abs(float(whole.float().mean()) - right.mean()) < 3


def test_a_value_is_the_same_gray_in_files_of_other_maxima(place):
    path = ramps(place, np.int32, [255, 300])
    source = data.open_source(path)
    grays = set()
    for i in range(12):
        values = np.asarray(Image.open(f"{path}/{'ab'[i % 2]}/{i:02d}.tiff"))
        names = [Path(record["path"]).stem for record in source.train.table["image"]]
        row = names.index(f"{i:02d}")
        made = source.train.whole(torch.tensor([row]), None)[0][0, 0].numpy()
        grays |= set(made[values == 200].tolist())
    assert grays == {round(200 * 255 / 1023)}


def test_what_lies_beyond_is_clipped_and_counted(place):
    path = ramps(place, np.float32, [1, 1, 1.02])
    (line,) = (x for x in data.open_source(path).found if x.startswith("pixel"))
    each = int((np.linspace(0, 1.02, 24 * 24).astype(np.float32) > 1).sum())
    assert line.endswith(f"clipped: {4 * each} values beyond, in 4 images")
    asked = data.open_source(path, way=data.way_of({}, pixel_range="0,0.5"))
    (line,) = (x for x in asked.found if x.startswith("pixel"))
    assert line.startswith("pixel values 0 to 0.5 (--pixel_range) become") and line.endswith("in 12 images")
    white = (np.linspace(0, 1, 24 * 24) / 0.5 * 255).round() >= 255
    assert int((asked.train.whole(torch.tensor([0]), None)[0] == 255).sum()) == 3 * white.sum()


def test_an_evaluation_counts_what_is_clipped_of_large_images(place):
    path = ramps(place, np.float32, [1, 1, 1.02], side=70)
    train, _ = data.open_labelled(path, way=data.way_of({}, pixel_range="0,1"))
    said = []
    part = train.images, torch.arange(12)
    features(Accelerator(cpu=True), torch.nn.Flatten(), part, image_size=64, say=said.append)
    each = int((np.linspace(0, 1.02, 70 * 70).astype(np.float32) > 1).sum())
    assert said == [f"clipped: {4 * each} values beyond the pixel range, in 4 images"]


def test_integers_beside_floats_are_said_to_share_a_range(place):
    path = ramps(place, np.uint16, [4095])
    Image.fromarray(RAMP.astype(np.float32)).save(f"{path}/a/02.tiff")
    (line,) = (x for x in data.open_source(path).found if x.startswith("pixel"))
    assert "integers (to 4095) and floats (to 1) are read by this one range" in line


@pytest.mark.parametrize("side", [24, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_a_bad_image(place, value, side):
    path = ramps(place, np.float32, [1], side=side)
    hole = np.full((side, side), 0.5, np.float32)
    hole[3, 4] = value
    Image.fromarray(hole).save(f"{path}/a/02.tiff")
    with pytest.raises(UserError, match=r"1 of its [\d,]+ values are NaN or infinite, .*/a/02.tiff"):
        data.open_source(path)
    source = data.open_source(path, skip_bad_images=True)
    assert source.way.pixel_range == (0, 1)
    if side == 24:
        assert len(source.train) == 11 and "02.tiff: cannot be read" in source.left_out[0]


def test_files_of_8_bits_keep_their_values_beside_others(place):
    path = ramps(place, np.uint16, [4000], ending="png")
    gray = np.full((24, 24), 100, np.uint8)
    Image.fromarray(gray).save(f"{path}/a/gray.png")
    source = data.open_source(path, label_column="none")
    (line,) = (x for x in source.found if x.startswith("pixel"))
    assert "files of 8 bits, 1 of 13 in the sample, keep theirs" in line
    assert any((x == 100).all() for x in source.train.whole(torch.arange(13), None)[0])


def test_plain_images_say_nothing_and_a_flag_that_does_nothing_is_said(place):
    for i in range(4):
        Image.fromarray((RAMP * 200).astype(np.uint8)).save(place / f"{i}.png")
    source = data.open_source(".")
    assert source.way.pixel_range is None and not any("pixel" in line for line in source.found)
    said = data.open_source(".", way=data.way_of({}, pixel_range="0,100")).found
    assert "note: --pixel_range is for files of more than 8 bits; the sample has none" in said


@pytest.mark.parametrize("bands", [3, 4])
def test_colour_of_16_bits(place, bands):
    values = np.stack([RAMP * 4095, RAMP[::-1] * 4095, RAMP.T * 4095], 2).round()
    if bands == 4:
        values = np.concatenate([values, np.full((24, 24, 1), 65535)], 2)
    (place / "x.png").write_bytes(colour_png(values))
    source = data.open_source(".")
    assert source.way.pixel_range == (0, 4095)
    found = source.train.whole(torch.tensor([0]), None)[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, values[..., :3] / 4095 * 255, atol=0.51)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_byte_orders(order):
    values = (RAMP * 4095).astype(order)
    image = Image.frombytes({"<": "I;16", ">": "I;16B"}[order[0]], (24, 24), values.tobytes())
    made, clipped = pixels.scaled(pixels.deep(image), (0, 4095), False)
    np.testing.assert_allclose(made, values.astype(float) / 4095 * 255, atol=0.51)
    assert clipped == 0


@pytest.mark.parametrize("side", [24, 70])
def test_a_stream_decides_from_its_first_images(place, side):
    path = ramps(place, np.uint16, [4095], side=side)
    source = data.open_source(path, streaming=True, label_column="none")
    assert source.way.pixel_range == (0, 4095) and source.way.small is False


def test_a_wrong_range_is_refused():
    for wrong in ("5", "a,b", "9,1", "0,nan", "0,inf", "1,2,3", "3,3"):
        with pytest.raises(UserError, match="--pixel_range .*: want two numbers, the lower one first, as in 0,4095"):
            pretrain(pixel_range=wrong)


def test_a_run_keeps_its_range_for_resume_and_evaluations(place, capsys):
    path = ramps(place, np.uint16, [3000], ending="png", count=40)
    short = dict(batch_size=8, backbone="resnet_tiny", eval_every=0, log_every=1)
    run = pretrain(dataset=path, pixel_range="0,4000", steps=2, out="run", **short)
    config = json.loads((run / "config.json").read_text())
    assert config["pixel_range"] == [0, 4000]
    capsys.readouterr()
    pretrain(resume="run", steps=3)
    assert "pixel values 0 to 4000 (the run's) become 0 to 255" in capsys.readouterr().out
    pretrain(resume="run", steps=4, pixel_range="0,4000")
    with pytest.raises(UserError, match="keeps the settings of that run"):
        pretrain(resume="run", steps=5, pixel_range="0,4095")
    knn(run="run")
    assert "pixel values 0 to 4000 (the run's)" in capsys.readouterr().out
    assert json.loads(Path("run/results.jsonl").read_text())["settings"]["pixel_range"] == [0, 4000]
    knn(run="run", pixel_range="0,3000")
    assert "pixel values 0 to 3000 (--pixel_range)" in capsys.readouterr().out


def test_evaluations_that_read_images_their_own_way_take_the_range_too(place):
    """As eval.voc07 and eval.detect do: the run's, else one from a sample of all their images."""
    path = Path(ramps(place, np.uint16, [2000], ending="png", side=70, count=4))
    records = [{"bytes": None, "path": str(file)} for file in sorted(path.rglob("*.png"))]
    pair, lines = reading.range_of({"one": records[:2], "two": records[2:]}, {})
    assert pair == (0, 4095)
    assert lines == ["pixel values 0 to 4095 (12-bit, from a sample of 4 images) become 0 to 255"]
    pair, lines = reading.range_of({"one": records}, {"pixel_range": [0, 1000]})
    assert pair == (0, 1000) and "(the run's)" in lines[0] and lines[0].endswith("in 4 of 4 images of the sample")
    scenes = Scenes(records, {"images": [{"file_name": "x", "width": 70, "height": 70}] * 4}, (0, 4095))
    assert scene_picture(scenes, 0).max() == round(2000 * 255 / 4095)


@pytest.mark.parametrize("workers", [0, 2])
def test_clipped_images_are_counted_while_large_ones_are_read(place, workers):
    path = ramps(place, np.float32, [1, 1, 1.02], side=70)
    for streaming in (False, True):
        source = data.open_source(path, label_column="none", streaming=streaming)
        options = dict(part_size=12, rank=0, world=1, seed=0)
        recipes = (ViewRecipe(16), ViewRecipe(16))
        if streaming:
            made = batches.StreamBatches(source, recipes, **options, readers=max(1, workers), skip_bad=False)
        else:
            made = batches.Batches(source, recipes, **options, batch_size=12)
        feed = batches.Feed(made, 0, 1, 0 if streaming else workers, pin=False)
        next(feed)
        assert feed.clipped == 4


def colour_tiff(values):
    """An uncompressed colour TIFF of 16 bits."""
    height, width, _ = values.shape
    content, bits = values.astype("<u2").tobytes(), struct.pack("<3H", 16, 16, 16)
    entries, after = 9, 8 + 2 + 12 * 9 + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, after), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, after + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(content))]
    made = b"II*\0" + struct.pack("<IH", 8, entries)
    for tag, kind, count, value in tags:
        made += struct.pack("<HHI", tag, kind, count) + struct.pack("<I", value)
    return made + struct.pack("<I", 0) + bits + content


@pytest.mark.parametrize("ending", ["ppm", "tiff"])
def test_colour_of_16_bits_that_pillow_cuts_is_refused(place, ending):
    """The upper 8 bits of 12-bit values are black."""
    values = np.full((16, 16, 3), 4095)
    content = b"P6 16 16 65535\n" + values.astype(">u2").tobytes() if ending == "ppm" else colour_tiff(values)
    Path("deep").mkdir()
    for i in range(20):
        Path(f"deep/{i:02d}.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=f"a colour {ending.upper()} of 16 bits, of which only the upper 8 can be read"):
        data.open_source("deep")


def test_a_deep_image_that_nothing_prepared_for_is_named(place):
    """The first 256 rows of a stream have 8 bits, a later one has 12: no range was decided for it."""
    deep = Image.fromarray(np.full((16, 16), 4095, np.uint16))
    rows = [Image.new("RGB", (16, 16))] * 300 + [deep]
    made = Dataset.from_dict({"image": [{"bytes": encoded(image), "path": None} for image in rows]})
    made.cast_column("image", datasets.Image()).to_parquet("late.parquet")
    source = data.open_source("late.parquet", streaming=True)
    assert source.way.pixel_range is None
    share = dict(part_size=7, rank=0, world=1, readers=1, seed=0, skip_bad=False)
    with pytest.raises(UserError, match="it has more than 8 bits, .* say --pixel_range LOW,HIGH"):
        for _ in batches.Feed(batches.StreamBatches(source, [ViewRecipe(8)] * 2, **share), 0, 100, 0, pin=False):
            pass
