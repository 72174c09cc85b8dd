"""What ends a run in good order, and what warns of one that goes wrong."""

import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from flags import RunError, UserError
from training import folder as run_folder

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
SAME = 3  # seconds within which a signal repeats the one before


@contextmanager
def asked_to_stop():
    """An event that SIGTERM, SIGINT and SIGHUP set, so that a step can be finished; one more, seconds later, ends at
    once.

    Earlier it is the same request: a launcher passes on to its processes what they may have got themselves. A signal
    that is ignored stays so, as SIGHUP is under `nohup`.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield asked
        return
    before = {kind: signal.getsignal(kind) for kind in SIGNALS}
    before = {kind: action for kind, action in before.items() if action != signal.SIG_IGN}
    when, terminals = [], [file for file in (1, 2) if os.isatty(file)]

    def handle(kind, frame):
        asked.set()
        _leave_closed(terminals)
        when.append(time.monotonic())
        if when[-1] - when[0] > SAME:
            signal.signal(kind, before[kind])
            signal.raise_signal(kind)

    for kind in before:
        signal.signal(kind, handle)
    try:
        yield asked
    finally:
        for kind in before:
            signal.signal(kind, before[kind])


def _leave_closed(terminals):
    """Write to nowhere what went to a terminal that is closed: a line to it would raise, before the checkpoint."""
    for file in terminals:
        if not os.isatty(file):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)


@contextmanager
def leaves_nothing(folder: Path, new: bool):
    """A new run that bad input ends before its first checkpoint leaves no folder: it holds what we wrote alone."""
    try:
        yield
    except RunError:
        raise
    except UserError:
        if new and run_folder.last_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def leaves_no_half(folder: Path, new: bool):
    """A new run that cannot write its first files leaves no folder, so that the same command can be repeated."""
    try:
        yield
    except RunError:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_finite(accelerator, losses: list, folder: Path, done: int, accumulate: int, lr, batches) -> None:
    """Stop the run if any of the losses since the last check, the last of step `done`, is not finite.

    accumulate: losses of a step. lr: the learning rate by step. Writes failure.json with the step, its learning rate
    and the rows of its batch. Raises RunError.
    """
    values = torch.stack([torch.as_tensor(v, device=accelerator.device) for v in losses])
    bad = (~values.isfinite()).nonzero().flatten()
    own = bad[:1] if len(bad) else torch.full((1,), len(values), device=values.device)
    first = int(accelerator.gather(own).min())
    if first == len(values):
        return
    step = done - (len(values) - 1 - first) // accumulate
    rows = batches.step_rows(step - 1).tolist() if hasattr(batches, "step_rows") else None
    found = {"step": step, "lr": lr(step - 1), "rows": rows}
    if accelerator.is_main_process:
        run_folder.write_json(folder / "failure.json", found)
    last = run_folder.last_checkpoint(folder)
    where = f", rows {', '.join(map(str, rows[:8]))}, ... (all in {folder / 'failure.json'})" if rows else ""
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    raise RunError(f"the loss is not finite at step {step}, lr {found['lr']:g}{where}; {good}. Try a lower --lr")


SPREAD = 0.01  # of the embeddings: below it they are one point, whatever they were at random weights


def collapsed(memory: dict, spread: float) -> bool:
    """True once: when the embeddings have collapsed in each of three log lines.

    They have where their spread is under a tenth of `memory["random"]`, that at random weights, or under SPREAD.
    """
    memory["low"] = memory.get("low", 0) + 1 if spread < max(SPREAD, memory.get("random", 0) / 10) else 0
    if memory["low"] < 3 or "warned" in memory:
        return False
    memory["warned"] = True
    return True
