"""The backbone that --init and --run name: of a run, a checkpoint, timm, the Hub, or somebody's file."""

from pathlib import Path
from typing import Any, NamedTuple

from bsim import ViewRecipe
from flags import UserError, first_line, nearest, one_of
from methods import METHODS
from methods.networks import backbone, backbone_names
from training import folder as run_folder
from training import state_dicts

FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin")


class Backbone(NamedTuple):
    network: Any  # of timm: images [N, 3, image_size, image_size] to features [N, network.num_features]
    name: str
    image_size: int
    folder: Path  # where its results go
    config: dict  # the run's settings; of a timm name or a bare file none
    file: Path | None = None  # of the weights; None for those of a timm name
    checkpoint: Path | None = None  # the folder, where the weights are a checkpoint's
    mean: tuple[float, ...] = ViewRecipe().mean  # of the images that the weights are used to
    std: tuple[float, ...] = ViewRecipe().std
    random: bool = False
    given: str = ""  # what it was asked for by
    weights: str = "online"
    found: str = ""  # a line on what was loaded of a file, or downloaded


def load_backbone(
    run: str,
    *,
    architecture: str | None = None,
    image_size: int | None = None,
    weights: str = "online",
    flag: str = "--run",
    may_be_random: bool = True,
) -> Backbone:
    """The backbone of a finished run (its folder), a checkpoint (its folder), a file, a timm name or a Hub id.

    A timm name without a tag gets random weights, from torch's generator, where they may be; one with a tag
    (resnet50.a1_in1k) and hf-hub:OWNER/NAME are downloaded. A file's architecture is that of the config.json beside it,
    else `architecture`. weights: online, or momentum for a run's slow copy. flag: what errors call `run`. Raises
    UserError where a run is not finished, or where the weights do not fit.
    """
    said = f"{flag} {run}"
    if not run:
        raise UserError(
            f"{flag}: want a run's folder, a checkpoint's folder, a file of weights, or a timm name: resnet50 for "
            "random weights, resnet50.a1_in1k for those of that tag"
        )
    path = Path(run).expanduser()
    if path.exists():
        return _local(path, architecture, image_size, weights, said)
    if weights == "momentum":
        raise UserError(f"--weights momentum: is for a run's folder or a checkpoint's; {run} is no such folder")
    base, _, tag = run.partition(".")
    if run.startswith("hf-hub:") or tag and base in backbone_names():
        return _downloaded(run, architecture, image_size, said)
    if path.parent != Path() or run not in backbone_names():
        raise UserError(f"{said}: no such folder or file, and no timm model{nearest(run, backbone_names())}")
    if not may_be_random:
        raise UserError(f"{said}: is a network without weights; {_tags(run)}")
    if architecture not in (None, run):
        raise UserError(f"--backbone {architecture}: {said} is another network; drop one of them")
    size = image_size or (32 if run == "resnet_tiny" else 224)
    return Backbone(backbone(run, size), run, size, Path(), {}, random=True, given=run)


def _local(path, architecture, image_size, weights, said):
    """Of a run's folder, a checkpoint's folder or a file."""
    file, prefix, folder, checkpoint = path, None, path.parent, None
    if path.is_dir() and (path / "method.safetensors").exists():
        file, prefix, folder, checkpoint = path / "method.safetensors", "backbone.", path.parent.parent, path
    elif path.is_dir():
        file, prefix, folder = path / "backbone.safetensors", "", path
    config = run_folder.config_of(folder, said.split()[0]) if path.is_dir() or (folder / "config.json").exists() else {}
    config = config if "backbone" in config else {}  # else it is of something else, such as the config.json of the Hub
    if not file.exists():
        last = run_folder.last_checkpoint(path)
        usable = f"take its last checkpoint: {said.split()[0]} {last}" if last else "it has no checkpoint yet"
        raise UserError(f"{said}: is not finished; {usable}")
    if weights == "momentum":
        checkpoint, prefix = checkpoint or run_folder.last_checkpoint(folder), _momentum(config, said)
        if checkpoint is None or not path.is_dir():
            raise UserError(f"{said}: has no checkpoint, which alone holds momentum weights")
        file = checkpoint / "method.safetensors"
    name, side = architecture or config.get("backbone"), image_size or config.get("image_size")
    if name is None or side is None:
        raise UserError(f"{said}: has no run's config.json beside it; say --backbone NAME and --image_size PIXELS")
    one_of("backbone", name, backbone_names())
    made = state_dicts.fitted(state_dicts.read(file, said), name, side, said, prefix)
    named = f" (their names begin with {made.prefix})" if made.prefix else ""
    counters = " (counters of batch norm)" if made.missing else ""
    line = (
        f"{file}: {made.loaded:,} tensors loaded{named}, {made.left_out:,} left out, {made.missing:,} missing{counters}"
    )
    usual = ViewRecipe()
    mean, std = (tuple(config.get(k) or getattr(usual, k)) for k in ("mean", "std"))
    return Backbone(
        made.network,
        name,
        side,
        folder,
        config,
        file,
        checkpoint,
        mean,
        std,
        given=str(path),
        weights=weights,
        found=line,
    )


def _momentum(config, said):
    """Where the slow copy of the backbone is in a checkpoint."""
    method = config.get("method")
    found = getattr(getattr(METHODS.get(method), "Method", None), "momentum_backbone", None)
    if found is None:
        have = [name for name, file in METHODS.items() if getattr(file.Method, "momentum_backbone", None)]
        raise UserError(f"--weights momentum: {method or said} has none; {', '.join(have)} have. Drop --weights")
    return found


def _downloaded(run, architecture, image_size, said):
    """Weights that timm knows by a tag, or that the Hub has."""
    import timm

    if not run.startswith("hf-hub:") and run not in timm.list_pretrained(f"{run.partition('.')[0]}.*"):
        raise UserError(f"{said}: no such weights; {_tags(run)}")
    try:
        theirs: Any = timm.create_model(run, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, the Hub, or a file there that is none of timm's
        more = "" if run.startswith("hf-hub:") else f". {_tags(run)}"
        raise UserError(
            f"{said}: could not be downloaded, and is not in the Hub's cache ({first_line(error)}){more}"
        ) from error
    about = theirs.pretrained_cfg
    name = architecture or about.get("architecture")
    one_of("backbone", name, backbone_names())
    side = image_size or about["input_size"][-1]
    made = state_dicts.fitted(theirs.state_dict(), name, side, said, "")
    line = f"{run}: {made.loaded:,} tensors loaded, {made.left_out:,} left out, {made.missing:,} missing"
    mean, std = tuple(about["mean"]), tuple(about["std"])
    return Backbone(made.network, name, side, Path(), {}, mean=mean, std=std, given=run, found=line)


def _tags(run):
    import timm

    base = run.partition(".")[0]
    tags = timm.list_pretrained(f"{base}.*")
    if not tags:
        return f"timm has no weights for {base}"
    return f"timm has {', '.join(tags[:20])}{', ...' * (len(tags) > 20)}"
