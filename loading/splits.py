"""Which rows of a dataset a split's name takes, and which split is evaluated on."""

import re

from datasets import Dataset

from flags import UserError
from loading import columns
from loading.folders import SPLIT_OF


def base(split: str) -> str:
    """The name of a split without its part: train of train[:5000]."""
    return split.partition("[")[0]


def both(splits: dict, split: str, eval_split: str | None, spec: str) -> tuple[str, str | None]:
    """The names of the split to train on and of that to evaluate on, as the dataset has them: validation for val.

    eval_split: None takes a split called validation or test, if there is one. Raises UserError where a name is unknown,
    and where the two have rows in common.
    """
    own, rows = _found(splits, split, spec)
    if eval_split is None:
        return own, next((s for s in ("validation", "valid", "val", "test") if s in splits and s != base(own)), None)
    name, others = _found(splits, eval_split, spec)
    if base(name) == base(own) and max(rows.start, others.start) < min(rows.stop, others.stop):
        raise UserError(
            f"--eval_split {eval_split}: has images of --split {split}; want others, as --split 'train[:5000]' "
            "--eval_split 'train[5000:]', or leave it out"
        )
    return own, name


def _found(splits, wanted, spec):
    """(The dataset's name of the split with the part that is asked for, its rows; one row stands for a stream)."""
    match = re.fullmatch(r"([\w.-]+)(\[(\d*):(\d*)\])?", wanted)
    name = match and next((x for x in (match[1], SPLIT_OF.get(match[1])) if x in splits), None)
    if name is None:
        raise UserError(f"split {wanted!r}: {spec} has {', '.join(splits)}; write one, or a part, as in train[:5000]")
    if isinstance(splits[name], Dataset):
        start, stop = (int(number) if number else None for number in match.group(3, 4))
        return name + (match[2] if match[3] or match[4] else ""), range(len(splits[name]))[start:stop]
    if match[3] or match[4]:
        raise UserError(f"split {wanted!r}: a part of a stream depends on who reads it; want a whole split")
    return name, range(1)


def taken(opened, wanted, spec, **names):
    """(rows of the split `wanted`, (all rows of that split, the first of these)); `names` are those of the columns.

    wanted: a name, or a name and a range of rows, as in train[:5000].
    """
    wanted, rows = _found(opened.splits, wanted, spec)
    of = opened.splits[base(wanted)]
    if isinstance(of, Dataset) and not rows:
        why = f"it has {len(of):,} in all" if len(of) else "; ".join(opened.notes)
        raise UserError(f"split {wanted!r} of {spec} has no rows{f' ({why})' if why else ''}")
    whole = columns.chosen(of, f"{spec}, {wanted}", **names)
    return whole.select(rows) if "[" in wanted and isinstance(of, Dataset) else whole, (whole, rows.start)
