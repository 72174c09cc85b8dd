"""Images: one as RGB; many by row, decoded when asked for. Small ones are decoded once: loading/decoded.py."""

import io
import zlib
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps

from bsim import ViewRecipe, random_crop_box
from flags import UserError
from loading import files, pixels
from loading.pixels import ANY

try:  # deprecated since torchvision 0.29; where it is gone Pillow reads the same pixels, in more time
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

PIXELS = 100_000_000  # an image that claims more is refused before it is decoded; `limit` sets it
ORIENTATION = ExifTags.Base.Orientation
Image.MAX_IMAGE_PIXELS = None

# ---------------------------------------------------------------------------------------------------------------------
# One image.


def to_rgb(image: Image.Image, pixel_range=ANY, file=None) -> tuple[Image.Image, int]:
    """(any PIL image as 8-bit RGB, upright, its transparency laid on white; how many of its values were clipped).

    Of more than 8 bits, `pixel_range` (low, high) becomes 0 to 255; None: the dataset was found to have
    none, and this is a ValueError. `file` is as in `pixels.deep`.
    """
    values, clipped = pixels.deep(image, file), 0
    if values is not None:
        turn = image.getexif().get(ORIENTATION, 1)
        values, clipped = pixels.scaled(values, pixel_range, image.mode == "F")
        image = Image.fromarray(values)
        image.getexif()[ORIENTATION] = turn
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), clipped


def limit(pixels: int) -> None:
    """Refuse images that claim more pixels than this, in this process and in workers that it forks later."""
    global PIXELS
    PIXELS, Image.MAX_IMAGE_PIXELS = pixels, None  # one limit, ours, which says how to raise it


def decode(record: dict, pixel_range=ANY) -> Image.Image:
    """A row's {"bytes", "path"} as an RGB image; any way in which that can fail is a ValueError."""
    return decoded(record, pixel_range)[0]


def decoded(record: dict, pixel_range=ANY) -> tuple[Image.Image, int]:
    """The same, and how many values were clipped."""
    with opened(record) as (image, file):
        return to_rgb(image, pixel_range, file)


@contextmanager
def opened(record):
    """(the image, of which only the header is read, and its file); what is met inside becomes a ValueError."""
    try:
        with _open(record) as file, Image.open(file) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(
                    f"claims {image.width} x {image.height} pixels; the limit is {PIXELS:,} in all. If it is yours, "
                    f"raise the limit: --max_pixels {image.width * image.height}"
                )
            yield image, file
    except Exception as error:  # a broken file can raise anything, from SyntaxError to struct.error
        reason = "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
        if ".cpp:" in reason:  # torchvision says where in its source first
            reason = reason.rpartition(".cpp:")[2].partition(", ")[2]
        raise ValueError(reason) from error


def _open(record):
    """The row's bytes, or its file: one of the Hub, or a regular one here, perhaps in an archive; no pipe or device."""
    if record is None or record["bytes"] is None and record["path"] is None:
        raise ValueError("the row has no image: it is null")
    return io.BytesIO(record["bytes"] if record["bytes"] is not None else files.read(record["path"]))


def mark(record: dict) -> int:
    """A number for an image: from its bytes, or, of a file that is not read yet, from its folder and name."""
    record = record or {"bytes": None, "path": None}
    return zlib.crc32(
        record["bytes"]
        or "/".join(Path((record["path"] or "").removeprefix(files.UNREADABLE).split("::")[0]).parts[-2:]).encode()
    )


def row_name(row, split: str, record: dict | None) -> str:
    """What a list calls an image: its row, and its file where it has one."""
    return f"row {row} of {split}{_file(record)}"


def _file(record):
    return f", {files.named(record['path'])}" if record and record["path"] else ""


