"""One reader of VOC's annotations for both evaluations; COCO's ids and masks."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from eval.boxes import open_scenes
from eval.coco import check_mask
from eval.voc import is_marked, read_annotation
from eval.voc07 import read_sets
from flags import UserError
from tests.eval.scenes import coco_folder, voc_folder

BOX = "<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>"


def written(place, name="dog", difficult="", box=(3, 4, 10, 12), width=24):
    file = place / "000001.xml"
    text = f"<object><name>{name}</name>{difficult}{BOX.format(*box)}</object>"
    file.write_text(f"<annotation><size><width>{width}</width><height>20</height></size>{text}</annotation>")
    return file


@pytest.mark.parametrize("mark", ["1", " 1 ", "1.0", "true", "True", "YES"])
def test_a_mark_in_any_spelling(place, mark):
    for boxes in (True, False):
        (thing,) = read_annotation(written(place, difficult=f"<difficult>{mark}</difficult>"), place, boxes).things
        assert thing.difficult and thing.name == "dog"
    assert is_marked(True) and is_marked(1) and not is_marked(None) and not is_marked(False) and not is_marked("0")


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "<difficult/>",
        "<difficult>0</difficult>",
        "<difficult>false</difficult>",
        "<difficult>Unspecified</difficult>",
    ],
)
def test_no_mark_in_any_spelling(place, mark):
    assert not read_annotation(written(place, difficult=mark), place).things[0].difficult


def test_names_sizes_and_boxes(place):
    read = read_annotation(written(place, name=" dog\n", width="24.0", box=(1, "4.0", 10, 12)), place)
    assert (read.width, read.height, read.things[0]) == (24, 20, ("dog", [0, 3, 10, 9], False))


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(name=""), "<name> is empty"),
        (dict(name="  "), "<name> is empty"),
        (dict(difficult="<difficult>perhaps</difficult>"), "<difficult> 'perhaps' is neither 0 nor 1"),
        (dict(width="wide"), "<size/width> 'wide' is no number"),
        (dict(width="24.5"), "<size/width> 24.5 is no number of pixels"),
        (dict(width="0"), "<size/width> 0 is no number of pixels"),
        (dict(box=(0.1, 0.2, 0.5, 1.0)), "the box 0.1, 0.2 to 0.5, 1 is in shares of the image; want pixels from 1"),
        (dict(box=("nan", 1, 2, 3)), "<bndbox/xmin> is nan"),
    ],
)
def test_what_is_no_annotation_names_its_file(place, changed, said):
    with pytest.raises(UserError) as caught:
        read_annotation(written(place, **changed), "VOCdevkit")
    wanted = f"--data VOCdevkit: annotation {place / '000001.xml'}: cannot be read ({said})"
    assert str(caught.value) == wanted


def test_both_evaluations_read_the_same(place):
    root = voc_folder(place, dict(trainval=4, test=4), difficult=0.4)
    for file in (root / "VOC2007" / "Annotations").glob("*.xml"):
        file.write_text(
            file.read_text()
            .replace("<name>digit</name>", "<name>\n digit </name>")
            .replace("<difficult>1<", "<difficult>True<")
        )
    scenes = open_scenes("voc", str(root))
    for one, two in zip(scenes, read_sets(str(root))):
        marks = [[each["iscrowd"] for each in objects] for objects in one.objects()]
        assert [{"digit": all(each)} if each else {} for each in marks] == two.found
        assert [category["name"] for category in one.truth["categories"]] == ["digit"]


def changed_coco(place, change):
    root = coco_folder(place, 3, 3)
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        truth = json.loads(file.read_text())
        change(truth, root / split)
        file.write_text(json.dumps(truth))
    return str(root)


def test_ids_that_are_words_become_numbers(place):
    def words(truth, folder):
        for image in truth["images"]:
            image["id"] = f"image-{image['id']}"
        for category in truth["categories"]:
            category["id"] = str(category["id"])
        for annotation in truth["annotations"]:
            annotation["image_id"] = f"image-{annotation['image_id']}"
            annotation["category_id"] = str(annotation["category_id"])

    plain = open_scenes("coco", changed_coco(place / "a", lambda truth, folder: None))
    named = open_scenes("coco", changed_coco(place / "b", words))
    for one, two in zip(plain[:2], named[:2]):
        boxes = [[[each["bbox"] for each in objects] for objects in scenes.objects()] for scenes in (one, two)]
        assert boxes[0] == boxes[1] and all(type(image["id"]) is int for image in two.truth["images"])


def test_images_in_subfolders_and_marks_of_null(place):
    def change(truth, folder):
        (folder / "a").mkdir()
        for image in truth["images"]:
            (folder / image["file_name"]).rename(folder / "a" / image["file_name"])
            image["file_name"] = f"a/{image['file_name']}"
        for annotation in truth["annotations"]:
            annotation |= {"iscrowd": None, "area": None}

    train, _, _ = open_scenes("coco", changed_coco(place, change))
    assert all(Path(record["path"]).is_file() for record in train.images)
    assert all(each["iscrowd"] == 0 and each["area"] > 0 for each in train.truth["annotations"])


@pytest.mark.parametrize(
    "shape, said",
    [
        ("no mask", "a str; want polygons, or run lengths with size and counts"),
        ([[1, 2, 3, 4]], "a polygon wants three points or more"),
        ([[1, 2, 3, 4, 5]], "a polygon wants three points or more"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon has a point that is no number"),
        ([[1, 2, 1e9, 4, 5, 6]], "a point at 1e+09 is far outside of 24 x 20 pixels"),
        ([[1, 2, 3, -1e9, 5, 6]], "a point at -1e+09 is far outside of 24 x 20 pixels"),
        ({"size": [24, 20], "counts": [480]}, "its size is [24, 20], the image's [20, 24]"),
        ({"size": [20, 24], "counts": [480, 1]}, "add up to 480 pixels"),
        ({"size": [20, 24], "counts": [-1, 481]}, "whole numbers from 0"),
        ({"size": [20, 24], "counts": 480}, "run lengths are a int"),
        ({"counts": [480]}, "a dict; want polygons"),
    ],
)
def test_what_is_no_mask_is_refused_with_its_file_before_the_training(place, shape, said):
    with pytest.raises(ValueError) as caught:
        check_mask(shape, 20, 24)
    assert said in str(caught.value)
    root = changed_coco(place, lambda truth, folder: truth["annotations"][0].update(segmentation="what"))
    with pytest.raises(UserError, match=r"annotation \d+, of .*jpg: its segmentation cannot be read"):
        open_scenes("coco", root)


def test_boxes_in_shares_of_the_image_are_refused(place):
    def share(truth, folder):
        for annotation in truth["annotations"]:
            annotation["bbox"] = (np.array(annotation["bbox"]) / 128).tolist()

    with pytest.raises(UserError, match="boxes are in shares of the image, .*; want pixels"):
        open_scenes("coco", changed_coco(place, share))


@pytest.mark.parametrize("mark", ["iscrowd", "difficult"])
def test_crowds_of_a_dataset_are_neither_learnt_nor_counted(place, mark):
    """Of a list of dicts and of a dict of lists alike."""
    one = {"bbox": [[1.0, 1.0, 9.0, 9.0], [3.0, 3.0, 9.0, 9.0]], "category": ["dog", "cat"], mark: [0, 1]}
    two = {"bbox": [[2.0, 2.0, 9.0, 9.0]], "category": ["cat"], mark: [None]}
    for name, rows in (("a", [one, two]), ("b", [[dict(zip(x, v)) for v in zip(*x.values())] for x in (one, two)])):
        images = [Image.new("RGB", (20, 20))] * 2
        made = Dataset.from_dict({"image": images, "objects": rows}).cast_column("image", datasets.Image())
        (place / name).mkdir()
        for split in ("train", "test"):
            made.to_parquet(place / name / f"{split}.parquet")
        for scenes in open_scenes("voc", str(place / name))[:2]:
            marks = [[(each["category_id"], each["iscrowd"]) for each in objects] for objects in scenes.objects()]
            assert marks == [[(2, 0), (1, 1)], [(1, 0)]]  # cat is 1, dog 2


def hub_boxes(place, **objects):
    """Train and test of two images, with these objects in both."""
    made = Dataset.from_dict({"image": [Image.new("RGB", (20, 20))] * 2, "objects": [objects] * 2})
    made = made.cast_column("image", datasets.Image())
    (place / "hub").mkdir()
    for split in ("train", "test"):
        made.to_parquet(place / "hub" / f"{split}.parquet")
    return str(place / "hub")


def test_names_and_marks_of_a_dataset_in_any_spelling(place):
    boxes = [[1.0, 1.0, 9.0, 9.0], [3.0, 3.0, 9.0, 9.0], [2.0, 2.0, 4.0, 4.0]]
    data = hub_boxes(place, bbox=boxes, category=["dog", " dog\n", "cat "], isCrowd=[0, 1, 0])
    train, _, _ = open_scenes("voc", data)
    assert [category["name"] for category in train.truth["categories"]] == ["cat", "dog"]
    assert [(each["category_id"], each["iscrowd"]) for each in train.objects()[0]] == [(2, 0), (2, 1), (1, 0)]


@pytest.mark.parametrize(
    "objects, said",
    [
        (dict(bbox=[[1.0, 1.0, 9.0]], category=["dog"]), "a box is .*, and no x, y, width and height"),
        (dict(bbox=[[1.0, 1.0, 9.0, 9.0]], category=[" "]), "has a category without a name"),
        (dict(bbox=[[1.0, 1.0, 9.0, 9.0]], category=[-1]), "has the unknown category -1"),
        (dict(bbox=[[0.5, 0.5, 0.9, 0.9]], category=["dog"]), "all boxes are in shares of the image"),
    ],
)
def test_objects_that_are_none_are_named(place, objects, said):
    with pytest.raises(UserError, match=said):
        open_scenes("voc", hub_boxes(place, **objects))
