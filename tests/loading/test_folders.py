"""Folders of images: every tree is read whole by one rule, or a line says what is left out."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from flags import UserError
from loading import folders
from tests.test_data import encoded, picture

PNG = [encoded(picture(i)) for i in range(4)]


def tree(root, names):
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(PNG[i % 4])
    return str(root)


def pets(n, *classes, ending="png"):
    return [f"{classes[i % len(classes)]}/{i}.{ending}" for i in range(n)]


def rule(*names):
    found = folders.arranged("/d", sorted(names))
    splits = {
        split: {sorted(names)[i]: labels and found.names[labels[n]] for n, i in enumerate(rows)}
        for split, (rows, labels) in found.splits.items()
    }
    return splits, [sorted(names)[i] for i in found.strays], found.notes


# The rule.


def test_split_words_in_file_names_and_deeper_folders_make_no_split():
    assert rule("1.png", "train.png", "test_2.png") == (
        {"train": {"1.png": None, "train.png": None, "test_2.png": None}},
        [],
        [],
    )
    names = ["cat/train/1.png", "cat/test/2.png", "dog/val.3.png", "dog/express-train-3.png"]
    assert rule(*names) == ({"train": {name: name[:3] for name in names}}, [], [])


@pytest.mark.parametrize("classes", [("train", "bus", "car"), ("strip", "test", "dev"), ("Test", "other")])
def test_classes_called_as_splits_are_classes_and_it_is_said(classes):
    names = pets(9, *classes)
    splits, strays, notes = rule(*names)
    assert splits == {"train": {name: name.split("/")[0] for name in names}} and not strays
    assert len(notes) == 1 and "to read one folder alone: --dataset /d/" in notes[0]
    assert all(name in notes[0] for name in classes)


@pytest.mark.parametrize("words", [("train", "test"), ("training", "val"), ("Train", "testing"), ("train", "eval")])
def test_folders_that_all_have_a_splits_name_are_splits(words):
    names = [f"{word}/{name}" for word in words for name in pets(4, "cat", "dog")]
    splits, strays, notes = rule(*names, "readme.png")
    other = folders.SPLIT_OF[words[1].lower()]
    assert set(splits) == {"train", other} and strays == ["readme.png"] and not notes
    assert splits["train"] == {name: name.split("/")[1] for name in names if name.startswith(words[0])}


def test_two_folders_of_one_split_keep_their_names():
    splits, _, _ = rule("train/1.png", "val/2.png", "dev/3.png")
    assert set(splits) == {"train", "val", "dev"}


def test_a_single_folder_is_descended_into():
    names = [f"archive/pets/{name}" for name in pets(6, "cat", "dog")]
    assert rule(*names) == ({"train": {name: name.split("/")[2] for name in names}}, [], [])
    names = [f"archive/{split}/images/{name}" for split in ("train", "test") for name in pets(6, "cat", "dog")]
    splits, _, _ = rule(*names)
    assert splits["test"] == {name: name.split("/")[3] for name in names if "/test/" in name}
    one = rule("train/cat/1.png", "train/dog/2.png", "test/cat/3.png")[0]  # a class alone is no wrapping folder
    assert one["test"] == {"test/cat/3.png": "cat"}


def test_images_in_no_class_folder_take_the_labels_with_them_and_it_is_said():
    splits, strays, notes = rule(*pets(6, "cat", "dog"), "stray.png")
    assert set(splits["train"].values()) == {None} and len(splits["train"]) == 7 and not strays
    assert notes == [
        "split train has no labels: 1 image lies in no class folder (stray.png); every image must lie in one"
    ]
    splits, _, notes = rule("train/cat/1.png", "train/dog/2.png", "val/3.png", "val/4.png")
    assert set(splits["train"].values()) == {"cat", "dog"} and set(splits["validation"].values()) == {None}
    assert "split validation has no labels: 2 of 2 images lie in no class folder (val/3.png)" in notes[0]


def test_images_beside_a_test_folder_are_not_lost():
    splits, strays, notes = rule("1.png", "2.png", "test/3.png")
    assert len(splits["train"]) == 3 and not strays
    assert notes[0].startswith(
        "all images are read as one split: test has the name of a split, images in no folder have not; to read one"
    )


# What a folder may hold.


def test_what_was_found_is_said(place):
    root = tree(place / "d", [*pets(24, "cat", "dog"), ".hidden/1.png", "cat/._2.png"])
    (place / "d" / "cat" / "0.txt").write_text("a caption")
    (place / "d" / "dog" / "more.zip").write_bytes(b"PK")
    (place / "d" / "dog" / "1.png").write_bytes(b"no image")
    source = data.open_source(root, skip_bad_images=True)
    first, *notes = source.found
    assert first == (f"found 26 images in 2 classes under {root}; 23 used, 3 left out (2 hidden, 1 cannot be read)")
    assert "archives are not opened: dog/more.zip" in notes[0] and "not read: 1 other file (.txt 1)" in notes[0]
    assert any(line.endswith("d/dog/1.png: cannot be read") for line in source.left_out)
    assert len(source.left_out) == 3 and source.images + len(source.queries[1]) == 23


def test_a_bad_image_is_named_by_its_file(place):
    root = tree(place / "d", pets(24, "cat", "dog"))
    (place / "d" / "dog" / "7.png").write_bytes(PNG[0][:40])
    with pytest.raises(UserError, match=r"row \d+ of train is not an image that can be read \(.*/d/dog/7.png\)"):
        data.open_source(root)


@pytest.mark.parametrize("endings", ["png PNG JPG jpeg webp bmp TIFF avif jp2 gif".split()])
def test_every_ending_that_pillow_reads(place, endings):
    for i, ending in enumerate(endings):
        path = place / "d" / ("a", "b")[i % 2] / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    assert data.open_source("d").found[0].startswith(f"found {len(endings)} images in 2 classes")


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_no_utf8_and_patterns_are_plain(place, streaming):
    names = [b"\xe9t\xe9/%d.png" % i for i in range(10)] + [b"a*[1]/\xff%d.png" % i for i in range(10)]
    root = tree(place / "photos [2024]*", names)
    source = data.open_source(root, streaming=streaming)
    assert source.found[0].startswith("found 20 images")
    if streaming:
        queries = 0 if source.queries is None else len(source.queries[1])
        found = {record["image"]["path"] for record in source.train}
        assert len(found) == 20 - queries and source.train.num_shards == 20
    else:
        assert sorted(source.train.labels(torch.arange(20)).tolist()) == [0] * 10 + [1] * 10


def test_links_are_followed_and_loops_end(place):
    tree(place / "far", pets(20, "cat", "dog"))
    (place / "d").mkdir()
    (place / "d" / "cat").symlink_to("../far/cat")
    tree(place / "d", pets(5, "bird"))
    assert data.open_source("d").found[0].startswith("found 15 images in 2 classes")
    (place / "d" / "bird" / "up").symlink_to("../..")  # above the folder itself
    with pytest.raises(UserError, match=r"--dataset d: .*/d/bird/up is a link to .*: a loop; remove the link"):
        data.open_source("d")
    (place / "d" / "bird" / "up").unlink()
    (place / "d" / "bird" / "0.png").unlink()
    (place / "d" / "bird" / "0.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="No such file: .*/d/bird/0.png"):
        data.open_source("d")


def test_metadata_that_names_some_images(place):
    root = tree(place / "d", [f"{i}.png" for i in range(24)])
    lines = [f"{i}.png,{('cat', 'dog')[i % 2]}" for i in range(20)]
    (place / "d" / "metadata.csv").write_text("\n".join(["file_name,label", *lines, "gone.png,cat"]))
    source = data.open_source(root)
    assert source.found[0] == (
        f"found 24 images in 2 classes under {root}; 20 used, 4 left out (4 not named in metadata.csv)"
    )
    assert "metadata.csv names 1 image not there (gone.png" in source.found[1]
    wanted = [int(Path(record["path"]).stem) % 2 for record in source.train.table["image"]]
    assert source.train.labels(torch.arange(20)).tolist() == wanted


def test_of_two_metadata_files_in_a_folder_the_second_is_said_not_to_be_read(place):
    root = tree(place / "d", [f"{i}.png" for i in range(24)])
    (place / "d" / "metadata.csv").write_text("file_name,label\n" + "\n".join(f"{i}.png,cat" for i in range(24)))
    (place / "d" / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "dog"}\n')
    source = data.open_source(root)
    assert source.images == 24 and "note: metadata.jsonl is not read, as metadata.csv is beside it" in source.found


def test_a_foreign_info_file_and_a_broken_readme_are_not_in_the_way(place):
    root = tree(place / "d", pets(20, "cat", "dog"))
    (place / "d" / "dataset_info.json").write_text('{"mine": 1}')
    (place / "d" / "README.md").write_text("---\na: [1\n---\n")
    source = data.open_source(root)
    assert source.found[0].endswith("all used") and "front matter of README.md cannot be read" in source.found[1]


# The fingerprint, and what is remembered.


def test_the_fingerprint_is_of_names_and_sizes_wherever_they_lie(place):
    root = tree(place / "d", pets(20, "cat", "dog"))
    first = data.open_source(root).fingerprint
    os.rename("d", "e")
    assert data.open_source("e").fingerprint == first
    os.rename("e/dog/1.png", "e/dog/x.png")  # as many images as before
    assert data.open_source("e").fingerprint != first
    os.rename("e/dog/x.png", "e/dog/1.png")
    Path("e/dog/1.png").write_bytes(encoded(picture(99)))
    assert data.open_source("e").fingerprint != first


def test_pixels_follow_a_file_that_changes_under_its_old_time(place):
    root = tree(place / "d", pets(20, "cat", "dog"))
    before = data.open_source(root)
    file = place / "d" / "cat" / "0.png"
    times = os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns
    changed = encoded(picture(50))
    file.write_bytes(changed)
    os.utime(file, ns=times)
    after = data.open_source(root)
    everything = torch.arange(20)
    assert (before.train.whole(everything, 12)[0] != after.train.whole(everything, 12)[0]).flatten(1).any(1).sum() == 1


def test_the_others_of_a_machine_take_the_listing_of_the_first(place, monkeypatch):
    root = tree(place / "d", [*pets(20, "cat", "dog"), b"cat/\xff.png"])
    first = folders.listed(Path(root))
    monkeypatch.setattr(os, "scandir", lambda folder: pytest.fail("listed again"))
    again = folders.listed(Path(root), remembered=True)
    assert again.names == first.names and (again.sizes == first.sizes).all() and (again.times == first.times).all()


# Any tree.

WORDS = ("train", "test", "val", "dev", "cat", "dog", "x-train-1", "Training")
FOLDERS = st.lists(st.sampled_from(WORDS), max_size=3).map(tuple)
ENTRY = st.tuples(
    FOLDERS,
    st.sampled_from(("1", "train", "test_2", "val.3", "a b", "[4]", "é")),
    st.sampled_from(("image", "image", "bad", "text", "link", "zip")),
)


def grown(root, entries):
    """The images, good or bad, of a drawn tree: real paths, one for each way to it."""
    (root / "d").mkdir()
    (root / "far").mkdir()
    tree(root / "far", ["1.png", "sub/2.png"])
    images = set()
    for i, (parents, stem, kind) in enumerate(entries):
        folder = root / "d" / Path(*parents)
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "link":
            link = folder / f"{stem}{i}"
            link.symlink_to(root / "far", target_is_directory=True)
            images |= {str(link / "1.png"), str(link / "sub" / "2.png")}
            continue
        file = folder / f"{stem}{i}.{ {'text': 'txt', 'zip': 'zip'}.get(kind, 'png') }"
        file.write_bytes(PNG[i % 4] if kind == "image" else b"nothing")
        if kind in ("image", "bad"):
            images.add(str(file))
    return images


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(ENTRY, max_size=14))
def test_used_plus_left_out_is_all_there_is(entries):
    with tempfile.TemporaryDirectory() as root:
        images = grown(Path(root).resolve(), entries)
        where = str(Path(root).resolve() / "d")
        opened = split = None
        try:
            opened = data.sources.opened(where, None, False)
        except UserError as error:
            assert not images and "no image and no table in it" in str(error)
            return
        used = [record["path"] for rows in opened.splits.values() for record in raw(rows)]
        left = [os.path.join(where, name) for names in opened.left_out.values() for name, _ in names]
        assert sorted(used + left) == sorted(images)
        for split, rows in opened.splits.items():
            try:
                source = data.open_source(where, split=split, skip_bad_images=True)
            except UserError as error:
                assert "no image in it can be read" in str(error)
                named = opened.splits[str(error).split()[1][:-1]]  # this split, or the one to evaluate on
                assert not any(Path(record["path"]).read_bytes().startswith(b"\x89PNG") for record in raw(named))
                continue
            good = sum(Path(record["path"]).read_bytes().startswith(b"\x89PNG") for record in raw(rows))
            assert len(source.train) == good and len(source.bad) == len(rows) - good
        again = data.sources.opened(where, None, False, remembered=True)
        assert {k: list(raw(v)) for k, v in again.splits.items()} == {k: list(raw(v)) for k, v in opened.splits.items()}


def raw(rows):
    return rows.cast_column("image", datasets.Image(decode=False))["image"]


@pytest.mark.slow
def test_two_processes_read_the_same_rows(place):
    root = tree(place / "d", [*pets(20, "cat", "dog"), b"dog/\xff.png"])
    code = (
        f"import data; rows = data.sources.opened({root!r}, None, False).splits['train']; print(rows.data.to_pydict())"
    )
    command = [sys.executable, "-c", code]
    found = [subprocess.check_output(command, cwd=Path(data.__file__).parent, text=True) for _ in range(2)]
    assert found[0] == found[1] and found[0].count(".png") == 21
