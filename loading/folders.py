"""Folders of images: every file with its size and times, and the rule for splits and classes."""

import os
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from PIL import Image

from flags import UserError, progress
from loading.files import as_text, shown

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow names and does not decode
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")


class Listing(NamedTuple):
    """Every file under a folder, sorted by name."""

    root: str  # absolute
    names: list[str]  # relative to root; bytes that are not UTF-8 are surrogates, as os.scandir gives them
    sizes: np.ndarray  # int64 [N]; -1: a link that leads nowhere, or no regular file
    times: np.ndarray  # int64 [N, 2]: of the last change of the content, and of the file

    def of(self, kept: list[int]) -> "Listing":
        return Listing(self.root, [self.names[i] for i in kept], self.sizes[kept], self.times[kept])


def endings() -> set[str]:
    """The endings of files that Pillow decodes, in lower case."""
    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS}


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def fingerprint(listing: Listing) -> str:
    """Of relative names and sizes: the same where the data lies elsewhere, another where a file is another."""
    return _hash(listing.names, listing.sizes)


def key(listing: Listing) -> str:
    """Of all that tells whether a file is still what it was: for what is kept in the cache."""
    return _hash([listing.root, *listing.names], listing.sizes, listing.times)


def _hash(names, *numbers):
    found = sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    for column in numbers:
        found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Listing.


def listed(root: Path, remembered: bool = False) -> Listing:
    """Every file under `root`; links to folders are followed. Raises UserError for a loop, or a folder it may not read.

    The table is kept in the cache of `datasets`. With `remembered` it is taken from there: for the other processes of
    a machine, where one has just listed the folder.
    """
    top = os.path.abspath(root)
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "bsim" / f"listing-{sha256(os.fsencode(top)).hexdigest()[:32]}"
    if remembered:
        try:
            with pa.memory_map(str(kept)) as file:
                table = pa.ipc.open_file(file).read_all()
            names = [os.fsdecode(name) for name in table["name"].to_pylist()]
            times = np.stack([table["written"].to_numpy(), table["changed"].to_numpy()], 1)
            return Listing(top, names, table["size"].to_numpy(), times)
        except (OSError, pa.ArrowInvalid):  # another machine's disk, or a full one
            pass
    found: list[tuple] = []
    with progress(None, unit=" files", named="listing", delay=5) as bar:
        _scan(top, "", {_place(parent) for parent in (Path(top), *Path(top).parents)}, found, bar)
    found.sort()
    names = [name for name, *_ in found]
    numbers = np.array([row[1:] for row in found], np.int64).reshape(-1, 3)
    listing = Listing(top, names, numbers[:, 0].copy(), numbers[:, 1:].copy())
    remember(_as_table(listing), kept)
    return listing


def _as_table(listing):
    columns = [listing.sizes, listing.times[:, 0], listing.times[:, 1]]
    names = pa.array([os.fsencode(name) for name in listing.names], pa.binary())
    return pa.table([names, *map(pa.array, columns)], ["name", "size", "written", "changed"])


