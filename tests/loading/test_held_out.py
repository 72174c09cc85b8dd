"""Images that are held out of training: which they are, and what is said where they cannot be asked."""

import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import data
from flags import UserError
from tests.test_data import folder, picture, table


@pytest.mark.parametrize(
    "labels, note",
    [
        ([-1] * 40, "no labels"),
        ([None] * 40, "no labels"),
        ([3] * 40, "1 classes among 40 labels"),
        (list(range(10**11, 10**11 + 40)), "40 classes among 40 labels"),
        ([0, 1] * 4, "8 images are too few to hold some out"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_k_nn_cannot_use(place, labels, note, streaming):
    kinds = Features(img=datasets.Image(), label=Value("int64"))
    rows = Dataset.from_dict({"img": [picture(i) for i in range(len(labels))], "label": labels}, kinds)
    rows.to_parquet(place / "rows.parquet")
    source = data.open_source("rows.parquet", streaming=streaming)
    assert source.queries is None and source.bank is None
    assert source.note == note or (streaming and source.note)
    assert streaming or source.images == len(labels)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", ["missing", "unknown"])
def test_a_test_split_without_labels_is_not_asked(place, labels, streaming):
    (place / "rows").mkdir()
    table(60).to_parquet(place / "rows" / "train.parquet")
    test = table(8).cast_column("label", Value("int64")).map(lambda row: {"label": -1})
    test = (
        test.remove_columns("label") if labels == "missing" else test.cast_column("label", table(1).features["label"])
    )
    test.to_parquet(place / "rows" / "test.parquet")
    try:
        source = data.open_source("rows", streaming=streaming)
    except UserError as error:  # `datasets` itself wants the same columns in every split of a folder
        assert labels == "missing" and "cannot be read" in str(error)
        return
    table_of, rows = source.queries
    assert 0 < len(rows) <= 15 and (table_of.labels(rows) >= 0).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_no_image_is_trained_on_and_evaluated(place, streaming):
    for split, n in (("train", 60), ("val", 40)):
        shutil.move(folder(place, n), place / "rows" / split)
    for split, eval_split in (("train", "train"), ("train", "training"), ("val", "dev"), ("validation", "val")):
        with pytest.raises(UserError, match=f"--eval_split {eval_split}: has images of --split {split}; want others"):
            data.open_source("rows", split=split, eval_split=eval_split, streaming=streaming)
    for name in ("val", "validation", "dev"):  # are one split, which does not evaluate itself
        source = data.open_source("rows", split=name, streaming=streaming)
        many = "a tenth of the images" if streaming else "4 images"
        assert f"note: held out for evaluation, and not trained on: {many} of split validation" in source.found
        if not streaming:
            (images, held_out), trained_on = source.queries, source.rows
            assert images is source.train and len(held_out) == 4 and len(trained_on) == 36
            assert not {*held_out.tolist()} & {*trained_on.tolist()}
        assert source.found[0].startswith("found 40 images") and "split validation (train has 60)" in source.found[0]


def test_evaluations_keep_what_they_train_on_and_ask_apart(place):
    for split, n in (("train", 60), ("val", 40)):
        shutil.move(folder(place, n), place / "rows" / split)
    train, test = data.open_labelled("rows", split="val")
    assert train.images is test.images and len(train.rows) == 36 and len(test.rows) == 4
    assert not {*train.rows.tolist()} & {*test.rows.tolist()}
    table(60).to_parquet(place / "rows.parquet")
    with pytest.raises(UserError, match=r"--eval_split train\[40:\]: has images of --split train\[:41\]; want others"):
        data.open_labelled("rows.parquet", split="train[:41]", eval_split="train[40:]")
    train, test = data.open_labelled("rows.parquet", split="train[:40]", eval_split="train[40:]")
    assert len(train.rows) == 40 and len(test.rows) == 20


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_held_out_images_are_said_where_some_are(place, streaming, labelled):
    rows = table(40) if labelled else table(40).remove_columns("label")
    rows.to_parquet(place / "rows.parquet")
    said = {"hold_out": [], "all": [], "test": []}
    for name, hold_out in (("hold_out", True), ("all", False)):
        source = data.open_source("rows.parquet", streaming=streaming, hold_out=hold_out)
        said[name] = [line for line in source.found if "held out" in line]
    (place / "two").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(place / "two" / f"{split}.parquet")
    source = data.open_source("two", streaming=streaming, hold_out=True)
    said["test"] = [line for line in source.found if "held out" in line]
    many = "a tenth of the images" if streaming else "4 images"
    line = [f"note: held out for evaluation, and not trained on: {many} of split train"]
    assert said == {"hold_out": line, "all": line if labelled else [], "test": []}


def test_few_labels_that_are_not_among_the_held_out_images_are_said(place):
    kinds = Features(img=datasets.Image(), label=Value("int64"))
    labels = [i % 2 if i < 8 else -1 for i in range(400)]
    rows = Dataset.from_dict({"img": [picture(i) for i in range(400)], "label": labels}, kinds)
    rows.to_parquet(place / "rows.parquet")
    notes = []
    for seed in range(8):
        source = data.open_source("rows.parquet", seed=seed, hold_out=True)
        notes.append(source.note)
        if source.note:
            assert source.queries is None and len(source.held_out[1]) == 40
        else:
            images, asked = source.queries
            known = int((images.labels(asked) >= 0).sum())
            thing = "held-out image" + "s" * (known > 1)
            assert f"note: accuracy is that of {known} {thing} with a label, so it is rough" in source.found
    assert {*notes} == {None, "none of the held-out images has one of the 8 labels"}


def test_a_stream_does_not_compare_other_classes(place):
    rows = table(40)
    (place / "d").mkdir()
    rows.to_parquet("d/train.parquet")
    rows.cast_column("label", ClassLabel(names=["dog", "cat"])).to_parquet("d/test.parquet")
    with pytest.raises(UserError, match="--eval_split test: has other classes than train"):
        data.open_source("d", streaming=True)
    assert data.open_source("d", streaming=True, label_column="none").note == "no labels"
