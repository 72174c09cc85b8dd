"""Images with boxes: VOC's folders, COCO's folders, datasets of the Hub; masks, and average precision."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from eval import hub_boxes
from eval.coco import mask_of, present, read_split
from eval.voc import read_annotation
from flags import UserError, reading
from loading.batches import CROP, epoch_order, generator

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
SLACK = 1  # pixels by which a box may leave its image: what tools round
METRICS = ("AP", "AP50", "AP75")


class Scenes(NamedTuple):
    """Images and the objects in them, as COCO's files have them: boxes are x, y, width and height, in pixels from 0."""

    images: Sequence  # {"bytes", "path"} of each, undecoded
    truth: dict  # "images" (id, file_name, width, height) in the order of `images`, "annotations", "categories"
    pixel_range: tuple[float, float] | None = None  # of files of more than 8 bits

    def objects(self) -> list[list[dict]]:
        """The annotations of each image."""
        found = defaultdict(list)
        for annotation in self.truth["annotations"]:
            found[annotation["image_id"]].append(annotation)
        return [found[image["id"]] for image in self.truth["images"]]


def open_scenes(task: str, data: str) -> tuple[Scenes, Scenes, str | None]:
    """(scenes to train on, scenes to evaluate on, what there is to be said of them).

    task voc: `data` is a VOCdevkit folder, or a dataset of the Hub or of parquet files with the columns image and
    objects; task coco: a COCO folder. Categories are numbered alike in both. Raises UserError where a file is missing
    or cannot be read, where a box is outside its image or has no area, where a category is not listed or only in the
    scenes to evaluate on.
    """
    path, note = Path(data).expanduser(), None
    if not data:
        raise UserError("--data: want a VOCdevkit folder, a COCO folder, or a dataset with boxes of the Hub")
    if task == "coco":
        found = [read_split(path, split) for split in ("train2017", "val2017")]
    elif path.is_dir() and not [*path.glob("*.parquet"), *path.glob("*/*.parquet")]:
        *found, note = _voc(path)
    else:
        found = _hub(data)
    for (_, truth), where in zip(found, ("to train on", "to evaluate on")):
        with reading(f"--data {data}: its annotations"):
            _check(truth, data)
        if not any(not annotation["iscrowd"] for annotation in truth["annotations"]):
            raise UserError(f"--data {data}: no object in the images {where}")
    _same_categories(data, *(truth for _, truth in found))
    train, test = (Scenes(*part) for part in found)
    return train, test, note


def _check(truth, data):
    """Every annotation belongs to an image and to a category, and its box lies in the image."""
    boxes = [annotation["bbox"] for annotation in truth["annotations"]]
    if boxes and max(max(box) for box in boxes) <= 1:
        raise UserError(f"--data {data}: all boxes are in shares of the image, as {boxes[0]}; want pixels")
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
        if x + width <= 1 and y + height <= 1 and (width < 1 or height < 1):
            raise UserError(
                f"{said}, has a box in shares of the image: x {x:g}, y {y:g}, width {width:g}, height {height:g}; "
                "want pixels"
            )
        right, bottom = image["width"] + SLACK, image["height"] + SLACK
        if not (min(x, y) >= -SLACK and x + width <= right and y + height <= bottom):  # nor is one of NaN inside
            raise UserError(
                f"{said}, has a box outside the image: from {x:g}, {y:g} to {x + width:g}, {y + height:g}, "
                f"in {image['width']} x {image['height']} pixels"
            )


def _same_categories(data, train, test):
    names, asked = ({c["id"]: c["name"] for c in truth["categories"]} for truth in (train, test))
    learnt, judged = ({a["category_id"] for a in truth["annotations"] if not a["iscrowd"]} for truth in (train, test))
    for number in sorted(judged):
        if number not in learnt or names[number] != asked[number]:
            raise UserError(f"--data {data}: class {asked[number]} is only in the images to evaluate on")


