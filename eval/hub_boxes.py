"""Datasets of the Hub with boxes: the columns image and objects, boxes as COCO has them."""

import datasets

from eval.voc import is_marked
from flags import UserError, reading
from loading import sources
from loading.images import decode
from loading.pixels import ANY

CATEGORY = ("category", "categories", "label", "labels")
MARKS = ("iscrowd", "crowd", "difficult", "isdifficult")  # of objects that are neither learnt nor counted


def is_mark(column: str) -> bool:
    """Whether a column of this name marks objects, however it is spelt: iscrowd, isCrowd, is_crowd, Difficult."""
    return column.lower().replace("_", "") in MARKS


def read_splits(data: str) -> list[tuple[str, datasets.Dataset, list[dict], list[str]]]:
    """(split, rows, objects of each row, class names) of train and of validation or test."""
    with reading(f"--data {data}: no such folder here, and as a dataset"):
        splits = sources.splits_of(data)
    test = next((split for split in ("validation", "valid", "val", "test") if split in splits), None)
    if test is None or "train" not in splits:
        raise UserError(f"--data {data}: want the splits train, and validation or test; it has {', '.join(splits)}")
    parts = [(split, splits[split]) for split in ("train", test)]
    for split, rows in parts:
        if not {"image", "objects"} <= set(rows.column_names):
            raise UserError(
                f"--data {data}, {split}: want the columns image and objects; it has {', '.join(rows.column_names)}"
            )
    with reading(f"--data {data}: its objects"):
        listed = [_class_names(rows) for _, rows in parts]
        if listed[1] and listed[0] != listed[1]:
            raise UserError(f"--data {data}, {test}: has other classes than train")
        tables = [_table(rows, split, known) for (split, rows), known in zip(parts, listed)]
        names = listed[0] or sorted({name for row in tables[0] for name in row["names"]})
        return [(split, rows, table, names) for (split, rows), table in zip(parts, tables)]


def _key(columns):
    for key in CATEGORY:
        if key in columns:
            return key
    raise ValueError(f"no category among {', '.join(columns)}")


def _class_names(rows):
    """The names of a ClassLabel; None where classes are plain numbers or words."""
    feature = rows.features["objects"]
    feature = getattr(feature, "feature", feature)  # of a list of dicts, the dict
    kind = feature[_key(feature)]
    kind = getattr(kind, "feature", kind)
    return kind.names if isinstance(kind, datasets.ClassLabel) else None


def _table(rows, split, known):
    """The objects of each row, their classes by name."""
    found, beside = [], {key: rows[key] for key in rows.column_names if is_mark(key)}  # marks in columns of their own
    for row, objects in enumerate(rows["objects"]):
        things = _things(objects, {key: column[row] for key, column in beside.items()}, f"row {row} of {split}")
        names = []
        for name in things["names"]:
            if name is None or (isinstance(name, int) and name < 0) or known and not name < len(known):
                raise UserError(f"row {row} of {split}, has the unknown category {name}")
            names.append((known[name] if known else str(name)).strip())
        if not all(names):
            raise UserError(f"row {row} of {split}, has a category without a name")
        found.append({**things, "names": names})
    return found


def _things(objects, beside, where):
    """{"boxes", "names", "marked"} of a row, from a dict of lists or a list of dicts."""
    if isinstance(objects, list):
        objects = {key: [each[key] for each in objects] for key in objects[0]} if objects else {}
    if not objects:
        return {"boxes": [], "names": [], "marked": []}
    objects = {**objects, **beside}
    boxes, names = objects["bbox"], objects[_key(objects)]
    try:
        named = [key for key in objects if is_mark(key) and objects[key] is not None]
        marks = [[is_marked(mark) for mark in objects[key]] for key in named]
    except ValueError as error:
        raise ValueError(f"{where}: the mark {error}") from None
    for box in boxes:
        if box is None or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise ValueError(f"{where}: a box is {box}, and no x, y, width and height")
    lengths = {len(column) for column in (boxes, names, *marks)}
    if len(lengths) > 1:
        raise ValueError(f"{where}: boxes, classes and marks are {sorted(lengths)} in number")
    return {"boxes": boxes, "names": names, "marked": [any(each) for each in zip(*marks)] or [False] * len(boxes)}


def sizes_of(rows: datasets.Dataset, split: str) -> tuple[list[dict], list[tuple[int, int]]]:
    """(images, (width, height) of each): of the columns width and height, or of the images themselves."""
    images = rows.cast_column("image", datasets.Image(decode=False))["image"]
    if {"width", "height"} <= set(rows.column_names):
        return images, list(zip(rows["width"], rows["height"]))
    return images, [decoded(image, f"row {row} of {split}").size for row, image in enumerate(images)]


def decoded(record: dict, name: str, pixel_range=None):
    """The image, or a UserError that names it."""
    try:
        return decode(record, pixel_range or ANY)
    except ValueError as error:
        raise UserError(f"{name}: is not an image that can be read ({error})") from None
