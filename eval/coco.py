"""COCO's files: a JSON a split; masks as polygons or run lengths."""

import json
import math
from pathlib import Path

from faster_coco_eval.core import mask as run_lengths

from eval.voc import is_marked
from flags import UserError, first_line, reading

FLAWED = {200365, 550395}  # COCO 2017's own two training images that have a box of no area


def present(path: Path, data) -> Path:
    if not path.exists():
        raise UserError(f"--data {data}: no {path}")
    return path


def read_split(root: Path, split: str) -> tuple[list[dict], dict]:
    """(images, truth) of a split. Raises UserError for a missing image, an annotation of none, a mask that is none."""
    file = present(root / "annotations" / f"instances_{split}.json", root)
    folder = present(root / split, root)
    with reading(f"--data {root}: {file}"):
        truth = json.loads(file.read_bytes())
        truth = {key: truth[key] for key in ("images", "annotations", "categories")}
        here = {path.name for path in folder.iterdir()}
        for image in truth["images"]:
            name = image["file_name"]
            if name not in here and not ("/" in name and (folder / name).is_file()):
                raise UserError(f"--data {root}: no {folder / name}, which {file.name} lists")
        _number_ids(truth, f"--data {root}: {file}")
        by_id = {image["id"]: image for image in truth["images"]}
        truth["annotations"] = [
            _checked(annotation, by_id.get(annotation["image_id"]), f"--data {root}")
            for annotation in truth["annotations"]
            if annotation["image_id"] not in FLAWED or min(annotation["bbox"][2:])
        ]
        return [{"bytes": None, "path": str(folder / image["file_name"])} for image in truth["images"]], truth


def _number_ids(truth, said):
    """Give images and categories whose ids are no whole numbers ids from 1: the evaluator takes numbers alone."""
    for key, of in (("images", "image_id"), ("categories", "category_id")):
        ids = [each["id"] for each in truth[key]]
        twice = next((i for i in ids if ids.count(i) > 1), None) if len(set(map(str, ids))) < len(ids) else None
        if twice is not None:
            raise UserError(f"{said}: {key} {twice} is listed twice")
        if all(type(i) is int for i in ids):
            continue
        number = {i: n for n, i in enumerate(ids, 1)}
        truth[key] = [{**each, "id": number[each["id"]]} for each in truth[key]]
        for annotation in truth["annotations"]:
            annotation[of] = number.get(annotation[of], f"{annotation[of]!r}")  # what is not listed is named later


def _checked(annotation, image, said):
    """The annotation, with its marks as numbers and its mask looked at."""
    if not annotation.get("segmentation"):
        raise UserError(f"{said}: annotation {annotation['id']}, of image {annotation['image_id']}, has no mask")
    if image is not None:
        try:
            check_mask(annotation["segmentation"], image["height"], image["width"])
        except ValueError as error:
            where = f"annotation {annotation['id']}, of {image['file_name']}"
            raise UserError(f"{said}: {where}: its segmentation cannot be read ({error})") from None
    _, _, width, height = annotation["bbox"]
    area = annotation.get("area")
    marked = int(is_marked(annotation.get("iscrowd")))
    return {**annotation, "area": width * height if area is None else area, "iscrowd": marked}


def check_mask(shape, height: int, width: int) -> None:
    """Raise ValueError for what is no mask of this size, or takes no end of memory: before a library reads it."""
    if isinstance(shape, list):
        if not shape:
            raise ValueError("no polygon")
        for polygon in shape:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon wants three points or more, as x, y, x, y, ...")
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in polygon):
                raise ValueError("a polygon has a point that is no number")
            for values, side in ((polygon[::2], width), (polygon[1::2], height)):
                if min(values) < -side or max(values) > 2 * side:
                    far = min(values) if min(values) < -side else max(values)
                    raise ValueError(f"a point at {far:g} is far outside of {width} x {height} pixels")
    elif isinstance(shape, dict) and {"size", "counts"} <= shape.keys():
        if list(shape["size"]) != [height, width]:
            raise ValueError(f"its size is {shape['size']}, the image's {[height, width]}")
        counts = shape["counts"]
        if isinstance(counts, list):
            if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
                raise ValueError(f"run lengths want whole numbers from 0 that add up to {height * width} pixels")
        elif not isinstance(counts, (str, bytes)):
            raise ValueError(f"run lengths are a {type(counts).__name__}")
    else:
        raise ValueError(f"a {type(shape).__name__}; want polygons, or run lengths with size and counts")


def mask_of(annotation: dict, height: int, width: int, file: str = ""):
    """uint8 [height, width], 1 in the object, of polygons or of run lengths, plain or compressed."""
    shape = annotation["segmentation"]
    try:
        check_mask(shape, height, width)
        if isinstance(shape, list):
            shape = run_lengths.merge(run_lengths.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = run_lengths.frPyObjects(shape, height, width)
        found = run_lengths.decode(shape)
        if found.shape != (height, width):
            raise ValueError(f"is of {found.shape[1]} x {found.shape[0]} pixels")
        return found
    except Exception as error:  # the library raises what its bindings raise
        raise UserError(
            f"{file + ', ' if file else ''}annotation {annotation['id']}: its segmentation cannot be read "
            f"({first_line(error)})"
        ) from None
