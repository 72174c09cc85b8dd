"""Hugging Face datasets: a name, a folder or files in; images to train on, and images to evaluate on, out."""

import math
import os
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from flags import UserError
from loading import columns, files, reading, sources, splits
from loading.batches import ORDER, SPLIT, generator
from loading.columns import features_of
from loading.decoded import SmallImages
from loading.full_disk import opening
from loading.images import PIXELS, LargeImages, limit, mark
from loading.reading import OPEN, Way

absolute, way_of = sources.absolute, reading.way_of
HELD_OUT = 2_000  # images without labels that are not trained on, at most
BANK, QUERIES = 50_000, 10_000  # images of a k-NN evaluation, at most; a tenth of that from a stream
DIGITS = dict(min_crop=0.6, flip=0.0)  # views of the digits: half a digit, or a mirrored one, is another or none


# ---------------------------------------------------------------------------------------------------------------------
# Opening a dataset.


def is_moved(dataset: str, config: dict) -> bool:
    """Whether `dataset` is the data of the run with this config in another place: the same relative names and sizes."""
    if config.get("fingerprint") is None or absolute(dataset) == config["dataset"]:
        return False
    try:
        return sources.opened(dataset, config.get("subset"), True, True).fingerprint == config["fingerprint"]
    except UserError:
        return False


def changed(part, dataset: str, config: dict) -> list[str]:
    """A note where the data of the run with this config is another than when the run began."""
    if config.get("fingerprint") in (None, part.fingerprint) or absolute(dataset) != config["dataset"]:
        return []
    return [f"note: the data in {dataset} is not what the run trained on: names or sizes of files differ"]


def check_same(source, dataset: str, recorded: str | None, moved: bool) -> None:
    """Raise UserError where the data a run resumes with is not what it began with, by its fingerprint `recorded`."""
    if moved and recorded is None:
        raise UserError(f"--dataset {dataset}: the run has no fingerprint of its data to compare with; drop --dataset")
    if recorded is not None and recorded != source.fingerprint:
        raise UserError(
            f"--resume: the data in {dataset} is not what the run began with: names or sizes of files differ. Put it "
            "back as it was, or start another run"
        )


class Source(NamedTuple):
    """An opened dataset. `queries` and `bank` are (images, rows) for k-NN, or None where that is not possible."""

    train: Any  # SmallImages, LargeImages, or a stream: a datasets.IterableDataset
    rows: torch.Tensor | None  # the rows to train on; None for a stream
    bank: tuple | None
    queries: tuple | None
    side: int  # the longer side of the images, of a few
    note: str | None  # why there is no k-NN
    found: tuple[str, ...] = ()  # what was found and left out, in lines
    left_out: tuple[str, ...] = ()  # each image that is not used, and why
    fingerprint: str | None = None  # of the relative names and sizes of local data
    way: Way = OPEN  # how the images are read
    held_out: tuple | None = None  # (images, rows) that are not trained on, where there are no queries
    among: tuple | None = None  # (images, rows) in which their neighbours are looked for, where there is no bank

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
    remembered: bool = False,
    max_pixels: int | None = None,
    way: Way = OPEN,
    hold_out: bool = False,
) -> Source:
    """Open `dataset` for pretraining. Raises UserError where it cannot be read or its columns are ambiguous.

    `remembered`: another process of this machine has just opened it, and what it listed is taken from the cache.
    `way`: how the images are read, where a run recorded it. `hold_out`: some images without labels are not trained on,
    but measured; of images with labels this is always so.
    """
    limit(max_pixels or PIXELS)
    with opening(dataset):
        opened = sources.opened(dataset, subset, streaming, skip_bad_images, remembered)
        names: dict = dict(image=image_column, label=label_column)
        split, eval_split = splits.both(opened.splits, split, eval_split, dataset)
        train, whole = splits.taken(opened, split, dataset, **names)
        parts, wholes = {split: train}, {split: whole}
        if eval_split:
            parts[eval_split], wholes[eval_split] = splits.taken(opened, eval_split, dataset, **names, optional=True)
        if streaming:
            source, notes, said = _stream_source(parts, split, eval_split, skip_bad_images, seed, way, hold_out)
        else:
            parts, notes = columns.numbered(parts)
            source, said = _source(parts, wholes, split, eval_split, skip_bad_images, seed, way, hold_out)
    notes += columns.could_be_labels(opened.splits[splits.base(split)], image_column, label_column)
    if eval_split and source.queries is not None and source.queries[0] is source.train:
        notes.append(f"split {eval_split} has no labels: k-NN holds out a tenth of {split} in its place")
    if streaming:
        apart = "a tenth of the images" if source.train is not train else ""
    else:
        count = len(source.train) - source.images
        apart = files.counted(count, "image") if count else ""
    if apart:
        notes.append(f"held out for evaluation, and not trained on: {apart} of split {split}")
    if source.queries is not None:
        asked = int((source.queries[0].labels(source.queries[1]) >= 0).sum())
        if asked < 10:
            notes.append(f"accuracy is that of {files.counted(asked, 'held-out image')} with a label, so it is rough")
    return _told(source, opened, dataset, split, said, notes)


