"""Whole runs of two processes by torchrun: they train, evaluate, stop and go on as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_data import table
from tests.test_train import lines, same, weights
from train import pretrain
from training import folder as run_folder

ROOT = Path(__file__).parents[2]


def torchrun(place, processes, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    head = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [*head, str(ROOT / "bsim.py"), *words], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_if_nothing_had_been(place):
    """SIGTERM to one of them: both finish the same step; and batch statistics, which differ, do not get lost."""
    words = "--method moco --split train[:200] --batch_size 32 --steps 60 --log_every 7 --eval_every 30".split()
    torchrun(place, 2, *words, "--out", "whole")
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(ROOT / "bsim.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen([*head, *words, "--out", "cut"], env=environment, stdout=subprocess.PIPE, text=True)
    while not Path("cut/metrics.jsonl").exists() or len(lines("cut")) < 2:
        assert run.poll() is None
        time.sleep(0.02)
    worker = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(worker), signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    step = int(run_folder.last_checkpoint(Path("cut")).name[5:])
    assert run.returncode == 0 and 14 <= step < 60
    assert said.count(f"stopped at step {step}; resume it: accelerate launch bsim.py --resume cut") == 1
    assert "note: on CPUs" not in said  # moco shuffles, which CPUs can
    torchrun(place, 2, "--resume", "cut")
    one, two = (load_file(run_folder.last_checkpoint(Path(run)) / "method.safetensors") for run in ("whole", "cut"))
    assert int(one["oldest"]) == 60 * 32 % len(one["queue"])  # both processes' keys
    assert json.loads(Path("whole/config.json").read_text())["batch_size"] == 32 and lines("whole")[-1]["knn"] > 0
    for name, value in one.items():  # running statistics were averaged once more: equal, but for rounding
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5 if ".running_" in name else 0, msg=name)
    for one, two in zip(lines("whole"), lines("cut"), strict=True):
        assert one.keys() == two.keys()
        rounded = ("alignment", "uniformity", "effective_rank")  # of the network with these statistics
        for key in [k for k in rounded if k in one]:
            assert two[key] == pytest.approx(one[key], rel=1e-4)
        aside = dict.fromkeys(("images_per_second", "knn", *rounded), 0)
        assert {**one, **aside} == {**two, **aside}


@pytest.mark.slow
def test_a_stream_of_two_processes_goes_on(place):
    for shard in range(4):
        table(64).select(range(shard * 16, shard * 16 + 16)).to_parquet(place / f"{shard}.parquet")
    words = (
        "--dataset *.parquet --streaming --label_column none --backbone resnet_tiny --batch_size 8 --workers 2".split()
    )
    words += "--method simclr --image_size 16 --checkpoint_every 5".split()
    said = torchrun(place, 2, *words, "--steps", "12", "--out", "whole").stdout
    assert "note: on CPUs batch norm's statistics are each process's own" in said
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step_000012")
    Path("cut/backbone.safetensors").unlink()
    torchrun(place, 2, "--resume", "cut")
    assert same(weights("whole"), weights("cut"))
    shutil.rmtree("cut/checkpoints/step_000012")
    Path("cut/backbone.safetensors").unlink()
    said = torchrun(place, 1, "--resume", "cut").stdout
    assert "with another number of processes or workers the stream begins its next epoch" in said


@pytest.mark.slow
def test_two_processes_evaluate_as_one(place):
    """On an uneven number of images; nothing is trained, so the random network's k-NN must agree."""
    words = "--split train[:101] --batch_size 32 --steps 1 --eval_every 1 --lr 1e-9".split()
    torchrun(place, 2, *words, "--out", "two")
    pretrain(split="train[:101]", batch_size=32, steps=1, eval_every=1, lr=1e-9, out="one")
    for name in ("knn_pixels", "knn_random"):
        assert lines("two")[0][name] == pytest.approx(lines("one")[0][name], abs=1e-4)