def remember(table: pa.Table, path: Path) -> None:
    """Write `table` beside `path`, then rename it. Nothing is kept where that is not possible."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        aside.replace(path)
    except OSError:  # a full disk, or a cache that may not be written to: it is made anew each time
        aside.unlink(missing_ok=True)


def _place(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _scan(folder, relative, above, found, bar):
    try:
        with os.scandir(folder) as entries:
            entries = list(entries)
    except OSError as error:
        raise UserError(f"--dataset: cannot be read ({shown(folder)}: {error.strerror})") from error
    for entry in entries:
        name = relative + entry.name
        try:
            if entry.is_dir():
                place = _place(entry.path)
                if place in above:
                    target = shown(os.path.realpath(entry.path))
                    raise UserError(
                        f"--dataset: {shown(entry.path)} is a link to {target}, a folder that it lies in: a loop; "
                        "remove the link"
                    )
                _scan(entry.path, name + "/", above | {place}, found, bar)
                continue
            status = entry.stat()
            size = status.st_size if entry.is_file() else -1
            found.append((name, size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:  # a link that leads nowhere: an image all the same, that cannot be read
            found.append((name, -1, 0, 0))
    bar.update(len(entries))


# ---------------------------------------------------------------------------------------------------------------------
# The rule.


class Folder(NamedTuple):
    """What images a folder has. `splits` are {split: (rows of the listing, class numbers or None)}."""

    splits: dict[str, tuple[list[int], list[int] | None]]
    names: list[str] | None  # of the classes
    strays: list[int]  # rows that lie in no split
    notes: list[str]


def arranged(root: str, names: list[str]) -> Folder:
    """The splits and classes of images with these relative names.

    The top-level folders are splits if every one of them has a split's name; their subfolders are then the classes.
    Otherwise all images are one split, and the top-level folders, if every image lies in one, are its classes. A single
    folder that holds everything is descended into. Deeper folders and file names make no split.
    """
    start, notes = 0, []
    while True:
        tops = {_top(name, start) for name in names}
        if len(tops) != 1 or None in tops or next(iter(tops)).casefold() in SPLIT_OF:
            break
        start += len(next(iter(tops))) + 1
    folders = sorted(tops - {None})
    words = [folder for folder in folders if folder.casefold() in SPLIT_OF]
    are_splits = words and len(words) == len(folders)
    if are_splits and None in tops and not any(SPLIT_OF[word.casefold()] == "train" for word in words):
        are_splits = False  # else the images beside them, most likely those to train on, were lost
    if words and not are_splits:
        others = [folder for folder in folders if folder not in words]
        unlike = f"{_some(others)} {'has' if len(others) == 1 else 'have'}" if others else "images in no folder have"
        read = "all images are read as one split" if None in tops else "the folders are read as classes, not as splits"
        notes.append(
            f"{read}: {_some(words)} {'has' if len(words) == 1 else 'have'} the "
            f"name of a split, {unlike} not; to read one folder alone: "
            f"--dataset {shown(os.path.join(root, names[0][:start], words[0]))}"
        )
    if not are_splits:
        inner = {"train": (list(range(len(names))), start)}
    else:
        inner = {}
        alone = Counter(SPLIT_OF[word.casefold()] for word in words)
        for i, name in enumerate(names):
            top = _top(name, start)
            if top is not None:
                split = SPLIT_OF[top.casefold()]
                split = split if alone[split] == 1 else top  # val/ beside dev/: both keep their names
                inner.setdefault(split, ([], start + len(top) + 1))[0].append(i)
    strays = [i for i, name in enumerate(names) if are_splits and _top(name, start) is None]
    return _with_classes(root, names, inner, strays, notes)


def _with_classes(root, names, inner, strays, notes):
    tops = {split: [_top(names[i], start) for i in rows] for split, (rows, start) in inner.items()}
    while True:
        single = {top for found in tops.values() for top in found}
        if len(single) != 1 or None in single:
            break
        step = len(single.pop()) + 1
        inner = {split: (rows, start + step) for split, (rows, start) in inner.items()}
        tops = {split: [_top(names[i], start) for i in rows] for split, (rows, start) in inner.items()}
    classes = sorted({top for found in tops.values() if None not in found for top in found})
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, (rows, _) in inner.items():
        outside = [i for i, top in zip(rows, tops[split]) if top is None]
        splits[split] = (rows, None if outside else [numbers[top] for top in tops[split]])
        if outside and (len(outside) < len(rows) or classes):
            count = f"{len(outside):,} of {len(rows):,} images lie" if len(outside) > 1 else "1 image lies"
            notes.append(
                f"split {split} has no labels: {count} in no class folder ({shown(names[outside[0]])}); "
                "every image must lie in one"
            )
    return Folder(splits, [shown(name) for name in classes] or None, strays, notes)


def _top(name, start):
    """The first folder of a relative name after `start` letters, or None for a file."""
    end = name.find("/", start)
    return None if end < 0 else name[start:end]


def _some(names):
    listed = ", ".join(map(shown, names[:4]))
    return f"{listed}, ... ({len(names)})" if len(names) > 4 else listed


def rows_of(listing: Listing, rows: list[int], labels, names, extra: dict, mark: str) -> Dataset:
    """Undecoded images in memory, with their labels and further columns; `mark` becomes the dataset's fingerprint."""
    paths = pa.array([as_text(os.path.join(listing.root, listing.names[i])) for i in rows], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(rows), pa.binary()), paths], ["bytes", "path"])
    table, features = {"image": images}, {"image": datasets.Image()}
    if labels is not None and "label" not in extra:
        table["label"], features["label"] = pa.array(labels, pa.int64()), ClassLabel(names=names)
    for name, column in extra.items():
        table[name] = column
        features[name] = Features.from_arrow_schema(pa.schema([(name, column.type)]))[name]
    return Dataset(pa.table(table), info=DatasetInfo(features=Features(features)), fingerprint=mark)
