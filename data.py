"""Hugging Face datasets in, batches of uint8 images out.

A batch is a pure function of (seed, step, process), so a run can start at any step without reading what it skips.
"""

import glob
import io
import math
import re
import signal
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bsim import ViewRecipe, random_crop_box
from flags import UserError

SMALL = 64  # images whose longer side is at most this are decoded once, and cached
PIXELS = 100_000_000  # an image that claims more is refused before it is decoded
DECODER = 1  # raise when `to_rgb` or the cache's layout changes: cached pixels of another version are not used
FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
BANK, QUERIES = 50_000, 10_000  # images of a k-NN evaluation, at most
DIGITS = dict(min_crop=0.6, flip=0.0)  # views of the digits: half a digit, or a mirrored one, is another or none
ORDER, CROP, VIEW, SPLIT = range(4)  # what a generator is for: keeps the streams of draws apart


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


# ---------------------------------------------------------------------------------------------------------------------
# One image.


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright: 16 bits are scaled down, transparency is laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # PIL would clip these to 255
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)
        scale = 1 / 257 if image.mode != "F" and (";16" in image.mode or highest > 255) else 1
        scale = 255 if image.mode == "F" and highest <= 1 else scale
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(record: dict) -> Image.Image:
    """A row's {"bytes", "path"} as an RGB image; any way in which that can fail is a ValueError."""
    try:
        with Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"claims {image.width} x {image.height} pixels")
            return to_rgb(image)
    except Exception as error:  # a broken file can raise anything, from SyntaxError to struct.error
        reason = "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise ValueError(reason) from error


def bad_row(row, error) -> UserError:
    return UserError(
        f"row {row} of the dataset is not an image that can be read ({error}). "
        "Mend it, or leave such rows out and count them: --skip_bad_images"
    )


def _pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _centre(image, size):
    """Shorter side to 8/7 of `size`, then the central square: the usual 256 and 224."""
    scale = size * 8 / 7 / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------------------------------------------------------------
# Images by row. Small ones lie decoded in the `datasets` cache; large ones are decoded when asked for.


class SmallImages:
    """Images decoded once, all of one shape; `rows` may be any of range(len)."""

    in_workers = False

    def __init__(self, rows: Dataset, shape: tuple[int, int], skip_bad: bool):
        settings = dict(shape=shape, skip_bad=skip_bad, decoder=DECODER)
        features = Features(pixels=Value("binary"), **{k: v for k, v in rows.features.items() if k == "label"})
        self.shape = shape
        self.table = rows.map(
            _decode_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            fn_kwargs=settings,
            desc="decoding",
        ).with_format("arrow")
        self.skipped = len(rows) - len(self.table)

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return torch.tensor(self.table[rows.tolist()]["label"].to_pylist())

    def whole(self, rows, size):
        """uint8 [N, 3, H, W]; the view that evaluates resizes them."""
        pixels = bytearray(b"".join(self.table[rows.tolist()]["pixels"].to_pylist()))
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape, 3).permute(0, 3, 1, 2)

    def pair(self, rows, recipes, generator):
        images = self.whole(rows, None)
        return images, images


def _decode_batch(batch, indices, shape, skip_bad, decoder):
    height, width = shape
    kept = {name: [] for name in ("pixels", "label") if name == "pixels" or name in batch}
    for i, row in enumerate(indices):
        try:
            image = decode(batch["image"][i])
        except ValueError as error:
            if skip_bad:
                continue
            raise bad_row(row, error) from None
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        kept["pixels"].append(image.tobytes())
        if "label" in kept:
            kept["label"].append(batch["label"][i])
    return kept


class LargeImages:
    """Images decoded and cropped when asked for, in DataLoader workers."""

    in_workers = True

    def __init__(self, rows: Dataset, skip_bad: bool):
        self.table, self.skip_bad, self.skipped = rows, skip_bad, 0

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return torch.tensor(self.table.select_columns("label")[rows.tolist()]["label"])

    def _images(self, rows):
        for row in rows.tolist():
            for other in count(row):  # with skip_bad a bad row's place is taken by the next good one
                try:
                    yield decode(self.table[other % len(self)]["image"])
                    break
                except ValueError as error:
                    if not self.skip_bad or other == row + len(self):
                        raise bad_row(other % len(self), error) from None
                    self.skipped += 1

    def whole(self, rows, size):
        return torch.stack([_pixels(_centre(image, size)) for image in self._images(rows)])

    def pair(self, rows, recipes, generator):
        return crop_pairs(self._images(rows), recipes, generator)


