"""Does BSIM help? A grid of runs of this project's own pretraining and evaluation, and what they say together.

    python benchmarks/study.py --dataset DIR --out runs/study --jobs 2 --grids methods passes
    python benchmarks/study.py --dataset DIR --out runs/study --jobs 2 --grids length mixtures siblings --best simclr

A finished cell is not run again and a broken one goes on where it was, so the same command ends what was interrupted.
What follows -- are flags of every run, in the place of the study's own.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from eval.common import read_results  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam")
WEIGHTS = (1.0, 0.5, 0.0)
SIBLINGS = ("imix", "unmix", "mixco", "keymix")
SIZES = {
    "small": {"split": "train[:5000]", "backbone": "resnet_tiny", "epochs": 30, "mixed_precision": "bf16"},
    "full": {"backbone": "resnet18", "epochs": 200, "mixed_precision": "bf16"},
}
# Encoder passes of an image in a step, SIM and half SIM, half BSIM (methods/*.py): what the half pays more.
MORE_PASSES = {"simclr": 3 / 2, "moco": 3 / 2, "byol": 6 / 4, "simsiam": 4 / 2}
PROTOCOLS = ("knn", "linear", "geometry")


def cells_of(grid: str, best: str, epochs: int) -> list[dict]:
    """The flags that each cell of a grid has beside the size's and the seed."""
    both = {"sim_weight": 0.5}
    if grid == "methods":
        return [{"method": m, "sim_weight": w} for m in METHODS for w in WEIGHTS]
    if grid == "passes":  # as many encoder passes as SIM has in `epochs`
        return [{"method": m, **both, "epochs": round(epochs / MORE_PASSES[m])} for m in METHODS]
    if grid == "length":
        methods = dict.fromkeys(("simclr", best))
        longer = [{"method": m, "sim_weight": w, "epochs": 4 * epochs} for m in methods for w in WEIGHTS]
        return longer + [{"method": m, **both, "epochs": round(4 * epochs / MORE_PASSES[m])} for m in methods]
    if grid == "mixtures":
        kinds = [{"alpha": 0.2}, {"alpha": 2.0}, {"mix": "mixup"}, {"mix": "either"}, {"per_sample": False}]
        kinds += [{"temperature": 0.1}, {"temperature": 0.4}] if best in ("simclr", "moco") else []
        plain = [{"temperature": k["temperature"], "sim_weight": 1.0} for k in kinds if "temperature" in k]
        return [{"method": best, **both, **kind} for kind in kinds] + [{"method": best, **kind} for kind in plain]
    if grid == "siblings":
        return [{"method": m, **both} for m in SIBLINGS]
    raise ValueError(grid)


def name_of(cell: dict) -> str:
    """Of the cell's folder: what it is, in words that sort."""
    short, words = {"method": "", "sim_weight": "w", "epochs": "e"}, []
    for key, value in cell.items():
        words.append(f"{short.get(key, key)}{value:g}" if isinstance(value, float) else f"{short.get(key, key)}{value}")
    return "-".join(words)


def run(words: list[str], log: Path, threads: int, gpu) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *words], env=environment, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with {done.returncode}; {log} says why")


def flags_of(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train_and_judge(cell: dict, folder: Path, options, more: dict, gpu) -> None:
    """Pretrain the cell, or go on with it, and judge it by each protocol that has not judged it yet."""
    log, start = folder.with_name(f"{folder.name}.log"), time.time()
    # A sibling's method is known to siblings.py alone, which takes the same commands.
    program = {name: ["-m", f"eval.{name}"] for name in PROTOCOLS} | {"pretrain": ["bsim.py"]}
    if cell["method"] in SIBLINGS:
        program = {name: ["benchmarks/siblings.py", name] for name in program}
    given = {**SIZES[options.size], **cell, "dataset": options.dataset, "eval_every": 0, **more}
    if not (folder / "backbone.safetensors").exists():
        words = [*program["pretrain"], "--resume", "--out", str(folder), *flags_of(given)]
        run(words, log, options.threads, gpu)
    judged = {line["protocol"] for line in read_results(folder)}
    for protocol in [p for p in PROTOCOLS if p not in judged]:
        run([*program[protocol], "--run", str(folder)], log, options.threads, gpu)
    if time.time() - start > 1:
        print(f"{folder.name}: {time.time() - start:.0f} s", flush=True)


def main():
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    more = {name.removeprefix("--"): value for name, value in zip(*[iter(sys.argv[cut + 1 :])] * 2)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a folder with train.parquet and test.parquet")
    parser.add_argument("--out", required=True, help="the folder of the runs")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--epochs", type=int, help="in the place of the size's own")
    parser.add_argument("--grids", nargs="+", default=["methods"], help="methods passes length mixtures siblings")
    parser.add_argument("--best", choices=METHODS, default="simclr", help="the method that gained most by `methods`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, help="runs at once; by itself the GPUs, or the cores")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    options = parser.parse_args(sys.argv[1:cut])
    options.dataset, out = str(Path(options.dataset).resolve()), Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    jobs, free = options.jobs or gpus or os.cpu_count(), Queue()
    for job in range(jobs):
        free.put(job % gpus if gpus else None)
    epochs = options.epochs or SIZES[options.size]["epochs"]

    def one(cell):
        gpu = free.get()
        try:
            train_and_judge(cell, out / name_of(cell), options, more, gpu)
        finally:
            free.put(gpu)

    # Seed by seed: what is interrupted has whole tables of fewer seeds.
    base = {"method": None, "sim_weight": 1.0, "epochs": epochs}
    cells = [
        {**base, **cell, "seed": seed}
        for seed in options.seeds
        for grid in options.grids
        for cell in cells_of(grid, options.best, epochs)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, cells))


if __name__ == "__main__":
    main()
