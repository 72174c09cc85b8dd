"""Which columns hold the images and the classes, and classes as numbers."""

import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value

from flags import UserError
from loading.files import counted

NAMES = ("label", "class", "labels", "cls")  # a column of one of these names holds classes, whatever its type
WORDS = ("string", "large_string", "string_view")


def features_of(rows):
    """The features of a dataset, or of a stream, which may know them only from its first row."""
    return rows.features or Dataset.from_list(list(rows.take(1))).features


def _kind(features, name: str) -> str:
    return getattr(features[name], "dtype", "") or type(features[name]).__name__


def chosen(rows, spec: str, image: str | None, label: str | None, optional: bool = False):
    """`rows` with only the columns "image", undecoded, and "label", which may be missing where `optional`.

    Nothing is copied, neither to disk nor in memory. Raises UserError where a column is missing or ambiguous.
    """
    features = features_of(rows)
    has = ", ".join(f"{name} ({_kind(features, name)})" for name in features)
    if optional and label not in (None, "none") and label not in features:
        label = "none"
    for flag, name in (("image_column", image), ("label_column", label)):
        if name not in (None, "none") and name not in features:
            raise UserError(f"--{flag} {name}: no such column in {spec}; it has {has}")
    image = _image_column(features, spec, image, has)
    label = _label_column(features, spec, label, image)
    if isinstance(rows, Dataset) or isinstance(features[image], datasets.Image):  # first: a stream would decode it
        rows = rows.cast_column(image, datasets.Image(decode=False))
    rows = rows.select_columns([image] + [label] * (label != "none"))
    rows = rows.rename_columns({k: v for k, v in ((image, "image"), (label, "label")) if k not in (v, "none")})
    if isinstance(rows, Dataset):
        return rows
    kept = {"image": datasets.Image(decode=False)}
    if label != "none":
        kept["label"] = features[label] if rows.features or _kind(features, label) in WORDS else Value("int64")
    return rows.cast(Features(kept))


def _image_column(features, spec, image, has):
    def is_image(name):
        found = features[name]
        return isinstance(found, datasets.Image) or (isinstance(found, dict) and set(found) == {"bytes", "path"})

    if image is None:
        found = [name for name in features if is_image(name)]
        if not found:
            plain = [name for name in features if _kind(features, name) in ("binary", "large_binary")]
            offered = f"; if {plain[0]} holds image files: --image_column {plain[0]}" if plain else ""
            raise UserError(f"--dataset {spec}: no column holds images; it has {has}{offered}")
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: images in columns {', '.join(found)}; choose: --image_column {found[0]}"
            )
        return found[0]
    if not is_image(image) and _kind(features, image) not in ("binary", "large_binary"):
        raise UserError(f"--image_column {image}: {_kind(features, image)} is no image column")
    return image


def could_be_labels(rows, image: str | None, label: str | None) -> list[str]:
    """A note where no column of `rows` is taken for the labels, and some could be; else none."""
    if label is not None:
        return []
    features = features_of(rows)
    holds = [name for name in _hold_classes(features)[0] if name != image]
    if not holds or _label_column(features, "", None, image) != "none":
        return []
    listed = ", ".join(f"{name} ({_kind(features, name)})" for name in holds[:4]) + ", ..." * (len(holds) > 4)
    return [f"no labels are used; {listed} could be: --label_column {holds[0]}"]


def _hold_classes(features) -> tuple[list[str], list[str]]:
    """The columns that can hold classes, and those of them that hold integers."""
    numbers = [name for name in features if re.fullmatch(r"u?int\d+", _kind(features, name))]
    return [name for name in features if name in numbers or _kind(features, name) in (*WORDS, "bool")], numbers


def _label_column(features, spec, label, image):
    holds, numbers = _hold_classes(features)
    if label is None:
        found = [name for name in features if isinstance(features[name], ClassLabel)]
        found = found or [name for word in NAMES for name in holds if name.casefold() == word and name != image][:1]
        found = found or (numbers if len(numbers) == 1 else [])
        if len(found) > 1:
            raise UserError(
                f"--dataset {spec}: classes in columns {', '.join(found)}; choose: --label_column {found[0]}, or none"
            )
        return found[0] if found else "none"
    if label != "none" and label not in holds:
        raise UserError(f"--label_column {label}: {_kind(features, label)} holds no classes; want integers or names")
    return label