def _source(parts, wholes, split, eval_split, skip_bad_images, seed, way, hold_out):
    """(Source, lines on pixel values) of {split: rows}, in which the split to evaluate may be missing."""
    labelled = "label" in parts[split].column_names
    usable = [split]
    for name, rows in parts.items():
        if name != split and ("label" in rows.column_names if labelled else hold_out):
            usable.append(name)
    columns.refuse_other_classes(parts, split, eval_split)
    images, way, side, said = reading.of_rows({name: parts[name] for name in usable}, skip_bad_images, way, wholes)
    train, held_out = images[split], images.get(eval_split)
    rows = torch.randperm(len(train), generator=generator(seed, SPLIT))
    labels = train.labels(rows) if labelled else torch.empty(0)
    kept = min(QUERIES, len(rows) // 10)
    picked, asked = None, labels[:0]
    if held_out is not None:
        picked = torch.randperm(len(held_out), generator=generator(seed, SPLIT))[:QUERIES]
        asked = held_out.labels(picked) if labelled else asked
    own = not (asked >= 0).any()  # a tenth of the training split is asked: a Hub test set may say -1
    note = columns.unfit(labels, labels[kept:], labels[:kept]) if own else columns.unfit(labels, labels, asked)
    if note:
        kept = min(HELD_OUT, len(rows) // 10) if hold_out and held_out is None else 0
        others = (held_out, picked) if held_out is not None and hold_out else (train, rows[:kept]) if kept else None
        rows = rows[kept:]
        rest = dict(way=way, held_out=others, among=(train, rows[:BANK]))
        return Source(train, rows.sort().values, None, None, side, note, **rest), said
    queries, rows = ((train, rows[:kept]), rows[kept:]) if own else ((held_out, picked), rows)
    return Source(train, rows.sort().values, (train, rows[:BANK]), queries, side, None, way=way), said


def _told(source, opened, dataset, split, said, notes):
    """`source` with what was found and left out of `split`."""
    base = splits.base(split)
    left_out = [*opened.left_out.get("", []), *opened.left_out.get(base, [])]
    left_out += [(name, "cannot be read") for name in sorted(source.bad)]
    lines, streams = [], source.rows is None
    count = opened.counts.get(split) if streams else len(source.train)
    if count is not None:
        total, why = count + len(left_out), Counter(reason for _, reason in left_out)
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in why.items())
        classes = ""
        if not streams and "label" in source.train.table.column_names:
            labels = source.train.labels(torch.arange(count))
            classes = f" in {files.counted(len(labels[labels >= 0].unique()), 'class')}"
        others = [f"{name} has {number:,}" for name, number in opened.counts.items() if name != base]
        of = f", split {split}" if others or split != base else ""
        of += f" ({', '.join(others)})" if others else ""
        used = f"{count:,} used, {len(left_out):,} left out ({reasons})" if left_out else "all used"
        damages = opened.damages.get(base, [])
        if damages:
            used = used.replace("all used", f"{count:,} used")
            used += "".join(f"; {damage}, what is after them is lost" for damage in damages)
        where = f"{'under' if os.path.isdir(opened.place or '') else 'in'} {files.shown(opened.place or dataset)}"
        lines.append(f"found {files.counted(total, 'image')}{classes} {where}{of}; {used}")
    lines += [*said, *(f"note: {note}" for note in (*opened.notes, *notes))]
    left_out += [(damage, "what is after them is lost") for damage in opened.damages.get(base, [])]
    listed = tuple(f"{files.shown(name)}: {reason}" for name, reason in left_out)
    return source._replace(found=tuple(lines), left_out=listed, fingerprint=opened.fingerprint)


class Labelled(NamedTuple):
    """Images with classes: rows of `images`, and of each the number of its class among `names`."""

    images: SmallImages | LargeImages
    rows: torch.Tensor
    labels: torch.Tensor  # int64
    names: list
    found: tuple[str, ...] = ()  # notes on what was read, in lines
    fingerprint: str | None = None  # of the relative names and sizes of local data


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
    remembered: bool = False,
    max_pixels: int | None = None,
    way: Way = OPEN,
) -> tuple[Labelled, Labelled]:
    """Open `dataset` for evaluation: a training set and an evaluation set.

    These are the split that is called validation or test or, where there is none, the tenth that pretraining with this
    seed held out. Raises UserError where there are no labels, or where the two have other classes.
    """
    limit(max_pixels or PIXELS)
    with opening(dataset):
        found = sources.opened(dataset, subset, False, skip_bad_images, remembered)
        asked = eval_split
        split, eval_split = splits.both(found.splits, split, eval_split, dataset)
        parts, wholes = {}, {}
        for wanted in (split, eval_split) if eval_split else (split,):
            optional = wanted != split and not asked
            rows, wholes[wanted] = splits.taken(
                found, wanted, dataset, image=image_column, label=label_column, optional=optional
            )
            if "label" in rows.column_names:
                parts[wanted] = rows
            elif not optional:
                unused = columns.could_be_labels(found.splits[splits.base(wanted)], image_column, label_column)
                why = "; ".join([*found.notes, *unused]) or "no column could be"
                raise UserError(f"--dataset {dataset}: split {wanted} has no labels; {why}")
        parts, notes = columns.numbered(parts)
    if not asked and eval_split in parts and not (np.asarray(parts[eval_split]["label"]) >= 0).any():
        del parts[eval_split]  # a Hub test set may say -1 of all
    if eval_split and eval_split not in parts:
        notes.append(f"split {eval_split} has no labels: a tenth of {split} is held out, and is the evaluation set")
    with opening(dataset):
        images, _, _, said = reading.of_rows(parts, skip_bad_images, way, wholes)
    for wanted, of in images.items():
        if of.bad:
            said.append(f"left out {files.counted(len(of.bad), 'image')} of split {wanted} that cannot be read")
    opened = []
    for wanted, rows in parts.items():
        numbers = images[wanted].labels(torch.arange(len(images[wanted])))
        names = rows.features["label"].names if isinstance(rows.features["label"], ClassLabel) else None
        opened.append((images[wanted], numbers, names))
    if len(opened) == 1:
        rows = torch.randperm(len(opened[0][0]), generator=generator(seed, SPLIT))
        kept = min(QUERIES, len(rows) // 10)
        two = [(*opened[0], rows[kept:].sort().values), (*opened[0], rows[:kept].sort().values)]
    else:
        two = [(*part, torch.arange(len(part[0]))) for part in opened]
    columns.refuse_unlike(dataset, *two)
    classes = two[0][1][two[0][3]]
    classes = classes[classes >= 0].unique()
    lines = (*said, *(f"note: {note}" for note in (*found.notes, *notes)))

    def labelled(images, numbers, names, rows):
        rows = rows[numbers[rows] >= 0]
        labels = torch.searchsorted(classes, numbers[rows])
        listed = [names[c] if names else str(c) for c in classes.tolist()]
        return Labelled(images, rows, labels, listed, lines, found.fingerprint)

    train, test = (labelled(*part) for part in two)
    return train, test


class Unlabelled(NamedTuple):
    """The images of a split, all of them, with their names and labels where they have some."""

    images: SmallImages | LargeImages
    table: Dataset  # "image", undecoded, and "label" where there is one: all rows, bad ones too
    place: str | None  # of local data
    names: list | None  # of the classes
    found: tuple[str, ...]

    def rows_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of `images` that these rows of `table` are; -1 of a bad small image, which it has not."""
        if not isinstance(self.images, SmallImages):
            return rows
        place = torch.from_numpy(np.searchsorted(self.images.good, rows))
        at = place.clamp(max=len(self.images.good) - 1)
        return torch.where(torch.from_numpy(self.images.good)[at] == rows, at, -1)


def open_images(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad_images: bool = False,
    remembered: bool = False,
    max_pixels: int | None = None,
    way: Way = OPEN,
) -> Unlabelled:
    """Open all images of a split of `dataset`, in its order. Raises UserError where it cannot be read."""
    limit(max_pixels or PIXELS)
    with opening(dataset):
        found = sources.opened(dataset, subset, False, skip_bad_images, remembered)
        rows, whole = splits.taken(found, split, dataset, image=image_column, label=label_column, optional=True)
        rows = columns.numbered({split: rows})[0][split]
        images, _, side, said = reading.of_rows({split: rows}, skip_bad_images, way, {split: whole})
    source = Source(images[split], torch.arange(len(images[split])), None, None, side, None)
    told = _told(source, found, dataset, split, said, [])
    names = getattr(rows.features.get("label"), "names", None)
    return Unlabelled(images[split], rows, found.place, names, told.found)


def _stream_source(parts, split, eval_split, skip_bad, seed, way, hold_out):
    train, held_out = parts[split], parts.get(eval_split)
    columns.refuse_other_classes(parts, split, eval_split)
    way, side, said = reading.of_stream(train, skip_bad, way)
    labelled = "label" in features_of(train)
    if not labelled and not hold_out:
        return Source(train, None, None, None, side, "no labels", way=way), [], said

    def sample(stream, most):
        """Up to `most` rows, few from each of many shards."""
        shards, records = stream.num_shards, []
        for shard in torch.randperm(shards, generator=generator(seed, ORDER)).tolist():
            records += stream.shard(shards, shard, contiguous=False).take(math.ceil(most / min(64, shards)))
            if len(records) >= most:
                break
        records = records[:most]
        kept = {name: [record[name] for record in records] for name in features_of(train)}
        return Dataset.from_dict(kept, features=features_of(train))

    whole, queries = train, None
    if not labelled and held_out is not None:
        queries = sample(held_out.select_columns("image"), QUERIES // 10)
    elif held_out is not None and "label" in features_of(held_out):
        queries = sample(held_out, QUERIES // 10)
        queries = queries if any(label not in (None, -1) for label in queries["label"]) else None
    if queries is None:
        queries = sample(train.filter(is_held_out), QUERIES // 20)
        train = train.filter(is_not_held_out)
    samples = {"the stream's sample": sample(train, BANK // 10), "the stream's k-NN queries": queries}
    samples, notes = columns.numbered(samples)
    bank, queries = (
        (LargeImages(rows, name, skip_bad, way.pixel_range), torch.arange(len(rows))) for name, rows in samples.items()
    )
    if not labelled:
        held_out = queries if len(queries[1]) else None
        rest = dict(way=way, held_out=held_out, among=bank)
        return Source(train, None, None, None, side, "no labels", **rest), notes, said
    known, asked = (of.labels(rows) for of, rows in (bank, queries))
    note = columns.unfit(known, known, asked)
    if note:
        return Source(whole, None, None, None, side, note, way=way), notes, said
    return Source(train, None, bank, queries, side, None, way=way), notes, said


def is_held_out(record: dict) -> bool:
    """A tenth of a stream, told by the image itself: the same for all workers, processes, epochs and machines."""
    return mark(record["image"]) % 10 == 0


def is_not_held_out(record: dict) -> bool:
    return not is_held_out(record)
