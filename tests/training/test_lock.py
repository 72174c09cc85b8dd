"""A run folder in which another process trains."""

import errno
import fcntl
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from flags import UserError
from train import pretrain
from training import folder as run_folder
from training import lock

ROOT = Path(__file__).parents[2]
SHORT = dict(dataset="digits", split="train[:200]", batch_size=32, log_every=2, eval_every=0, workers=0)
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(sys.argv[2], end="", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder, words="process 7 on node3"):
    """Another process holds the lock of `folder`, as one that trains there does."""
    words = [sys.executable, "-c", HOLDER, str(folder / ".lock"), words]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_second_process_is_refused_and_the_first_is_left_alone(place):
    run = Path("run")
    pretrain(**SHORT, steps=4, checkpoint_every=2, out="run")
    (run / "backbone.safetensors").unlink()
    before = contents(run)
    with held(run) as first:
        with pytest.raises(
            UserError, match="--resume run: process 7 on node3 trains there; wait for its end, or stop it"
        ):
            pretrain(resume="run", steps=6)
        assert contents(run) == before
        first.kill()
        first.wait()
        pretrain(resume="run", steps=6)  # what a process held ends with it
    assert [line["step"] for line in run_folder.read_metrics(run)] == [2, 4, 6]
    assert not (run / ".lock").exists()
    with held(run):  # nothing was kept
        pass


def test_of_two_that_begin_at_once_in_one_folder_one_is_refused(place, monkeypatch):
    """Both have found the folder free; the other was the first to take it."""
    Path("run").mkdir()
    monkeypatch.setattr(run_folder, "choose", lambda *flags: Path("run"))
    with held(Path("run"), ""):
        with pytest.raises(UserError, match="--out run: another process trains there; .* delete run/.lock"):
            pretrain(**SHORT, steps=2, out="run")
        assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_a_run_that_ends_meanwhile_does_not_take_the_lock_away(place, monkeypatch):
    """It deletes its file between our opening of it and our lock."""
    Path("run").mkdir()
    real, ended = fcntl.lockf, []

    def lockf(file, flags):
        if not ended:
            ended.append(Path("run/.lock").unlink())
        return real(file, flags)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock.releasing():
        lock.take(Path("run"))
        words = [sys.executable, "-c", HOLDER, "run/.lock", "another"]
        found = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert found.returncode == 1 and "BlockingIOError" in found.stderr
    assert ended and not Path("run/.lock").exists()


def test_the_lock_of_another_run_is_not_deleted(place):
    Path("run").mkdir()
    with lock.releasing():
        lock.take(Path("run"))
        Path("run/.lock").unlink()  # by the user, who takes the first run for dead
        Path("run/.lock").write_text("process 7 on node3")
    assert Path("run/.lock").read_text() == "process 7 on node3"


def test_a_disk_that_goes_away_does_not_fail_a_run_that_ends(place, monkeypatch):
    Path("run").mkdir()
    with lock.releasing():
        lock.take(Path("run"))

        def gone(*stats):
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(lock.os.path, "samestat", gone)
    assert not lock._held


def test_it_is_given_back_when_a_run_fails(place):
    Path("run").mkdir()
    with pytest.raises(ZeroDivisionError), lock.releasing():
        lock.take(Path("run"))
        assert Path("run/.lock").read_text().startswith("process ")
        raise ZeroDivisionError
    assert not Path("run/.lock").exists()
    with held(Path("run")):
        pass


def test_a_disk_without_locks_keeps_none_and_it_is_said(place, monkeypatch, capsys):
    def refuses(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    pretrain(**SHORT, steps=2, out="run")
    assert capsys.readouterr().out.count("note: the disk of run keeps no locks: a second run in it would not be") == 1
    pretrain(resume="run", steps=4)
    assert [line["step"] for line in run_folder.read_metrics(Path("run"))] == [2, 4]


@pytest.mark.slow
def test_all_of_many_processes_are_refused_by_one_line(place):
    pretrain(**SHORT, steps=2, out="run")
    words = "-m torch.distributed.run --standalone --nproc-per-node 2".split() + [
        str(ROOT / "bsim.py"),
        "--resume",
        "run",
    ]
    with held(Path("run")):
        done = subprocess.run([sys.executable, *words, "--steps", "4"], capture_output=True, text=True, timeout=300)
    assert done.stderr.count("bsim.py: --resume run: process 7 on node3 trains there") == 1
    assert "[rank" not in done.stderr  # no process ends with a traceback
    ended = re.findall(r"exitcode +: (-?\d+)", done.stderr)  # torchrun's table; -15: it was stopped after the other
    assert len(ended) == 2 and "2" in ended and set(ended) <= {"2", "-15"}
