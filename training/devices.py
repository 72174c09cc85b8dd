"""Accelerate, and the way of a batch to its device."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from flags import UserError


def open_accelerator(mixed_precision: str | None, **options) -> Accelerator:
    """Accelerate's, on the accelerator that there is. Raises UserError for a precision that it does not have."""
    try:
        # Without `cpu` it would not see torchrun's processes on a CPU.
        return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None


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
