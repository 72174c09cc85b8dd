"""Digit scans on canvases, with exact boxes and masks: a VOCdevkit folder and a COCO folder without a network."""

import json
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SCANS = load_digits()


def scene(rng, side=128, most=3, ten=False):
    """A canvas [side, side, 3] uint8, and its objects: name, box (x1, y1, x2, y2; ends excluded), mask."""
    canvas = rng.normal(90, 12, (side, side, 3)).clip(0, 255).astype(np.uint8)
    objects = []
    for _ in range(rng.integers(1, most + 1)):
        for _ in range(20):  # tries to find a free place
            pick, size = rng.integers(len(SCANS.images)), int(rng.integers(side // 5, side // 2))
            scan = np.asarray(Image.fromarray((SCANS.images[pick] * 15).astype(np.uint8)).resize((size, size)))
            inked = scan > 60
            y, x = rng.integers(0, side - size, 2)
            mask = np.zeros((side, side), bool)
            mask[y : y + size, x : x + size] = inked
            rows, columns = np.where(mask)
            box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            if all(box[0] >= b[2] or box[2] <= b[0] or box[1] >= b[3] or box[3] <= b[1] for _, b, _ in objects):
                colour = rng.integers(150, 256, 3)
                canvas[mask] = (colour * (scan[inked][:, None] / 255)).astype(np.uint8)
                objects.append((f"digit{SCANS.target[pick]}" if ten else "digit", box, mask))
                break
    return canvas, objects


def voc_folder(place: Path, counts: dict, seed=0, year="2007", difficult=0.0, **options) -> Path:
    """`place`/VOCdevkit with the image sets `counts` names, as in dict(train=20, test=10)."""
    rng, root = np.random.default_rng(seed), place / "VOCdevkit" / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    sets, number = {}, 0
    for split, count in counts.items():
        for _ in range(count):
            canvas, objects = scene(rng, **options)
            number += 1
            name = f"{number:06d}"
            sets.setdefault(split, []).append(name)
            if split in ("train", "val"):
                sets.setdefault("trainval", []).append(name)
            Image.fromarray(canvas).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            tree = ElementTree.Element("annotation")
            ElementTree.SubElement(tree, "filename").text = f"{name}.jpg"
            size = ElementTree.SubElement(tree, "size")
            for key, value in zip(("width", "height", "depth"), (canvas.shape[1], canvas.shape[0], 3)):
                ElementTree.SubElement(size, key).text = str(value)
            for label, box, _ in objects:
                found = ElementTree.SubElement(tree, "object")
                for key, value in (("name", label), ("truncated", 0), ("difficult", int(rng.random() < difficult))):
                    ElementTree.SubElement(found, key).text = str(value)
                corners = ElementTree.SubElement(found, "bndbox")  # VOC counts pixels from 1, and includes the last
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3])):
                    ElementTree.SubElement(corners, key).text = str(value)
            ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
    for split, names in sets.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return place / "VOCdevkit"


def coco_folder(place: Path, train: int, val: int, seed=0, **options) -> Path:
    """`place`/coco with train2017/, val2017/ and annotations/instances_*.json, masks as uncompressed run lengths."""
    rng, root = np.random.default_rng(seed), place / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    categories = {}
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            canvas, objects = scene(rng, **options)
            height, width = canvas.shape[:2]
            Image.fromarray(canvas).save(root / split / f"{i:012d}.jpg", quality=95)
            images.append({"id": i + 1, "file_name": f"{i:012d}.jpg", "height": height, "width": width})
            for label, (x1, y1, x2, y2), mask in objects:
                runs = [(key, len(list(same))) for key, same in groupby(mask.T.ravel().tolist())]
                lengths = [0] * runs[0][0] + [length for _, length in runs]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": categories.setdefault(
                            label, 10 * len(categories) + 3
                        ),  # ids with gaps, as COCO's
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": [height, width], "counts": lengths},
                    }
                )
        listed = [{"id": number, "name": name} for name, number in categories.items()]
        content = {"images": images, "annotations": annotations, "categories": listed}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
