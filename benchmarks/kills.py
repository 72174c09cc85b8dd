"""A run that saves at every step, killed (SIGKILL) at random moments and resumed until it ends: is it the same run?

    python benchmarks/kills.py [--kills 200] [--method byol] [--seed 0]

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from runs import last_checkpoint, read_metrics  # noqa: E402
from train import pretrain  # noqa: E402


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--method", default="byol")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    run = dict(method=options.method, sim_weight=0.5, dataset="digits", split="train[:200]", batch_size=32)
    run |= dict(steps=4 * options.kills, accumulate=2, checkpoint_every=1, log_every=3, eval_every=2 * options.kills)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        start = time.time()
        finish(run | {"out": "whole"})
        pace = (time.time() - start) / run["steps"]
        killed, folder = 0, Path("cut")
        while killed < options.kills:
            before = last_checkpoint(folder)
            child = fork(run | {"out": "cut", "resume": True})
            while last_checkpoint(folder) == before and not ended(child):
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
    json.dump({"method": options.method, "kills": killed, "identical": alike, "steps": run["steps"]}, sys.stdout)
    print()
    raise SystemExit(0 if alike else 1)


if __name__ == "__main__":
    main()
