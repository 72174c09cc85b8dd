"""What a run says of itself: the figures of a log line, and the summary at its end."""

import shlex
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from methods.networks import Losses
from training.optimize import learning_rate
from training.state import Training

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


def summary(t: Training, bad: set, clipped: int = 0) -> str:
    s, folder = t.s, t.folder
    assert folder is not None
    lines = [f"finished {folder} at step {s.steps}"]
    if t.knn is not None:
        lines.append(f"  k-NN          {t.knn:.1f} %")
    if "knn_pixels" in t.baselines:
        lines.append(f"  raw pixels    {t.baselines['knn_pixels']:.1f} %")
        if "knn_initial" in t.baselines:
            lines.append(f"  at the start  {t.baselines['knn_initial']:.1f} %")
        else:
            lines.append(f"  random net    {t.baselines['knn_random']:.1f} %")
    if "warned" in t.health:
        lines.append(f"  warning       the embeddings collapsed; {COLLAPSE}")
    if bad:
        lines.append(f"  skipped       {len(bad)} bad images")
    if clipped:
        lines.append(
            f"  clipped       {clipped:,} images that were read had values beyond --pixel_range {s.pixel_range}"
        )
    lines.append(f"  weights       {folder / 'backbone.safetensors'}  ({s.backbone}, as timm names them)")
    lines.append(f"  look at       {folder / 'views.png'}, {folder / 'curves.png'}")
    other = 1 if s.sim_weight < 1 else 0
    again = {"method": s.method, **{k: v for k, v in s.given.items() if k not in NOT_AGAIN}}
    words = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in again.items())
    words += f" --sim_weight {other}"
    lines.append(f"next: accelerate launch bsim.py {words}   ({'plain ' if other else 'BSIM with '}{s.method})")
    return "\n".join(lines)
