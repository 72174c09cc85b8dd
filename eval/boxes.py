"""Images with boxes: VOC's folders, COCO's folders, datasets of the Hub; masks, and average precision."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import datasets
import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths

from flags import UserError, first_line, reading
from loading import sources
from loading.batches import CROP, epoch_order, generator
from loading.images import decode

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
SLACK = 1  # pixels by which a box may leave its image: what tools round
FLAWED = {200365, 550395}  # COCO 2017's own two training images that have a box of no area
METRICS = ("AP", "AP50", "AP75")


class Scenes(NamedTuple):
    """Images and the objects in them, as COCO's files have them: boxes are x, y, width and height, in pixels from 0."""

    images: Sequence  # {"bytes", "path"} of each, undecoded
    truth: dict  # "images" (id, file_name, width, height) in the order of `images`, "annotations", "categories"

    def objects(self) -> list[list[dict]]:
        """The annotations of each image."""
        found = defaultdict(list)
        for annotation in self.truth["annotations"]:
            found[annotation["image_id"]].append(annotation)
        return [found[image["id"]] for image in self.truth["images"]]


def open_scenes(task: str, data: str) -> tuple[Scenes, Scenes, str | None]:
    """(scenes to train on, scenes to be judged by, what there is to be said of them).

    task voc: `data` is a VOCdevkit folder, or a dataset of the Hub or of parquet files with the columns image and
    objects; task coco: a COCO folder. Categories are numbered alike in both. Raises UserError where a file is missing
    or cannot be read, where a box is outside its image or has no area, where a category is not listed or only in the
    scenes to be judged by.
    """
    path, note = Path(data).expanduser(), None
    if not data:
        raise UserError("--data: want a VOCdevkit folder, a COCO folder, or a dataset with boxes of the Hub")
    if task == "coco":
        found = [_coco(path, split) for split in ("train2017", "val2017")]
    elif path.is_dir() and not [*path.glob("*.parquet"), *path.glob("*/*.parquet")]:
        *found, note = _voc(path)
    else:
        found = _hub(data)
    for (_, truth), where in zip(found, ("to train on", "to be judged by")):
        with reading(f"--data {data}: its annotations"):
            _check(truth, data)
        if not any(not annotation["iscrowd"] for annotation in truth["annotations"]):
            raise UserError(f"--data {data}: no object in the images {where}")
    _same_categories(data, *(truth for _, truth in found))
    return *(Scenes(*part) for part in found), note


def _check(truth, data):
    """Every annotation belongs to an image and to a category, and its box lies in the image."""
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for annotation in truth["annotations"]:
        image = images.get(annotation["image_id"])
        said = f"--data {data}: annotation {annotation['id']}"
        if image is None:
            raise UserError(f"{said} is of image {annotation['image_id']}, which is not listed")
        said = f"{said}, of {image['file_name']}"
        if annotation["category_id"] not in categories:
            raise UserError(f"{said}, has the unknown category {annotation['category_id']}")
        x, y, width, height = annotation["bbox"]
        if not (width > 0 and height > 0):
            raise UserError(f"{said}, has a box of no area: x {x:g}, y {y:g}, width {width:g}, height {height:g}")
        right, bottom = image["width"] + SLACK, image["height"] + SLACK
        if not (min(x, y) >= -SLACK and x + width <= right and y + height <= bottom):  # nor is one of NaN inside
            raise UserError(
                f"{said}, has a box outside the image: from {x:g}, {y:g} to {x + width:g}, {y + height:g}, "
                f"in {image['width']} x {image['height']} pixels"
            )


def _same_categories(data, train, test):
    names, asked = ({c["id"]: c["name"] for c in truth["categories"]} for truth in (train, test))
    learnt, judged = ({a["category_id"] for a in truth["annotations"]} for truth in (train, test))
    for number in sorted(judged):
        if number not in learnt or names[number] != asked[number]:
            raise UserError(f"--data {data}: class {asked[number]} is only in the images to be judged by")


