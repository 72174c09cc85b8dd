"""Large JPEGs in parquet to two views of 224 pixels: ours against lightly's DataLoader with as many workers.

    python benchmarks/pipeline.py --workers 1 2
    python benchmarks/pipeline.py --rows 10000 1000000

Ours crops in the workers, which hand over uint8, and makes the rest of the views in batches on the device: on a GPU the
row `crops` is what the CPU does, without one `views`. `decoding` is the same workers decoding and doing nothing else.
With --rows: the memory of a process that has made 20 batches of so many (small) rows.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import datasets  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402
from turns import machine, spread  # noqa: E402

import data  # noqa: E402
from bsim import ViewRecipe, make_view  # noqa: E402
from loading.batches import VIEW, Batches, Feed, generator  # noqa: E402
from loading.images import after_crop  # noqa: E402

RECIPE, BATCH = ViewRecipe(224), 64


def write_jpegs(folder: Path, rows: int, distinct: int, size: tuple[int, int] = (500, 375)) -> None:
    """Parquet files of photographs, `distinct` of them over and over."""
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    jpegs = []
    for i in range(distinct):
        file, photo = io.BytesIO(), photos[i % 2]
        left, top = 7 * i % (photo.width - 500), 5 * i % (photo.height - 375)
        photo.crop((left, top, left + 500, top + 375)).resize(size).save(file, "JPEG", quality=90)
        jpegs.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    folder.mkdir()
    for part in range(0, rows, 10_000):
        count = min(10_000, rows - part)
        table = {"image": [jpegs[i % distinct] for i in range(count)], "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"part-{part:07}.parquet")


def ours(source, workers: int, views: bool):
    """Two batches after another, for ever."""
    parts = dict(batch_size=BATCH, part_size=BATCH, rank=0, world=1, seed=0)
    left = after_crop(RECIPE)
    for i, pair in enumerate(Feed(Batches(source, (RECIPE, RECIPE), **parts), 0, 1 << 30, workers, pin=False)):
        draws = generator(0, VIEW, i)
        yield [make_view(x, left, generator=draws) for x in pair] if views else pair


class Rows(Dataset):
    """As a user of lightly would write it: PIL images of the same rows, through a transform."""

    def __init__(self, table, transform):
        self.table, self.transform = table, transform

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        return self.transform(self.table[i]["image"])


def peers(table, workers: int) -> dict:
    """{name: a function that begins to load}."""

    def decoded(record):
        return decode_jpeg(torch.frombuffer(bytearray(record["bytes"]), dtype=torch.uint8)).shape[1]

    options = dict(batch_size=BATCH, num_workers=workers, shuffle=True, drop_last=True)
    found = {"decoding": lambda: DataLoader(Rows(table, decoded), **options)}
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError:
        print("lightly is not installed", file=sys.stderr)
        return found
    two = SimCLRTransform(RECIPE.size, cj_strength=0.5, gaussian_blur=0.5, min_scale=RECIPE.scale[0])
    pictures = table.cast_column("image", datasets.Image())
    return found | {"lightly": lambda: DataLoader(Rows(pictures, two), **options)}


def rates(folder: Path, workers: int, options) -> None:
    source = data.open_source(str(folder), label_column="none")
    contenders = {
        "ours, crops": lambda: ours(source, workers, False),
        "ours, views": lambda: ours(source, workers, True),
        **peers(source.train.table, workers),
    }
    seconds = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, begin in contenders.items():
            # Workers of its own each turn: those that wait would go on in another's time.
            feed = iter(begin())
            next(feed)
            start = time.perf_counter()
            for _ in range(options.batches):
                next(feed)
            seconds[name].append((time.perf_counter() - start) / options.batches / BATCH)
            del feed
    for name, seen in seconds.items():
        middle, low, high = spread([1 / s for s in seen])
        beside = [
            f"{spread([o / s for s, o in zip(seen, seconds[k])])[0]:.2f}"
            for k in ("lightly", "decoding")
            if k in seconds
        ]
        print(f"| {workers} | {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {' | '.join(beside)} |", flush=True)


def memory(folder: Path) -> float:
    """GiB of this process and its workers after 20 batches, without what is mapped of files, the kernel's to drop."""
    source = data.open_source(str(folder), label_column="none")
    feed = ours(source, 2, False)
    for _ in range(20):
        next(feed)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    maps = "".join(Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in family)
    return sum(map(int, re.findall(r"Pss_(?:Anon|Shmem): +(\d+)", maps))) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=10, help="of 64 images, in each turn")
    parser.add_argument("--rows", type=int, nargs="+", help="measure memory with so many rows instead")
    parser.add_argument("--folder", help="where the parquet files go; default: a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(f"{memory(Path(options.measure)):.3f}")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        print(machine("lightly", "torchvision", "pillow", "datasets"))
        if options.rows:
            print("\n| rows | GiB |\n| --- | --- |")
        else:
            print("\n| workers | | pairs/s | quartiles | of lightly's | of decoding |")
            print("| --- | --- | --- | --- | --- | --- |")
            write_jpegs(Path(place, "jpegs"), 2_000, 200)
            for workers in options.workers:
                rates(Path(place, "jpegs"), workers, options)
        for rows in options.rows or []:
            write_jpegs(Path(place, str(rows)), rows, 4, (80, 60))  # or a million would not fit the disk
            words = [sys.executable, __file__, "--measure", f"{place}/{rows}"]
            print(f"| {rows:,} | {subprocess.check_output(words, text=True).strip()} |", flush=True)


if __name__ == "__main__":
    main()
