"""Datasets: every source, every kind of image, every refusal; batches that do not depend on who makes them."""

import io
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

import data
from bsim import ViewRecipe
from flags import UserError
from loading import batches, images

RECIPES = (ViewRecipe(16), ViewRecipe(16, scale=(0.5, 1)))


def picture(seed, height=12, width=12, mode="RGB"):
    """A smooth colour picture: survives JPEG and quantisation."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def table(n=20, size=(12, 12), **columns):
    features = Features(img=datasets.Image(), label=ClassLabel(names=["cat", "dog"]))
    rows = Dataset.from_dict(
        {"img": [picture(i, *size) for i in range(n)], "label": [i % 2 for i in range(n)]}, features
    )
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def folder(place, n=12, size=(12, 12)):
    for i in range(n):
        path = place / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, *size).save(path)
    return place / "pets"


# Images.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16", "I", "F"])
def test_every_mode_comes_out_as_rgb(mode):
    gray = mode in ("L", "LA", "1", "I;16", "I", "F")
    original = picture(3).convert("L").convert("RGB") if gray else picture(3)
    values = np.asarray(original.convert("L"))
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
        assert image.mode == "I;16"
    elif mode == "I":
        image = Image.fromarray(values.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(values.astype(np.float32) / 255)
    elif mode in ("1", "P"):
        image = original.convert(mode)
        original = image.convert("RGB")
    else:
        image = original.convert(mode)
    kind = {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    record = {"bytes": encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {})), "path": None}
    found = images.decode(record)
    assert found.mode == "RGB"
    apart = np.abs(np.asarray(found, int) - np.asarray(original, int))
    assert apart.max() <= (24 if mode == "CMYK" else 1)


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = np.asarray(images.decode({"bytes": encoded(Image.fromarray(ramp)), "path": None}))[..., 0].ravel()
    np.testing.assert_allclose(found, ramp.ravel() / 257, atol=0.51)
    dark = np.full((4, 4), 200, np.uint16)  # almost black, not mid-gray
    assert np.asarray(images.decode({"bytes": encoded(Image.fromarray(dark)), "path": None})).max() <= 1


def test_transparency_is_laid_on_white_and_orientation_is_followed():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    found = images.decode({"bytes": encoded(image), "path": None})
    assert found.getpixel((0, 0)) == (10, 20, 30) and found.getpixel((3, 3)) == (255, 255, 255)
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((3, 3))
    found = images.decode({"bytes": encoded(palette, transparency=palette.getpixel((3, 3))), "path": None})
    assert found.getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    turned = images.decode({"bytes": encoded(picture(0, 4, 8), "JPEG", exif=exif), "path": None})
    assert turned.size == (4, 8)


def test_an_image_bomb_is_refused_before_it_is_decoded():
    header = encoded(Image.new("1", (8, 8)))
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">II", 60_000, 60_000) + header[24:29]
    bomb = header[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    with pytest.raises(ValueError, match="60000|3600000000"):
        images.decode({"bytes": bomb, "path": None})


# Sources.


def every_source(place, streaming=False):
    rows = table(60)
    rows.to_parquet(place / "rows.parquet")
    both = DatasetDict(train=rows, test=table(6))
    both.save_to_disk(place / "saved")
    (place / "parquets").mkdir()
    rows.to_parquet(place / "parquets" / "train.parquet")
    table(6).to_parquet(place / "parquets" / "test.parquet")
    with tarfile.open(place / "shard.tar", "w") as tar:
        for i in range(60):
            for name, content in ((f"{i:03d}.png", encoded(picture(i))), (f"{i:03d}.cls", str(i % 2).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    arrow = next((place / "saved" / "train").glob("*.arrow"))
    shutil.copy(arrow, place / "rows.arrow")
    found = {name: place / name for name in ("rows.parquet", "saved", "parquets", "shard.tar", "rows.arrow")}
    return {**found, "folder": folder(place, 60), "glob": place / "*.parquet"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return every_source(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.parquet", "saved", "parquets", "shard.tar", "rows.arrow", "folder", "glob"])
def test_every_source_gives_the_same_images(sources, name, streaming):
    source = data.open_source(str(sources[name]), streaming=streaming)
    wanted = sorted(np.asarray(picture(i)).tobytes() for i in range(60))
    if streaming:
        records = list(source.train)
        held = [source.queries[0].table[i] for i in source.queries[1].tolist()]
        if name not in ("saved", "parquets"):  # without a test split the head of the stream is held out
            assert 1 <= len(held) <= 15
            records += held
        found = sorted(np.asarray(images.decode(record["image"])).tobytes() for record in records)
    else:
        everything = torch.arange(len(source.train))
        found = sorted(x.permute(1, 2, 0).numpy().tobytes() for x in source.train.whole(everything, 12)[0])
        labels = source.train.labels(everything)
        assert sorted(labels.tolist()) == [0] * 30 + [1] * 30
        assert source.queries[1].numel() == 6
    assert found == wanted


def test_digits_are_scikit_learns_scans():
    from sklearn.datasets import load_digits

    source = data.open_source("digits")
    scans = load_digits()
    pixels, _ = source.train.whole(torch.arange(1797), 8)
    assert (pixels == pixels[:, :1]).all()
    np.testing.assert_allclose(pixels[:, 0].numpy(), scans.images * 255 / 16, atol=0.51)
    assert source.train.labels(torch.arange(1797)).tolist() == scans.target.tolist()
    assert len(source.rows) == 1618 and len(source.queries[1]) == 179
    assert not set(source.rows.tolist()) & set(source.queries[1].tolist())


def test_a_part_of_a_split(sources):
    source = data.open_source(str(sources["parquets"]), split="train[5:45]")
    assert source.images == 40 and len(source.queries[1]) == 6
    assert sorted(source.train.labels(torch.arange(40)).tolist()) == [0] * 20 + [1] * 20
    with pytest.raises(UserError, match="a part of a stream depends on who reads it; want a whole split"):
        data.open_source(str(sources["parquets"]), split="train[5:45]", streaming=True)


def test_second_opening_reads_the_cache(sources, monkeypatch):
    data.open_source(str(sources["rows.parquet"]))
    monkeypatch.setattr(images, "decode", lambda record: pytest.fail("decoded again"))
    source = data.open_source(str(sources["rows.parquet"]))
    assert len(source.train) == 60


def test_labels_are_optional(place):
    table(20).remove_columns("label").to_parquet(place / "bare.parquet")
    source = data.open_source("bare.parquet")
    assert source.bank is None and source.queries is None and source.images == 20
    source = data.open_source("bare.parquet", streaming=True)
    assert source.bank is None


def test_columns_by_type_and_by_flag(place):
    pictures = [picture(i) for i in range(20)]
    two = Features(img=datasets.Image(), other=datasets.Image(), label=ClassLabel(num_classes=2))
    rows = Dataset.from_dict({"img": pictures, "other": pictures, "label": [i % 2 for i in range(20)]}, two)
    rows.to_parquet(place / "two.parquet")
    with pytest.raises(UserError, match="images in columns img, other; choose: --image_column img"):
        data.open_source("two.parquet")
    assert data.open_source("two.parquet", image_column="other").images == 18
    with pytest.raises(UserError, match=r"--image_column image: no such column .* img \("):
        data.open_source("two.parquet", image_column="image")
    with pytest.raises(UserError, match="--image_column label: int64 is no image column"):
        data.open_source("two.parquet", image_column="label")

    rows = table(20, fine=[i % 4 for i in range(20)]).cast_column("fine", ClassLabel(num_classes=4))
    rows.to_parquet(place / "labels.parquet")
    with pytest.raises(UserError, match="classes in columns label, fine; choose: --label_column label, or none"):
        data.open_source("labels.parquet")
    source = data.open_source("labels.parquet", label_column="fine")
    assert set(source.train.labels(torch.arange(20)).tolist()) == {0, 1, 2, 3}
    assert data.open_source("labels.parquet", label_column="none").queries is None

    others = {"x": list(range(20)), "y": [i % 4 for i in range(20)], "kind": ["a", "b"] * 10}
    rows = table(20).remove_columns("label")
    for name, values in others.items():
        rows = rows.add_column(name, values)
    rows.to_parquet(place / "unnamed.parquet")
    note = "no labels are used; x (int64), y (int64), kind (string) could be: --label_column x"
    source = data.open_source("unnamed.parquet")
    assert source.queries is None and [line for line in source.found if "labels" in line] == [f"note: {note}"]
    assert not any("labels" in line for line in data.open_source("unnamed.parquet", label_column="none").found)
    assert not any("labels" in line for line in data.open_source("unnamed.parquet", label_column="kind").found)
    with pytest.raises(UserError, match=r"split train has no labels; .*kind \(string\) could be: --label_column x"):
        data.open_labelled("unnamed.parquet")

    rows = table(20).cast_column("label", Value("int64")).add_column("name", ["ab"[i % 2] for i in range(20)])
    rows.to_parquet(place / "plain.parquet")
    assert data.open_source("plain.parquet").train.labels(torch.arange(4)).tolist() == [0, 1, 0, 1]
    a, b, *others = data.open_source("plain.parquet", label_column="name").train.labels(torch.arange(4)).tolist()
    assert a != b and others == [a, b]
    with pytest.raises(UserError, match="--label_column img: .* holds no classes; want integers or names"):
        data.open_source("plain.parquet", label_column="img")

    plain = Features(img={"bytes": Value("binary"), "path": Value("string")}, raw=Value("binary"))
    png = [encoded(picture(i)) for i in range(10)]
    Dataset.from_dict({"img": [{"bytes": p, "path": None} for p in png], "raw": png}, plain).to_parquet("bytes.parquet")
    assert data.open_source("bytes.parquet").images == 10
    assert data.open_source("bytes.parquet", image_column="raw").images == 10


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("/no/such/place", {}, "--dataset /no/such/place: no such file or folder"),
        ("nobody/has-this", {}, "--dataset nobody/has-this: is no file or folder here, and the Hub did not serve it"),
        ("empty", {}, "--dataset empty: cannot be read"),
        ("words.csv", {}, "want files that end in .parquet, .arrow, .tar"),
        ("text.parquet", {}, r"no column holds images; it has text \(string\)"),
        ("digits", dict(split="tset"), "split 'tset': digits has train"),
        ("digits", dict(split="train[10:5]"), "has no rows"),
        ("digits", dict(eval_split="test"), "split 'test': digits has train"),
        ("broken.parquet", {}, "--dataset broken.parquet: cannot be read"),
    ],
)
def test_refusals(place, spec, options, message):
    (place / "empty").mkdir()
    (place / "words.csv").write_text("a,b\n")
    (place / "broken.parquet").write_bytes(b"PAR1 nothing")
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet("text.parquet")
    with pytest.raises(UserError, match=message) as caught:
        data.open_source(spec, **options)
    assert "\n" not in str(caught.value)


# Bad images.


def spoiled(place, n=20, size=(12, 12), bad=(7, 13)):
    path = folder(place, n, size)
    for i in bad:
        file = path / ("cat", "dog")[i % 2] / f"{i}.png"
        file.write_bytes(file.read_bytes()[:40])
    return path


def test_a_corrupt_small_image_names_its_row_or_is_left_out(place):
    path = spoiled(place)
    with pytest.raises(UserError, match=r"row \d+ of train is not an image .* --skip_bad_images"):
        data.open_source(str(path))
    source = data.open_source(str(path), skip_bad_images=True)
    assert len(source.bad) == 2 and len(source.train) == 18


def test_a_dataset_of_bad_images_only_ends(place):
    path = spoiled(place, 6, (70, 90), bad=range(6))
    with pytest.raises(UserError, match="no image in it can be read"):
        data.open_source(str(path), skip_bad_images=True)


def test_a_stream_so_short_that_none_is_held_out(place):
    kept = [i for i in range(60) if images.zlib.crc32(encoded(picture(i))) % 10][:25]
    rows = {"img": [picture(i) for i in kept], "label": [i % 2 for i in range(25)]}
    Dataset.from_dict(rows, features=table(1).features).to_parquet("rows.parquet")
    source = data.open_source("rows.parquet", streaming=True)
    assert source.queries is None and source.note == "no image was held out"


def test_small_images_among_which_a_large_one_turns_up(place):
    path = folder(place, 40, (20, 30))
    picture(99, 300, 400).save(path / "cat" / "large.png")
    source = data.open_source(str(path))
    assert source.train.in_workers
    wide, _, _ = source.train.pair(torch.arange(41), RECIPES, batches.generator(0))
    assert wide.shape == (41, 3, 16, 16)


def test_small_images_of_several_shapes_are_made_one(place):
    path = folder(place, 20, (20, 30))
    folder(place, 10, (24, 12))
    source = data.open_source(str(path))
    assert not source.train.in_workers and source.train.shape == (24, 30) and source.side == 30


def test_bad_images_do_not_shift_labels(place):
    path = spoiled(place, 40, (70, 90))
    source = data.open_source(str(path), skip_bad_images=True)
    everything = torch.arange(40)
    pixels, clipped = source.train.whole(everything, 16)
    good = clipped >= 0
    assert int((~good).sum()) == 2
    clean = folder(place / "clean", 40, (70, 90))
    wanted = data.open_source(str(clean)).train
    assert torch.equal(source.train.labels(everything), wanted.labels(everything))
    assert torch.equal(pixels[good], wanted.whole(everything, 16)[0][good])


def test_names_with_brackets_and_spaces(place):
    table(20).to_parquet("a b[1].parquet")
    assert data.open_source("a b[1].parquet").images == 18
