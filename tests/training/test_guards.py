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

from eval.results import write_result
from flags import RunError
from methods import METHODS
from train import pretrain
from training import folder as run_folder
from training import guards, pictures

ROOT = Path(__file__).parents[2]
SHORT = dict(dataset="digits", split="train[:200]", batch_size=32, log_every=2, eval_every=0)


@pytest.mark.slow
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
    assert f"stopped at step {step}; resume it: accelerate launch bsim.py --resume run" in out.decode()
    assert run_folder.read_metrics(Path("run"))[-1]["step"] == step
    pretrain(resume="run", steps=step + 2)
    assert [line["step"] for line in run_folder.read_metrics(Path("run"))] == list(range(1, step + 3))


@pytest.mark.parametrize("kind", guards.SIGNALS)
def test_signals_ask_to_stop_and_are_put_back(kind):
    own = signal.signal(kind, signal.SIG_DFL)  # pytest may have been started with it ignored, as by nohup
    try:
        with guards.asked_to_stop() as asked:
            signal.raise_signal(kind)
            assert asked.is_set()
        assert signal.getsignal(kind) == signal.SIG_DFL
    finally:
        signal.signal(kind, own)


def test_nohup_stays_as_it_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guards.asked_to_stop() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.is_set() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_goes_to_a_closed_terminal_goes_nowhere():
    ours, theirs = os.openpty()
    assert os.isatty(theirs)
    guards._leave_closed([theirs])
    assert os.isatty(theirs)  # open: lines are still shown
    os.close(ours)
    with pytest.raises(OSError):
        os.write(theirs, b"a line")
    guards._leave_closed([theirs])
    assert os.write(theirs, b"a line") == 6
    os.close(theirs)


def full(path):
    """Make `path` a file to which nothing can be written: the disk is full."""
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "views.png", "curves.png", "backbone.safetensors"])
def test_a_full_disk_is_one_line_whatever_is_written(place, monkeypatch, name):
    write, append = run_folder.write, run_folder.append

    def fills(path, save):
        if path.name == name != "metrics.jsonl":  # which is written anew only where it is cut
            full(path.with_name(f".{name}.part"))
        write(path, save)

    def fills_when_appended(path, line):
        if path.name == name and path.exists() and path.stat().st_size:
            path.rename("kept")
            full(path)
        append(path, line)

    for module in (run_folder, pictures):
        monkeypatch.setattr(module, "write", fills)
    monkeypatch.setattr(run_folder, "append", fills_when_appended)
    with pytest.raises(RunError) as caught:
        pretrain(method="simclr", **SHORT, steps=6, checkpoint_every=2, out="run")
    advice = "or name a folder on another disk: --out FOLDER" if name == "config.json" else "then --resume run"
    advice = "then repeat the command" if name == "curves.png" else advice
    assert str(caught.value) == f"run/{name} cannot be written (No space left on device); make room in run, {advice}"
    assert not list(Path("run").glob(".*.part"))
    if name == "config.json":
        assert not Path("run").exists()  # the same command can be repeated
        return
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if name == "metrics.jsonl":
        Path("kept").rename("run/metrics.jsonl")
    if name != "curves.png":
        pretrain(resume="run")
    assert [line["step"] for line in run_folder.read_metrics(Path("run"))] == [2, 4, 6]


def test_a_line_that_the_disk_has_no_room_for_leaves_no_half(place):
    disk = place / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]).returncode:
        pytest.skip("wants root, to mount a small tmpfs")
    try:
        path, lines = disk / "metrics.jsonl", 0
        (disk / "results.json").write_text("before")
        with pytest.raises(RunError, match="No space left on device"):
            while True:
                run_folder.append(path, json.dumps({"step": lines, "more": "x" * 9000}))
                lines += 1
        assert [line["step"] for line in run_folder.read_metrics(disk)] == list(range(lines)) and lines > 2
        with pytest.raises(RunError, match="results.json cannot be written"):
            run_folder.write(disk / "results.json", lambda file: file.write_text("x" * 90000))
        assert (disk / "results.json").read_text() == "before" and len(list(disk.iterdir())) == 2
        with pytest.raises(RunError, match="results.jsonl cannot be written .* make room in"):
            write_result(disk, "knn", "digits", {"seed": 0, "more": "x" * 90000}, {})
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def killed(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
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
    assert len(found) == 3 * len(METHODS) and all(x["identical"] and x["kills"] == 1 for x in found)


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