def bad_row(row, split: str, error, record: dict | None = None) -> UserError:
    return UserError(
        f"row {row} of {split} is not an image that can be read ({error}{_file(record)}). "
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
# Images by row. `pair` is two views' worth of uint8 images and a Met; `whole` is for evaluation.


class Met(NamedTuple):
    """What was met when a batch was read."""

    bad: list  # names of unreadable images
    rows: list | None  # the rows that were read, in the places of bad ones others; None of a stream
    clipped: list  # of each image with values beyond the pixel range, how many


class LargeImages:
    """Images decoded and cropped when asked for, in DataLoader workers."""

    in_workers = True

    def __init__(self, rows: Dataset, split: str, skip_bad: bool, pixel_range=ANY):
        self.table, self.split, self.skip_bad = rows, split, skip_bad
        self.bad: set[str] = set()
        self.pixel_range = pixel_range

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return class_numbers(self.table.select_columns("label")[rows.tolist()]["label"])

    def _image(self, row):
        """(the image, how many of its values were clipped); (None, -1) of a bad one."""
        record = self.table[row]["image"]
        try:
            return decoded(record, self.pixel_range)
        except ValueError as error:
            if not self.skip_bad:
                raise bad_row(row, self.split, error, record) from None
            return None, -1

    def whole(self, rows, size):
        """uint8 [N, 3, size, size], the central square; and how many values were clipped, -1: a bad image, black."""
        found, clipped = zip(*(self._image(row) for row in rows.tolist()))
        black = torch.zeros(3, size, size, dtype=torch.uint8)
        return torch.stack([black if x is None else _pixels(_centre(x, size)) for x in found]), torch.tensor(clipped)

    def pair(self, rows, recipes, generator, among=None):
        """Two crops of each image; the place of a bad one is taken by the next good one.

        among: the rows that may take it, sorted; all by default.
        """
        found, met = [], Met([], rows.tolist(), [])
        among = torch.arange(len(self)) if among is None and self.skip_bad else among
        for place, row in enumerate(rows.tolist()):
            for other in chain([row], _after(row, among) if self.skip_bad else []):
                record = self.table[other]["image"]
                try:
                    found.append(crops(record, recipes, generator, self.pixel_range, met.clipped))
                except ValueError as error:
                    failed = bad_row(other, self.split, error, record)
                    met.bad.append(row_name(other, self.split, record))
                    continue
                met.rows[place] = other
                break
            else:
                raise failed
        return *stacked(found), met


def _after(row, among):
    """The rows of `among` after `row`, then those before it."""
    first = int(torch.searchsorted(among, row, right=True))
    return (int(among[(first + i) % len(among)]) for i in range(len(among)))


def class_numbers(labels: list) -> torch.Tensor:
    """int64 numbers for classes given as integers; -1 where there is none. Names: loading/columns.py numbers them."""
    return torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int64)


def crops(record, recipes, generator, pixel_range=ANY, clipped=None):
    """A random-resized crop of a row's image for each recipe, uint8 [1, 3, size, size]; a ValueError as `decode`'s.

    The number of its values beyond pixel_range, if there are any, is added to the list `clipped`.
    A JPEG is decoded once, and at the smallest of its own scales (a half, a quarter, an eighth) that has no crop
    enlarged which would not be anyway.
    """
    with opened(record) as (image, file):
        plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
        image, beyond = (image, 0) if plain else to_rgb(image, pixel_range, file)
        boxes = [
            random_crop_box(1, image.height, image.width, recipe.scale, recipe.ratio, generator=generator)[0].tolist()
            for recipe in recipes
        ]
        spare = min(min(box[2:]) // recipe.size for box, recipe in zip(boxes, recipes))
        shrink = next(scale for scale in (8, 4, 2, 1) if scale <= max(1, spare * plain))
        if plain and shrink == 1 and decode_jpeg:
            pixels = decode_jpeg(
                torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), mode=ImageReadMode.RGB
            )
        else:
            image.draft("RGB", (image.width // shrink, image.height // shrink))
            pixels = _pixels(image)
        found = []
        for (top, left, height, width), recipe in zip(boxes, recipes):
            bottom, right = -((-top - height) // shrink), -((-left - width) // shrink)
            cut = pixels[None, :, top // shrink : bottom, left // shrink : right]
            found.append(F.interpolate(cut, (recipe.size, recipe.size), mode="bilinear", antialias=True))
        if beyond and clipped is not None:
            clipped.append(beyond)
        return found


def stacked(found):
    """What `crops` made of each image, as uint8 [N, 3, size, size] for each recipe."""
    return tuple(torch.cat(side) for side in zip(*found))


def after_crop(recipe: ViewRecipe) -> ViewRecipe:
    """What is left of a recipe for images that are cropped already."""
    return recipe._replace(scale=(1, 1), ratio=(1, 1))
