"""The whole method of a run, projector included."""

import copy
from typing import Any

import torch
from torch import nn

from flags import UserError, first_line
from methods import METHODS
from training import folder as run_folder
from training import state_dicts
from training.resolve import LOOP, method_defaults
from training.weights import Backbone


def load_method(loaded: Backbone) -> Any:
    """The whole method, projector included, of the checkpoint that was loaded, else of the run's last one.

    Its backbone is that checkpoint's too, and a copy: `loaded.network` stays as it is. Raises UserError where the
    checkpoint is damaged.
    """
    config, checkpoint = loaded.config, loaded.checkpoint or run_folder.last_checkpoint(loaded.folder)
    if checkpoint is None:
        raise UserError(f"--run {loaded.folder}: has no checkpoint, which the projector would be in")
    file = checkpoint / "method.safetensors"
    weights = state_dicts.read(file, f"--run {loaded.folder}")
    try:
        method_file = METHODS[config["method"]]
        scale = {"image_size": config["image_size"], "width": loaded.network.num_features}
        scale |= {"steps": config["steps"], "images": config["images"]}
        published = method_defaults(method_file, loaded.network, **scale)
        heads = {k: config[k] for k in published if k not in LOOP}
    except KeyError as error:
        raise UserError(f"--run {loaded.folder}: its config.json is damaged (it has no {first_line(error)})") from error
    method = method_file.Method(copy.deepcopy(loaded.network), **heads)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"--run {checkpoint}: {file} is damaged ({' '.join(str(error).split())[:160]})") from error
    return method


def has_weights_of(network: nn.Module, other: nn.Module) -> bool:
    """Whether the two have the same values in all parameters and buffers."""
    theirs = other.state_dict()
    return all(torch.equal(v.cpu(), theirs[k].cpu()) for k, v in network.state_dict().items())
