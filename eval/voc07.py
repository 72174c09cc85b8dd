"""PASCAL VOC 2007 classification: a linear SVM for each class, on frozen features (Goyal et al., ICCV 2019).

python -m eval.voc07 --run runs/moco --data VOCdevkit
python -m eval.voc07 --run runs/moco --data VOCdevkit --low_shot

What the paper leaves open is as in its code (fair_self_supervision_benchmark, tools/svm), except that an image whose
boxes of a class are all difficult, which VOC ignores, is left out of that class's training too: there it is a negative.
"""

from eval.settings import VOC07
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(VOC07, "eval.voc07")

import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value, concatenate_datasets
from joblib import Parallel, delayed
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from eval.command import backbone_of, finish, start
from eval.features import features
from eval.hub_boxes import is_mark
from eval.results import check_writable
from eval.voc import is_marked, read_annotation
from flags import Given, UserError, command, reading
from loading import sources
from loading.batches import generator
from loading.images import LargeImages, decode
from loading.reading import range_of

COSTS = sorted([2.0**i for i in range(-19, -3)] + [10.0**i for i in range(-7, 3)])  # 26, as in the benchmark's code
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
DRAWS = 5
LISTS = ("objects", "labels", "classes")  # columns that may list the classes of an image

# ---------------------------------------------------------------------------------------------------------------------
# The images and their classes.


class ImageSet(NamedTuple):
    images: LargeImages
    found: list[dict]  # of each image the classes in it, and of each whether all its boxes are difficult
    name: str


def read_sets(data: str) -> tuple[ImageSet, ImageSet]:
    """The images to train on (trainval) and to evaluate on (test): of a VOCdevkit folder, else of a dataset."""
    place = Path(data).expanduser()
    tried = [place, place / "VOC2007", place / "VOCdevkit" / "VOC2007"]
    root = next((folder for folder in tried if (folder / "ImageSets" / "Main").is_dir()), None)
    if root:
        return tuple(_read_voc(root, name) for name in ("trainval", "test"))
    if place.is_dir() and not any(place.rglob("*.parquet")):
        looked = ", ".join(str(folder / "ImageSets" / "Main") for folder in tried)
        raise UserError(f"--data {data}: holds no VOC 2007 (looked for {looked}) and no .parquet files")
    if not place.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data):
        raise UserError(f"--data {data}: no such folder; want a VOCdevkit folder, or a Hub dataset OWNER/NAME")
    return _read_dataset(data, "" if place.is_dir() else " (no folder here, so of the Hub)")


def _image_set(rows, found, name):
    """`rows` with a column "image"; `features` asks for a label, and answers -1 for an image that cannot be read."""
    return ImageSet(LargeImages(rows.add_column("label", [0] * len(rows)), name, skip_bad=True), found, name)


def _read_voc(root, name):
    listing = root / "ImageSets" / "Main" / f"{name}.txt"
    try:
        numbers = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--data {root}: has no image set {name} (looked for {listing}: {error})") from None
    if not numbers:
        raise UserError(f"--data {root}: image set {name} is empty ({listing})")
    files = [root / "JPEGImages" / f"{number}.jpg" for number in numbers]
    for file in files:
        if not file.is_file():
            raise UserError(f"--data {root}: image {file.stem} of {name} is missing (looked for {file})")
    read = [read_annotation(root / "Annotations" / f"{number}.xml", root, boxes=False) for number in numbers]
    found = [_classes((thing.name, thing.difficult) for thing in annotation.things) for annotation in read]
    records = [{"bytes": None, "path": str(file)} for file in files]
    rows = Dataset.from_dict({"image": records}, features=Features(image=datasets.Image(decode=False)))
    return _image_set(rows, found, name)


def _classes(things) -> dict[str, bool]:
    """{class: whether all its objects are difficult} of (name, difficult)."""
    found: dict[str, bool] = {}
    for name, difficult in things:
        found[name] = found.get(name, True) and difficult
    return found


