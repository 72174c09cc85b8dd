"""Hugging Face datasets in, batches of uint8 images out.

A batch is a pure function of (seed, step, process), so a run can start at any step without reading what it skips.
"""

import glob
import io
import math
import re
import signal
import zlib
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flags import UserError
from images import SMALL, LargeImages, SmallImages, TooLarge, bad_row, crop_pairs, decode

FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
BANK, QUERIES = 50_000, 10_000  # images of a k-NN evaluation, at most; a tenth of that from a stream
DIGITS = dict(min_crop=0.6, flip=0.0)  # views of the digits: half a digit, or a mirrored one, is another or none
ORDER, CROP, VIEW, SPLIT = range(4)  # what a generator is for: keeps the streams of draws apart


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


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
    splits = _load(dataset, subset, streaming)
    train = _columns(_take_split(splits, split, dataset), f"{dataset}, {split}", image_column, label_column)
    held_out = None
    if eval_split is None:
        base = split.partition("[")[0]
        eval_split = next((s for s in ("validation", "valid", "val", "test") if s in splits and s != base), None)
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
        records = list(stream.shuffle(seed=seed, buffer_size=1000).take(most))
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
    return _mark(record["image"]) % 10 == 0


def _mark(image):
    """A number for an image: from its bytes, or, of a file that is not read yet, from its folder and name."""
    return zlib.crc32(image["bytes"] or "/".join(Path(image["path"]).parts[-2:]).encode())


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
        splits = _digits()
        return {k: v.to_iterable_dataset() for k, v in splits.items()} if streaming else splits
    path = Path(spec).expanduser()
    files = [glob.escape(str(path))] if path.is_file() else sorted(glob.glob(str(path)))
    files = [] if path.is_dir() else files
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()):
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, dict) else {"train": saved}
            return {k: v.to_iterable_dataset() for k, v in saved.items()} if streaming else dict(saved)
        if path.is_dir():
            if subset is not None:
                raise UserError(f"--subset {subset}: a folder has none")
            return dict(datasets.load_dataset(str(path), streaming=streaming))
        if files:
            kinds = {FILES.get(Path(file).suffix) for file in files}
            if len(kinds) > 1 or None in kinds:
                raise UserError(f"--dataset {spec}: want files that end in {', '.join(FILES)}, all alike")
            return dict(datasets.load_dataset(kinds.pop(), data_files=files, streaming=streaming))
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec):
            raise UserError(f"--dataset {spec}: no such file or folder")
        return dict(datasets.load_dataset(spec, subset, streaming=streaming))
    except UserError:
        raise
    except Exception as error:  # a loader of many formats raises whatever its format's library raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "cannot be read" if files or path.is_dir() else "is no file or folder here, and the Hub did not serve it"
        raise UserError(f"--dataset {spec}: {kind} ({reason}). The default, digits, needs no network") from error


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
    rows = rows.select_columns([image] + [label] * (label != "none"))
    rows = rows.rename_columns({k: v for k, v in ((image, "image"), (label, "label")) if k not in (v, "none")})
    kept = {"image": datasets.Image(decode=False)}
    if label != "none":
        kept["label"] = features[label] if rows.features else Value("int64")
    return rows.cast(Features(kept))


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


@lru_cache(2)
def _order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


class Batches(torch.utils.data.Dataset):
    """Batch i of this process, of the `parts` batches into which each step's global batch is cut.

    Every part is another slice of one global batch, so the images of a step do not depend on the number of processes.
    """

    def __init__(self, source, recipes, *, batch_size, part_size, rank, world, seed):
        self.source, self.recipes, self.seed = source, recipes, seed
        self.batch_size, self.part_size, self.rank, self.world = batch_size, part_size, rank, world
        self.accumulate = batch_size // (part_size * world)
        self.steps_per_epoch = len(source.rows) // batch_size

    def rows(self, i):
        """The rows of batch i of this process."""
        step, micro = divmod(i, self.accumulate)
        start = (micro * self.world + self.rank) * self.part_size
        return self.step_rows(step)[start : start + self.part_size]

    def step_rows(self, step):
        """The rows of the whole batch of a step, over all processes and parts."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.source.rows))
        return self.source.rows[order[step * self.batch_size : (step + 1) * self.batch_size]]

    def __getitem__(self, i):
        try:
            return self.source.train.pair(self.rows(i), self.recipes, generator(self.seed, CROP, i, self.rank))
        except UserError as error:
            return error  # raised in a worker, it would arrive as a traceback


class StreamBatches(IterableDataset):
    """The same from a stream. Batch i is made by worker i % workers, and drawn from (seed, i, process)."""

    def __init__(self, source, recipes, *, part_size, rank, world, seed, skip_bad, start=0):
        self.source, self.recipes, self.part_size = source, recipes, part_size
        self.rank, self.world, self.seed, self.skip_bad, self.start = rank, world, seed, skip_bad, start

    def epoch(self, number):
        """This process's rows in an epoch's order. (Not by set_epoch, whose number all workers share, and race for.)"""
        order = generator(self.seed, ORDER, number).initial_seed() % 2**32
        stream = self.source.train.shuffle(seed=order, buffer_size=max(1000, 4 * self.part_size))
        return split_dataset_by_node(stream, rank=self.rank, world_size=self.world) if self.world > 1 else stream

    def __iter__(self):
        info = get_worker_info()
        i, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.start - self.start % workers  # the round of workers that `start` is in
        images, bad = [], []
        for epoch in count():
            any_row = False
            for row, record in enumerate(self.epoch(epoch)):
                any_row = True
                if i < first:  # passed over undecoded
                    images.append(None)
                else:
                    try:
                        images.append(decode(record["image"]))
                    except ValueError as error:
                        if not self.skip_bad:
                            yield bad_row(f"{row}, in its order,", "the stream", error)
                            return
                        bad.append(str(_mark(record["image"])))
                if len(images) == self.part_size:
                    if i >= first:
                        yield *crop_pairs(images, self.recipes, generator(self.seed, CROP, i, self.rank)), bad
                    images, bad, i = [], [], i + workers
            if not any_row:
                yield UserError("the stream has no rows for this process; use fewer processes or workers")
                return


def _leave_signals(worker):
    """Signals are for the loop to answer: workers end with it."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)


def loader(batches, start: int, stop: int, workers: int, pin: bool):
    """Batches start to stop - 1, made by `workers` processes ahead of time (0: by this one, when asked for)."""
    options = dict(batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=_leave_signals)
    if isinstance(batches, StreamBatches):
        return islice(DataLoader(batches, **options), start % max(1, workers), None)
    return DataLoader(batches, sampler=range(start, stop), **options)


class _Whole(torch.utils.data.Dataset):
    def __init__(self, images, rows, size, chunk):
        self.images, self.parts, self.size = images, rows.split(chunk), size

    def __getitem__(self, i):
        try:
            return self.images.whole(self.parts[i], self.size)
        except UserError as error:
            return error


def whole_images(images, rows, size, *, workers=0, chunk=256):
    """(uint8 batch, which are good) of the images at `rows`, uncropped or centrally cropped, in order."""
    parts = math.ceil(len(rows) / chunk)
    workers = min(workers, parts) if images.in_workers else 0
    for batch in DataLoader(
        _Whole(images, rows, size, chunk), batch_size=None, sampler=range(parts), num_workers=workers
    ):
        if isinstance(batch, UserError):
            batch.everywhere = False
            raise batch
        yield batch
