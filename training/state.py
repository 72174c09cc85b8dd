"""What the functions of the training loop hand to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import data
from bsim import Mixture, ViewRecipe
from training import folder as run_folder
from training.resolve import Run


@dataclass
class Training:
    """What a step needs, and what it leaves."""

    s: Run
    accelerator: Accelerator
    source: data.Source
    method: Any  # an nn.Module as methods/__init__.py says; `model` is the same, wrapped for many processes
    model: nn.Module
    optimizer: torch.optim.Optimizer
    views: tuple[ViewRecipe, ...]
    recipes: tuple[ViewRecipe, ...]  # of whole images; `views` are what is left of them where workers crop
    draw_mixture: Callable[..., Mixture]
    start: int = 0
    folder: Path | None = None  # of the run; None in a dry run
    new: bool = False  # this process made the folder
    window: dict[str, list] = field(default_factory=dict)  # losses since the last log line
    baselines: dict[str, Any] = field(default_factory=dict)  # accuracies before training
    health: dict[str, Any] = field(default_factory=dict)  # what the collapse alarm remembers
    places: list | None = None  # where the readers of a stream stood at the checkpoint
    figures: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    batches: Any = None
    feed: Any = None
    to_device: Callable[[torch.Tensor], torch.Tensor] = lambda images: images

    @property
    def made_by(self) -> dict:
        return {"method": self.s.method, "backbone": self.s.backbone, "format": run_folder.FORMAT}