# ---------------------------------------------------------------------------------------------------------------------
# Three sources, one form: what COCO's files hold.


def _voc(root):
    """VOC07+12: trained on trainval of both years where both are there, evaluated on 2007's test set."""
    years = ["2007"] + ["2012"] * (root / "VOC2012").exists()
    parts = [_voc_images(root, year, "trainval") for year in years], [_voc_images(root, "2007", "test")]
    found = {thing.name for part in parts for entries in part for _, read in entries for thing in read.things}
    names = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    note = None if "2012" in years else f"note: no {root / 'VOC2012'}; trained on VOC2007's trainval alone"
    return *(_voc_scenes([entry for entries in part for entry in entries], names) for part in parts), note


def _voc_images(root, year, split):
    """(image file, annotation) for each image of a split."""
    folder = root / f"VOC{year}"
    listed = present(folder / "ImageSets" / "Main" / f"{split}.txt", root).read_text().split()
    here = {path.name for path in present(folder / "JPEGImages", root).iterdir()}
    found = []
    for name in listed:
        if f"{name}.jpg" not in here:
            raise UserError(f"--data {root}: no {folder / 'JPEGImages' / name}.jpg, which {split}.txt lists")
        file = present(folder / "Annotations" / f"{name}.xml", root)
        found.append((str(folder / "JPEGImages" / f"{name}.jpg"), read_annotation(file, root)))
    return found


def _voc_scenes(entries, names):
    truth = _truth([{"file_name": file, "width": read.width, "height": read.height} for file, read in entries], names)
    for image, (_, read) in zip(truth["images"], entries):
        for name, box, difficult in read.things:
            # Difficult objects are neither learnt nor counted: to the evaluator, crowds, the only thing it leaves out.
            _add(truth, image, names.index(name) + 1, box, int(difficult))
    return [{"bytes": None, "path": image["file_name"]} for image in truth["images"]], truth


def _hub(data):
    return [_hub_scenes(*part) for part in hub_boxes.read_splits(data)]


def _hub_scenes(split, rows, table, names):
    images, sizes = hub_boxes.sizes_of(rows, split)
    listed = [{"file_name": f"row {row} of {split}", "width": w, "height": h} for row, (w, h) in enumerate(sizes)]
    truth, number = _truth(listed, names), {name: n for n, name in enumerate(names, 1)}
    for image, things in zip(truth["images"], table):
        for box, label, marked in zip(things["boxes"], things["names"], things["marked"]):
            if label not in number:
                raise UserError(f"{image['file_name']}, has the unknown category {label}")
            _add(truth, image, number[label], box, int(marked))
    return images, truth


def _truth(images, names):
    """Without annotations yet; images and categories are numbered from 1."""
    images = [{"id": number, **image} for number, image in enumerate(images, 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": [], "categories": categories}


def _add(truth, image, category, box, crowd=0):
    annotation = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": category, "bbox": box}
    truth["annotations"].append(annotation | {"area": box[2] * box[3], "iscrowd": crowd})


# ---------------------------------------------------------------------------------------------------------------------
# An image, the average precision.


def picture(scenes: Scenes, row: int):
    """The image as uint8 [H, W, 3]. Raises UserError where it cannot be read, or has not the size that is written."""
    listed = scenes.truth["images"][row]
    image = hub_boxes.decoded(scenes.images[row], listed["file_name"], scenes.pixel_range)
    if image.size != (listed["width"], listed["height"]):
        raise UserError(
            f"{listed['file_name']}: has {image.width} x {image.height} pixels, "
            f"and its annotation says {listed['width']} x {listed['height']}"
        )
    return np.array(image)


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
            file = self.scenes.truth["images"][row]["file_name"]
            target["masks"] = np.stack([mask_of(each, height, width, file) for each in objects])
        if torch.rand(1, generator=draws) < 0.5:
            image = image[:, ::-1].copy()
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"][:, :, ::-1].copy()
        return image, target | {"boxes": boxes}
