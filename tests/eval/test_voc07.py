"""VOC 2007: whole runs, difficult boxes, refusals."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from torch import nn

import eval.voc07 as module
import flags
from eval.voc07 import read_sets, truths, voc07
from flags import UserError
from tests.eval.scenes import SCANS, voc_folder
from tests.eval.test_svm import GRID
from training.weights import Backbone

# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


class Filters(nn.Module):
    """Correlations with digit scans of four sizes, anywhere in the image: features [N, 200] that know the digits."""

    def __init__(self):
        super().__init__()
        picked = [i for digit in range(10) for i in np.flatnonzero(SCANS.target == digit)[:5]]
        self.scans = torch.tensor(SCANS.images[picked]).float()[:, None]

    def forward(self, images):
        grey, found = images.mean(1, keepdim=True), []
        for size in (7, 10, 12, 15):
            scans = F.interpolate(self.scans, (size, size), mode="bilinear", antialias=True)
            scans = F.normalize((scans - scans.mean((2, 3), keepdim=True)).flatten(1)).view_as(scans)
            mean = F.avg_pool2d(grey, size, 1)
            variance = (F.avg_pool2d(grey**2, size, 1) - mean**2).clamp(min=0.01) * size**2
            found.append((F.conv2d(grey, scans) / variance.sqrt()).amax((2, 3)))
        return torch.cat(found, 1) ** 4


@pytest.fixture
def filters(monkeypatch, place):
    """Every --run is Filters, at 32 pixels; its results go to the current folder."""
    monkeypatch.setattr(module, "COSTS", GRID)
    monkeypatch.setattr(module, "backbone_of", lambda *_, **__: Backbone(Filters(), "filters", 32, Path(), {}))


def results():
    return [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("voc"), dict(train=140, val=60, test=100), ten=True, side=32, most=2)


def test_digits_are_told_apart(filters, digits, capsys):
    """A VOC folder of one or two digits an image: far above what scores by chance give, the part that is positive."""
    metrics = voc07(run="x", data=str(digits), low_shot=True, workers=0)
    _, truth, asked = truths(*read_sets(str(digits)), 3)
    chance = 100 * asked.mean()
    assert chance < 20 and metrics["map"] > 2.5 * chance
    # 200 images allow 16 of a class and 144 others, not 32; more images are better.
    assert [k for k in metrics if k[:4] == "map_" and "std" not in k] == [f"map_{k}" for k in (1, 2, 4, 8, 16)]
    assert chance < metrics["map_1"] < metrics["map_4"] < metrics["map_16"] < metrics["map"]
    (line,) = results()
    assert line["protocol"] == "voc07" and line["dataset"] == str(digits) and line["metrics"] == metrics
    assert line["settings"]["costs"].keys() == metrics["ap"].keys() == {f"digit{i}" for i in range(10)}
    assert np.mean(list(metrics["ap"].values())) == pytest.approx(metrics["map"])
    said = capsys.readouterr().out
    assert "200 images to train on, 100 to evaluate on, 10 classes" in said and f"{metrics['map']:.2f}" in said
    assert "no low-shot with 32 images a class" in said


def test_shuffled_classes_are_chance(filters, digits, monkeypatch):
    """The same features with the trainval images' classes exchanged at random: nothing leaks from the test images."""
    read = module.read_sets

    def exchanged(data):
        train, test = read(data)
        order = np.random.default_rng(0).permutation(len(train.found))
        return train._replace(found=[train.found[i] for i in order]), test

    monkeypatch.setattr(module, "read_sets", exchanged)
    metrics = voc07(run="x", data=str(digits), workers=0)
    _, _, asked = truths(*read_sets(str(digits)), 3)
    assert metrics["map"] < 1.7 * 100 * asked.mean()


def test_a_timm_name_runs_alike_twice_and_with_workers(place, digits, monkeypatch):
    monkeypatch.setattr(module, "COSTS", GRID[1:2])
    first, second = (voc07(run="resnet_tiny", data=str(digits / "VOC2007"), image_size=16, workers=w) for w in (0, 1))
    assert first == second and 5 < first["map"] < 100 and len(results()) == 2
    assert voc07(run="resnet_tiny", data=str(digits), image_size=16, workers=0, seed=1)["map"] != first["map"]


