"""The backbone as other code wants it: for timm, torchvision, Detectron2, or as a folder for the Hub.

python -m eval.export --run runs/moco --format detectron2
"""

from eval.settings import Export
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Export, "eval.export")

import json
import re
import shutil
from pathlib import Path
from pickle import dumps
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save
from timm.models.resnet import ResNet
from torch import nn

from eval.command import backbone_of
from eval.results import read_results, table, weights_of
from flags import Given, UserError, command, reading
from methods.networks import SMALL_STEM
from training import folder as run_folder
from training.weights import Backbone

POSSIBLE = {
    "torchvision": "ResNets, ResNeXts, wide ResNets and DenseNets, such as resnet50 or densenet121",
    "Detectron2": "torchvision's ResNets, ResNeXts and wide ResNets, such as resnet50 or resnext50_32x4d",
}
CARD = (
    "method sim_weight mix alpha dataset subset split streaming image_size steps epochs batch_size lr optimizer "
    "weight_decay seed"
).split()

# ---------------------------------------------------------------------------------------------------------------------
# Whether a library has the network at all.


def is_small(loaded: Backbone) -> bool:
    """Whether it has the stem that is for small images, which no library's constructor makes."""
    return isinstance(loaded.network, ResNet) and isinstance(loaded.network.maxpool, nn.Identity)


def refuse_tiny(loaded, library):
    if loaded.name == "resnet_tiny":
        raise UserError(
            f"--run: {library} has no resnet_tiny, which is made here: load its backbone.safetensors into "
            f'methods.networks.backbone("resnet_tiny", {loaded.image_size}), or train with another --backbone'
        )


def refuse_small(loaded, library):
    refuse_tiny(loaded, library)
    if is_small(loaded):
        raise UserError(
            f"--run: its {loaded.name}, made for small images, begins with a 3x3 convolution and no max-pool, "
            f"{library}'s with 7x7. Write it with --format timm, which says how to load it, or train with --image_size "
            f"{SMALL_STEM + 1} or more"
        )


def timm_arguments(loaded: Backbone) -> dict:
    """What timm.create_model wants for this network: transformers their size and patches, others nothing."""
    sized: dict[str, Any] = dict(num_classes=0, img_size=loaded.image_size)
    try:
        made: Any = timm.create_model(loaded.name, **sized)
    except TypeError:
        return dict(num_classes=0)
    embedding: Any = getattr(loaded.network, "patch_embed", None)
    side = getattr(embedding, "patch_size", None)
    return sized | {"patch_size": side[0]} if side and side != made.patch_embed.patch_size else sized


@torch.no_grad()
def torchvision_model(loaded: Backbone, library: str = "torchvision"):
    """torchvision's network of that name with these weights, in the place of its classifier nothing.

    Raises UserError, in the name of `library`, where there is none, or where its keys, or its features of a random
    image, are others.
    """
    refuse_small(loaded, library)
    weights, possible = loaded.network.state_dict(), f"possible are {POSSIBLE[library]}"
    if loaded.name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--run: {library} has no {loaded.name}; {possible}")
    network = torchvision.models.get_model(loaded.name)
    theirs = network.state_dict()
    wrong = [k for k in weights if k not in theirs or theirs[k].shape != weights[k].shape]
    heads = {k.partition(".")[0] for k in theirs if k not in weights}
    if wrong or len(heads) != 1:
        raise UserError(f"--run: {library}'s {loaded.name} has other layers, or names them otherwise; {possible}")
    network.load_state_dict(weights, strict=False)
    setattr(network, heads.pop(), nn.Identity())
    images = torch.randn(2, 3, loaded.image_size, loaded.image_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = loaded.network.eval()(images), network.eval()(images)
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(ours.abs().max())):
        raise UserError(f"--run: {library}'s {loaded.name} computes other features; {possible}")
    return network


# ---------------------------------------------------------------------------------------------------------------------
# The formats: of each the content, of a file or of a folder's files, and how it is loaded from `target`.