def _present(path, data):
    if not path.exists():
        raise UserError(f"--data {data}: no {path}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# VOC: a file an image, boxes counted from 1 with their last pixel.


def _voc(root):
    """VOC07+12: trained on trainval of both years where both are there, judged by 2007's test set."""
    years = ["2007"] + ["2012"] * (root / "VOC2012").exists()
    parts = [_voc_objects(root, year, "trainval") for year in years], [_voc_objects(root, "2007", "test")]
    found = {name for part in parts for entries in part for _, objects in entries for name, *_ in objects}
    names = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    note = None if "2012" in years else f"note: no {root / 'VOC2012'}; trained on VOC2007's trainval alone"
    return *(_voc_scenes([entry for entries in part for entry in entries], names) for part in parts), note


def _voc_objects(root, year, split):
    """(image, objects) for each image of a split; an object is (name, box, difficult)."""
    folder = root / f"VOC{year}"
    listed = _present(folder / "ImageSets" / "Main" / f"{split}.txt", root).read_text().split()
    here = {path.name for path in _present(folder / "JPEGImages", root).iterdir()}
    found = []
    for name in listed:
        if f"{name}.jpg" not in here:
            raise UserError(f"--data {root}: no {folder / 'JPEGImages' / name}.jpg, which {split}.txt lists")
        file = _present(folder / "Annotations" / f"{name}.xml", root)
        with reading(f"--data {root}: {file}"):
            tree = ElementTree.parse(file)
            size = {side: int(_text(tree, f"size/{side}")) for side in ("width", "height")}
            objects = []
            for found_here in tree.iterfind("object"):
                x1, y1, x2, y2 = (float(_text(found_here, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
                objects.append((_text(found_here, "name"), box, int(found_here.findtext("difficult") or 0)))
        found.append(({"file_name": str(folder / "JPEGImages" / f"{name}.jpg"), **size}, objects))
    return found


def _text(node, key):
    found = node.findtext(key)
    if found is None:
        raise ValueError(f"no <{key}>")
    return found


def _voc_scenes(entries, names):
    truth = _truth([image for image, _ in entries], names)
    for image, (_, objects) in zip(truth["images"], entries):
        for name, box, difficult in objects:
            # Difficult objects are neither learnt nor counted: to the evaluator, crowds, the only thing it leaves out.
            _add(truth, image, names.index(name) + 1, box, difficult)
    return [{"bytes": None, "path": image["file_name"]} for image in truth["images"]], truth


def _truth(images, names):
    """What COCO's files hold, without annotations yet; images and categories are numbered from 1."""
    images = [{"id": number, **image} for number, image in enumerate(images, 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": [], "categories": categories}


def _add(truth, image, category, box, crowd=0):
    annotation = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": category, "bbox": box}
    truth["annotations"].append(annotation | {"area": box[2] * box[3], "iscrowd": crowd})


# ---------------------------------------------------------------------------------------------------------------------
# COCO: a file a split.


def _coco(root, split):
    file = _present(root / "annotations" / f"instances_{split}.json", root)
    folder = _present(root / split, root)
    with reading(f"--data {root}: {file}"):
        truth = json.loads(file.read_bytes())
        truth = {key: truth[key] for key in ("images", "annotations", "categories")}
        here = {path.name for path in folder.iterdir()}
        for image in truth["images"]:
            if image["file_name"] not in here:
                raise UserError(f"--data {root}: no {folder / image['file_name']}, which {file.name} lists")
        kept = []
        for annotation in truth["annotations"]:
            if annotation["image_id"] in FLAWED and not min(annotation["bbox"][2:]):
                continue
            if not annotation.get("segmentation"):
                raise UserError(
                    f"--data {root}: annotation {annotation['id']}, of image {annotation['image_id']}, has no mask"
                )
            _, _, width, height = annotation["bbox"]
            kept.append({"area": width * height, "iscrowd": 0, **annotation})
        truth["annotations"] = kept
        images = [{"bytes": None, "path": str(folder / image["file_name"])} for image in truth["images"]]
    return images, truth


# ---------------------------------------------------------------------------------------------------------------------
# Datasets of the Hub: the columns image and objects, boxes as COCO has them.


def _hub(data):
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
        tables = [_hub_objects(rows) for _, rows in parts]
        names = _class_names(parts[0][1]) or sorted({str(label) for _, labels in tables[0] for label in labels})
        listed = _class_names(parts[1][1])
        if listed and listed != names:
            raise UserError(f"--data {data}, {test}: has other classes than train")
        return [_hub_scenes(rows, split, table, names) for (split, rows), table in zip(parts, tables)]


def _class_key(columns):
    for key in ("category", "categories", "label"):
        if key in columns:
            return key
    raise ValueError(f"no category among {', '.join(columns)}")


def _class_names(rows):
    """The names of a ClassLabel; None where classes are plain numbers or words."""
    feature = rows.features["objects"]
    feature = getattr(feature, "feature", feature)  # of a list of dicts, the dict
    kind = feature[_class_key(feature)]
    kind = getattr(kind, "feature", kind)
    return kind.names if isinstance(kind, datasets.ClassLabel) else None


def _hub_objects(rows):
    """(boxes, classes) of each row, from a dict of lists or a list of dicts."""
    found = []
    for objects in rows["objects"]:
        if isinstance(objects, list):
            objects = {key: [each[key] for each in objects] for key in objects[0]} if objects else {}
        found.append((objects["bbox"], objects[_class_key(objects)]) if objects else ([], []))
    return found


def _hub_scenes(rows, split, table, names):
    images = rows.cast_column("image", datasets.Image(decode=False))["image"]
    if {"width", "height"} <= set(rows.column_names):
        sizes = list(zip(rows["width"], rows["height"]))
    else:
        sizes = [_decoded(image, f"row {row} of {split}").size for row, image in enumerate(images)]
    listed = [{"file_name": f"row {row} of {split}", "width": w, "height": h} for row, (w, h) in enumerate(sizes)]
    truth, numbered = _truth(listed, names), bool(_class_names(rows))
    for image, (boxes, labels) in zip(truth["images"], table):
        for box, label in zip(boxes, labels, strict=True):
            number = label if numbered else names.index(str(label)) if str(label) in names else None
            if number is None or not 0 <= number < len(names):
                raise UserError(f"{image['file_name']}, has the unknown category {label}")
            _add(truth, image, number + 1, box)
    return images, truth


# ---------------------------------------------------------------------------------------------------------------------
# An image, a mask, the average precision.


def _decoded(record, name):
    try:
        return decode(record)
    except ValueError as error:
        raise UserError(f"{name}: is not an image that can be read ({error})") from None


def picture(scenes: Scenes, row: int):
    """The image as uint8 [H, W, 3]. Raises UserError where it cannot be read, or has not the size that is written."""
    listed = scenes.truth["images"][row]
    image = _decoded(scenes.images[row], listed["file_name"])
    if image.size != (listed["width"], listed["height"]):
        raise UserError(
            f"{listed['file_name']}: has {image.width} x {image.height} pixels, "
            f"and its annotation says {listed['width']} x {listed['height']}"
        )
    return np.array(image)


def mask_of(annotation: dict, height: int, width: int):
    """uint8 [height, width], 1 in the object, of polygons or of run lengths, plain or compressed."""
    shape = annotation["segmentation"]
    try:
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
            f"annotation {annotation['id']}: its segmentation cannot be read ({first_line(error)})"
        ) from None


def average_precision(truth: dict, found: list[dict], kind: str = "bbox") -> dict:
    """{"AP", "AP50", "AP75"} in per cent, as COCO's evaluator has them: 101 points, at most 100 objects an image.

    truth: as in `Scenes`. found: image_id, category_id, score, and "bbox" or (kind "segm") "segmentation" as compressed
    run lengths. AP is the mean over the thresholds 0.50, 0.55, ..., 0.95 of the overlap. Crowds are left out.
    """
    if not found:
        return dict.fromkeys(METRICS, 0.0)
    # The evaluator writes into what it is given, and takes an annotation's number 0 for none.
    annotations = [{**annotation, "id": number} for number, annotation in enumerate(truth["annotations"], 1)]
    known = COCO({**truth, "annotations": annotations})
    kept = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    judge = COCOeval_faster(known, known.loadRes([{key: each[key] for key in kept} for each in found]), kind)
    judge.run()
    return dict(zip(METRICS, (float(value) * 100 for value in judge.stats)))


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


class Batches:
    """The batch of a step of this process: images uint8 [H, W, 3] and their targets, half of them mirrored.

    Which rows and which mirrored depends on (seed, step) and the place in the batch alone, not on the processes.
    Images without an object to learn are left out, crowds and difficult objects of the others too.
    """

    def __init__(self, scenes: Scenes, classes: list[int], masks: bool, *, batch_size, rank, world, seed):
        self.scenes, self.masks, self.seed, self.batch_size = scenes, masks, seed, batch_size
        self.share = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.label = {category: label for label, category in enumerate(classes, 1)}  # 0 is the background
        self.objects = [[each for each in objects if not each["iscrowd"]] for objects in scenes.objects()]
        self.kept = torch.tensor([row for row, objects in enumerate(self.objects) if objects])

    def step_rows(self, step: int) -> torch.Tensor:
        """The rows of the whole batch of a step: epoch after epoch, each in an order of its own."""
        n = len(self.kept)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.kept[[int(epoch_order(n, self.seed, place // n)[place % n]) for place in places]]

    def __call__(self, step: int):
        rows = self.step_rows(step).tolist()
        return tuple(zip(*(self._example(rows[i], generator(self.seed, CROP, step, i)) for i in self.share)))

    def _example(self, row, draws):
        """uint8 [H, W, 3], and {"boxes": corners, "labels", "masks": uint8 [objects, H, W]}."""
        image, objects = picture(self.scenes, row), self.objects[row]
        height, width = image.shape[:2]
        boxes = np.array([each["bbox"] for each in objects], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        target = {"labels": np.array([self.label[each["category_id"]] for each in objects])}
        if self.masks:
            target["masks"] = np.stack([mask_of(each, height, width) for each in objects])
        if torch.rand(1, generator=draws) < 0.5:
            image = image[:, ::-1].copy()
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"][:, :, ::-1].copy()
        return image, target | {"boxes": boxes}
