"""The README's table: every method with sim_weight 1, 0.5 and 0 on one dataset, k-NN beside its baselines.

    python benchmarks/table.py --dataset DIR --out runs/table --jobs 2 -- --split 'train[:5000]' --epochs 30

What follows -- goes to bsim.py. A finished cell is not run again, so an interrupted table goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "moco", "byol", "simsiam")


def cell(method, sim_weight, seed, options, flags):
    out = Path(options.out) / f"{method}-{sim_weight:g}-{seed}"
    if not (out / "backbone.safetensors").exists():
        go_on = any((out / "checkpoints").glob("step_*"))
        words = ["--resume", str(out)] if go_on else ["--method", method, "--out", str(out)]
        if not go_on:
            words += ["--dataset", options.dataset, "--sim_weight", str(sim_weight), "--seed", str(seed), *flags]
        start = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, str(ROOT / "bsim.py"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
        print(f"{out.name}: {time.time() - start:.0f} s", flush=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "knn" in line]
    return method, sim_weight, evaluated[-1]["knn"], evaluated[0]


def main():
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--weights", nargs="+", type=float, default=(1.0, 0.5, 0.0))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(sys.argv[1:cut])
    with ThreadPoolExecutor(options.jobs) as pool:
        cells = [(m, w, s) for m in options.methods for w in options.weights for s in options.seeds]
        found = list(pool.map(lambda c: cell(*c, options, flags), cells))
    first = found[0][3]
    print(f"\nraw pixels {first['knn_pixels']:.1f} %, random network {first['knn_random']:.1f} %\n")
    print("| method | " + " | ".join(f"sim_weight {w:g}" for w in options.weights) + " |")
    print("| --- |" + " --- |" * len(options.weights))
    for method in options.methods:
        row = []
        for weight in options.weights:
            values = [knn for m, w, knn, _ in found if (m, w) == (method, weight)]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            row.append(f"{sum(values) / len(values):.1f}{spread}")
        print(f"| {method} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
