"""metadata.csv, .jsonl or .parquet in a folder of images: a row for each image it names, as in `datasets`."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, json

from flags import UserError, first_line
from loading.files import counted, shown

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def applied(root: str, names: list[str], images: list[int]) -> tuple[list[int], dict, list, list[str]]:
    """(images that are named, their further columns, [(file, why it is left out)], notes); images: rows of `names`.

    An image belongs to the metadata of the nearest folder above it; one that has none is kept.
    """
    tables, notes, known = {}, [], {names[i] for i in images}
    files: dict[str, str] = {}
    for name in sorted(name for name in names if os.path.basename(name) in NAMES):
        first = files.setdefault(os.path.dirname(name), name)
        if first != name:
            notes.append(f"{shown(name)} is not read, as {shown(first)} is beside it")
    for folder, file in files.items():
        table = _read(os.path.join(root, file))
        if "file_name" not in table.column_names:
            notes.append(f"{shown(file)} has no column file_name and is not read")
            continue
        rows = {os.path.normpath(os.path.join(folder, str(x))): i for i, x in enumerate(table["file_name"].to_pylist())}
        if not known & rows.keys():
            notes.append(f"{shown(file)} names no image that is there and is not read")
            continue
        missing = sorted(rows.keys() - known)
        if missing:
            notes.append(f"{shown(file)} names {counted(len(missing), 'image')} not there ({shown(missing[0])})")
        tables[folder] = (file, table, rows)
    if not tables:
        return images, {}, [], notes
    kept, sources, left_out = [], [], []
    for i in images:
        folder = os.path.dirname(names[i])
        while folder not in tables and folder:
            folder = os.path.dirname(folder)
        file, _, rows = tables.get(folder, ("", None, {}))
        if file and names[i] not in rows:
            left_out.append((names[i], f"not named in {shown(file)}"))
            continue
        kept.append(i)
        sources.append((folder, rows[names[i]]) if file else None)
    columns = {}
    for _, table, _ in tables.values():
        for name in table.column_names:
            if name in ("file_name", "image") or pa.types.is_nested(table[name].type):
                continue
            values = {folder: t[name].to_pylist() for folder, (_, t, _) in tables.items() if name in t.column_names}
            column = [values[at[0]][at[1]] if at and at[0] in values else None for at in sources]
            columns[name] = pa.array(column, table[name].type)
    return kept, columns, left_out, notes


def _read(path):
    try:
        if path.endswith(".csv"):
            return csv.read_csv(path)
        return json.read_json(path) if path.endswith(".jsonl") else pq.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--dataset: cannot be read ({shown(path)}: {first_line(error)})") from error
