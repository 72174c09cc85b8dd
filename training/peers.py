"""Many processes: one that is lost is noticed, and all stop at the same step."""

import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from flags import RunError, first_line
from methods.networks import processes
from training import folder as run_folder

BEAT, SILENCE = 5, 30  # seconds between signs of life, and without one until a process counts as lost


def agreement(asked: threading.Event):
    """A function that says at each step whether any process was asked to stop; all hear it at the same step.

    What it says is a step old, so that no process waits for another, nor for its device.
    """
    if processes()[1] == 1:
        return asked.is_set
    group: Any = dist.new_group(backend="gloo")
    pending: list[Any] = []

    def stops():
        flag = torch.tensor(float(asked.is_set()))
        pending.append((flag, dist.all_reduce(flag, group=group, async_op=True)))
        if len(pending) == 1:
            return False
        flag, work = pending.pop(0)
        work.wait()
        return bool(flag)

    return stops


class Peers:
    """Ends this process, with a line that says why, when another one is lost: a collective would wait for it for ever.

    All give signs of life in the store in which torchrun's processes met. Process 0 looks for all, the others for
    process 0. As a context it also turns the error of a closed connection into a RunError, and at the end takes leave.
    """

    def __init__(self):
        self.folder, self.fresh, self.leaves = None, time.monotonic(), threading.Event()
        self.rank, self.world = processes()
        if self.world > 1:
            self.beating = threading.Thread(target=self._beat, daemon=True)
            self.beating.start()
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        if isinstance(error, RuntimeError) and re.search("gloo|nccl|connection|peer|timed? ?out", str(error), re.I):
            found = RunError(f"another process has ended ({first_line(error)}); {self._advice()}")
            found.everywhere = False
            raise found from error
        if error is None:
            self.leaves.set()
            self.beating.join(BEAT)

    def _advice(self):
        last = run_folder.last_checkpoint(self.folder) if self.folder else None
        return f"{last} is whole: start again with --resume {self.folder}" if last else "there is no checkpoint yet"

    def _end(self, lost):
        print(f"bsim.py: {lost} has not been heard of for {SILENCE} s; {self._advice()}", file=sys.stderr, flush=True)
        os._exit(RunError.code)  # the main thread waits in a collective

    def _watch(self):
        while not self.leaves.wait(1):
            if time.monotonic() - self.fresh > SILENCE + BEAT:
                self._end(f"process 0, at {os.environ['MASTER_ADDR']},")

    def _beat(self):
        try:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))

            def read(key):
                return store.get(key).decode() if store.check([key]) else None

            store.set(f"bsim/host/{self.rank}", socket.gethostname())
            heard = {peer: (None, time.monotonic()) for peer in (range(1, self.world) if self.rank == 0 else [0])}
            for beat in count():
                left = self.leaves.is_set()
                store.set(f"bsim/alive/{self.rank}", "left" if left else str(beat))
                if left:
                    return
                for peer, (sign, when) in heard.items():
                    new = read(f"bsim/alive/{peer}")
                    if new != sign or new == "left":
                        heard[peer] = new, time.monotonic()
                    elif time.monotonic() - when > SILENCE:
                        self._end(f"process {peer} on {read(f'bsim/host/{peer}')}")
                self.fresh = time.monotonic()
                self.leaves.wait(BEAT)
        except RuntimeError:  # the store does not answer; `_watch` gives it as long as it gives a process
            pass
