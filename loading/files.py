"""The path of an image as a column of strings can hold it: a file, a member of a tar, a file of the Hub."""

import os
import re
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import fsspec

UNREADABLE = "bytes::"  # begins a path that is not valid UTF-8, which Arrow's strings cannot hold
MEMBER = re.compile(r"(?P<name>.*)::tar\+(?P<start>\d+)\+(?P<size>\d+)\+(?P<tar>.*)", re.DOTALL)


def as_text(path: str) -> str:
    """A path as os.scandir gives it, as valid Unicode; `as_path` undoes it."""
    return path if _is_unicode(path) else UNREADABLE + quote_from_bytes(os.fsencode(path))


def as_path(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text[len(UNREADABLE) :])) if text.startswith(UNREADABLE) else text


def shown(path: str) -> str:
    """A path for a message: bytes that are not UTF-8 as \\xNN."""
    return path if _is_unicode(path) else os.fsencode(path).decode("utf-8", "backslashreplace")


def counted(number: int, thing: str) -> str:
    """1 image, 2,000 images, 3 classes."""
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"


def _is_unicode(path):
    return path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)


def member(name: str, start: int, size: int, tar: str) -> str:
    """The path of the `size` bytes at `start` in a tar file."""
    return f"{shown(name)}::tar+{start}+{size}+{as_text(tar)}"


def named(text: str) -> str:
    """What a message calls the image at a path of a row."""
    found = MEMBER.fullmatch(text)
    return f"{found['name']} in {shown(as_path(found['tar']))}" if found else shown(as_path(text))


def read(text: str) -> bytes:
    """The bytes at a row's path: a regular file, here, in a tar or on the Hub; never a pipe or a device."""
    found = MEMBER.fullmatch(text)
    path = as_path(found["tar"] if found else text)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            file.seek(int(found["start"]) if found else 0)
            return file.read(int(found["size"]) if found else -1)
    if text.startswith("hf://") or "::hf://" in text or Path(text.split("::")[-1]).is_file():
        with fsspec.open(text) as file:
            return file.read()
    raise ValueError(f"No such file: {shown(path)}")