def _read_dataset(data, said):
    """A dataset's splits trainval, or train and validation, and test, with lists of classes; none is difficult."""
    with reading(f"--data {data}{said}"):
        splits = sources.splits_of(data)
    learn = [name for name in ("trainval",) if name in splits] or [x for x in ("train", "validation") if x in splits]
    if not learn or "test" not in splits:
        raise UserError(
            f"--data {data}: has splits {', '.join(splits)}; want trainval, or train and validation, and test"
        )
    rows = concatenate_datasets([splits[name] for name in learn])
    return tuple(_listed(rows, data, name) for rows, name in ((rows, "+".join(learn)), (splits["test"], "test")))


def _listed(rows, data, name):
    image = next((k for k, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    classes = next((k for k in LISTS if _inner(rows.features.get(k)) is not None), None)
    if image is None or classes is None:
        has = ", ".join(f"{k} ({type(kind).__name__})" for k, kind in rows.features.items())
        raise UserError(
            f"--data {data}: want a column of images, and a column objects, labels or classes with a list of classes "
            f"(numbers or names) for each; {name} has {has}"
        )
    lists = [listed or [] for listed in rows[classes]]
    inner = _inner(rows.features[classes])
    _refuse_vectors(lists, f"--data {data}: column {classes} of {name}")
    marks = [k for k in rows.column_names if is_mark(k)]
    found, columns = [], [rows[k] for k in marks]
    for row, listed in enumerate(lists):
        where, difficult = f"--data {data}: row {row} of {name}", [False] * len(listed)
        for key, column in zip(marks, columns):
            marked = column[row] if column[row] is not None else [0] * len(listed)
            if not isinstance(marked, list) or len(marked) != len(listed):
                raise UserError(f"{where} has {len(listed)} classes, and {key} has no mark for each of them")
            try:
                difficult = [one or is_marked(mark) for one, mark in zip(difficult, marked)]
            except ValueError as error:
                raise UserError(f"{where}: {key} {error}") from None
        names = [_named(value, inner, where) for value in listed]
        found.append(_classes(zip(names, difficult)))
    rows = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    return _image_set(rows if image == "image" else rows.rename_column(image, "image"), found, name)


def _named(value, inner, where) -> str:
    """The name of a class in a list."""
    if isinstance(value, int) and (value < 0 or isinstance(inner, ClassLabel) and value >= inner.num_classes):
        wanted = f"0 to {inner.num_classes - 1}" if isinstance(inner, ClassLabel) else "0 or more"
        raise UserError(f"{where} lists the class {value}; want {wanted}")
    name = "" if value is None else inner.int2str(value) if isinstance(inner, ClassLabel) else str(value).strip()
    if not name:
        raise UserError(f"{where} lists a class without a name")
    return name


def _refuse_vectors(lists, where):
    """Raise UserError for multi-hot vectors: as many numbers for every image, all of them 0 or 1."""
    lists = [listed for listed in lists if listed]
    lengths, values = {len(listed) for listed in lists}, {str(value).strip() for listed in lists for value in listed}
    if len(lists) > 1 and len(lengths) == 1 and min(lengths) > 1 and values <= {"0", "1"}:
        raise UserError(
            f"{where} has {min(lengths)} numbers of 0 and 1 for every image, as multi-hot vectors have; "
            "want a list of the classes that are in the image"
        )


def _inner(kind):
    """What a list of classes is a list of; None of any other column."""
    inner = kind.feature if isinstance(kind, (List, LargeList)) else None
    fits = isinstance(inner, ClassLabel) or isinstance(inner, Value) and re.search("int|string", inner.dtype)
    return inner if fits else None


def only_difficult(part: ImageSet) -> list[str]:
    """The classes of which `part` has difficult objects alone."""
    seen = [item for found in part.found for item in found.items()]
    return sorted({name for name, difficult in seen} - {name for name, difficult in seen if not difficult})


def truths(train: ImageSet, test: ImageSet, folds: int):
    """(names of the C classes, truth of `train` [N, C], truth of `test` [M, C]).

    Truth is 1 where the image has the class, 0 where it has not, -1 where all its boxes of the class are difficult.
    A class whose objects in `test` are all difficult is left out, as VOC's own evaluation has no precision for it.
    Raises UserError for a class without a positive image, or with fewer to train on, of either sort, than `folds`.
    """
    every = [item for part in (train, test) for found in part.found for item in found.items()]
    names = sorted({name for name, difficult in every if not difficult} - {*only_difficult(test)})
    made = []
    for part in (train, test):
        value = [[{None: 0, False: 1, True: -1}[found.get(name)] for name in names] for found in part.found]
        made.append(np.array(value, dtype=np.int8).reshape(len(part.found), len(names)))
        for name, column in zip(names, made[-1].T):
            if not (column == 1).any():
                raise UserError(f"--data: class {name} has no positive image in {part.name}")
    for name, column in zip(names, made[0].T):
        positive, negative = int((column == 1).sum()), int((column == 0).sum())
        if min(positive, negative) < folds:
            raise UserError(
                f"--folds {folds}: class {name} has {positive} positive and {negative} negative images in "
                f"{train.name}; want one of each in every fold"
            )
    if len(names) < 2:
        raise UserError(f"--data: {len(names)} classes in {train.name} and {test.name}; want 2 or more")
    return names, *made


def unit_features(accelerator, loaded, part: ImageSet, workers: int):
    """Features [N, D] float64 of length 1. Raises UserError with the name of an image that cannot be read."""
    rows = torch.arange(len(part.images))
    normal, say = (loaded.mean, loaded.std), accelerator.print
    options = dict(image_size=loaded.image_size, normal=normal, workers=workers, say=say)
    found, good = features(accelerator, loaded.network, (part.images, rows), **options)
    bad = (good < 0).nonzero().flatten().tolist()
    if bad:
        record, reason = part.images.table[bad[0]]["image"], ValueError("this time it could")
        try:
            decode(record)
        except ValueError as error:
            reason = error
        name = record["path"] or f"in row {bad[0]}"
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"--data: image {name} of {part.name} cannot be read ({reason}){more}")
    return F.normalize(found.cpu().double(), dim=1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The protocol.


def average_precisions(truth, scores):
    """AP [C], from 0 to 1, of scores [N, C] for truth [N, C]; where that is -1 the image does not count.

    The area under the precision-recall curve with precision made falling, as in VOC from 2010 on and in the
    benchmark's code: sum over i of (r_i - r_(i-1)) max{precision at recall >= r_i}. Not VOC 2007's mean over 11
    recalls, nor scikit-learn's average_precision, whose precision is not made falling. Images with equal scores count
    together.
    """
    found = []
    for true, score in zip(truth.T, scores.T):
        precision, recall, _ = precision_recall_curve(true[true >= 0], score[true >= 0])  # recall falls from 1 to 0
        found.append(float((np.maximum.accumulate(precision)[:-1] * -np.diff(recall)).sum()))
    return np.array(found)


def svm(cost: float) -> LinearSVC:
    """The benchmark's SVM for labels 1 and -1: squared hinge, L2 penalty on the bias too, tolerance 1e-4.

    It solves the dual; the primal has the same minimum, and its solver needs no random numbers: threads cannot
    disturb each other's.
    """
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, dual=False, max_iter=2000)


def choose_cost(x, y, folds: int) -> float:
    """The cost whose mean average precision (scikit-learn's, as in the benchmark) over stratified folds is highest."""
    return max(COSTS, key=lambda c: cross_val_score(svm(c), x, y, cv=folds, scoring="average_precision").mean())


def _sides(truth):
    """Of a column of truths: the rows that count, and 1 or -1 for each of them."""
    rows = np.flatnonzero(truth >= 0)
    return rows, np.where(truth[rows] == 1, 1, -1)


def full(train, truth, test, folds: int):
    """(scores [M, C] of `test`, cost of each class): an SVM on all of `train`, its cost by cross-validation."""

    def one(column):
        rows, sides = _sides(column)
        cost = choose_cost(train[rows], sides, folds)
        return svm(cost).fit(train[rows], sides).decision_function(test), cost

    scores, costs = zip(*Parallel(n_jobs=-1, prefer="threads")(delayed(one)(column) for column in truth.T))
    return np.stack(scores, 1), list(costs)


def draw(truth, shots: int, seed: int, number: int):
    """`truth` [N, C] with, of each class, `shots` positive and (C - 1) x `shots` negative images; the rest is -1."""
    drawn = np.full_like(truth, -1)
    for c, column in enumerate(truth.T):
        for value, count in ((1, shots), (0, (truth.shape[1] - 1) * shots)):
            rows = np.flatnonzero(column == value)
            order = torch.randperm(len(rows), generator=generator(seed, number, shots, c, value)).numpy()
            drawn[rows[order[:count]], c] = value
    return drawn


def low_shot(train, truth, test, asked, shots: int, seed: int) -> dict:
    """mAP in per cent of SVMs on `shots` positives a class: the mean of five draws, and their standard deviation.

    The cost, one for all classes and draws, is the one whose mean mAP on `test` is highest. The paper does not say how
    it is chosen; its code does this, so this is a choice on the test images, and numbers in the literature have it.
    """

    def one(drawn, c):
        rows, sides = _sides(drawn[:, c])
        scores = np.stack([svm(cost).fit(train[rows], sides).decision_function(test) for cost in COSTS], 1)
        return average_precisions(np.repeat(asked[:, c : c + 1], len(COSTS), 1), scores)

    draws = [draw(truth, shots, seed, number) for number in range(DRAWS)]
    jobs = (delayed(one)(drawn, c) for drawn in draws for c in range(truth.shape[1]))
    found = np.reshape(Parallel(n_jobs=-1, prefer="threads")(jobs), (DRAWS, -1, len(COSTS))).mean(1)  # [draws, costs]
    best = found[:, found.mean(0).argmax()] * 100
    return {f"map_{shots}": float(best.mean()), f"map_{shots}_std": float(best.std())}


@command(VOC07)
def voc07(s: VOC07, given: Given) -> dict:
    accelerator, workers = start(s)
    loaded = backbone_of(s, accelerator.print)
    check_writable(loaded.folder)
    train, test = read_sets(s.data)
    names, truth, asked = truths(train, test, s.folds)
    pair, lines = range_of({part.name: part.images.table for part in (train, test)}, loaded.config)
    for part in (train, test):
        part.images.pixel_range = pair
    for line in lines:
        accelerator.print(line)
    for name in only_difficult(test):
        accelerator.print(f"note: class {name} is only difficult in {test.name}, and is left out")
    loaded.network.to(accelerator.device, memory_format=torch.channels_last).eval()
    accelerator.print(
        f"voc07 of {s.run} ({loaded.name}, {loaded.image_size} pixels) on {s.data}: {len(truth)} images to train on, "
        f"{len(asked)} to evaluate on, {len(names)} classes"
    )
    metrics, costs = {}, {}
    known, queries = (unit_features(accelerator, loaded, part, workers) for part in (train, test))
    if accelerator.is_main_process:
        metrics, costs = _judge(accelerator.print, known, truth, queries, asked, names, s)
    resolved = {**asdict(s), "dataset": s.data, "workers": workers, "costs": costs}
    resolved |= {"backbone": loaded.name, "image_size": loaded.image_size, "pixel_range": pair}
    finish(accelerator, loaded.folder, "voc07", resolved, metrics)
    return metrics


def _judge(say, train, truth, test, asked, names, s):
    """(metrics, {class: cost})."""
    scores, costs = full(train, truth, test, s.folds)
    each = average_precisions(asked, scores) * 100
    metrics = {"map": float(each.mean()), "ap": dict(zip(names, each.tolist()))}
    fewest = min((truth == 1).sum(0).min(), (truth == 0).sum(0).min() // (len(names) - 1))
    for shots in SHOTS if s.low_shot else ():
        if shots > fewest:
            say(f"no low-shot with {shots} images a class: some class allows {fewest} at most")
            break
        metrics |= low_shot(train, truth, test, asked, shots, s.seed)
    return metrics, dict(zip(names, costs))


if __name__ == "__main__":
    launch(voc07, "eval.voc07")
