"""How the images of a dataset are read: decided once, for all its splits together, and recorded with the run."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from flags import UserError, interval
from loading import pixels
from loading.decoded import DECODED_ONCE, SmallImages, TooLarge
from loading.files import counted
from loading.images import LargeImages, bad_row, decode, opened

SHAPES, SAMPLE = 16, 256  # images whose shape, and whose pixel values, decide
JPEG = b"\xff\xd8"
NONE = "split {}: no image in it can be read; name others with --split and --eval_split"


class Way(NamedTuple):
    """What an earlier run recorded, or a flag says; the default leaves all open."""

    small: bool | None = None  # small images are decoded once, and made `shape`; large ones when they are asked for
    shape: tuple[int, int] | None = None  # height, width
    pixel_range: tuple[float, float] | None = None  # the values, of files of more than 8 bits, that become 0 and 255
    flag: bool = False  # whether --pixel_range says so


OPEN = Way()


def way_of(config: dict, own: bool = True, pixel_range=None) -> Way:
    """The way that the run with this config recorded; own: whether the images are the run's own.

    pixel_range: what the flag says; else the run's is used, for other images too.
    """
    pair, small = interval(pixel_range or config.get("pixel_range")), config.get("small_images")
    flag = pixel_range is not None
    if not own or small is None:
        return Way(pixel_range=pair, flag=flag)
    return Way(small, tuple(config["image_shape"]) if small else None, pair, flag)


def of_rows(parts: dict, skip_bad: bool, way: Way, wholes: dict) -> tuple[dict, Way, int, list[str]]:
    """({split: images}, the way they are read, the longer side of the first split's, lines on their pixel values).

    parts: {split: rows}. If one of them has an image that is too large for the cache of small ones, all do without it.
    wholes: {split: (all rows of the split that this is a part of, the first row of the part)}.
    """
    shapes = {split: _shape(rows, split, skip_bad) for split, rows in parts.items()}
    shape = next(iter(shapes.values()))
    pair, seen = _pixel_range(parts, skip_bad, way)
    decides = way.small is None
    small = max(max(shape) for shape in shapes.values()) <= DECODED_ONCE if decides else way.small
    made = Way(small, (way.shape or shape) if small else None, pair, way.flag)
    try:
        images = {split: _images(rows, split, made, skip_bad, decides, wholes[split]) for split, rows in parts.items()}
    except TooLarge:  # though none of the few that were looked at
        made = made._replace(small=False, shape=None)
        images = {split: _images(rows, split, made, skip_bad, decides, wholes[split]) for split, rows in parts.items()}
    return images, made, max(shape), _lines(seen, made, images.values())


def of_stream(stream, skip_bad: bool, way: Way) -> tuple[Way, int, list[str]]:
    """The same of a stream, from its first images, which are read as large ones."""
    side = max(_shape(stream.take(SHAPES), "the stream", skip_bad))
    pair, seen = _pixel_range({"the stream": stream.take(SAMPLE)}, skip_bad, way)
    made = Way(False, None, pair, way.flag)
    return made, side, _lines(seen, made, [])


def range_of(parts: dict, config: dict) -> tuple[tuple[float, float] | None, list[str]]:
    """(pixel range, lines on it) for an evaluation that reads images its own way: the run's, else from a sample.

    parts: {name: sequence of undecoded images}.
    """
    pair, seen = _pixel_range(parts, True, way_of(config, own=False))
    return pair, _lines(seen, Way(False, None, pair), [])


def _images(rows, split, way, skip_bad, decides, whole):
    if not way.small:
        return LargeImages(rows, split, skip_bad, way.pixel_range)
    try:
        images = SmallImages(rows, split, way.shape, skip_bad, way.pixel_range, False, *whole)
    except TooLarge:
        if decides:
            raise
        images = SmallImages(rows, split, way.shape, skip_bad, way.pixel_range, True, *whole)
    if len(images) == 0:
        raise UserError(NONE.format(split))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Samples: the same rows in every process, and when a run is resumed.


def _spread(rows, most) -> Iterator[tuple]:
    """(row, undecoded image) of at most about `most` rows, spread over the dataset; of a stream, its first."""
    if isinstance(rows, IterableDataset):
        yield from ((row, record["image"]) for row, record in enumerate(islice(rows, most)))
        return
    for row in range(0, len(rows), max(1, len(rows) // most)):
        yield row, rows[row]["image"] if isinstance(rows, Dataset) else rows[row]


def _shape(rows, split, skip_bad):
    """The largest height and width of a few images."""
    shapes = []
    for row, record in _spread(rows, SHAPES):
        try:
            image = decode(record)
            shapes.append((image.height, image.width))
        except ValueError as error:
            if not skip_bad:
                raise bad_row(row, split, error, record) from None
    if not shapes:
        raise UserError(NONE.format(split))
    return max(height for height, _ in shapes), max(width for _, width in shapes)


class Seen(NamedTuple):
    """Of a sample: how many images, and of those of more than 8 bits the extremes and whether they are floats."""

    images: int
    deep: list  # (lowest, highest, whether floats)
    depth: str  # what the range is called


def _pixel_range(parts, skip_bad, way):
    """(the range or None, what was seen of a sample)."""
    found, total = [], 0
    each = max(1, SAMPLE // len(parts))
    for split, rows in parts.items():
        for row, record in _spread(rows, each):
            try:
                found += _extremes(record)
                total += 1
            except ValueError as error:
                if not skip_bad:
                    raise bad_row(row, split, error, record) from None
    if way.pixel_range is not None or not found:
        return way.pixel_range, Seen(total, found, "--pixel_range" if way.flag else "the run's")
    low, high = min(low for low, _, _ in found), max(high for _, high, _ in found)
    pair, depth = pixels.decided(low, high, any(floats for _, _, floats in found))
    return pair, Seen(total, found, depth)


def _extremes(record):
    """[(lowest, highest, whether floats)] of an image of more than 8 bits; none of another."""
    named = (record or {}).get("path") or ""
    content = (record or {}).get("bytes")
    if content is None and os.path.isfile(named):
        with open(named, "rb") as file:
            content = file.read(2)  # a name may say .jpg of a file that is none
    if content and content[:2] == JPEG:
        return []  # which has 8 bits, and need not be decoded
    with opened(record) as (image, file):
        floats, values = image.mode == "F", pixels.deep(image, file)
        if values is None or not values.size:
            return []
        colour = values[..., :3] if values.ndim == 3 else values
        return [(float(np.min(colour)), float(np.max(colour)), floats)]


def _lines(seen, way, images):
    """What is printed of the pixel values: nothing of images of 8 bits."""
    if not seen.deep:
        return ["note: --pixel_range is for files of more than 8 bits; the sample has none"] if way.flag else []
    low, high = way.pixel_range
    sampled = f"from a sample of {counted(seen.images, 'image')}"
    source = seen.depth if seen.depth in ("--pixel_range", "the run's") else f"{seen.depth}, {sampled}"
    line = f"pixel values {pixels.said(way.pixel_range)} ({source}) become 0 to 255"
    if len(seen.deep) < seen.images:
        line += f"; files of 8 bits, {seen.images - len(seen.deep):,} of {seen.images:,} in the sample, keep theirs"
    kinds = {floats: max(high for _, high, of in seen.deep if of is floats) for floats in {of for *_, of in seen.deep}}
    if len(kinds) == 2:
        line += (
            f"; integers (to {kinds[False]:.6g}) and floats (to {kinds[True]:.6g}) are read by this one range: where "
            "they mean different things, save them alike"
        )
    if any(isinstance(x, SmallImages) for x in images):
        values, of = (sum(part) for part in zip(*(x.clipped for x in images)))
        if values:
            line += f"; clipped: {counted(values, 'value')} beyond, in {counted(of, 'image')}"
    else:
        of = sum(lowest < low or highest > high for lowest, highest, _ in seen.deep)
        if of:
            line += f"; clipped: values beyond, in {of:,} of {seen.images:,} images of the sample"
    return [line]
