"""PASCAL VOC's annotations, for `detect` and `voc07`: a file an image, boxes counted from 1 with their last pixel."""

import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from flags import UserError, first_line


class Thing(NamedTuple):
    """An object in an image."""

    name: str
    box: list[float]  # x, y, width, height, in pixels from 0; none where only the classes were asked for
    difficult: bool  # neither learnt nor counted (Everingham et al., 2010, section 3.3)


class Annotation(NamedTuple):
    width: int
    height: int
    things: list[Thing]


def is_marked(value) -> bool:
    """Whether a mark such as difficult or iscrowd is set: a number, a bool, a word, or nothing. Raises ValueError."""
    word = "0" if value is None else str(value).strip().lower()
    if word in ("", "0", "0.0", "false", "no", "none", "unspecified"):
        return False
    if word in ("1", "1.0", "true", "yes"):
        return True
    raise ValueError(f"{value!r} is neither 0 nor 1")


def read_annotation(file: Path, data, boxes: bool = True) -> Annotation:
    """What an annotation file says; without `boxes` of the classes alone, which need no size and no boxes.

    Raises UserError, which names `data` and the file, for what is no annotation.
    """
    try:
        tree = ElementTree.parse(file).getroot()
        width, height = (_whole(tree, f"size/{side}") if boxes else 0 for side in ("width", "height"))
        return Annotation(width, height, [_thing(node, boxes) for node in tree.iterfind("object")])
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"--data {data}: annotation {file}: cannot be read ({first_line(error)})") from None


def _text(node, key):
    found = (node.findtext(key) or "").strip()
    if not found:
        raise ValueError(f"no <{key}>" if node.find(key) is None else f"<{key}> is empty")
    return found


def _number(node, key):
    try:
        found = float(_text(node, key))
    except ValueError as error:
        raise ValueError(error if "<" in str(error) else f"<{key}> {node.findtext(key)!r} is no number") from None
    if not math.isfinite(found):
        raise ValueError(f"<{key}> is {found}")
    return found


def _whole(node, key):
    found = _number(node, key)
    if not found.is_integer() or found < 1:
        raise ValueError(f"<{key}> {found:g} is no number of pixels")
    return int(found)


def _thing(node, boxes):
    try:
        difficult = is_marked(node.findtext("difficult"))
    except ValueError as error:
        raise ValueError(f"<difficult> {error}") from None
    return Thing(_text(node, "name"), _box(node) if boxes else [], difficult)


def _box(node):
    x1, y1, x2, y2 = (_number(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    if max(x2, y2) <= 1 and (x1, y1, x2, y2) != (1, 1, 1, 1):
        raise ValueError(f"the box {x1:g}, {y1:g} to {x2:g}, {y2:g} is in shares of the image; want pixels from 1")
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
