"""What `--dataset` names: digits, a folder, files, a saved dataset or a Hub id, opened as splits of rows."""

import glob
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image

from flags import UserError, first_line
from loading import archives, folders, metadata, readme, tables
from loading.files import counted, shown
from loading.folders import SPLIT_OF

SHARDS = 256  # into which a stream is cut, at most, where that costs nothing: workers share them, a resume skips them
DIGITS = "The default, digits, needs no network"


class Opened(NamedTuple):
    """The splits of a dataset, and what was found and left out on the way."""

    splits: dict  # {name: Dataset or IterableDataset}
    place: str | None = None  # the absolute path of local data
    fingerprint: str | None = None  # of its relative names and sizes
    counts: dict = {}  # {split: rows}, where known
    left_out: dict = {}  # {split, or "" for what lies in none: [(file, why)]}
    notes: list = []
    damages: dict = {}  # {split: [an archive that is cut, and how many of its files can be read]}


def absolute(spec: str) -> str:
    """`spec` as it is found from any folder: the absolute path of local data; digits and Hub ids stay."""
    path = os.path.abspath(os.path.expanduser(spec))
    return path if spec not in ("", "digits") and (os.path.exists(path) or glob.glob(path)) else spec


def opened(spec: str, subset: str | None, streaming: bool, skip_bad: bool = False, remembered: bool = False) -> Opened:
    """Every split of `spec` by name. `remembered`: a folder was just listed by another process of this machine."""
    if spec == "digits":
        _refuse(subset, "digits, which has")
        found = Opened(_digits())
        return found._replace(splits=_as_streams(found.splits)) if streaming else found
    if not spec.strip():
        raise UserError("--dataset: want digits, a Hub id, a folder or files; the name is empty")
    path = Path(spec).expanduser()
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))
    try:
        if path.is_dir():
            return _folder(spec, Path(os.path.abspath(path)), subset, streaming, skip_bad, remembered)
        if files:
            _refuse(subset, "files, which have")
            return _files(spec, [os.path.abspath(file) for file in files], streaming, skip_bad)
    except UserError as error:
        if str(error).startswith(
            "--dataset: "
        ):  # from a reader of one kind of file, which is not told the flag's value
            raise UserError(f"--dataset {spec}: {str(error)[11:]}") from error
        raise
    return _hub(spec, subset, streaming)


def _refuse(subset, what):
    if subset is not None:
        raise UserError(f"--subset {subset}: --dataset is {what} no configurations; drop --subset")


def splits_of(spec: str) -> dict:
    """The splits of `spec` by name. Raises ValueError, with the reason alone, for a flag that is not --dataset."""
    try:
        return opened(spec, None, False).splits
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"--dataset {spec}: ")) from error


# ---------------------------------------------------------------------------------------------------------------------
# Local data.


def _folder(spec, path, subset, streaming, skip_bad, remembered):
    listing = folders.listed(path, remembered)
    mark = folders.key(listing)
    if tables.is_saved(path):
        _refuse(subset, "a saved dataset, which has")
        found = tables.saved(path, mark)
        counts = {split: len(rows) for split, rows in found.items()}
        found = _as_streams(found) if streaming else found
        return Opened(found, str(path), folders.fingerprint(listing), counts)
    head, note = readme.front_matter(path)
    notes = [note] if note else []
    if note and subset is not None:
        raise UserError(f"--subset {subset}: {note}")
    configured = readme.configured(head, listing.names, subset, spec)
    known = {}
    if configured is not None:
        if "" not in configured:
            known = {split: [listing.names[i] for i in rows] for split, rows in configured.items()}
        told = {i for rows in configured.values() for i in rows}
        ends = {*folders.endings(), *tables.FILES}
        untold = [n for i, n in enumerate(listing.names) if i not in told and folders.ending(n) in ends]
        if untold:
            notes.append(f"{counted(len(untold), 'file')} that README.md does not name left out: {_listed(untold)}")
        listing = listing.of(sorted({i for rows in configured.values() for i in rows}))
        mark = f"{mark}-{subset}"
    ends = folders.endings()
    images = [i for i, name in enumerate(listing.names) if folders.ending(name) in ends]
    others = [i for i, name in enumerate(listing.names) if folders.ending(name) in tables.FILES]
    others = [i for i in others if os.path.basename(listing.names[i]) not in metadata.NAMES]
    others = [i for i in others if not folders.is_hidden(listing.names[i])]
    if len(others) > len(images) or others and configured is None and "dataset_info" in head:
        return _tables(spec, listing, others, known, streaming, skip_bad, mark, notes)
    if not images:
        has = _foreign(listing.names)
        raise UserError(f"--dataset {spec}: cannot be read (no image and no table in it{'; ' * bool(has)}{has})")
    return _images(listing, images, known, streaming, mark, notes)


