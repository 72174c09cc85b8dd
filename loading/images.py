"""Images: one as RGB, many by row: small ones decoded in the `datasets` cache, large ones decoded when asked for."""

import io
import zlib
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from bsim import ViewRecipe, random_crop_box
from flags import UserError, progress
from loading import files

SMALL = 64  # images whose longer side is at most this are decoded once, and cached
PIXELS = 100_000_000  # an image that claims more is refused before it is decoded; `limit` sets it
ORIENTATION = ExifTags.Base.Orientation
Image.MAX_IMAGE_PIXELS = None
DECODER = 1  # raise when `to_rgb` or the cache's layout changes: cached pixels of another version are not used

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


def limit(pixels: int) -> None:
    """Refuse images that claim more pixels than this, in this process and in workers that it forks later."""
    global PIXELS
    PIXELS, Image.MAX_IMAGE_PIXELS = pixels, None  # one limit, ours, which says how to raise it


def decode(record: dict) -> Image.Image:
    """A row's {"bytes", "path"} as an RGB image; any way in which that can fail is a ValueError."""
    with _opened(record) as (image, _):
        return to_rgb(image)


@contextmanager
def _opened(record):
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
# Images by row. `pair` is two views' worth of uint8 images and the bad rows met; `whole` is for evaluation.


class TooLarge(Exception):
    """An image of more than SMALL pixels among small ones."""


class SmallImages:
    """Images decoded once, all made one shape. With skip_bad the bad ones are left out, and `bad` says which."""

    in_workers = False

    def __init__(self, rows: Dataset, split: str, shape: tuple[int, int], skip_bad: bool):
        kept = {k: v for k, v in rows.features.items() if k == "label"}
        features = Features(pixels=Value("binary"), row=Value("int64"), **kept)
        self.shape = shape
        self.table = _map_with_bar(
            rows,
            _decode_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            fn_kwargs=dict(split=split, shape=shape, skip_bad=skip_bad, decoder=DECODER),
            cache_file_name=_cached(rows, split, shape, skip_bad),
        ).with_format("arrow")
        kept = set(self.table["row"].to_pylist()) if len(self.table) < len(rows) else range(len(rows))
        self.bad = {row_name(i, split, rows[i]["image"]) for i in range(len(rows)) if i not in kept}

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return class_numbers(self.table[rows.tolist()]["label"].to_pylist())

    def whole(self, rows, size):
        """uint8 [N, 3, H, W], whatever the size, which the view that evaluates gives them; and which are good: all."""
        pixels = bytearray(b"".join(self.table[rows.tolist()]["pixels"].to_pylist()))
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape, 3).permute(0, 3, 1, 2)
        return images, torch.ones(len(images), dtype=torch.bool)

    def pair(self, rows, recipes, generator):
        images, _ = self.whole(rows, None)
        return images, images, []


_bar = None  # of the decoding that is under way


def _map_with_bar(rows, function, **options):
    """rows.map(function, **options) with a bar in images a second; none where its result is cached already."""
    global _bar
    shown, quiet = not Path(options["cache_file_name"]).exists(), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # that of `datasets`, which counts examples
    try:
        with progress(len(rows), shown=shown, unit=" images", named="decoding") as _bar:
            return rows.map(function, **options)
    finally:
        _bar = None
        if not quiet:
            datasets.enable_progress_bars()


def _cached(rows, split, shape, skip_bad):
    """Where decoded images are kept: in the cache of `datasets`, also of rows that lie in the user's own folder."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "bsim"
    folder.mkdir(parents=True, exist_ok=True)
    mark = Hasher.hash((rows._fingerprint, rows.split and str(rows.split), split, shape, skip_bad, DECODER))
    return str(folder / f"pixels-{mark}.arrow")


def _decode_batch(batch, indices, split, shape, skip_bad, decoder):
    height, width = shape
    kept = {name: [] for name in ("pixels", "row", "label") if name != "label" or name in batch}
    for i, row in enumerate(indices):
        try:
            image = decode(batch["image"][i])
        except ValueError as error:
            if skip_bad:
                continue
            raise bad_row(row, split, error, batch["image"][i]) from None
        if max(image.size) > SMALL:
            raise TooLarge
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        kept["pixels"].append(image.tobytes())
        kept["row"].append(row)
        if "label" in kept:
            kept["label"].append(batch["label"][i])
    if _bar is not None:
        _bar.update(len(indices))
    return kept


class LargeImages:
    """Images decoded and cropped when asked for, in DataLoader workers."""

    in_workers = True

    def __init__(self, rows: Dataset, split: str, skip_bad: bool):
        self.table, self.split, self.skip_bad, self.bad = rows, split, skip_bad, set()

    def __len__(self):
        return len(self.table)

    def labels(self, rows):
        return class_numbers(self.table.select_columns("label")[rows.tolist()]["label"])

    def _image(self, row):
        """The image, or the error that says why there is none."""
        record = self.table[row]["image"]
        try:
            return decode(record)
        except ValueError as error:
            found = bad_row(row, self.split, error, record)
            if not self.skip_bad:
                raise found from None
            return found

    def whole(self, rows, size):
        """uint8 [N, 3, size, size], the central square; and which are good: a bad one is black."""
        found = [self._image(row) for row in rows.tolist()]
        good = torch.tensor([not isinstance(image, UserError) for image in found])
        black = torch.zeros(3, size, size, dtype=torch.uint8)
        return torch.stack([_pixels(_centre(x, size)) if ok else black for x, ok in zip(found, good)]), good

    def pair(self, rows, recipes, generator):
        """Two crops of each image; the place of a bad one is taken by the next good one."""
        found, bad = [], []
        for row in rows.tolist():
            for other in count(row):
                record = self.table[other % len(self)]["image"]
                try:
                    found.append(crops(record, recipes, generator))
                    break
                except ValueError as error:
                    if not self.skip_bad or other == row + len(self):
                        raise bad_row(other % len(self), self.split, error, record) from None
                bad.append(row_name(other % len(self), self.split, record))
        return *stacked(found), bad


def class_numbers(labels: list) -> torch.Tensor:
    """int64 numbers for classes given as integers; -1 where there is none. Names: loading/columns.py numbers them."""
    return torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int64)


def crops(record, recipes, generator):
    """A random-resized crop of a row's image for each recipe, uint8 [1, 3, size, size]; a ValueError as `decode`'s.

    A JPEG is decoded once, and at the smallest of its own scales (a half, a quarter, an eighth) that has no crop
    enlarged which would not be anyway.
    """
    with _opened(record) as (image, file):
        plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
        image = image if plain else to_rgb(image)
        boxes = [
            random_crop_box(1, image.height, image.width, recipe.scale, recipe.ratio, generator=generator)[0].tolist()
            for recipe in recipes
        ]
        spare = min(min(box[2:]) // recipe.size for box, recipe in zip(boxes, recipes))
        shrink = next(scale for scale in (8, 4, 2, 1) if scale <= max(1, spare * plain))
        if plain and shrink == 1:
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
        return found


def stacked(found):
    """What `crops` made of each image, as uint8 [N, 3, size, size] for each recipe."""
    return tuple(torch.cat(side) for side in zip(*found))


def after_crop(recipe: ViewRecipe) -> ViewRecipe:
    """What is left of a recipe for images that are cropped already."""
    return recipe._replace(scale=(1, 1), ratio=(1, 1))
