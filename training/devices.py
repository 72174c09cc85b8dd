"""Accelerate, and the way of a batch to its device."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from timm.layers import convert_sync_batchnorm
from torch import nn

from flags import UserError


def open_accelerator(mixed_precision: str | None, handlers: Sequence = (), **options) -> Accelerator:
    """Accelerate's, on the accelerator that there is. Raises UserError for a precision that it does not have.

    A line says where bf16 is slower than fp32, as `accelerate config` may have been answered for a GPU.
    """
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one decodes; see Peers
    options |= dict(mixed_precision=mixed_precision, kwargs_handlers=[*handlers, patient])
    try:
        # Without `cpu` it would not see torchrun's processes on a CPU.
        found = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None
    if found.device.type == "cpu" and found.mixed_precision == "bf16" and not _cpu_has_bf16():
        found.print("bf16 is slow on this CPU, which has no instructions for it; --mixed_precision no is faster")
    return found


def synchronised(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`model` with batch norm over all GPUs; as it is on one, and on CPUs, where SyncBatchNorm does not run (said).

    timm's conversion, as torch's own drops the activations that timm's norms hold.
    """
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type != "cuda":
        accelerator.print("note: on CPUs batch norm's statistics are each process's own")
        return model
    return convert_sync_batchnorm(model)


def _cpu_has_bf16() -> bool:
    # Without AVX-512, or what other CPUs have in its place, oneDNN's convolutions took ten times as long as in fp32.
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mover(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that moves a batch to `device`; on a GPU while the last step is still computed."""
    if device.type != "cuda":
        return lambda images: images.to(device, non_blocking=True)
    copies = torch.cuda.Stream()

    def move(images):
        with torch.cuda.stream(copies):
            moved = images.to(device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(copies)
        moved.record_stream(torch.cuda.current_stream())  # else its memory could be given away before it is used
        return moved

    return move