def test_only_the_direction_of_features_counts(place, digits, monkeypatch):
    class Scaled(Filters):
        def forward(self, images):
            return super().forward(images) * (2 + images.mean((1, 2, 3)))[:, None].exp()

    monkeypatch.setattr(module, "COSTS", GRID[1:2])
    found = []
    for network in (Filters(), Scaled()):
        monkeypatch.setattr(module, "backbone_of", lambda *_, n=network, **__: Backbone(n, "x", 32, Path(), {}))
        found.append(voc07(run="x", data=str(digits), workers=0)["map"])
    assert found[0] == pytest.approx(found[1], abs=0.01)


def annotate(root, number, objects):
    tree = ElementTree.Element("annotation")
    for name, difficult in objects:
        item = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(item, "name").text = name
        if difficult is not None:
            ElementTree.SubElement(item, "difficult").text = difficult
        part = ElementTree.SubElement(item, "part")  # VOC marks heads and hands of persons; they are no classes
        ElementTree.SubElement(part, "name").text = "head"
    ElementTree.ElementTree(tree).write(root / "Annotations" / f"{number}.xml")


def test_difficult_boxes(place):
    root = voc_folder(place, dict(trainval=3, test=2), side=24) / "VOC2007"
    annotate(root, "000001", [("dog", "1"), ("dog", "0"), ("cat", "1")])
    annotate(root, "000002", [("cat", "0"), ("dog", "1"), ("dog", "1")])
    annotate(root, "000003", [("cat", None)])
    annotate(root, "000004", [("dog", "0"), ("cat", "1")])
    annotate(root, "000005", [("cat", "0")])
    train, test = read_sets(str(place))
    with pytest.raises(UserError, match="--folds 2: class cat has 2 positive and 0 negative images in trainval"):
        truths(train, test, 2)
    names, truth, asked = truths(train._replace(found=[*train.found, {}]), test, 1)
    assert names == ["cat", "dog"]
    assert truth.tolist() == [[-1, 1], [1, -1], [1, 0], [0, 0]] and asked.tolist() == [[-1, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["classes", "int32", "string"])
def test_a_dataset_gives_what_the_folder_gives(filters, digits, kind):
    """Parquet files with a list of classes an image, as ClassLabel, numbers or names, in two ways to divide them."""
    names = [f"digit{i}" for i in range(10)]
    inner = ClassLabel(names=names) if kind == "classes" else Value(kind)
    column = {"classes": "objects", "int32": "labels", "string": "classes"}[kind]
    for part in read_sets(str(digits)):
        listed = [sorted(found) for found in part.found]
        listed = listed if kind == "string" else [[names.index(name) for name in found] for found in listed]
        records = [{"bytes": Path(part.images.table[i]["image"]["path"]).read_bytes()} for i in range(len(listed))]
        rows = Dataset.from_dict(
            {"number": list(range(len(listed))), "photo": [{**r, "path": None} for r in records], column: listed},
            features=Features({"number": Value("int32"), "photo": datasets.Image(), column: List(inner)}),
        )
        Path("pets/data").mkdir(parents=True, exist_ok=True)
        if part.name == "test":
            rows.to_parquet("pets/data/test-0.parquet")
        elif kind == "string":
            rows.to_parquet("pets/data/trainval-0.parquet")
        else:
            rows.select(range(140)).to_parquet("pets/data/train-0.parquet")
            rows.select(range(140, 200)).to_parquet("pets/data/validation-0.parquet")
    if kind == "string":  # `datasets` knows train, validation and test by a file's name; others are named in a card
        files = [{"split": s, "path": f"data/{s}-*"} for s in ("trainval", "test")]
        head = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
        Path("pets/README.md").write_text(f"---\n{head}\n---\n")
    for folder, dataset in zip(read_sets(str(digits)), read_sets("pets")):
        rows = torch.arange(len(folder.found))
        wanted = (
            folder.found if kind != "int32" else [{k[len("digit") :]: v for k, v in x.items()} for x in folder.found]
        )
        assert dataset.found == wanted
        assert torch.equal(folder.images.whole(rows, 32)[0], dataset.images.whole(rows, 32)[0])
    if kind == "string":
        assert voc07(run="x", data="pets", workers=0) == voc07(run="x", data=str(digits), workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def test_flags_come_first(place):
    for given, said in (
        (dict(), "--data: want a VOCdevkit folder"),
        (dict(data="x", folds=1), "--folds 1: want 2 or more"),
        (dict(data="x", mixed_precision="fp8"), "--mixed_precision fp8: want no, fp16, bf16"),
        (dict(data="x", image_size=4), "--image_size 4: want 8 or more"),
    ):
        with pytest.raises(UserError, match=said):
            voc07(run="nowhere", **given)


@pytest.fixture
def broken(place):
    return voc_folder(place, dict(trainval=40, test=12), side=24, difficult=0.1)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda root: (root / "ImageSets/Main/test.txt").unlink(), "has no image set test .looked for .*Main/test.txt"),
        (lambda root: (root / "ImageSets/Main/test.txt").write_text("\n"), "image set test is empty"),
        (lambda root: (root / "JPEGImages/000003.jpg").unlink(), "image 000003 of trainval is missing .*000003.jpg"),
        (lambda root: (root / "Annotations/000005.xml").unlink(), "annotation .*000005.xml: cannot be read"),
        (lambda root: (root / "Annotations/000005.xml").write_text("<annotation>"), "000005.xml: cannot be read"),
        (
            lambda root: (root / "Annotations/000005.xml").write_text("<annotation><object/></annotation>"),
            "000005.xml: cannot be read",
        ),
    ],
)
def test_a_folder_that_is_not_whole(broken, harm, said):
    harm(broken / "VOC2007")
    with pytest.raises(UserError, match=said):
        voc07(run="resnet_tiny", data=str(broken), workers=0)
    assert not Path("results.jsonl").exists()


