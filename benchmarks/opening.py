"""Seconds to open a folder of many small JPEGs, beside `datasets.load_dataset("imagefolder")`; what data costs on disk.

    python benchmarks/opening.py
    python benchmarks/opening.py --disk 200

Each opening is a process of its own: the first, and one that finds what the first left in the cache. With --disk: what
a run leaves in an empty cache for so many MB of parquet, of a saved dataset, of Arrow files and of a folder, then for a
second --split.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from turns import machine  # noqa: E402

TIMED = "import time; start = time.perf_counter(); {work}; print(time.perf_counter() - start)"
OURS = "source = data.open_source({folder!r}); assert source.train.in_workers"
THEIRS = "rows = datasets.load_dataset('imagefolder', data_dir={folder!r}, split='train')"
OPENED = "import data; data.open_source({path!r}, split={split!r})"


def jpeg(seed, side):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def process(code, cache):
    environment = {**os.environ, "HF_HOME": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)


def opening(place, images, classes):
    folder = place / "images"
    distinct = [jpeg(i, 72) for i in range(20)]  # larger than what is decoded once and cached
    for i in range(images):
        if i < classes:
            (folder / f"class{i:03d}").mkdir(parents=True)
        (folder / f"class{i % classes:03d}" / f"{i:07d}.jpg").write_bytes(distinct[i % 20])
    print(f"{images:,} JPEGs of 72 pixels in {classes} folders. {machine('datasets')}\n")
    print("| | first | again |\n| --- | --- | --- |", flush=True)
    found = {}
    for name, module, work in (("data.open_source", "data", OURS), ("load_dataset", "datasets", THEIRS)):
        code = f"import {module}; " + TIMED.format(work=work.format(folder=str(folder)))
        found[name] = [float(process(code, place / name)) for _ in range(2)]
        print(f"| {name} | {found[name][0]:.2f} s | {found[name][1]:.2f} s |", flush=True)
    ours, theirs = found.values()
    print(f"\nA {theirs[0] / ours[0]:.0f}th of the time; again a {theirs[1] / ours[1]:.0f}th.")


def on_disk(folder):
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / 1e6


def disk(place, megabytes):
    side = 256
    files = [jpeg(i, side) for i in range(round(megabytes * 1e6 / len(jpeg(0, side))))]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    columns = {"image": [{"bytes": x, "path": None} for x in files], "label": [i % 2 for i in range(len(files))]}
    rows = datasets.Dataset.from_dict(columns, features=kinds)
    paths = {name: place / name for name in ("rows.parquet", "saved", "folder")}
    rows.to_parquet(str(paths["rows.parquet"]))
    rows.save_to_disk(str(paths["saved"]))
    for i, content in enumerate(files):
        path = paths["folder"] / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    paths["saved/*.arrow"] = place / "saved" / "*.arrow"
    print("| | data, MB | the cache after a run | after one on half of it | beside the data |")
    print("| --- | --- | --- | --- | --- |")
    for name, path in paths.items():
        cache, left = place / f"cache-{name.replace('/', '-')}", []
        before = on_disk(place / name.split("/")[0]) if path.suffix != ".parquet" else path.stat().st_size / 1e6
        for split in ("train", f"train[:{len(files) // 2}]"):
            process(OPENED.format(path=str(path), split=split), cache)
            left.append(on_disk(cache))
        after = on_disk(place / name.split("/")[0]) if path.suffix != ".parquet" else path.stat().st_size / 1e6
        print(f"| {name} | {before:.1f} | {left[0]:.1f} | {left[1]:.1f} | {after - before:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--disk", type=float, help="measure disk for so many MB, in place of seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        started = time.time()
        if options.disk:
            disk(Path(place), options.disk)
        else:
            opening(Path(place), options.images, options.classes)
        print(f"\n{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
