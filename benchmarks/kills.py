"""A run that saves at every step, killed (SIGKILL) at random moments and resumed until it ends: is it the same run?

    python benchmarks/kills.py [--kills 200] [--method byol moco] [--images cached large stream] [--seed 0]

`--images cached` are small ones; `large` ones are decoded by two workers; `stream` are the large ones, streamed.

Weights, momentum encoder, queue, optimiser state and metrics (times aside) are compared, bit for bit, with those of a
run that nobody disturbed. Exit code 1 where they differ.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from datasets import Image as ImageFeature  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from methods import METHODS  # noqa: E402
from train import pretrain  # noqa: E402
from training.folder import last_checkpoint, read_metrics  # noqa: E402


def fork(options: dict) -> int:
    """Train in a child process, which need not import anything again; its process number."""
    child = os.fork()
    if child:
        return child
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        torch.set_num_threads(1)
        pretrain(**options)
        os._exit(0)
    except BaseException:
        os._exit(1)


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reached(folder: Path, step: int) -> bool:
    last = last_checkpoint(folder)
    return last is not None and int(last.name[5:]) >= step


def finish(options: dict) -> None:
    _, status = os.waitpid(fork(options), 0)
    if status:
        raise SystemExit(f"{options}: ended with status {status}")


def end(folder: Path) -> dict:
    """All that a run ends with, times aside."""
    last = last_checkpoint(folder)
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    momenta = {f"{k}.{name}": v for k, state in optimizer.items() for name, v in state.items() if v is not None}
    return {
        "step": last.name,
        "method": load_file(last / "method.safetensors"),
        "backbone": load_file(folder / "backbone.safetensors"),
        "optimizer": {k: torch.as_tensor(v) for k, v in momenta.items()},
        "metrics": [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(folder)],
    }


def same(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def large_digits(path: str) -> None:
    """200 scans of 80 x 80 pixels, in parquet files of 50."""
    scans = load_digits()
    rows = {"image": [Image.fromarray((x * 15).astype("uint8")).resize((80, 80)) for x in scans.images[:200]]}
    rows = Dataset.from_dict(rows | {"label": scans.target[:200].tolist()}).cast_column("image", ImageFeature())
    for i in range(4):
        rows.shard(4, i).to_parquet(f"{path}/{i}.parquet")


def trial(method: str, images: str, kills: int, seed: int) -> dict:
    """An undisturbed run, and one that is killed so often; both end in the current folder, which is new."""
    draw, steps = random.Random(seed), max(12, 4 * kills)
    run = dict(method=method, sim_weight=0.5, batch_size=16, accumulate=2, image_size=16, backbone="resnet_tiny")
    run |= dict(steps=steps, checkpoint_every=1, log_every=3, eval_every=0)
    if images == "cached":
        run |= dict(dataset="digits", split="train[:200]", eval_every=steps // 2)
    else:
        os.mkdir("large")
        large_digits("large")
        run |= dict(dataset="large", workers=2, streaming=images == "stream")
    start = time.time()
    finish(run | {"out": "whole"})
    pace = (time.time() - start) / steps
    killed, folder = 0, Path("cut")
    for step in sorted(draw.sample(range(1, steps), kills)):
        child = fork(run | {"out": "cut", "resume": True})
        while not ended(child) and not reached(folder, step):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 2 * pace))  # anywhere in a step, a save or the writing of a line
        if ended(child):
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
    if not (folder / "backbone.safetensors").exists():
        finish(run | {"out": "cut", "resume": True})
    alike = same(end(Path("whole")), end(folder))
    return {"method": method, "images": images, "steps": steps, "kills": killed, "identical": alike}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--method", nargs="+", default=["byol"], choices=METHODS)
    parser.add_argument("--images", nargs="+", default=["cached"], choices=("cached", "large", "stream"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    fails = 0
    for method, images in product(options.method, options.images):
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            found = trial(method, images, options.kills, options.seed)
            print(json.dumps(found), flush=True)
            fails += not found["identical"]
            os.chdir("/")
    raise SystemExit(1 if fails else 0)


if __name__ == "__main__":
    main()