def crop_pairs(images, recipes, generator):
    """Two random-resized crops of each PIL image: uint8 [N, 3, size, size], twice."""
    crops = ([], [])
    for image in images:
        for side, recipe in zip(crops, recipes):
            box = random_crop_box(1, image.height, image.width, recipe.scale, recipe.ratio, generator=generator)
            top, left, height, width = box[0].tolist()
            crop = image.crop((left, top, left + width, top + height))
            side.append(_pixels(crop.resize((recipe.size, recipe.size), Image.Resampling.BILINEAR)))
    return tuple(torch.stack(side) for side in crops)


def after_crop(recipe: ViewRecipe) -> ViewRecipe:
    """What is left of a recipe for images that are cropped already."""
    return recipe._replace(scale=(1, 1), ratio=(1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Opening a dataset.


class Source(NamedTuple):
    """An opened dataset. `queries` and `bank` are (images, rows) for k-NN, or None where there are no labels."""

    train: SmallImages | LargeImages | datasets.IterableDataset
    rows: torch.Tensor | None  # the rows to train on; None for a stream
    bank: tuple | None
    queries: tuple | None
    side: int  # the longer side of the first image
    skipped: int  # bad images left out so far

    @property
    def images(self):
        return None if self.rows is None else len(self.rows)


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
    train = _take_split(splits, split, dataset)
    if eval_split is None:
        base = split.partition("[")[0]
        eval_split = next((s for s in ("validation", "valid", "val", "test") if s in splits and s != base), None)
    held_out = _take_split(splits, eval_split, dataset) if eval_split else None
    train, names = _columns(train, dataset, image_column, label_column)
    if held_out is not None:
        held_out, _ = _columns(held_out, dataset, image_column, label_column, names)
    if streaming:
        return _stream_source(train, held_out, skip_bad_images)

    first = _first_image(train, skip_bad_images)
    small = max(first.size) <= SMALL

    def images(rows):
        return SmallImages(rows, first.size[::-1], skip_bad_images) if small else LargeImages(rows, skip_bad_images)

    labelled = "label" in train.features
    train = images(train)
    if len(train) == 0:
        raise UserError(f"--dataset {dataset}: no image in it can be read")
    rows = torch.randperm(len(train), generator=generator(seed, SPLIT))
    if not labelled:
        return Source(train, rows.sort().values, None, None, max(first.size), train.skipped)
    if held_out is None or "label" not in held_out.features:
        kept = min(QUERIES, len(rows) // 10)
        queries, rows = (train, rows[:kept]), rows[kept:]
    else:
        held_out = images(held_out)
        queries = (held_out, torch.randperm(len(held_out), generator=generator(seed, SPLIT))[:QUERIES])
    bank = (train, rows[:BANK])
    return Source(train, rows.sort().values, bank, queries, max(first.size), train.skipped)


def _stream_source(train, held_out, skip_bad):
    side = max(_first_image(train, skip_bad).size)
    if "label" not in _features(train):
        return Source(train, None, None, None, side, 0)
    head = list(train.take(10_000))
    queries = list(held_out.take(5_000)) if held_out is not None else head[: len(head) // 10]
    if held_out is None:
        head, train = head[len(queries) :], train.skip(len(queries))

    def images(records):
        rows = Dataset.from_list(records, features=train.features)
        return LargeImages(rows, skip_bad), torch.arange(len(rows))

    return Source(train, None, images(head), images(queries), side, 0)


def _features(rows):
    """The features of a dataset, or of a stream, which may know them only from its first row."""
    return rows.features or Dataset.from_list(list(rows.take(1))).features


def _first_image(rows, skip_bad):
    for row, record in enumerate(rows):
        try:
            return decode(record["image"])
        except ValueError as error:
            if not skip_bad:
                raise bad_row(row, error) from None
    raise UserError("the dataset has no rows that can be read")


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
    files = sorted(glob.glob(str(path))) if any(c in spec for c in "*?[") else [str(path)] if path.is_file() else []
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()):
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, dict) else {"train": saved}
            return {k: v.to_iterable_dataset() for k, v in saved.items()} if streaming else dict(saved)
        if path.is_dir():
            return dict(datasets.load_dataset(str(path), subset, streaming=streaming))
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
        rows = rows.skip(start) if start else rows
        return rows.take(stop - start) if stop is not None else rows
    rows = rows.select(range(*slice(start, stop).indices(len(rows)))) if match[2] or match[3] else rows
    if len(rows) == 0:
        raise UserError(f"split {wanted!r} of {spec} has no rows")
    return rows


def _columns(rows, spec, image, label, names=None):
    """`rows` with only the columns "image", undecoded, and "label" where there is one; and the names of its classes."""
    features = _features(rows)

    def is_image(feature):
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    def described():
        return ", ".join(f"{k} ({getattr(v, 'dtype', type(v).__name__)})" for k, v in features.items())

    for flag, name in (("image_column", image), ("label_column", label)):
        if name not in (None, "none") and name not in features:
            raise UserError(f"--{flag} {name}: no such column in {spec}; it has {described()}")
    if image is None:
        found = [name for name, feature in features.items() if is_image(feature)]
        if not found:
            raise UserError(f"--dataset {spec}: no column holds images; it has {described()}")
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: images in columns {', '.join(found)}; choose: --image_column {found[0]}"
            )
        image = found[0]
    elif not is_image(features[image]) and getattr(features[image], "dtype", "") not in ("binary", "large_binary"):
        raise UserError(f"--image_column {image}: {getattr(features[image], 'dtype', 'that')} is no image column")
    if label is None:
        found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        integers = [k for k, v in features.items() if re.fullmatch(r"u?int\d+", getattr(v, "dtype", "") or "")]
        found = found or (integers if len(integers) == 1 else [])
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: classes in columns {', '.join(found)}; choose: --label_column {found[0]}, or none"
            )
        label = found[0] if found else "none"
    rows = rows.select_columns([image] + [label] * (label != "none"))
    rows = rows.rename_columns({k: v for k, v in ((image, "image"), (label, "label")) if k not in (v, "none")})
    features = {"image": datasets.Image(decode=False)}
    if label != "none":
        features["label"] = rows.features["label"] if rows.features else Value("int64")
        if getattr(features["label"], "dtype", "") in ("string", "large_string"):
            if not isinstance(rows, Dataset):
                raise UserError(
                    f"--label_column {label}: names of classes cannot be numbered in a stream; want integers"
                )
            names = names or sorted(rows.unique("label"))
            features["label"] = ClassLabel(names=names)
    return rows.cast(Features(features)), names


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
        images = self.source.train
        skipped = images.skipped
        try:
            pair = images.pair(self.rows(i), self.recipes, generator(self.seed, CROP, i, self.rank))
        except UserError as error:
            return error  # raised in a worker, it would arrive as a traceback
        return *pair, images.skipped - skipped


