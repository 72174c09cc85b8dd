"""Boxes and masks of VOC, COCO and datasets: what is read and refused, and the average precision."""

import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from eval.boxes import VOC_CLASSES, Batches, average_precision, open_scenes, picture
from eval.coco import mask_of, run_lengths
from flags import UserError
from tests.eval.scenes import coco_folder, scene, voc_folder


def coco_file(root, split="train2017"):
    return root / "annotations" / f"instances_{split}.json"


def changed(file, change):
    """Rewrite a COCO file as `change` leaves it."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def drawn(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [scene(rng, **options) for _ in range(count)]


def test_voc_boxes_are_read_as_they_were_drawn(place):
    root = voc_folder(place, dict(train=30, val=10, test=2), ten=True)
    train, test, note = open_scenes("voc", str(root))
    assert note == f"note: no {root / 'VOC2012'}; trained on VOC2007's trainval alone"
    assert (len(train.images), len(test.images)) == (40, 2)
    names = [category["name"] for category in train.truth["categories"]]
    assert names == sorted(names) and train.truth["categories"] == test.truth["categories"]
    rng = np.random.default_rng(0)
    for row in range(40):
        canvas, objects = scene(rng, ten=True)
        rng.random(len(objects))  # which of them are difficult
        assert np.abs(picture(train, row).astype(int) - canvas).mean() < 9  # a JPEG of noise; another image has 14
        found = [(names[each["category_id"] - 1], each["bbox"]) for each in train.objects()[row]]
        assert found == [(name, [x1, y1, x2 - x1, y2 - y1]) for name, (x1, y1, x2, y2), _ in objects]


def test_voc_is_2007_and_2012_and_its_classes_are_the_twenty(place):
    for year, counts in (("2007", dict(train=2, val=1, test=2)), ("2012", dict(train=3, val=1))):
        root = voc_folder(place, counts, year=year, seed=int(year))
    for file in root.rglob("*.xml"):
        file.write_text(file.read_text().replace("<name>digit<", "<name>sofa<"))
    train, test, note = open_scenes("voc", str(root))
    assert (len(train.images), len(test.images), note) == (3 + 4, 2, None)
    assert [category["name"] for category in test.truth["categories"]] == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert {each["category_id"] for each in train.truth["annotations"]} == {VOC_CLASSES.index("sofa") + 1}


def test_difficult_objects_are_neither_learnt_nor_counted(place):
    root = voc_folder(place, dict(train=30, test=10), difficult=0.4)
    train, test, _ = open_scenes("voc", str(root))
    hard = [each for each in train.truth["annotations"] if each["iscrowd"]]
    assert 0 < len(hard) < len(train.truth["annotations"])
    batches = Batches(train, [1], False, batch_size=2, rank=0, world=1, seed=0)
    learnt = sum(len(objects) for objects in batches.objects)
    assert learnt == len(train.truth["annotations"]) - len(hard)
    assert all(batches.objects[row] for row in batches.kept)
    assert len(batches.kept) == len({each["image_id"] for each in train.truth["annotations"] if not each["iscrowd"]})
    easy = [{**each, "score": 1.0} for each in test.truth["annotations"] if not each["iscrowd"]]
    every = [{**each, "score": 1.0} for each in test.truth["annotations"]]
    assert average_precision(test.truth, easy)["AP"] == pytest.approx(100)
    assert average_precision(test.truth, every)["AP"] == pytest.approx(100)  # no false alarm either


@pytest.mark.parametrize("kind", ["plain", "compressed", "polygon"])
def test_coco_masks_are_read_in_every_form(place, kind):
    root = coco_folder(place, 2, 2)
    canvas, objects = drawn(1)[0]
    height, width = canvas.shape[:2]

    def change(content):
        for each in content["annotations"]:
            if kind == "compressed":
                shape = run_lengths.frPyObjects(each["segmentation"], height, width)
                each["segmentation"] = {"size": shape["size"], "counts": shape["counts"].decode()}
            elif kind == "polygon":
                x, y, w, h = each["bbox"]
                each["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y, x, y + h, x + w, y + h]]

    changed(coco_file(root), change)
    train, _, _ = open_scenes("coco", str(root))
    for each, (_, (x1, y1, x2, y2), mask) in zip(train.objects()[0], objects, strict=True):
        found = mask_of(each, height, width)
        if kind == "polygon":  # two triangles: the box
            mask = np.zeros_like(mask)
            mask[y1:y2, x1:x2] = True
        assert (found == mask).mean() > (0.999 if kind == "polygon" else 0.9999999)
        assert found.sum() > 0


def objects_of(kind, rows):
    boxes = [[[float(v) for v in (x1, y1, x2 - x1, y2 - y1)] for _, (x1, y1, x2, y2), _ in row] for _, row in rows]
    labels = [[0 if kind == "numbers" else name for name, *_ in row] for _, row in rows]
    if kind == "dicts":
        return [[{"bbox": b, "category": c} for b, c in zip(*row)] for row in zip(boxes, labels)]
    return [{"bbox": b, "categories" if kind == "numbers" else "label": c} for b, c in zip(boxes, labels)]


@pytest.mark.parametrize("kind", ["numbers", "words", "dicts"])
def test_a_dataset_of_parquet_files_is_read_as_the_folder_is(place, kind):
    for split, count, seed in (("train", 4, 0), ("test", 3, 1)):
        rows = drawn(count, seed)
        for i, (canvas, _) in enumerate(rows):
            Image.fromarray(canvas).save(place / f"{split}{i}.png")
        images = [{"bytes": (place / f"{split}{i}.png").read_bytes(), "path": None} for i in range(count)]
        table = Dataset.from_dict({"image": images, "objects": objects_of(kind, rows)})
        table = table.cast_column("image", datasets.Image())
        if kind == "numbers":
            label = datasets.ClassLabel(names=["digit", "letter"])
            shape = {"bbox": List(List(Value("float32"))), "categories": List(label)}
            table = table.cast(Features(image=datasets.Image(), objects=shape))
        (place / "set").mkdir(exist_ok=True)
        table.to_parquet(place / "set" / f"{split}.parquet")
    train, test, note = open_scenes("voc", str(place / "set"))
    assert note is None and (len(train.images), len(test.images)) == (4, 3)
    assert [c["name"] for c in train.truth["categories"]] == ["digit", "letter"][: 1 + (kind == "numbers")]
    for scenes, seed in ((train, 0), (test, 1)):
        for row, (canvas, objects) in enumerate(drawn(len(scenes.images), seed)):
            assert np.array_equal(picture(scenes, row), canvas)
            wanted = [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2), _ in objects]
            assert [each["bbox"] for each in scenes.objects()[row]] == wanted


def edit(**values):
    return lambda content: content["annotations"][1].update(values)


@pytest.mark.parametrize(
    "change, said",
    [
        (edit(bbox=[100, 100, 60, 10]), r"annotation 2, of .*\.jpg, has a box outside the image: from 100, 100 to 160"),
        (edit(bbox=[-3, 100, 60, 10]), r"annotation 2, of .*\.jpg, has a box outside the image: from -3, 100"),
        (edit(bbox=[float("nan"), 1, 6, 1]), r"annotation 2, of .*\.jpg, has a box outside the image"),
        (edit(bbox=[10, 10, 0, 10]), r"annotation 2, of .*\.jpg, has a box of no area: x 10, y 10, width 0, height 10"),
        (edit(category_id=77), r"annotation 2, of .*\.jpg, has the unknown category 77"),
        (edit(image_id=99), r"annotation 2 is of image 99, which is not listed"),
        (edit(segmentation=[]), r"annotation 2, of image 2, has no mask"),
        (lambda content: content.pop("categories"), r"instances_train2017.json: cannot be read \('categories'\)"),
        (
            lambda content: (
                content["categories"].append({"id": 4, "name": "letter"})
                or [each.update(category_id=4) for each in content["annotations"]]
            ),
            "class digit is only in the images to evaluate on",
        ),
    ],
)
def test_a_bad_annotation_is_named(place, change, said):
    root = coco_folder(place, 3, 2, seed=2)
    changed(coco_file(root), change)
    with pytest.raises(UserError, match=said) as error:
        open_scenes("coco", str(root))
    assert str(root) in str(error.value) and "\n" not in str(error.value)


def test_the_two_flawed_boxes_of_coco_itself_are_left_out(place):
    root = coco_folder(place, 3, 2, seed=2)

    def change(content):
        number = content["images"][0]["id"]
        for each in (*content["images"], *content["annotations"]):
            key = "id" if "file_name" in each else "image_id"
            each[key] = 200365 if each[key] == number else each[key]
        content["annotations"][0]["bbox"][3] = 0.0

    before = len(json.loads(coco_file(root).read_text())["annotations"])
    changed(coco_file(root), change)
    assert len(open_scenes("coco", str(root))[0].truth["annotations"]) == before - 1


def test_what_is_missing_is_named(place):
    voc, coco = voc_folder(place, dict(train=2, test=2)), coco_folder(place, 2, 2)
    (voc / "VOC2007/JPEGImages/000001.jpg").rename(place / "away.jpg")
    with pytest.raises(UserError, match=r"no .*JPEGImages/000001.jpg, which trainval.txt lists"):
        open_scenes("voc", str(voc))
    (place / "away.jpg").rename(voc / "VOC2007/JPEGImages/000001.jpg")
    file = voc / "VOC2007/Annotations/000001.xml"
    file.write_text(file.read_text().replace("xmax", "xmux"))
    with pytest.raises(UserError, match=r"000001.xml: cannot be read \(no <bndbox/xmax>\)"):
        open_scenes("voc", str(voc))
    (voc / "VOC2007/ImageSets/Main/test.txt").unlink()
    file.write_text(file.read_text().replace("xmux", "xmax"))
    with pytest.raises(UserError, match=r"no .*VOC2007/ImageSets/Main/test.txt"):
        open_scenes("voc", str(voc))
    with pytest.raises(UserError, match=r"no .*VOC2007/ImageSets/Main/trainval.txt"):
        open_scenes("voc", str(coco))
    with pytest.raises(UserError, match=r"no .*annotations/instances_train2017.json"):
        open_scenes("coco", str(voc))
    with pytest.raises(UserError, match="no such folder here, and as a dataset: cannot be read"):
        open_scenes("voc", str(place / "nowhere"))
    next((coco / "val2017").iterdir()).unlink()
    with pytest.raises(UserError, match=r"no .*val2017/0+.\.jpg, which instances_val2017.json lists"):
        open_scenes("coco", str(coco))


# ---------------------------------------------------------------------------------------------------------------------
# The average precision.


def guesses(scenes, seed):
    """Moved boxes and masks of the truth, with doubles, false alarms and equal scores."""
    rng, found = np.random.default_rng(seed), []
    for image, objects in zip(scenes.truth["images"], scenes.objects()):
        height, width = image["height"], image["width"]
        for each in [*objects, *objects, *rng.choice(scenes.truth["annotations"], 2)]:
            dx, dy = rng.integers(-5, 6, 2)
            mask = np.roll(mask_of(each, height, width), (dy, dx), (0, 1))
            x, y, w, h = each["bbox"]
            guess = {"image_id": image["id"], "category_id": each["category_id"], "score": round(rng.random(), 1)}
            guess["bbox"] = [float(x + dx), float(y + dy), float(w * rng.uniform(0.8, 1.2)), float(h)]
            found.append(guess | {"segmentation": run_lengths.encode(np.asfortranarray(mask))})
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_is_that_of_pycocotools(place, kind, capsys):
    pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools, to compare with, is not installed")
    from pycocotools.cocoeval import COCOeval

    root = coco_folder(place, 2, 12, ten=True)
    changed(coco_file(root), lambda content: content.update(json.loads(coco_file(root, "val2017").read_text())))
    for file in (root / "val2017").iterdir():
        (root / "train2017" / file.name).write_bytes(file.read_bytes())
    changed(
        coco_file(root, "val2017"), lambda content: [each.update(iscrowd=1) for each in content["annotations"][::7]]
    )
    for each in range(2):
        _, scenes, _ = open_scenes("coco", str(root))
        found = guesses(scenes, each)
        ours = average_precision(scenes.truth, found, kind)
        known = pycocotools.COCO(str(coco_file(root, "val2017")))
        judge = COCOeval(known, known.loadRes(found), kind)
        judge.evaluate(), judge.accumulate(), judge.summarize()
        assert list(ours.values()) == pytest.approx([100 * value for value in judge.stats[:3]], abs=1e-6)
        assert list(ours) == ["AP", "AP50", "AP75"] and 0 < ours["AP"] < ours["AP50"] < 100


def test_ap_of_everything_and_of_nothing(place):
    _, test, _ = open_scenes("coco", str(coco_folder(place, 2, 5)))
    perfect = [{**each, "score": 0.9} for each in test.truth["annotations"]]
    for each, objects in zip(perfect, test.truth["annotations"]):
        shape = run_lengths.frPyObjects(objects["segmentation"], 128, 128)
        each["segmentation"] = shape
    before = json.dumps(test.truth)
    for kind in ("bbox", "segm"):
        assert average_precision(test.truth, perfect, kind) == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
        assert average_precision(test.truth, [], kind) == {"AP": 0, "AP50": 0, "AP75": 0}
    assert json.dumps(test.truth) == before  # what it is given stays as it is
