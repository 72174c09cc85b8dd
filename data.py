"""Hugging Face datasets: a name, a folder or files in; images to train on, and images to evaluate on, out."""

import glob
import io
import math
import re
from itertools import count
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from flags import UserError, first_line, reading
from loading.batches import ORDER, SPLIT, generator
from loading.images import SMALL, LargeImages, SmallImages, TooLarge, bad_row, decode, mark

FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
BANK, QUERIES = 50_000, 10_000  # images of a k-NN evaluation, at most; a tenth of that from a stream
DIGITS = dict(min_crop=0.6, flip=0.0)  # views of the digits: half a digit, or a mirrored one, is another or none
SHARDS = 256  # into which a stream is cut, at most, where that costs nothing: workers share them, a resume skips them


# ---------------------------------------------------------------------------------------------------------------------
# Opening a dataset.


class Source(NamedTuple):
    """An opened dataset. `queries` and `bank` are (images, rows) for k-NN, or None where that is not possible."""

    train: SmallImages | LargeImages | datasets.IterableDataset
    rows: torch.Tensor | None  # the rows to train on; None for a stream
    bank: tuple | None
    queries: tuple | None
    side: int  # the longer side of the images, of a few
    note: str | None  # why there is no k-NN

    @property
    def images(self):
        return None if self.rows is None else len(self.rows)

    @property
    def bad(self):
        return set() if self.rows is None else set(self.train.bad)


