"""What goes wrong: signals, kills, full disks, losses that are not finite, collapse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from flags import RunError
from methods import METHODS
from train import pretrain
from training import folder as run_folder
from training import guards

ROOT = Path(__file__).parents[2]
SHORT = dict(dataset="digits", split="train[:200]", batch_size=32, log_every=2, eval_every=0)


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(place):
    words = "--split train[:200] --batch_size 32 --steps 4000 --log_every 1 --eval_every 0 --out run".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "bsim.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    while not Path("run/metrics.jsonl").exists() or len(run_folder.read_metrics(Path("run"))) < 3:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    last = run_folder.last_checkpoint(Path("run"))
    step = int(last.name[5:])
    assert run.returncode == 0
    assert f"stopped at step {step}; go on with: accelerate launch bsim.py --resume run" in out.decode()
    assert run_folder.read_metrics(Path("run"))[-1]["step"] == step
    pretrain(resume="run", steps=step + 2)
    assert [line["step"] for line in run_folder.read_metrics(Path("run"))] == list(range(1, step + 3))


def killed(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_ten_kills_change_nothing():
    """Slow for a test, and the promise that matters most: bit-identical after SIGKILL at random moments."""
    (found,) = killed("--kills", "10", "--method", "moco")
    assert found == {"method": "moco", "images": "cached", "steps": 40, "kills": 10, "identical": True}


@pytest.mark.slow
def test_a_kill_changes_nothing_for_any_method_and_any_way_to_load():
    found = killed("--kills", "1", "--seed", "3", "--method", *METHODS, "--images", "cached", "large", "stream")
    assert len(found) == 12 and all(x["identical"] and x["kills"] == 1 for x in found)


def test_a_full_disk_leaves_the_previous_checkpoint(place):
    disk = place / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]).returncode:
        pytest.skip("wants root, to mount a small tmpfs")
    try:
        with pytest.raises(
            RunError, match=r"the checkpoint of step 3 cannot be written .*step_000002 is whole; make room"
        ):
            pretrain(method="simclr", **SHORT, steps=5, checkpoint_every=1, out=str(disk / "run"))
        left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert left == ["step_000001", "step_000002"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        folder = pretrain(resume=str(disk / "run"))
        assert [line["step"] for line in run_folder.read_metrics(folder)] == [2, 4, 5]
    finally:
        subprocess.run(["umount", "-l", str(disk)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run(place, monkeypatch, accumulate):
    method = METHODS["simclr"].Method
    forward, calls = method.forward, []

    def breaks(self, *args):
        losses = forward(self, *args)
        calls.append(1)
        return losses._replace(bsim=losses.bsim * float("nan")) if len(calls) == 5 * accumulate else losses

    monkeypatch.setattr(method, "forward", breaks)
    options = dict(SHORT, log_every=4, checkpoint_every=3, accumulate=accumulate, steps=8)
    with pytest.raises(
        RunError, match=r"not finite at step 5, lr .*, rows .* the last good checkpoint is run/.*step_000003"
    ):
        pretrain(method="simclr", **options, out="run")
    found = json.loads(Path("run/failure.json").read_text())
    assert found["step"] == 5 and len(found["rows"]) == 32
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_000003"]
    assert [line["step"] for line in run_folder.read_metrics(Path("run"))] == [4]
    assert RunError.code == 1
    pretrain(resume="run")  # the cause is gone: it goes on from the good one
    assert run_folder.read_metrics(Path("run"))[-1]["step"] == 8


def test_collapse_is_said_once_and_only_when_it_lasts():
    def said(spreads, random=1.0):
        memory = {"random": random}
        return [guards.collapsed(memory, spread) for spread in spreads]

    assert said([1.0, 0.09, 0.5, 0.09, 0.09]) == [False] * 5
    assert said([1.0, 0.09, 0.09, 0.09, 0.09, 0.09]) == [False, False, False, True, False, False]
    assert said([0.5, 0.051, 0.051, 0.051], random=0.5) == [False] * 4
    assert said([0.0, 0.0, 0.0, 0.0]) == [False, False, True, False]  # collapsed before its first log line
    assert said([0.0, 0.0, 0.0], random=0.0) == [False, False, True]  # and at random weights, as black images are
    assert said([0.02, 0.02, 0.02], random=0.15) == [False] * 3


def test_images_that_are_all_black_are_warned_of(place, capsys):
    black = Dataset.from_dict({"image": [Image.new("RGB", (16, 16))] * 40}).cast_column("image", ImageFeature())
    black.to_parquet("black.parquet")
    options = dict(dataset="black.parquet", batch_size=8, log_every=1)
    pretrain(method="byol", backbone="resnet_tiny", steps=4, **options)
    said = capsys.readouterr().out
    assert "warning: step 3: the embeddings collapse; their spread is 0, or a tenth of that at random weights" in said


def test_collapse_is_in_the_output_and_the_summary(place, monkeypatch, capsys):
    monkeypatch.setattr(
        guards, "collapsed", lambda memory, spread: memory.setdefault("warned", spread > 0) and spread > 0
    )
    pretrain(method="simclr", **SHORT, steps=2, out="run")
    said = capsys.readouterr().out
    assert "warning: step 2: the embeddings collapse" in said
    assert "warning       the embeddings collapsed" in said


def test_starting_and_going_on_are_one_command(place):
    options = dict(method="simclr", **SHORT, steps=4, out="run", resume=True)
    pretrain(**options)
    Path("run/backbone.safetensors").unlink()  # as if killed between the last checkpoint and this
    pretrain(**options)
    assert Path("run/backbone.safetensors").exists()
