"""Pixel values of more than 8 bits: one range for a whole dataset becomes 0 to 255.

Files of 8 bits keep their values. The range is decided from a sample of the dataset (loading/reading.py), unless
`--pixel_range` names it, and is kept in the config.json of the run.
"""

import numpy as np
import torch
from PIL import Image

from flags import interval

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras, microscopes and scanners have
OVERSHOOT = 0.25  # beyond 0 to 1, or -1 to 1, that is taken for interpolation's, and clipped
FAINT = 1 / 16  # floats that stay below it would be almost black of 0 to 1: their own range is taken
ANY = "any"  # in the place of a range: none was decided, as for a single image
UNKNOWN = {"I": (0, 65535), "F": (0, 1)}  # the range of integers and floats where none was decided


# ---------------------------------------------------------------------------------------------------------------------
# The range.


def text(pair) -> str | None:
    """A range as --pixel_range takes it."""
    return ",".join(map(str, interval(pair) or [])) or None


def said(pair) -> str:
    return f"{pair[0]:.6g} to {pair[1]:.6g}" if pair[1] < 1e6 else f"{pair[0]:.10g} to {pair[1]:.10g}"


def decided(low: float, high: float, floats: bool) -> tuple[tuple[float, float], str]:
    """(range, its name) for values from `low` to `high` in a sample.

    Integers: the smallest bit depth of DEPTHS that holds them; with negative values, or more than 16 bits, the range
    that was measured. Floats: 0 to 1, -1 to 1 or 0 to 255 where the values are such; else the range that was measured.
    """
    if floats:
        if high <= 1 + OVERSHOOT and low >= -1 - OVERSHOOT and high > FAINT:
            return ((0, 1) if low >= -OVERSHOOT else (-1, 1)), "floats"
        if low >= 0 and 128 <= high <= 255:
            return (0, 255), "floats"
    elif low >= 0 and high < 2 ** DEPTHS[-1]:
        bits = next(bits for bits in DEPTHS if high < 2**bits)
        return (0, 2**bits - 1), f"{bits}-bit"
    return interval((low, high if high > low else low + 1)) or (0, 1), "measured"


# ---------------------------------------------------------------------------------------------------------------------
# One image.


def deep(image: Image.Image, file=None) -> np.ndarray | None:
    """Values of an image of more than 8 bits, [H, W] or [H, W, C]; None for one of 8 bits.

    file: the opened file, for a colour PNG of 16 bits, of which Pillow reads 8. Raises ValueError for NaN or infinity,
    and for colour of 16 bits in another format, of which Pillow reads the upper 8 bits.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image)
        bad = int((~np.isfinite(values)).sum()) if image.mode == "F" else 0
        if bad:
            raise ValueError(f"{bad:,} of its {values.size:,} values are NaN or infinite")
        return values
    if image.format != "PNG" and _raw_depth(image):
        raise ValueError(f"a colour {image.format} of 16 bits, of which only the upper 8 can be read; save it as PNG")
    if file is not None and is_deep_png(image):
        from torchvision.io import ImageReadMode, decode_png  # deprecated, and only these files need it

        alpha = "A" in image.getbands()
        content = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        found = decode_png(content, ImageReadMode.RGB_ALPHA if alpha else ImageReadMode.RGB)
        return found.permute(1, 2, 0).numpy()
    return None


def is_deep_png(image: Image.Image) -> bool:
    """Whether this is a colour PNG of 16 bits, not decoded yet."""
    return image.format == "PNG" and _raw_depth(image)


def _raw_depth(image):
    """Whether the file has 16 bits a channel of which Pillow reads 8."""
    tiles: list = getattr(image, "tile", [])  # of an opened file
    if not tiles or image.mode not in ("RGB", "RGBA", "LA"):
        return False
    raw = tiles[0][3]  # how the decoder reads: ("RGB;16L", ...), or of a PPM ("RGB", the largest value)
    return ";16" in str(raw) or image.format == "PPM" and isinstance(raw, tuple) and raw[-1] > 255


def scaled(values: np.ndarray, pair, floats: bool) -> tuple[np.ndarray, int]:
    """(values as uint8, how many of them were clipped) where `pair` becomes 0 and 255; an alpha is of 16 bits."""
    if pair is None:
        raise ValueError("it has more than 8 bits, those that decided how to read had 8; say --pixel_range LOW,HIGH")
    low, high = UNKNOWN["F" if floats else "I"] if pair == ANY else pair
    colour = values[..., :3].astype(np.float64) if values.ndim == 3 else values.astype(np.float64)
    clipped = int(((colour < low) | (colour > high)).sum())
    made = ((colour - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 4:
        alpha = (values[..., 3:].astype(np.float64) / 257).round().astype(np.uint8)
        made = np.concatenate([made, alpha], 2)
    return made, clipped