def open_source(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> Source:
    """Open `dataset` for pretraining. Raises UserError where it cannot be read or its columns are ambiguous."""
    with reading(f"--dataset {dataset}"):
        splits = _load(dataset, subset, streaming)
        train = _columns(_take_split(splits, split, dataset), f"{dataset}, {split}", image_column, label_column)
        held_out = None
        eval_split = eval_split or _split_to_evaluate(splits, split)
        if eval_split:
            held_out = _take_split(splits, eval_split, dataset)
            held_out = _columns(held_out, f"{dataset}, {eval_split}", image_column, label_column, optional=True)
        if streaming:
            return _stream_source(train, held_out, skip_bad_images, seed)

    shape = _common_shape(train, split, skip_bad_images)
    train = _by_row(train, split, shape, skip_bad_images)
    rows = torch.randperm(len(train), generator=generator(seed, SPLIT))
    labels = train.labels(rows) if "label" in train.table.column_names else torch.empty(0)
    note = _unfit(labels)
    if note:
        return Source(train, rows.sort().values, None, None, max(shape), note)
    queries = None
    if held_out is not None and "label" in held_out.column_names:
        held_out = _by_row(held_out, eval_split, shape, skip_bad_images)
        picked = torch.randperm(len(held_out), generator=generator(seed, SPLIT))[:QUERIES]
        queries = (held_out, picked) if (held_out.labels(picked) >= 0).any() else None  # a Hub test set may say -1
    if queries is None:
        kept = min(QUERIES, len(rows) // 10)
        queries, rows = (train, rows[:kept]), rows[kept:]
    return Source(train, rows.sort().values, (train, rows[:BANK]), queries, max(shape), None)


class Labelled(NamedTuple):
    """Images with classes: rows of `images`, and of each the number of its class among `names`."""

    images: SmallImages | LargeImages
    rows: torch.Tensor
    labels: torch.Tensor  # int64
    names: list


def open_labelled(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> tuple[Labelled, Labelled]:
    """Open `dataset` for evaluation: images to learn from, and images to be judged by.

    These are the split that is called validation or test or, where there is none, the tenth that pretraining with this
    seed held out. Raises UserError where there are no labels, or where the two have other classes.
    """
    splits = _load(dataset, subset, False)
    eval_split = eval_split or _split_to_evaluate(splits, split)
    opened = []
    for wanted in (split, eval_split) if eval_split else (split,):
        rows = _columns(_take_split(splits, wanted, dataset), f"{dataset}, {wanted}", image_column, label_column)
        if "label" not in rows.column_names:
            raise UserError(
                f"--dataset {dataset}: split {wanted} has no labels; name their column: --label_column NAME"
            )
        shape = opened[0][0].shape if opened and not opened[0][0].in_workers else None
        images = _by_row(rows, wanted, shape or _common_shape(rows, wanted, skip_bad_images), skip_bad_images)
        numbers = images.labels(torch.arange(len(images)))
        names = rows.features["label"].names if isinstance(rows.features["label"], ClassLabel) else None
        opened.append((images, numbers, names))
    if len(opened) == 1:
        rows = torch.randperm(len(opened[0][0]), generator=generator(seed, SPLIT))
        kept = min(QUERIES, len(rows) // 10)
        parts = [(*opened[0], rows[kept:].sort().values), (*opened[0], rows[:kept].sort().values)]
    else:
        parts = [(*part, torch.arange(len(part[0]))) for part in opened]
    _same_classes(dataset, *parts)
    classes = parts[0][1][parts[0][3]]
    classes = classes[classes >= 0].unique()
    found = []
    for images, numbers, names, rows in parts:
        rows = rows[numbers[rows] >= 0]
        labels = torch.searchsorted(classes, numbers[rows])
        listed = [names[c] if names else str(c) for c in classes.tolist()]
        found.append(Labelled(images, rows, labels, listed))
    return tuple(found)


def _same_classes(dataset, train, test):
    known, asked = (set(part[1][part[3]].tolist()) - {-1} for part in (train, test))
    if len(known) < 2 or not asked:
        raise UserError(
            f"--dataset {dataset}: {len(known)} classes to learn, {len(asked)} to be judged by; want 2 or more"
        )
    if train[2] != test[2]:
        unlike = [pair for pair in zip(train[2] or [], test[2] or []) if pair[0] != pair[1]]
        said = f"class {unlike[0][0]!r} there is {unlike[0][1]!r} here" if unlike else "other classes"
        raise UserError(
            f"--dataset {dataset}: the split to evaluate has {said}; want the classes of the split to train"
        )
    if asked - known:
        first = sorted(asked - known)[0]
        name = train[2][first] if train[2] else first
        raise UserError(f"--dataset {dataset}: class {name} is only in the split to evaluate, which cannot be learnt")


def _split_to_evaluate(splits, split):
    base = split.partition("[")[0]
    return next((s for s in ("validation", "valid", "val", "test") if s in splits and s != base), None)


def _by_row(rows, split, shape, skip_bad):
    if max(shape) <= SMALL:
        try:
            images = SmallImages(rows, split, shape, skip_bad)
            if len(images) == 0:
                raise UserError(f"split {split}: no image in it can be read")
            return images
        except TooLarge:  # though none of the few that were looked at
            pass
    return LargeImages(rows, split, skip_bad)


def _unfit(labels) -> str | None:
    """Why these labels cannot be evaluated by k-NN, or None."""
    known = labels[labels >= 0]
    if len(labels) == 0 or len(known) == 0:
        return "no labels"
    if len(labels) < 20:
        return f"{len(labels)} images are too few to hold some out"
    classes = len(known.unique())
    if classes < 2 or classes > len(known) / 2:
        return f"{classes} classes among {len(known)} labels"
    return None


def _stream_source(train, held_out, skip_bad, seed):
    side = max(_common_shape(train.take(16), "the stream", skip_bad))
    if "label" not in _features(train):
        return Source(train, None, None, None, side, "no labels")

    def sample(stream, most):
        """Up to `most` rows, few from each of many shards."""
        shards, records = stream.num_shards, []
        for shard in torch.randperm(shards, generator=generator(seed, ORDER)).tolist():
            records += stream.shard(shards, shard, contiguous=False).take(math.ceil(most / min(64, shards)))
            if len(records) >= most:
                break
        records = records[:most]
        columns = {name: [record[name] for record in records] for name in ("image", "label")}
        rows = Dataset.from_dict(columns, features=_features(train))
        return LargeImages(rows, "the stream's sample", skip_bad), torch.arange(len(rows))

    queries = None
    if held_out is not None and "label" in _features(held_out):
        queries = sample(held_out, QUERIES // 10)
        queries = queries if (queries[0].labels(queries[1]) >= 0).any() else None
    if queries is None:
        queries = sample(train.filter(is_held_out), QUERIES // 20)
        train = train.filter(is_not_held_out)
    bank = sample(train, BANK // 10)
    note = _unfit(bank[0].labels(bank[1])) or (None if len(queries[1]) else "no image was held out")
    return Source(train, None, None if note else bank, None if note else queries, side, note)


def is_held_out(record: dict) -> bool:
    """A tenth of a stream, told by the image itself: the same for all workers, processes, epochs and machines."""
    return mark(record["image"]) % 10 == 0


def is_not_held_out(record: dict) -> bool:
    return not is_held_out(record)


def _features(rows):
    """The features of a dataset, or of a stream, which may know them only from its first row."""
    return rows.features or Dataset.from_list(list(rows.take(1))).features


def _common_shape(rows, split, skip_bad):
    """The largest height and width of a few images, spread over the dataset."""
    shapes = []
    picked = range(0, len(rows), max(1, len(rows) // 16)) if isinstance(rows, Dataset) else None
    for row, record in zip(picked or count(), map(rows.__getitem__, picked) if picked else rows):
        try:
            image = decode(record["image"])
            shapes.append((image.height, image.width))
        except ValueError as error:
            if not skip_bad:
                raise bad_row(row, split, error) from None
    if not shapes:
        raise UserError(f"split {split}: no image in it can be read")
    return max(height for height, _ in shapes), max(width for _, width in shapes)


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


def _load(spec, subset, streaming):
    """Every split of `spec` by name."""
    if spec == "digits":
        return _as_streams(_digits()) if streaming else _digits()
    path = Path(spec).expanduser()
    files = [glob.escape(str(path))] if path.is_file() else sorted(glob.glob(str(path)))
    files = [] if path.is_dir() else files
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()):
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, dict) else {"train": saved}
            return _as_streams(saved) if streaming else dict(saved)
        if path.is_dir():
            if subset is not None:
                raise UserError(f"--subset {subset}: a folder has none")
            if streaming and datasets.load_dataset_builder(str(path)).name == "imagefolder":
                return _as_streams(datasets.load_dataset(str(path)))  # a list of files; they are read as it trains
            return _many_shards(datasets.load_dataset(str(path), streaming=streaming))
        if files:
            kinds = {FILES.get(Path(file).suffix) for file in files}
            if len(kinds) > 1 or None in kinds:
                raise UserError(f"--dataset {spec}: want files that end in {', '.join(FILES)}, all alike")
            return _many_shards(datasets.load_dataset(kinds.pop(), data_files=files, streaming=streaming))
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec):
            raise UserError(f"--dataset {spec}: no such file or folder")
        return _many_shards(datasets.load_dataset(spec, subset, streaming=streaming))
    except UserError:
        raise
    except Exception as error:  # a loader of many formats raises whatever its format's library raises
        kind = "cannot be read" if files or path.is_dir() else "is no file or folder here, and the Hub did not serve it"
        raise UserError(
            f"--dataset {spec}: {kind} ({first_line(error)}). The default, digits, needs no network"
        ) from error


def _as_streams(splits):
    """Rows that are here already, read as they are asked for."""
    return {k: v.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(v)))) for k, v in splits.items()}


def _many_shards(splits):
    """A stream of few parquet files by their row groups; of many not, since that reads each file's end."""
    few = [k for k, v in splits.items() if not isinstance(v, Dataset) and v.num_shards < SHARDS // 4]
    return {k: v.reshard() if k in few else v for k, v in splits.items()}


def _take_split(splits, wanted, spec):
    """The split `wanted`: a name, or a name and a range of rows, as in train[:5000]."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d*):(\d*)\])?", wanted)
    if not match or match[1] not in splits:
        raise UserError(f"split {wanted!r}: {spec} has {', '.join(splits)}; write one, or a part, as in train[:5000]")
    rows, start, stop = splits[match[1]], int(match[2] or 0), int(match[3]) if match[3] else None
    if not isinstance(rows, Dataset):
        if match[2] or match[3]:
            raise UserError(f"split {wanted!r}: a part of a stream depends on who reads it; want a whole split")
        return rows
    rows = rows.select(range(*slice(start, stop).indices(len(rows)))) if match[2] or match[3] else rows
    if len(rows) == 0:
        raise UserError(f"split {wanted!r} of {spec} has no rows")
    return rows


def _columns(rows, spec, image, label, optional=False):
    """`rows` with only the columns "image", undecoded, and "label", which may be missing where `optional`."""
    features = _features(rows)

    def kind(name):
        return getattr(features[name], "dtype", "") or type(features[name]).__name__

    def is_image(name):
        found = features[name]
        return isinstance(found, datasets.Image) or (isinstance(found, dict) and set(found) == {"bytes", "path"})

    has = ", ".join(f"{name} ({kind(name)})" for name in features)
    if optional and label not in (None, "none") and label not in features:
        label = "none"
    for flag, name in (("image_column", image), ("label_column", label)):
        if name not in (None, "none") and name not in features:
            raise UserError(f"--{flag} {name}: no such column in {spec}; it has {has}")
    if image is None:
        found = [name for name in features if is_image(name)]
        if not found:
            raise UserError(f"--dataset {spec}: no column holds images; it has {has}")
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: images in columns {', '.join(found)}; choose: --image_column {found[0]}"
            )
        image = found[0]
    elif not is_image(image) and kind(image) not in ("binary", "large_binary"):
        raise UserError(f"--image_column {image}: {kind(image)} is no image column")
    numbers = [name for name in features if re.fullmatch(r"u?int\d+", kind(name))]
    if label is None:
        found = [name for name in features if isinstance(features[name], ClassLabel)]
        found = found or (numbers if len(numbers) == 1 else [])
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: classes in columns {', '.join(found)}; choose: --label_column {found[0]}, or none"
            )
        label = found[0] if found else "none"
    elif label != "none" and label not in numbers and kind(label) not in ("string", "large_string", "bool"):
        raise UserError(f"--label_column {label}: {kind(label)} holds no classes; want integers or names")
    if isinstance(features[image], datasets.Image):  # before anything else, which in a stream would decode it
        rows = rows.cast_column(image, datasets.Image(decode=False))
    rows = rows.select_columns([image] + [label] * (label != "none"))
    rows = rows.rename_columns({k: v for k, v in ((image, "image"), (label, "label")) if k not in (v, "none")})
    kept = {"image": datasets.Image(decode=False)}
    if label != "none":
        kept["label"] = features[label] if rows.features else Value("int64")
    return rows.cast(Features(kept))
