"""WebDataset tars: read right whatever the order of their members, and never a cut one without a word."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from flags import UserError
from loading import images
from tests.test_data import encoded, picture

JPG = [encoded(picture(i), "JPEG", quality=95) for i in range(40)]
PNG = [encoded(picture(i)) for i in range(40)]


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def samples(n=40, ending="png", content=PNG, label=lambda i: i % 2):
    pairs = [((f"{i:04d}.{ending}", content[i]), (f"{i:04d}.cls", str(label(i)).encode())) for i in range(n)]
    return [member for pair in pairs for member in pair]


def read(path, **options):
    """{pixels: label} of every image of a tar, in its order."""
    source = data.open_source(path, **options)
    everything = torch.arange(len(source.train))
    pixels, _ = source.train.whole(everything, 12)
    labels = source.train.labels(everything).tolist() if "label" in source.train.table.column_names else None
    return [x.permute(1, 2, 0).numpy().tobytes() for x in pixels], labels, source


WANTED = [np.asarray(picture(i)).tobytes() for i in range(40)]


def test_members_in_any_order(place):
    ordered = samples()
    for name, members in (("a.tar", ordered), ("b.tar", ordered[::2] + ordered[1::2]), ("c.tar", ordered[::-1])):
        pixels, labels, _ = read(write(name, members))
        order = range(40) if name != "c.tar" else range(39, -1, -1)
        assert pixels == [WANTED[i] for i in order] and labels == [i % 2 for i in order]


@pytest.mark.parametrize("name", ["img.{:04d}.png", "a.b/{}.5.png", "{}.0.png", "x.{}.PNG", "v1.2.{:03d}.png"])
def test_names_with_dots(place, name):
    members = [(name.format(i), PNG[i]) for i in range(40)]
    members += [(name.format(i)[:-3] + "cls", str(i % 2).encode()) for i in range(40)]
    pixels, labels, _ = read(write("dots.tar", members))
    assert pixels == WANTED and labels == [i % 2 for i in range(40)]


def test_two_images_of_a_sample_are_two_columns(place):
    members = [m for i in range(40) for m in ((f"{i}.jpg", JPG[i]), (f"{i}.seg.png", PNG[i]), (f"{i}.cls", b"1"))]
    write("two.tar", members)
    with pytest.raises(UserError, match="images in columns jpg, seg.png; choose: --image_column jpg"):
        data.open_source("two.tar")
    assert read("two.tar", image_column="seg.png")[0] == WANTED


def test_jpeg_and_png_in_one_archive(place):
    members = [(f"{i:02d}.{('png', 'jpg')[i % 2]}", (PNG, JPG)[i % 2][i]) for i in range(40)]
    pixels, labels, source = read(write("both.tar", members))
    assert pixels[::2] == WANTED[::2] and labels is None and source.images == 40
    apart = np.abs(
        np.frombuffer(b"".join(pixels[1::2]), np.uint8).astype(int) - np.frombuffer(b"".join(WANTED[1::2]), np.uint8)
    )
    assert apart.mean() < 12


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_begin_late_are_read_and_the_others_counted(place, streaming):
    members = [m for m in samples() if m[0].endswith("png") or m[0] > "0011"]
    source = data.open_source(write("late.tar", members), streaming=streaming)
    if not streaming:
        assert source.train.labels(torch.arange(40)).tolist() == [-1] * 11 + [i % 2 for i in range(11, 40)]
        assert "note: split train: 11 of 40 images without a label" in source.found[1]
    else:
        assert "images without a label" in source.found[1]


@pytest.mark.parametrize("root", ["", "./"])
def test_folders_in_an_archive_are_said_to_be_no_classes(place, root):
    members = [(f"{root}{('cat', 'dog')[i % 2]}/{i:04d}.png", PNG[i]) for i in range(40)]
    source = read(write("pets.tar", members))[2]
    assert source.note == "no labels" and source.images == 40
    assert source.found[1].startswith("note: folders in an archive (cat, dog) are no classes")
    labels = [(f"{root}{('cat', 'dog')[i % 2]}/{i:04d}.cls", str(i % 2).encode()) for i in range(40)]
    first, _, rough = read(write("labelled.tar", members + labels))[2].found
    assert first.startswith("found 40 images in 2 classes") and rough.endswith("with a label, so it is rough")


def test_words_are_classes(place):
    members = samples(label=lambda i: ("dog", "cat")[i % 2])
    _, labels, _ = read(write("words.tar", members))
    assert labels == [1, 0] * 20  # cat, dog by their sorted names


def test_samples_without_an_image_are_said(place):
    source = data.open_source(write("a.tar", [*samples(30), ("x.cls", b"1"), ("y.cls", b"0"), ("._0001.png", b"mac")]))
    assert "33 images in 2 classes" in source.found[0]
    assert "30 used, 3 left out (1 hidden, 2 without an image)" in source.found[0]
    write("none.tar", [("a.json", b"{}"), ("b.txt", b"words")])
    with pytest.raises(UserError, match=r"none.tar has files that end in .json \(1\), .txt \(1\), and no image; want"):
        data.open_source("none.tar")


@pytest.mark.parametrize("where", ["header", "data", "edge", "damaged", "joined"])
def test_a_tar_that_is_cut_is_refused_or_counted(place, where):
    path = write("cut.tar", samples())
    with tarfile.open(path) as tar:
        member = tar.getmember("0024.png")
    content = (place / "cut.tar").read_bytes()
    ends = {"header": member.offset + 256, "data": member.offset_data + 20, "edge": member.offset}
    if where in ends:
        content = content[: ends[where]]
    elif where == "damaged":
        content = content[: member.offset] + b"?" * 512 + content[member.offset + 512 :]
    else:
        content += content
    (place / "cut.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"--dataset cut.tar: .*/cut.tar .*; \d+ files before that can be read. Copy"):
        data.open_source(path)
    pixels, labels, source = read(path, skip_bad_images=True)
    kept = 40 if where == "joined" else 24
    assert pixels == WANTED[:kept] and labels == [i % 2 for i in range(kept)]
    assert f"found {kept} images" in source.found[0] and f"; {kept} used; " in source.found[0]
    assert "what is after them is lost" in source.found[0]
    assert any("cut.tar" in line for line in source.left_out)


def test_images_are_read_where_they_lie(place, monkeypatch):
    path = write("a.tar", samples())
    source = data.open_source(path, label_column="none")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", lambda *a, **k: pytest.fail("indexed again"))
        again = data.open_source(path)
    record = data.sources.opened(path, None, False).splits["train"].data.to_pydict()["png"][7]
    assert record["bytes"] is None and np.asarray(images.decode(record)).tobytes() == WANTED[7]
    assert len(source.train) == len(again.train) == 40
    with pytest.raises(UserError, match=r"\(.*0007.png in .*/bad.tar\)"):
        data.open_source(write("bad.tar", [*samples(7), ("0007.png", b"no image"), *samples(40)[16:]]))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_an_archive_are_images_too(place, kind):
    """GNU tar writes a link for the second name of a file."""
    content = encoded(Image.new("RGB", (80, 80), "red"))
    with tarfile.open("a.tar", "w") as tar:
        for i in range(6):
            entry = tarfile.TarInfo(f"{i:02d}.png")
            if i % 2:
                entry.type, entry.linkname = kind, f"{i - 1:02d}.png"
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    source = data.open_source("a.tar")
    assert len(source.train) == 6 and "found 6 images" in source.found[0]
    assert (source.train.whole(torch.arange(6), 80)[1] == 0).all()