# ---------------------------------------------------------------------------------------------------------------------
# Classes as numbers.


def numbered(parts: dict[str, Dataset | None]) -> tuple[dict, list[str]]:
    """The same splits with labels that are integers, and notes on labels that are missing.

    Names become numbers by the sorted list of all names in all parts, in a ClassLabel; other labels stay. -1 and null
    mean "no label". Raises UserError for other negative labels.
    """
    columns, labelled, notes = {}, {}, []
    for split, rows in parts.items():
        if rows is None or "label" not in rows.column_names or len(rows) == 0:
            continue
        column = rows.select_columns("label").with_format("arrow")[:]["label"]
        columns[split] = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        labelled[split] = rows
    words = {split: column for split, column in columns.items() if not pa.types.is_integer(column.type)}
    words = {split: column for split, column in words.items() if not pa.types.is_null(column.type)}
    found = {word for column in words.values() for word in pc.unique(column).to_pylist()} - {None}
    names = [str(name) for name in sorted(found)]
    made = dict(parts)
    for split, column in columns.items():
        if split in words:
            column = pc.index_in(column, pa.array(sorted(found), column.type))
        numbers = np.asarray(pc.fill_null(column.cast(pa.int64()), -1))
        low = int(numbers.min())
        if low < -1:
            where = counted(int((numbers == low).sum()), "row")
            raise UserError(
                f"split {split}: label {low} in {where}; -1 means no label, and no other "
                "negative number is a class. Choose another column with --label_column, or none"
            )
        if split in words:
            feature = ClassLabel(names=names) if names else Value("int64")
            made[split] = labelled[split].remove_columns("label").add_column("label", numbers, feature=feature)
        missing = int((numbers == -1).sum())
        if missing:
            notes.append(
                f"split {split}: {missing:,} of {counted(len(numbers), 'image')} without a label (-1 or null); no "
                "evaluation uses them"
            )
    return made, notes


# ---------------------------------------------------------------------------------------------------------------------
# Classes that cannot be evaluated.


def refuse_other_classes(parts: dict, split: str, eval_split: str | None) -> None:
    """Raise UserError where two splits with labels name their classes differently: their numbers cannot be compared."""
    found = {name: features_of(rows) for name, rows in parts.items()}
    if eval_split not in found or not all("label" in features for features in found.values()):
        return
    known, asked = (getattr(found[name]["label"], "names", None) for name in (split, eval_split))
    if known != asked:
        raise UserError(
            f"--eval_split {eval_split}: has other classes than {split} ({_listed(asked)}, not {_listed(known)}); name "
            "another split, or leave the evaluation out with --label_column none"
        )


def _listed(names):
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4) if names else "numbers"


def refuse_unlike(dataset, train, test):
    """Raise UserError where the classes of `test` cannot be learnt; each is (images, numbers, names, rows)."""
    known, asked = (set(part[1][part[3]].tolist()) - {-1} for part in (train, test))
    if len(known) < 2 or not asked:
        raise UserError(
            f"--dataset {dataset}: {len(known)} classes to train on, {len(asked)} to evaluate on; want 2 or more"
        )
    if train[2] != test[2]:
        unlike = [pair for pair in zip(train[2] or [], test[2] or []) if pair[0] != pair[1]]
        said = f"class {unlike[0][0]!r} there is {unlike[0][1]!r} here" if unlike else "other classes"
        raise UserError(
            f"--dataset {dataset}: the split to evaluate has {said}; want the classes of the split to train"
        )
    if asked - known:
        first = sorted(asked - known)[0]
        name = train[2][first] if train[2] else first
        raise UserError(f"--dataset {dataset}: class {name} is only in the split to evaluate, which cannot be learnt")


def unfit(labels, bank, asked) -> str | None:
    """Why labels [N] cannot be evaluated by k-NN, or None. bank, asked: those of images that are learnt and asked."""
    known = labels[labels >= 0]
    if len(labels) == 0 or len(known) == 0:
        return "no labels"
    if len(labels) < 20:
        return f"{len(labels)} images are too few to hold some out"
    classes = len(known.unique())
    if classes < 2 or classes > len(known) / 2:
        return f"{classes} classes among {len(known)} labels"
    if len(asked) == 0:
        return "no image was held out"
    for images, own in (("other", bank), ("held-out", asked)):
        if not (own >= 0).any():
            return f"none of the {images} images has one of the {len(known)} labels"
    return None
