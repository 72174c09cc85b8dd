"""Which rows of a dataset a split's name takes, and which split is evaluated on."""

import re

from datasets import Dataset

from flags import UserError
from loading import columns
from loading.folders import SPLIT_OF


def taken(opened, wanted, spec, **names):
    """(rows of the split `wanted`, (all rows of that split, the first of these)); `names` are those of the columns.

    wanted: a name, or a name and a range of rows, as in train[:5000].
    """
    splits, match = opened.splits, re.fullmatch(r"([\w.-]+)(?:\[(\d*):(\d*)\])?", wanted)
    name = match and next((x for x in (match[1], SPLIT_OF.get(match[1])) if x in splits), None)
    if name is None:
        raise UserError(f"split {wanted!r}: {spec} has {', '.join(splits)}; write one, or a part, as in train[:5000]")
    part, total = match[2] or match[3], len(splits[name]) if isinstance(splits[name], Dataset) else None
    if total is None and part:
        raise UserError(f"split {wanted!r}: a part of a stream depends on who reads it; want a whole split")
    taken = range(total or 0)[slice(int(match[2] or 0), int(match[3]) if match[3] else None)]
    if total is not None and not taken:
        why = f"it has {total:,} in all" if total else "; ".join(opened.notes)
        raise UserError(f"split {wanted!r} of {spec} has no rows{f' ({why})' if why else ''}")
    whole = columns.chosen(splits[name], f"{spec}, {wanted}", **names)
    return whole.select(taken) if part else whole, (whole, taken.start)


def to_evaluate(splits, split):
    base = split.partition("[")[0]
    return next((s for s in ("validation", "valid", "val", "test") if s in splits and s != base), None)
