"""Small images, decoded once: pixels lie in the cache of `datasets`, in blocks that all parts of a split share."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps

from flags import progress
from loading import images
from loading.images import Met, bad_row, class_numbers, decoded, row_name
from loading.pixels import ANY

DECODED_ONCE = 64  # images whose longer side is at most this are decoded once, and cached
BLOCK, BLOCKS = 8_192, 32  # rows of a block, at least; blocks of a split, at most: each is an open file
DECODER = 3  # raise when `to_rgb` or the cache's layout changes: cached pixels of another version are not used
COLUMNS = Features(pixels=Value("binary"), clipped=Value("int64"), error=Value("string"), too_large=Value("bool"))


class TooLarge(Exception):
    """An image of more than DECODED_ONCE pixels among small ones."""


class SmallImages:
    """Images decoded once, all made one shape. With skip_bad the bad ones are left out, and `bad` says which.

    rows: the images, with their labels; they are the rows of `whole`, the whole split, from `first` on.
    `clipped`: how many values lie beyond pixel_range, and in how many images. An image of more than DECODED_ONCE
    pixels raises TooLarge, or with `shrink` is made the shape too.
    """

    in_workers = False

    def __init__(
        self,
        rows: Dataset,
        split: str,
        shape: tuple[int, int],
        skip_bad: bool,
        pixel_range=ANY,
        shrink=False,
        whole: Dataset | None = None,
        first: int = 0,
    ):
        whole = (rows if whole is None else whole).select_columns("image")
        way = dict(shape=shape, pixel_range=pixel_range, shrink=shrink)
        parts, bad = [], []
        for start, file, part in _decoded(whole, range(first, first + len(rows)), way):
            if pc.any(part.select_columns("too_large")[:]["too_large"]).as_py():
                raise TooLarge
            errors = part.select_columns("error")[:]["error"]
            found = (np.flatnonzero(pc.is_valid(errors)) + start - first).tolist()
            if found and not skip_bad:
                file.unlink()  # what was a passing fault of a disk is not remembered
                why = errors.drop_null()[0].as_py()
                raise bad_row(found[0], split, why, rows[found[0]]["image"])
            bad += found
            parts.append(part)
        self.shape, self.table, self.pixels = shape, rows, concatenate_datasets(parts)
        self.bad = {row_name(i, split, rows[i]["image"]) for i in bad}
        self.good = np.setdiff1d(np.arange(len(rows)), bad)  # rows of `rows`, in order
        if bad:
            self.table, self.pixels = rows.select(self.good), self.pixels.select(self.good)
        clipped = np.asarray(self.pixels.select_columns("clipped")[:]["clipped"])
        self.clipped = int(clipped.sum()), int((clipped > 0).sum())

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return class_numbers(self.table.select_columns("label")[rows.tolist()]["label"])

    def whole(self, rows, size):
        """uint8 [N, 3, H, W], whatever the size, which the view that evaluates gives them; and N zeros.

        LargeImages says in their place how many values were clipped; here `clipped` has it, of all rows.
        """
        pixels = bytearray(b"".join(self.pixels[rows.tolist()]["pixels"].to_pylist()))
        found = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape, 3).permute(0, 3, 1, 2)
        return found, torch.zeros(len(found), dtype=torch.int64)

    def pair(self, rows, recipes, generator, among=None):
        found, _ = self.whole(rows, None)
        return found, found, Met([], rows.tolist(), [])


# ---------------------------------------------------------------------------------------------------------------------
# The blocks. A part of a split reads those it lies in, so it costs nothing where the whole split was decoded.


def _blocks(whole, part, way):
    """{rows: file} of the blocks of `whole` that hold rows of `part`; never in the user's own folder."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "bsim"
    folder.mkdir(parents=True, exist_ok=True)
    size = max(BLOCK, -(-len(whole) // BLOCKS))
    mark = Hasher.hash((whole._fingerprint, str(whole.split), len(whole), sorted(way.items()), images.PIXELS, DECODER))
    firsts = range(part.start // size * size, part.stop, size)
    return {
        range(first, min(first + size, len(whole))): folder / f"pixels-{mark}-{first // size}.arrow" for first in firsts
    }


def _decoded(whole, part, way):
    """Yield (first row, the block's file, the rows as COLUMNS in Arrow's format) of the rows `part`, block by block."""
    blocks = _blocks(whole, part, way)
    missing = sum(len(rows) for rows, file in blocks.items() if not file.exists())
    with progress(missing, shown=missing > 0, unit=" images", named="decoding") as bar:
        for rows, file in blocks.items():
            if not file.exists():
                _decode_block(whole.select(rows), file, way, bar)
            start, stop = max(part.start, rows.start), min(part.stop, rows.stop)
            table = Dataset.from_file(str(file)).with_format("arrow")
            yield start, file, table.select(range(start - rows.start, stop - rows.start))


def _decode_block(rows, file, way, bar):
    """Write the block's file, which is complete or absent: a full disk leaves nothing beside it."""
    aside = file.with_suffix(f".{os.getpid()}")
    aside.mkdir(exist_ok=True)

    def decode_batch(batch):
        bar.update(len(batch["image"]))
        found = [_row(record, **way) for record in batch["image"]]
        return {name: list(column) for name, column in zip(COLUMNS, zip(*found))}

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # that of `datasets`, which counts examples
    try:
        rows.map(
            decode_batch,
            batched=True,
            remove_columns="image",
            features=COLUMNS,
            cache_file_name=str(aside / file.name),
            new_fingerprint=file.stem,
        )
        (aside / file.name).replace(file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not quiet:
            datasets.enable_progress_bars()


def _row(record, shape, pixel_range, shrink):
    """What COLUMNS hold of an image."""
    height, width = shape
    try:
        image, clipped = decoded(record, pixel_range)
    except ValueError as error:
        return None, 0, str(error), False
    if max(image.size) > DECODED_ONCE and not shrink:
        return None, 0, None, True
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return image.tobytes(), clipped, None, False
