"""Features of images in a file, for whatever comes after: search, clustering, a classifier of your own.

python -m eval.embed --run runs/byol --dataset path/to/images --out features.parquet
"""

from eval.settings import Embed
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Embed, "eval.embed")

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

import data
from eval.command import backbone_of, images_of, start
from eval.features import in_batches, refuse_not_finite, unit
from flags import Given, UserError, command, progress
from loading.files import counted, named
from training.folder import writing

ROWS = 1_024  # that are in memory at a time


class Rows(NamedTuple):
    """Some rows of the file."""

    names: list  # files, or numbers of rows
    labels: pa.Array | None
    features: np.ndarray  # [n, D] float32 or float16
    good: np.ndarray  # [n] bool; the features of others are NaN


def chunks(
    accelerator: Any, loaded: Any, part: data.Unlabelled, share: torch.Tensor, workers: int, s: Embed
) -> Iterator[Rows]:
    """The rows of `share`, some at a time."""
    table = part.table.with_format("arrow")
    has_label, kind = "label" in table.column_names, np.float16 if s.half else np.float32
    normal = loaded.mean, loaded.std
    paths = pc.struct_field(table.data.column("image"), "path")
    has_file = pc.any(pc.greater(pc.binary_length(paths), 0)).as_py()  # of one type in every part
    for rows in share.split(ROWS):
        own = part.rows_of(rows)
        features = torch.full((len(rows), loaded.network.num_features), torch.nan)
        known, at = (own >= 0).nonzero().flatten(), 0
        for values, clipped in in_batches(
            accelerator, loaded.network, part.images, own[known], loaded.image_size, normal, workers
        ):
            places, readable = known[at : at + len(values)], clipped >= 0
            refuse_not_finite(values.cpu()[readable])
            values = unit(values) if s.normalize else values
            features[places[readable]] = values.cpu()[readable]
            at += len(values)
        found = table[rows[0].item() : rows[-1].item() + 1]
        labels = _labels(found["label"].to_pylist(), part.names) if has_label else None
        yield Rows(
            _names(found["image"], rows, part.place) if has_file else rows.tolist(),
            labels,
            features.numpy().astype(kind),
            features.isfinite().all(1).numpy(),
        )


def _names(images, rows, place):
    """Files, below the dataset's folder if they lie in it."""
    images = images.combine_chunks() if isinstance(images, pa.ChunkedArray) else images
    paths = [row and row["path"] for row in pa.StructArray.from_arrays([images.field("path")], ["path"]).to_pylist()]
    below = f"{place}{os.sep}" if place and os.path.isdir(place) else "\0"
    return [named(path).removeprefix(below) if path else f"row {row}" for path, row in zip(paths, rows.tolist())]


def _labels(numbers, names):
    found = [None if x is None or x < 0 else names[x] if names else x for x in numbers]
    return pa.array(found, pa.string() if names else pa.int64())  # also where all are null


# ---------------------------------------------------------------------------------------------------------------------
# Files: each process writes its share aside; the first joins them, so what bears the name is whole.


def write_parquet(path: Path, found: Iterator[Rows]) -> None:
    writer = None
    try:
        for rows in found:
            table = _as_table(rows)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _as_table(rows):
    files = bool(rows.names) and isinstance(rows.names[0], str)
    columns = {"file" if files else "row": pa.array(rows.names, pa.string() if files else pa.int64())}
    if rows.labels is not None:
        columns["label"] = rows.labels
    width = rows.features.shape[1]
    offsets = np.concatenate([[0], np.cumsum(np.where(rows.good, width, 0))]).astype(np.int32)
    values = pa.array(rows.features[rows.good].ravel())
    missing = pa.array(np.append(~rows.good, False))
    columns["feature"] = pa.ListArray.from_arrays(pa.array(offsets, mask=missing.to_numpy(False)), values)
    return pa.table(columns)


