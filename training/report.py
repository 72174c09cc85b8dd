"""What a run says of itself: the figures of a log line, and the summary at its end."""

import shlex
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from loading.files import counted
from methods.networks import Losses
from training.optimize import learning_rate
from training.settings import MIXTURES
from training.state import Training

PICTURES = ("views.png", "neighbours.png", "curves.png")
NOT_AGAIN = ("out", "resume", "sim_weight")  # flags that the command that is proposed does not repeat
COLLAPSE = "their spread is 0, or a tenth of that at random weights. See curves.png; try a lower --lr"


@dataclass
class Clock:
    """Images a second since the last log line."""

    since: int
    at: float = field(default_factory=time.perf_counter)

    def speed(self, done: int, batch_size: int) -> float:
        return round((done - self.since) * batch_size / (time.perf_counter() - self.at), 1)

    def restart(self, done: int) -> None:
        self.since, self.at = done, time.perf_counter()


def spread(embeddings: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a unit vector's coordinate, times sqrt(D): 1 when spread (SimSiam, section 4.1)."""
    unit = F.normalize(embeddings.detach().float(), dim=1)
    return unit.std(0).mean() * unit.shape[1] ** 0.5


def measured(t: Training, losses: Losses, done: int) -> dict[str, Any]:
    """Means over the window, which is emptied, and over the processes."""
    values = {"feature_std": spread(losses.embeddings)}
    for name, seen in t.window.items():
        values[name] = torch.stack([torch.as_tensor(v, device=t.accelerator.device) for v in seen]).mean()
    means = {k: float(t.accelerator.reduce(v, reduction="mean")) for k, v in values.items()}
    t.window.clear()
    epoch = round(done / t.s.steps_per_epoch, 3) if t.s.steps_per_epoch else None
    numbers = {k: means.get(k) for k in ("loss", "sim", "bsim")}
    return {
        "step": done,
        "epoch": epoch,
        **numbers,
        "lr": learning_rate(done - 1, t.s),
        "feature_std": means["feature_std"],
    }


def without_labels(t: Training) -> list[str]:
    """A line on what is measured of images without labels; none of images with labels."""
    source = t.source
    if not source.note:
        return []
    if source.held_out:
        held_out = counted(len(source.held_out[1]), "held-out image")
        said = f"Effective rank, alignment and uniformity of {held_out} are measured"
        return [f"accuracy is left out: {source.note}. {said}"]
    why = "none was held out when the run began" if t.start else "the images are too few to hold some out"
    return [f"nothing is evaluated: {source.note}, and {why}"]


ROWS = {"one_label": "1 label a class", "five_labels": "5 labels a class", "knn": "k-NN, all labels"}


def accuracies(baselines: dict, figures: dict) -> str:
    """A row for few labels and one for all: after training where that was, raw pixels, the network at the start."""
    first = "initial" if "knn_initial" in baselines else "random"
    heads = {"": "trained", "_pixels": "raw pixels", f"_{first}": f"{first} weights"}
    heads = {end: head for end, head in heads.items() if any(f"{row}{end}" in {**baselines, **figures} for row in ROWS)}
    lines = ["  accuracy in %     " + "".join(word.rjust(16) for word in heads.values())]
    for row, named in ROWS.items():
        values = [(figures if not end else baselines).get(f"{row}{end}") for end in heads]
        if any(value is not None for value in values):
            shown = ("-" if value is None else f"{value:.1f}" for value in values)
            lines.append(f"  {named:<18}" + "".join(word.rjust(16) for word in shown))
    return "\n".join(lines)


def summary(t: Training, bad: set, clipped: int = 0) -> str:
    s, folder = t.s, t.folder
    assert folder is not None
    lines = [f"finished {folder} at step {s.steps}"]
    if "knn" in t.figures:
        lines.append(accuracies(t.baselines, t.figures))
    if t.figures.get("effective_rank") is not None:
        rank, alignment, uniformity = (t.figures[k] for k in ("effective_rank", "alignment", "uniformity"))
        lines.append(
            f"  features      effective rank {rank:.1f}, alignment {alignment:.2f}, uniformity {uniformity:.2f}"
        )
    if "warned" in t.health:
        lines.append(f"  warning       the embeddings collapsed; {COLLAPSE}")
    if bad:
        lines.append(f"  skipped       {len(bad)} bad images")
    if clipped:
        lines.append(
            f"  clipped       {clipped:,} images that were read had values beyond --pixel_range {s.pixel_range}"
        )
    lines.append(f"  weights       {folder / 'backbone.safetensors'}  ({s.backbone}, as timm names them)")
    pictures = [name for name in PICTURES if (folder / name).exists()]
    lines.append(f"  look at       {', '.join(str(folder / name) for name in pictures)}")
    other = 1 if s.sim_weight < 1 else 0
    left = NOT_AGAIN + MIXTURES if other else NOT_AGAIN
    again = {"method": s.method, **{k: v for k, v in s.given.items() if k not in left}}
    words = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in again.items())
    words += f" --sim_weight {other}"
    lines.append(f"next: accelerate launch bsim.py {words}   ({'plain ' if other else 'BSIM with '}{s.method})")
    return "\n".join(lines)
