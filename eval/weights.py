"""The backbone that is evaluated: of a run, a checkpoint, a file, or a timm name for random weights."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flags import UserError, first_line, nearest, one_of
from methods import METHODS
from methods.networks import backbone, backbone_names
from training import folder as run_folder
from training.resolve import LOOP


class Backbone(NamedTuple):
    network: nn.Module  # images [N, 3, image_size, image_size] to features [N, network.num_features]
    name: str
    image_size: int
    folder: Path  # where its results go
    config: dict  # the run's settings; of a timm name or a bare file none


def load_backbone(run: str, *, architecture: str | None = None, image_size: int | None = None) -> Backbone:
    """The backbone of a finished run (its folder), of a checkpoint (its folder), of a file, or a timm model's name.

    A timm name gets random weights, from torch's generator. A file's architecture is that of the config.json beside it,
    else `architecture`. Raises UserError where a run is not finished, or where the weights do not fit.
    """
    if not run:
        raise UserError("--run: want a run's folder, a backbone.safetensors, or a timm name for random weights")
    path = Path(run).expanduser()
    if not path.exists():
        if path.parent != Path() or run not in backbone_names():
            raise UserError(f"--run {run}: no such folder or file, and no timm model{nearest(run, backbone_names())}")
        size = image_size or (32 if run == "resnet_tiny" else 224)
        return Backbone(backbone(run, size), run, size, Path(), {})
    file, prefix, folder = path, "", path.parent
    if path.is_dir() and (path / "method.safetensors").exists():  # a checkpoint
        file, prefix, folder = path / "method.safetensors", "backbone.", path.parent.parent
    elif path.is_dir():
        file, folder = path / "backbone.safetensors", path
    config = run_folder.config_of(folder, "--run") if path.is_dir() or (folder / "config.json").exists() else {}
    if not file.exists():
        last = run_folder.last_checkpoint(path)
        usable = f"evaluate its last checkpoint: --run {last}" if last else "it has no checkpoint yet"
        raise UserError(f"--run {run}: is not finished; {usable}")
    name, size = architecture or config.get("backbone"), image_size or config.get("image_size")
    if name is None or size is None:
        raise UserError(f"--run {run}: has no config.json beside it; say --backbone NAME and --image_size PIXELS")
    one_of("backbone", name, backbone_names())
    network = backbone(name, size)
    try:
        weights = {k[len(prefix) :]: v for k, v in load_file(file).items() if k.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--run {run}: {file} is damaged ({first_line(error)})") from error
    wanted = network.state_dict()
    wrong = [
        k for k in {**weights, **wanted} if k not in weights or k not in wanted or weights[k].shape != wanted[k].shape
    ]
    if wrong:
        raise UserError(
            f"--run {run}: {len(wrong)} of its weights do not fit {name} at {size} pixels, such as "
            + ", ".join(sorted(wrong)[:3])
        )
    network.load_state_dict(weights)
    return Backbone(network, name, size, folder, config)


def load_method(loaded: Backbone) -> nn.Module:
    """The whole method of the run's last checkpoint, projector included, around the backbone."""
    config = loaded.config
    method_file = METHODS[config["method"]]
    scale = {"image_size": config["image_size"], "width": loaded.network.num_features}
    published = method_file.defaults(**scale, steps=config["steps"], images=config["images"])
    method = method_file.Method(loaded.network, **{k: config[k] for k in published if k not in LOOP})
    method.load_state_dict(load_file(run_folder.last_checkpoint(loaded.folder) / "method.safetensors"))
    return method
