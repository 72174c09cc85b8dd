"""A dataset is opened: whatever fails is one line, and a full disk says which folder is full."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from flags import RunError, UserError, reading

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
WORDS = ("no space left", "not enough disk space", "disk quota exceeded")  # of libraries that give no number


def full(error: BaseException | None) -> bool:
    """Whether an error goes back to a disk that takes no more."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(word in str(error).lower() for word in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def opening(dataset: str) -> Iterator[None]:
    """As `reading`; a full disk is a RunError that names the cache, where alone opening writes."""
    try:
        with reading(f"--dataset {dataset}"):
            yield
    except UserError as error:
        if not full(error):
            raise
        raise RunError(
            f"--dataset {dataset}: no space left in {datasets.config.HF_DATASETS_CACHE}, where what is decoded and "
            "converted is kept. Make room there, or name a folder on another disk: HF_HOME=FOLDER"
        ) from error