def test_a_corrupt_image_is_named_in_one_line_with_code_2(broken, monkeypatch, capsys):
    root = broken / "VOC2007"
    for i in range(1, 53):  # two classes
        annotate(root, f"{i:06d}", [("dog" if i % 2 else "cat", "0")])
    for name, content in (("000007", b"no image"), ("000009", b"")):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(content)
    argv = ["eval.voc07", "--run", "resnet_tiny", "--data", str(broken), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        flags.launch(voc07, "eval.voc07")
    *bars, said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and all(bar.startswith("features: ") for bar in bars if bar)
    file = root / "JPEGImages" / "000007.jpg"
    assert said == (
        f"eval.voc07: --data: image {file} of trainval cannot be read (cannot identify image file), and 1 more"
    )


def test_a_class_without_a_positive_image(broken):
    root = broken / "VOC2007"
    for i in range(1, 53):
        annotate(root, f"{i:06d}", [("dog" if i % 2 else "cat", "0"), *[("cow", "1")] * (i == 4)])
    annotate(root, "000050", [("cow", "0")])
    with pytest.raises(UserError, match="class cow has no positive image in trainval"):
        voc07(run="resnet_tiny", data=str(broken), workers=0)
    annotate(root, "000004", [("cow", "0")])
    annotate(root, "000050", [("cat", "0")])
    with pytest.raises(UserError, match="class cow has no positive image in test"):
        voc07(run="resnet_tiny", data=str(broken), workers=0)
    annotate(root, "000050", [("cow", "0")])
    with pytest.raises(UserError, match="--folds 3: class cow has 1 positive and 39 negative images in trainval"):
        voc07(run="resnet_tiny", data=str(broken), workers=0)


def test_places_without_a_voc(place):
    Path("empty").mkdir()
    with pytest.raises(UserError, match="holds no VOC 2007 .looked for empty/ImageSets/Main, empty/VOC2007/ImageSets"):
        voc07(run="resnet_tiny", data="empty")
    with pytest.raises(UserError, match="--data /nowhere/VOCdevkit: no such folder"):
        voc07(run="resnet_tiny", data="/nowhere/VOCdevkit")
    with pytest.raises(UserError, match="--data some/where .no folder here, so of the Hub.: cannot be read"):
        voc07(run="resnet_tiny", data="some/where")
    rows = Dataset.from_dict({"label": [0, 1]})
    rows.to_parquet("empty/train-0.parquet")
    with pytest.raises(UserError, match="has splits train; want trainval, or train and validation, and test"):
        voc07(run="resnet_tiny", data="empty")
    rows.to_parquet("empty/test-0.parquet")
    with pytest.raises(UserError, match=r"want a column of images, .*train has label \(Value\)"):
        voc07(run="resnet_tiny", data="empty")


def test_a_run_that_is_not_finished(place, digits):
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"backbone": "resnet_tiny", "image_size": 16}))
    with pytest.raises(UserError, match="--run run: is not finished"):
        voc07(run="run", data=str(digits))