def for_timm(loaded: Backbone, target: Path):
    """The weights under timm's names, in safetensors; the small-image stem is put in where it is loaded."""
    refuse_tiny(loaded, "timm")
    given = "".join(f", {k}={v}" for k, v in timm_arguments(loaded).items())
    stem = ""
    if is_small(loaded):
        stem = (
            f"network.conv1 = torch.nn.Conv2d(3, {loaded.network.conv1.out_channels}, 3, padding=1, bias=False); "
            "network.maxpool = torch.nn.Identity(); "
        )
    return _safetensors(loaded), (
        "load it: import timm, torch; from safetensors.torch import load_file; "
        f'network = timm.create_model("{loaded.name}"{given}); {stem}'
        f"network.load_state_dict(load_file({str(target)!r}))"
    )


def for_torchvision(loaded: Backbone, target: Path):
    """The weights under torchvision's names, in safetensors, without the classifier's."""
    torchvision_model(loaded)
    return _safetensors(loaded), (
        "load it: import torchvision; from safetensors.torch import load_file; "
        f"network = torchvision.models.{loaded.name}(); "
        f"network.load_state_dict(load_file({str(target)!r}), strict=False)"
    )


def detectron2_key(key: str) -> str:
    """torchvision's name of a ResNet's weight as Detectron2's: layer1.0.bn2.bias is res2.0.conv2.norm.bias."""
    key = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return key if key.startswith("res") else f"stem.{key}"


def for_detectron2(loaded: Backbone, target: Path):
    """A pickle in the format of Detectron2's model zoo: {"model": {key: array}, "matching_heuristics": True}."""
    refuse_small(loaded, "Detectron2")
    if not isinstance(loaded.network, ResNet):
        raise UserError(f"--run: Detectron2 has no {loaded.name}; possible are {POSSIBLE['Detectron2']}")
    network = torchvision_model(loaded, "Detectron2")  # whose ResNet computes the same with the stride in the 3x3
    weights = {k: v.numpy() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    model = {"model": {detectron2_key(k): v for k, v in weights.items()}}
    content = dumps(model | {"__author__": "BSIM", "matching_heuristics": True}, protocol=3)
    # NumPy 2 names a module that the NumPy 1 of many a Detectron2 has not; both know it by the old name.
    content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    settings = {
        "WEIGHTS": target.absolute(),
        "PIXEL_MEAN": _bytes(loaded.mean),
        "PIXEL_STD": _bytes(loaded.std),
        "RESNETS.DEPTH": re.findall(r"\d+", loaded.name)[0],
        "RESNETS.NUM_GROUPS": network.groups,
        "RESNETS.WIDTH_PER_GROUP": network.base_width,
        "RESNETS.RES2_OUT_CHANNELS": weights["layer1.0.conv1.weight"].shape[1] * network.layer1[0].expansion,
        "RESNETS.STRIDE_IN_1X1": False,
    }
    return content, "its settings: INPUT.FORMAT RGB " + " ".join(f"MODEL.{k} {v}" for k, v in settings.items())


def _bytes(shares):
    return f'"[{", ".join(f"{255 * share:.3f}" for share in shares)}]"'


def for_hub(loaded: Backbone, target: Path):
    """A folder of timm's for the Hub: model.safetensors, config.json, and README.md, the model card."""
    refuse_small(loaded, "timm")
    arguments = timm_arguments(loaded)
    theirs = loaded.network.pretrained_cfg
    size = [3, loaded.image_size, loaded.image_size]
    images = dict(mean=loaded.mean, std=loaded.std, input_size=size, interpolation="bilinear", crop_pct=7 / 8)
    images |= {k: theirs[k] for k in ("fixed_input_size", "first_conv", "classifier") if theirs.get(k) is not None}
    config = {
        "architecture": loaded.name,
        "num_classes": 0,
        "num_features": loaded.network.num_features,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": {"num_classes": 0, **images},
    }
    content = {"model.safetensors": _safetensors(loaded), "README.md": card(loaded).encode()}
    content["config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    return content, f"load it: import timm; network = timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"


def _safetensors(loaded):
    return save({k: v.contiguous() for k, v in loaded.network.state_dict().items()}, {"format": "pt"})


def card(loaded: Backbone) -> str:
    """A model card in Markdown, from the run's settings and results."""
    config = loaded.config
    method = config.get("method")
    settings = [[k, _exactly(config[k])] for k in CARD if config.get(k) is not None]
    if loaded.checkpoint is not None:  # the steps until then; how many epochs those are depends on the images
        step = int(loaded.checkpoint.absolute().name.removeprefix("step_"))
        settings = [[k, step if k == "steps" else v] for k, v in settings if k != "epochs"]
    settings += [["versions", ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items())]] * bool(config)
    with reading(f"{loaded.folder / 'results.jsonl'}"):
        results = [
            [line["protocol"], line["dataset"], _measured(line["metrics"]), line["seed"]]
            for line in (read_results(loaded.folder) if config else [])
            if weights_of(*map(line["settings"].get, ("run", "weights"))) == weights_of(loaded.given, loaded.weights)
        ]
    mixed = bool(method) and config.get("sim_weight") != 1
    paper = ", which mixes images ([arXiv 2011.13356](https://arxiv.org/abs/2011.13356))" * mixed
    tags = ["timm", "image-feature-extraction", "self-supervised", *[method] * bool(method), *["bsim"] * mixed]
    front = "\n".join(["---", "library_name: timm", "tags:", *(f"- {tag}" for tag in tags), "---"])
    how = (
        "with random weights"
        if loaded.random
        else f"with the weights of {loaded.file.name if loaded.file else loaded.found.partition(':')[0]}"
    )
    if method:
        how = f"trained without labels by {method.upper()}{'-BSIM' * mixed}{paper}"
    if loaded.checkpoint is not None:
        how += f", at step {step}, a checkpoint before its end" * (step < config.get("steps", 0))
    evaluated = table(results, ["protocol", "images", "in per cent", "seed"]) if results else "None was run."
    return f"""{front}

# {loaded.name}, {loaded.image_size} pixels

A backbone {how}; it has no classifier.

```python
import timm

network = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # [N, 3, H, W] to [N, {loaded.network.num_features}]
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
```

## How it was trained

{table(settings, ["setting", "value"]) if settings else "No run's settings are known."}

## Evaluations

{evaluated}
"""


def _exactly(value):
    """0.50, but 1e-06: what two digits would change is written as it is."""
    return str(value) if isinstance(value, float) and float(f"{value:.2f}") != value else value


def _measured(metrics):
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())


