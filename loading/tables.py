"""Parquet, Arrow files and saved datasets: parquet is converted once, by `datasets`; the others are read in place."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.fingerprint import Hasher
from datasets.packaged_modules.parquet.parquet import Parquet

from flags import UserError, first_line
from loading.files import shown

END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}


def why(error: BaseException) -> str:
    """The first line of what an error goes back to: `datasets` says only that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# Parquet and Arrow files.


def opened(kind: str, splits: dict[str, list[str]], streaming: bool, mark: str) -> tuple[dict, dict, list[str]]:
    """({split: rows, or a stream}, {split: number of rows}, notes). Raises UserError with the file that is at fault.

    `mark` stands for the files' names, sizes and times.
    """
    schemas = {path: _schema(kind, path) for paths in splits.values() for path in paths}
    empty = [path for path, (_, rows) in schemas.items() if rows == 0]
    counts = {split: sum(schemas[path][1] for path in paths) for split, paths in splits.items()}
    found = {}
    full = {split: [path for path in paths if path not in empty] for split, paths in splits.items()}
    full = {split: paths for split, paths in full.items() if paths}
    for split, paths in full.items():
        of = [(path, schemas[path][0]) for path in paths]
        _check_columns(of)
        try:
            found[split] = _arrow(paths, f"{mark}-{split}") if kind == "arrow" else _parquet(split, paths, streaming)
        except Exception as error:  # of whatever library
            said = _types(of) or shown(paths[0])
            raise UserError(f"--dataset: cannot be read ({said}: {why(error)})") from error
    for split in splits:
        found.setdefault(split, Dataset.from_dict({}))
    notes = [f"{', '.join(map(shown, empty[:4]))}{', ...' * (len(empty) > 4)} has no rows"] if empty else []
    return {split: found[split] for split in splits}, counts, notes


def _schema(kind, path):
    """(schema, number of rows) of a file."""
    try:
        if os.path.getsize(path) == 0:
            raise ValueError("it is empty: 0 bytes")
        if kind == "parquet":
            with pq.ParquetFile(path) as file:
                return file.schema_arrow, file.metadata.num_rows
        table = _mapped(path)
        return table.schema, table.num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"--dataset: cannot be read ({shown(path)}: {first_line(error)})") from error


def _mapped(path):
    """An Arrow file of either format, mapped into memory. Raises ValueError for a stream cut between its batches."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 8))
        ends = file.read()
    if ends != END and not ends.endswith(b"ARROW1"):
        raise ValueError("it is cut: the mark of its end is missing")
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _check_columns(schemas):
    path, first = schemas[0] if schemas else (None, None)
    for other, schema in schemas[1:]:
        if set(schema.names) != set(first.names):
            raise UserError(
                f"--dataset: {shown(other)} has columns {', '.join(schema.names)}; {shown(path)} has "
                f"{', '.join(first.names)}. Want the same in all files; or name some: --dataset 'FOLDER/a*.parquet'"
            )


def _types(schemas):
    """The first file in which a column has another type than in the first file, and what it has."""
    path, first = schemas[0]
    for other, schema in schemas[1:]:
        for name in first.names:
            if schema.field(name).type != first.field(name).type:
                types = schema.field(name).type, first.field(name).type
                return f"{shown(other)} has {name} as {types[0]}, {shown(path)} as {types[1]}"
    return None


def _parquet(split, paths, streaming):
    """Converted once to Arrow files in the cache of `datasets`, again where a file's size or a time of it changes.

    The time of the change (ctime) tells of a file put in another's place by a copy that keeps times.
    """
    found = [os.stat(path) for path in paths]
    times = [(str(x.st_size), str(x.st_mtime_ns), str(x.st_ctime_ns)) for x in found]
    builder = Parquet(dataset_name="parquet", data_files=DataFilesDict({split: DataFilesList(paths, times)}))
    if streaming:
        return builder.as_streaming_dataset(split)
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _arrow(paths, mark):
    parts = []
    for path in paths:
        try:
            parts.append(Dataset.from_file(path))
        except pa.ArrowInvalid:  # Arrow's other format, of files
            parts.append(Dataset(_mapped(path), fingerprint=Hasher.hash((path, mark))))
    rows = concatenate_datasets(parts)
    return marked(rows, mark)


def marked(rows: Dataset, mark: str) -> Dataset:
    """The same rows under a fingerprint of our own, without a format: what is kept in the cache is told by it."""
    return Dataset(rows.data, info=rows.info, indices_table=rows._indices, fingerprint=Hasher.hash(mark))


# ---------------------------------------------------------------------------------------------------------------------
# What `save_to_disk` wrote.


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder: a file called dataset_info.json alone may be anyone's."""
    return bool(_parts(folder))


def _parts(folder):
    """{split: its folder}."""
    several = (folder / "dataset_dict.json").exists()
    parts = sorted(path.parent for path in folder.glob("*/state.json")) if several else [folder]
    parts = [part for part in parts if (part / "state.json").exists() and (part / "dataset_info.json").exists()]
    return {part.name if several else "train": part for part in parts}


def saved(folder: Path, mark: str) -> dict[str, Dataset]:
    """Its splits, read in place: nothing is written beside them, where `datasets` would put what it derives."""
    found = {}
    for split, part in _parts(folder).items():
        try:
            empty = not json.loads((part / "state.json").read_text())["_data_files"]  # `datasets` cannot load these
            for file in part.glob("*.arrow"):
                _mapped(str(file))
            rows = Dataset.from_dict({}) if empty else datasets.load_from_disk(str(part))
        except Exception as error:
            raise UserError(f"--dataset: cannot be read ({shown(str(part))}: {why(error)})") from error
        found[split] = marked(rows, f"{mark}-{split}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which files of a folder are which split.


def split_words(name: str, words: dict[str, str]) -> set[str]:
    """The splits that a file's name speaks of, between marks: data-train-00000-of-00002.parquet."""
    letters = "".join(x if x.isalpha() else " " for x in os.path.basename(name).rpartition(".")[0].casefold())
    return {words[word] for word in letters.split() if word in words}


def by_name(names: list[str], words: dict[str, str]) -> tuple[dict[str, list[int]], list[str]]:
    """{split: rows of `names`} if every file's name has one split's name, else all as train; and notes."""
    numbered = (re.fullmatch(r"(.+?)-\d+(-of-\d+)?\.\w+", os.path.basename(name)) for name in names)
    heads = [match[1] for match in numbered if match]
    if len(heads) == len(names) and {*heads} & {*words, "trainval"}:  # as on the Hub: any word before the number
        found = [{words.get(head, head)} for head in heads]
    else:
        found = [split_words(name, words) for name in names]
    if all(len(splits) == 1 for splits in found):
        rows: dict[str, list[int]] = {}
        for i, (split,) in enumerate(found):
            rows.setdefault(split, []).append(i)
        return rows, []
    plain = [name for name, splits in zip(names, found) if len(splits) != 1]
    if Counter(map(bool, found))[True]:
        other = next(name for name, splits in zip(names, found) if splits)
        return {"train": list(range(len(names)))}, [
            f"{shown(plain[0])} has no split's name in it, beside {shown(other)}: all files are read as one split; "
            "to read some: --dataset 'FOLDER/train*.parquet'"
        ]
    return {"train": list(range(len(names)))}, []