def _images(listing, images, known, streaming, mark, notes):
    names, left_out = listing.names, {"": []}
    foreign = set(range(len(names))) - set(images)
    foreign = _foreign([names[i] for i in sorted(foreign) if os.path.basename(names[i]) not in metadata.NAMES])
    notes = [*notes, *([foreign] if foreign else [])]
    left_out[""] += [(names[i], "hidden") for i in images if folders.is_hidden(names[i])]
    images = [i for i in images if not folders.is_hidden(names[i])]
    images, extra, unnamed, said = metadata.applied(listing.root, names, images)
    left_out[""] += unnamed
    folder = folders.arranged(listing.root, [names[i] for i in images])
    if known:
        folder = folder._replace(splits=_told(known, [names[i] for i in images], folder), strays=[])
    left_out[""] += [(names[images[i]], "in no split's folder") for i in folder.strays]
    if folder.strays:
        notes.append(f"in no split's folder: {_listed([names[images[i]] for i in folder.strays])}")
    splits = {}
    for split, (rows, labels) in folder.splits.items():
        columns = {name: column.take(rows) for name, column in extra.items()}
        own = [images[i] for i in rows]
        splits[split] = folders.rows_of(listing, own, labels, folder.names, columns, f"{mark}-{split}")
    counts = {split: len(rows) for split, rows in splits.items()}
    used = listing.of(sorted(images))
    splits = _as_streams(splits) if streaming else splits
    return Opened(splits, listing.root, folders.fingerprint(used), counts, left_out, [*notes, *said, *folder.notes])


def _told(known, names, folder):
    """The splits that README.md tells, with the classes of the rule; `known` are names of files."""
    place = {name: i for i, name in enumerate(names)}
    labels = {i: x for rows, numbers in folder.splits.values() if numbers for i, x in zip(rows, numbers)}
    splits = {split: [place[name] for name in files if name in place] for split, files in known.items()}
    return {
        split: (rows, [labels[i] for i in rows] if all(i in labels for i in rows) else None)
        for split, rows in splits.items()
        if rows
    }


def _tables(spec, listing, rows, known, streaming, skip_bad, mark, notes):
    names = listing.names
    kinds = Counter(tables.FILES[folders.ending(names[i])] for i in rows)
    if len(kinds) > 1:
        raise UserError(f"--dataset {spec}: has files that end in {', '.join(tables.FILES)}, want all alike")
    foreign = _foreign([name for i, name in enumerate(names) if i not in set(rows)], tables_too=True)
    mine = [names[i] for i in rows]
    if known:
        place = {name: i for i, name in enumerate(mine)}
        splits = {split: [place[name] for name in files if name in place] for split, files in known.items()}
        said = []
    else:
        arranged = folders.arranged(listing.root, mine)
        if set(arranged.splits) != {"train"} or any("name of a split" in note for note in arranged.notes):
            splits, said = {split: of for split, (of, _) in arranged.splits.items()}, arranged.notes
        else:
            splits, said = tables.by_name(mine, SPLIT_OF)
    paths = {split: [os.path.join(listing.root, mine[i]) for i in of] for split, of in splits.items() if of}
    found = _of_kind(kinds.most_common(1)[0][0], paths, streaming, skip_bad, mark)
    used = folders.fingerprint(listing.of(rows))
    return found._replace(
        place=listing.root, fingerprint=used, notes=[*notes, *([foreign] if foreign else []), *said, *found.notes]
    )


def _files(spec, files, streaming, skip_bad):
    kinds = {tables.FILES.get(folders.ending(file)) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise UserError(f"--dataset {spec}: want files that end in {', '.join(tables.FILES)}, all alike")
    root = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files)
    status = [os.stat(file) for file in files]
    listing = folders.Listing(
        root,
        [os.path.relpath(file, root) for file in files],
        np.array([s.st_size for s in status], np.int64),
        np.array([[s.st_mtime_ns, s.st_ctime_ns] for s in status], np.int64),
    )
    found = _of_kind(kinds.pop(), {"train": files}, streaming, skip_bad, folders.key(listing))
    return found._replace(place=absolute(spec), fingerprint=folders.fingerprint(listing))


