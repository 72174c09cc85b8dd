"""A dry run: the first steps of a run, timed. No run folder is made."""

import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from flags import progress
from training.resolve import Run


class Found(NamedTuple):
    """What a dry run measures."""

    seconds: float  # a step
    skipped: int  # steps that were taken first, and are not in `seconds`
    timed: int
    memory: int  # bytes, at the peak, of the largest process


def measure(train_step, accelerator, s: Run) -> Found:
    """Take the first steps of the run by train_step(step); time all but the first half of them.

    The first ones pay for what is set up once, and use up batches that workers made before the clock was started.
    """
    steps = min(s.dry_run or s.steps, s.steps)
    skipped, clock = steps // 2, None
    bar = progress(steps, shown=accelerator.is_main_process)
    for step in range(steps):
        if step == skipped:
            clock = _now(accelerator)
        train_step(step)
        bar.update()
    seconds = (_now(accelerator) - clock) / (steps - skipped)
    bar.close()
    return Found(seconds, skipped, steps - skipped, max(gather_object([_peak(accelerator)])))


def report(found: Found, model: torch.nn.Module, device: str, ahead: int, s: Run) -> str:
    """The text that is printed; `ahead` is how many batches the workers of a process hold ready."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, every = sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
    whose = "allocated on the GPU" if device == "cuda" else "of main memory, libraries included,"
    lines = [
        f"dry run: {found.timed} steps timed, the {found.skipped} before them left out; nothing is written",
        f"  parameters    {trained:,} trained, {every:,} in all",
        f"  peak memory   {found.memory / 2**30:.2f} GiB {whose} by the largest process",
        f"  speed         {s.batch_size / found.seconds:,.1f} images/s, {found.seconds:.4g} s a step",
        f"  the run       {s.steps:,} steps, {timedelta(seconds=round(s.steps * found.seconds))}"
        " (h:m:s), without start, k-NN and checkpoints",
    ]
    if ahead > found.skipped * s.accumulate:
        enough = 2 * -(-ahead // s.accumulate)
        lines.append(f"  note          workers hold {ahead} batches ready; are the data slow? --dry_run {enough}")
    return "\n".join(lines)


def _now(accelerator):
    """The clock, when every device has done what it was given."""
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter()


def _peak(accelerator):
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
