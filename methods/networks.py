"""What the methods are made of: the backbone, the MLP heads, the moving average, the gather across processes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn

SMALL_STEM = 64  # images of this side or less get the small-image stem, and the views and rates for small images


class Losses(NamedTuple):
    """What a method's forward returns. `embeddings` [N, D] are the projections whose spread is the collapse alarm."""

    sim: torch.Tensor | None  # scalar; None where it was not asked for
    bsim: torch.Tensor | None
    embeddings: torch.Tensor


def backbone(name: str, image_size: int, weights: Mapping[str, torch.Size] | None = None) -> nn.Module:
    """A network from images [N, 3, image_size, image_size] to features [N, width]; `num_features` is the width.

    Any timm model without its classifier, randomly initialised, or "resnet_tiny": 0.7 million parameters, for CPUs.
    For images of 64 pixels or fewer a ResNet's stem is one 3x3 convolution and no max-pool (SimCLR, appendix B.9).
    There a ViT's patches have an eighth of the side, 4 pixels at 32. weights: the shapes, by name, of weights that it
    is to take; it is then made with their stem, or their patches. Raises ValueError where its patches leave pixels out.
    """
    import timm  # seconds, which --help need not wait for
    from timm.models.resnet import BasicBlock, ResNet

    if name == "resnet_tiny":
        # Its stem has stride 2: at 32 pixels a quarter of the cost. Its blocks work from the start: with timm's
        # zero-initialised last norms, short runs ended 5 points of k-NN lower.
        shape: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(24, 48, 96, 192), zero_init_last=False)
        block: Any = BasicBlock  # timm's annotation asks for an instance
        return _small_stem(ResNet(block, **shape, num_classes=0), stride=2)
    patch = _patch(name, image_size, weights)
    sized: dict[str, Any] = {"img_size": image_size} | ({"patch_size": patch} if patch else {})
    try:
        network = timm.create_model(name, num_classes=0, **sized)  # transformers must know the size
    except TypeError:
        network = timm.create_model(name, num_classes=0)
    embedding: Any = getattr(network, "patch_embed", None)
    side = getattr(embedding, "patch_size", (1, 1))
    side = side[0] if isinstance(side, tuple) else side
    if image_size % side and not getattr(
        embedding, "dynamic_img_pad", False
    ):  # timm would leave out the last pixels without a word
        below = image_size // side * side
        raise ValueError(f"its patches have {side} pixels, so want {below or side} or {below + side}")
    # The width of what comes out, which for some (mobilenetv3) is not that of the last convolution.
    network.num_features = getattr(network, "head_hidden_size", None) or network.num_features
    small = image_size <= SMALL_STEM
    if weights is not None:
        small = tuple(weights.get("conv1.weight", ())[1:]) == (3, 3, 3)
    return _small_stem(network) if small and isinstance(network, ResNet) else network


def _patch(name: str, image_size: int, weights: Mapping[str, torch.Size] | None) -> int | None:
    """The side of a ViT's patches where it is not the model's own."""
    from timm.models import is_model_in_modules

    if not is_model_in_modules(name, {"vision_transformer", "deit"}):
        return None
    if weights is not None:
        shape = tuple(weights.get("patch_embed.proj.weight", ()))
        return shape[-1] if len(shape) == 4 else None
    whole = [side for side in range(1, image_size + 1) if image_size % side == 0]
    return min(whole, key=lambda side: abs(side - image_size / 8)) if image_size <= SMALL_STEM else None


def _small_stem(network, stride=1):
    width = network.bn1.num_features
    network.conv1 = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def backbone_names() -> list[str]:
    import timm

    return ["resnet_tiny", *timm.list_models()]


def mlp(*widths: int, norm: bool = True, last_norm: bool = False, affine: bool = True) -> nn.Sequential:
    """Linear layers of these widths with batch norm (`norm`) and ReLU between them.

    `last_norm` adds a batch norm after the last one, with learned scale and shift where `affine`.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        layers.append(nn.Linear(before, after, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(after, affine=affine or not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def moving_average(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum x target + (1 - momentum) x online; buffers (batch statistics) are copied."""
    for slow, fast in zip(target.parameters(), online.parameters()):
        slow.lerp_(fast, 1 - momentum)
    for kept, seen in zip(target.buffers(), online.buffers()):
        kept.copy_(seen)


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Batch norm's running statistics become their mean over the processes, each of which has seen its own images."""
    if processes()[1] > 1:
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= processes()[1]


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: torch.Tensor) -> torch.Tensor:
    """[n, D] of each process to [processes x n, D] in the order of the ranks, the same everywhere; gradients flow."""
    if processes()[1] == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


def deal(x: torch.Tensor) -> torch.Tensor:
    """[n, ...] of each process to n rows of all processes: row r, r + processes, ... for process r. No gradient."""
    rank, world = processes()
    return x if world == 1 else gather(x.detach())[rank::world]


def deal_back(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `deal`: each row returns to the process that it came from."""
    rank, world = processes()
    return x if world == 1 else rearrange(gather(x.detach()), "(r n) d -> (n r) d", r=world).chunk(world)[rank]


def gather_others(x: torch.Tensor) -> torch.Tensor | None:
    """As `gather`, without this process's own rows; None where there is no other process."""
    rank, world = processes()
    if world == 1:
        return None
    everyone = gather(x)
    return torch.cat([everyone[: rank * len(x)], everyone[(rank + 1) * len(x) :]])