def _of_kind(kind, paths, streaming, skip_bad, mark):
    left_out, damages, notes = {}, {}, []
    if kind == "tar":
        found, counts = {}, {}
        for split, files in paths.items():
            rows = archives.rows_of(files, skip_bad, f"{mark}-{split}")
            found[split], left_out[split], damages[split], said = rows
            notes += said
            counts[split] = len(found[split])
    else:
        found, counts, notes = tables.opened(kind, paths, streaming, mark)
    if streaming:
        found = _many_shards(found) if kind == "parquet" else _as_streams(found)
    return Opened(found, counts=counts, left_out=left_out, notes=notes, damages=damages)


def _foreign(names, tables_too=False):
    """A line on files that are no images: archives by name, others by ending (or by name, beside tables)."""
    names = [name for name in names if not folders.is_hidden(name)]
    zips = [name for name in names if folders.ending(name) in folders.ARCHIVES]
    plain = [name for name in names if name not in set(zips) and os.path.basename(name) != "README.md"]
    said = []
    if zips:
        said.append(f"archives are not opened: {_listed(zips)}; unpack them to use what they hold")
    if plain and tables_too:
        said.append(f"not read: {_listed(plain)}")
    elif plain:
        count = Counter(folders.ending(name) or "no ending" for name in plain).most_common(6)
        listed = ", ".join(f"{shown(end)} {number:,}" for end, number in count)
        said.append(f"not read: {counted(len(plain), 'other file')} ({listed})")
    return "; ".join(said)


def _listed(names):
    return ", ".join(map(shown, names[:4])) + (f", ... ({len(names):,})" if len(names) > 4 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, and the digits.


def _hub(spec, subset, streaming):
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec):
        moved = "; if it moved, name where it is now: --dataset NEW" if os.path.isabs(os.path.expanduser(spec)) else ""
        raise UserError(f"--dataset {spec}: no such file or folder{moved}")
    said = "is no file or folder here, and the Hub did not serve it"
    unknown = _unknown_to_hub(spec)
    if unknown:
        raise UserError(f"--dataset {spec}: {said} ({unknown}). {DIGITS}")
    try:
        # Not the bare name, which may be a folder here, or the name of one of the loaders of `datasets`.
        return Opened(_many_shards(datasets.load_dataset(f"hf://datasets/{spec}", subset, streaming=streaming)))
    except Exception as error:  # a loader of many formats raises whatever its format's library raises
        raise UserError(f"--dataset {spec}: {said} ({tables.why(error)}). {DIGITS}") from error


def _unknown_to_hub(spec):
    """Why the Hub, or its cache here, knows no dataset `spec`; None where it does.

    The cache of `datasets` is not asked: it keeps what was read from a local folder under the folder's name alone.
    """
    kept = Path(constants.HF_HUB_CACHE) / f"datasets--{spec.replace('/', '--')}" / "snapshots"
    owned = Path(datasets.config.HF_DATASETS_CACHE) / spec.replace("/", "___")
    if kept.is_dir() and any(kept.iterdir()) or "/" in spec and owned.is_dir():
        return None
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "offline, and it is not in the Hub's cache"
    try:
        HfApi().dataset_info(spec, timeout=30)
    except GatedRepoError:
        return None  # `load_dataset` says how to get access
    except RepositoryNotFoundError:
        return "no dataset has that name there"
    except Exception as error:
        return first_line(error)
    return None


def _digits():
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = [{"bytes": _png(scan), "path": None} for scan in scans.images]
    features = Features(image=datasets.Image(), label=ClassLabel(names=[str(d) for d in range(10)]))
    return {"train": Dataset.from_dict({"image": images, "label": scans.target.tolist()}, features=features)}


def _png(scan):
    file = io.BytesIO()
    Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _as_streams(splits):
    """Rows that are here already, read as they are asked for."""
    return {k: v.to_iterable_dataset(num_shards=min(SHARDS, len(v))) if len(v) else v for k, v in splits.items()}


def _many_shards(splits):
    """A stream of few parquet files by their row groups; of many not, since that reads each file's end."""
    few = [k for k, v in splits.items() if not isinstance(v, Dataset) and v.num_shards < SHARDS // 4]
    return {k: v.reshard() if k in few else v for k, v in splits.items()}