def listed_dataset(place, image="image", **columns):
    """A folder of parquet files with train and test, eight images each, and these columns."""
    kinds = {k: List(Value("string" if isinstance(v[0][0], str) else "int64")) for k, v in columns.items()}
    pixels = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(8)]
    made = Dataset.from_dict({image: pixels, **columns}, features=Features({image: datasets.Image(), **kinds}))
    (place / "set").mkdir()
    for split in ("train", "test"):
        made.to_parquet(place / "set" / f"{split}.parquet")
    return str(place / "set")


def test_the_commonest_name_of_an_image_column(place):
    data = listed_dataset(place, classes=[["dog"], ["cat", "dog"]] * 4)
    train, test = read_sets(data)
    assert [set(found) for found in train.found] == [{"dog"}, {"cat", "dog"}] * 4 and (
        train.images.whole(torch.arange(8), 8)[1] == 0
    ).all()


@pytest.mark.parametrize(
    "lists, said",
    [
        ([[0, 1], [1, 0]] * 4, "column labels of train has 2 numbers of 0 and 1 for every image, as multi-hot vectors"),
        ([[0, 0, 1], [1, 1, 1]] * 4, "column labels of train has 3 numbers of 0 and 1 for every image"),
        ([[3, -1], [2]] * 4, "row 0 of train lists the class -1; want 0 or more"),
        ([["dog", " "], ["cat"]] * 4, "row 0 of train lists a class without a name"),
    ],
)
def test_lists_that_name_no_classes_are_refused(place, lists, said):
    with pytest.raises(UserError) as caught:
        read_sets(listed_dataset(place, labels=lists))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_two_classes_that_are_numbered_0_and_1_are_no_vectors(place):
    train, _ = read_sets(listed_dataset(place, labels=[[0], [0, 1]] * 4))
    assert [set(found) for found in train.found] == [{"0"}, {"0", "1"}] * 4


def test_difficult_and_crowds_of_a_dataset(place):
    data = listed_dataset(place, classes=[["dog", "cat"], ["cat", "cat"]] * 4, difficult=[[0, 1], [1, 0]] * 4)
    train, _ = read_sets(data)
    assert train.found == [{"dog": False, "cat": True}, {"cat": False}] * 4


def test_a_class_that_is_only_difficult_has_no_precision(broken, capsys):
    """As in VOC's own evaluation, which has no positive to find then; the others keep theirs."""
    root = broken / "VOC2007"
    for i in range(1, 53):
        annotate(root, f"{i:06d}", [("dog" if i % 2 else "cat", "0")])
    alone = voc07(run="resnet_tiny", data=str(broken), workers=0)
    for i in range(1, 53):
        cow = [("cow", "0" if i < 9 else "true")] * (i < 12 or i > 45)
        annotate(root, f"{i:06d}", [("dog" if i % 2 else "cat", "0"), *cow])
    found = voc07(run="resnet_tiny", data=str(broken), workers=0)
    assert (
        found["ap"] == alone["ap"]
        and "note: class cow is only difficult in test, and is left out" in capsys.readouterr().out
    )