FORMATS = {  # who makes it, and its default name in RUN/export
    "timm": (for_timm, "timm.safetensors"),
    "torchvision": (for_torchvision, "torchvision.safetensors"),
    "detectron2": (for_detectron2, "detectron2.pkl"),  # Detectron2 tells the format by this ending
    "hub": (for_hub, "hub"),
}


@command(Export)
def export(s: Export, given: Given) -> Path:
    make, name = FORMATS[s.format]
    ending = Path(name).suffix
    name = name.removesuffix(ending) + "-momentum" * (s.weights == "momentum") + ending
    if s.out is not None and ending and Path(s.out).suffix != ending:
        raise UserError(f"--out {s.out}: want a name that ends in {ending}, as in {Path(s.out).with_suffix(ending)}")
    torch.manual_seed(0)  # for a timm name
    loaded = backbone_of(s, print)
    target = Path(s.out).expanduser() if s.out is not None else loaded.folder / "export" / name
    if target.exists():
        another = target.with_name(f"{target.stem}-2{ending}")
        raise UserError(f"--out {target}: exists, and nothing is overwritten; name another: --out {another}")
    content, how = make(loaded, target)
    with run_folder.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write(target, lambda aside: _put(aside, content))
    values = sum(v.numel() for v in loaded.network.parameters())
    print(table([[s.format, loaded.name, f"{values:,}", target]], ["for", "architecture", "parameters", "written"]))
    print(how)
    return target


def _put(aside, content):
    """Write a file, or a folder of files; what an export that was killed has left goes."""
    if aside.is_dir():
        shutil.rmtree(aside)
    if isinstance(content, bytes):
        aside.write_bytes(content)
        return
    aside.mkdir()
    for name, part in content.items():
        (aside / name).write_bytes(part)


if __name__ == "__main__":
    launch(export, "eval.export")