class StreamBatches(IterableDataset):
    """The same from a stream. Batch i is made by worker i % workers, and drawn from (seed, i, process)."""

    def __init__(self, source, recipes, *, part_size, rank, world, seed, skip_bad, start=0):
        stream = source.train.shuffle(seed=seed, buffer_size=max(1000, 4 * part_size))
        self.stream = split_dataset_by_node(stream, rank=rank, world_size=world) if world > 1 else stream
        self.recipes, self.part_size, self.rank, self.seed = recipes, part_size, rank, seed
        self.skip_bad, self.start = skip_bad, start

    def __iter__(self):
        info = get_worker_info()
        i, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.start - self.start % workers  # the round of workers that `start` is in
        images, skipped = [], 0
        for epoch in count():
            self.stream.set_epoch(epoch)
            any_row = False
            for row, record in enumerate(self.stream):
                any_row = True
                if i < first:  # passed over undecoded
                    images.append(None)
                else:
                    try:
                        images.append(decode(record["image"]))
                    except ValueError as error:
                        if not self.skip_bad:
                            yield bad_row(f"{row} (in the stream's order)", error)
                            return
                        skipped += 1
                if len(images) == self.part_size:
                    if i >= first:
                        yield *crop_pairs(images, self.recipes, generator(self.seed, CROP, i, self.rank)), skipped
                    images, skipped, i = [], 0, i + workers
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
    """uint8 batches of the images at `rows`, uncropped or centrally cropped, in order."""
    parts = math.ceil(len(rows) / chunk)
    workers = min(workers, parts) if images.in_workers else 0
    for batch in DataLoader(
        _Whole(images, rows, size, chunk), batch_size=None, sampler=range(parts), num_workers=workers
    ):
        if isinstance(batch, UserError):
            raise batch
        yield batch