def join_parquet(target: Path, shares: list[Path]) -> None:
    with pq.ParquetWriter(target, pq.read_schema(shares[0])) as writer:
        for share in shares:
            with pq.ParquetFile(share) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def write_npy(path: Path, found: Iterator[Rows]) -> None:
    """The features' bytes in `path`, the other columns in `path`.csv."""
    with open(path, "wb") as file, open(f"{path}.csv", "w", newline="", encoding="utf-8") as names:
        lines = csv.writer(names)
        for rows in found:
            file.write(rows.features.tobytes())
            lines.writerows(zip(rows.names, rows.labels.to_pylist()) if rows.labels is not None else zip(rows.names))


def join_npy(target: Path, shares: list[Path], head: list[str], shape: tuple[int, int], half: bool) -> None:
    with open(target, "wb") as file, open(f"{target}.csv", "w", newline="", encoding="utf-8") as names:
        about = {"descr": "<f2" if half else "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        names.write(",".join(head) + "\r\n")
        for share in shares:
            with open(share, "rb") as part, open(f"{share}.csv", encoding="utf-8", newline="") as own:
                while block := part.read(1 << 22):
                    file.write(block)
                while text := own.read(1 << 20):
                    names.write(text)


def _targets(out):
    """The files of --out, which must not be there."""
    target = Path(out).expanduser()
    files = [target] if target.suffix == ".parquet" else [target, target.with_suffix(".csv")]
    for file in files:
        if file.exists():
            another = target.with_name(f"{target.stem}-2{target.suffix}")
            raise UserError(f"--out {out}: {file} exists, and nothing is overwritten; name another: --out {another}")
    return files


@contextmanager
def _own_share() -> Iterator[None]:
    """A UserError inside is of this process's own share, so this process says it."""
    try:
        yield
    except UserError as error:
        error.everywhere = False
        raise


@command(Embed)
def embed(s: Embed, given: Given) -> Path:
    files = _targets(s.out)
    target = files[0]
    accelerator, workers = start(s)
    loaded = backbone_of(s, accelerator.print)
    images = images_of(s, loaded.config)
    images.pop("eval_split")
    way = data.way_of(loaded.config, images.pop("own"), s.pixel_range)
    with accelerator.local_main_process_first():
        remembered = not accelerator.is_local_main_process
        part = data.open_images(images.pop("dataset"), **images, remembered=remembered, way=way)
    for line in part.found:
        accelerator.print(line)
    loaded.network.to(accelerator.device, memory_format=torch.channels_last).eval()
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(part.table)
    own = torch.arange(count * rank // world, count * (rank + 1) // world)
    shares = [target.with_name(f".{target.name}.{i}.part") for i in range(world)]
    aside = target.with_name(f".{target.name}.part")
    head: list[str] = []
    missing = 0

    def counting() -> Iterator[Rows]:
        nonlocal missing
        with progress(len(own), shown=accelerator.is_main_process, unit=" images", named="features") as bar:
            for rows in chunks(accelerator, loaded, part, own, workers, s):
                missing += int((~rows.good).sum())
                head[:] = ["file" if isinstance(rows.names[0], str) else "row"] + ["label"] * (rows.labels is not None)
                yield rows
                bar.update(len(rows.names))

    npy = target.suffix == ".npy"
    with _own_share(), writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (write_npy if npy else write_parquet)(shares[rank], counting())
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shape = count, loaded.network.num_features
                existing = [share for share in shares if share.exists()]  # of few images some have none
                if npy:
                    join_npy(aside, existing, head, shape, s.half)
                    Path(f"{aside}.csv").replace(files[1])
                else:
                    join_parquet(aside, existing)
                aside.replace(target)
            accelerator.wait_for_everyone()
        finally:
            for path in (shares[rank], *([aside] if accelerator.is_main_process else [])):
                for file in (path, Path(f"{path}.csv")):
                    file.unlink(missing_ok=True)
    missing = int(accelerator.reduce(torch.tensor(missing, device=accelerator.device)))
    bad = f"; none of {counted(missing, 'image')} that cannot be read" * bool(missing)
    accelerator.print(
        f"features of {counted(count, 'image')}, {loaded.network.num_features} numbers each{bad} -> {target}"
    )
    return target


if __name__ == "__main__":
    launch(embed, "eval.embed")
