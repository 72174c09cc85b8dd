"""The optimizer, and the learning rate of a step."""

import math

import torch
from timm.optim import Lars
from torch import nn

from training.resolve import Run


def optimizer_of(model: nn.Module, s: Run) -> torch.optim.Optimizer:
    """Momentum SGD as published decays everything; LARS and AdamW leave biases and norms out."""
    constant = getattr(model, "constant_lr", None)
    parameters: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = s.optimizer == "sgd" or parameter.ndim > 1
            parameters.setdefault((decayed, name.split(".")[0] == constant), []).append(parameter)
    adapts = s.optimizer == "lars"  # timm's LARS would take steps of plain SGD where the weight decay is 0
    groups = [
        dict(params=params, constant=fixed, weight_decay=s.weight_decay * decayed, always_adapt=adapts and decayed)
        for (decayed, fixed), params in parameters.items()
    ]
    if s.optimizer == "lars":
        return Lars(groups, lr=s.peak_lr, momentum=0.9)
    if s.optimizer == "sgd":
        # Fused, its momentum would begin with whatever lies in memory where fp16's first step overflows (torch 2.14).
        return torch.optim.SGD(groups, lr=s.peak_lr, momentum=0.9, fused=s.mixed_precision != "fp16")
    return torch.optim.AdamW(groups, lr=s.peak_lr, fused=True)


def learning_rate(step: int, s: Run) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < s.warmup_steps:
        return s.peak_lr * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / (s.steps - s.warmup_steps)
    return s.peak_lr * (1 + math.cos(math.pi * progress)) / 2
