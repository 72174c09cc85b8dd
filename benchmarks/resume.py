"""Seconds from `bsim.py --resume` to the end of its first step, at step 10 and at step 1,000,000.

    python benchmarks/resume.py --dataset DIR

The run of a million steps is one of ten whose checkpoint says so, in an epoch that fits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
FLAGS = "--method simclr --backbone resnet_tiny --batch_size 64 --label_column none --log_every 1 --checkpoint_every 10"


def wait_until(done, process):
    while not done():
        if process.poll() is not None:
            raise SystemExit(f"{process.args}: ended with {process.returncode}")
        time.sleep(0.02)
    process.kill()
    process.wait()


def seconds(dataset: str, out: str, step: int, *extra: str) -> float:
    command = [sys.executable, str(ROOT / "bsim.py")]
    words = [*FLAGS.split(), "--dataset", dataset, "--steps", "2000000", "--out", out, *extra]
    checkpoint, metrics = Path(out, "checkpoints", "step_000010"), Path(out, "metrics.jsonl")
    wait_until(checkpoint.exists, subprocess.Popen([*command, *words], **QUIET))
    for other in set(checkpoint.parent.iterdir()) - {checkpoint}:
        shutil.rmtree(other)
    state = json.loads((checkpoint / "state.json").read_text())
    images = json.loads(Path(out, "config.json").read_text())["images"] or 10_000
    for process in state["processes"]:
        process["places"] = process["places"] and [[step * 64 // images, *place[1:]] for place in process["places"]]
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": step}))
    checkpoint.rename(checkpoint.with_name(f"step_{step:06d}"))
    metrics.write_text("")
    start = time.time()
    wait_until(lambda: metrics.read_text(), subprocess.Popen([*command, "--resume", out], **QUIET))
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == step + 1
    return time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    dataset = str(Path(parser.parse_args().dataset).resolve())
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        print("| | step 10 | step 1,000,000 |\n| --- | --- | --- |")
        for name, extra in (("rows by number", []), ("--streaming", ["--streaming"])):
            found = [seconds(dataset, f"{len(extra)}-{step}", step, *extra) for step in (10, 1_000_000)]
            print(f"| {name} | {found[0]:.1f} s | {found[1]:.1f} s |", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
