"""Mean and standard deviation of the channels of a dataset's images, for --mean data."""

import torch

from flags import UserError

SAMPLE = 2_000  # images, about


def measured(images, rows: torch.Tensor | None, side: int) -> tuple[dict[str, tuple[float, ...]], int]:
    """({"mean": (R, G, B), "std": (R, G, B)} from 0 to 1, of how many) of some of `images`, spread over `rows`.

    side: of images, the longer one. Raises UserError for a stream, rows None, which would have to be read twice.
    """
    if rows is None:
        raise UserError("--mean data: a stream is not measured; give three numbers, as in --mean 0.5,0.5,0.5")
    rows = rows[:: max(1, len(rows) // SAMPLE)]
    total, squares, pixels, count = torch.zeros(3).double(), torch.zeros(3).double(), 0, 0
    for part in rows.split(256):
        found, clipped = images.whole(part, min(256, max(side, 16)))
        values = found[clipped >= 0].double() / 255
        total, squares = total + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
        pixels, count = pixels + values[:, 0].numel(), count + len(values)
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(0).sqrt()
    if not (std > 0).all():
        raise UserError("--std data: a channel of the training set has one value everywhere; give three numbers")
    rounded = {"mean": mean, "std": std}
    return {name: tuple(round(x, 6) for x in values.tolist()) for name, values in rounded.items()}, count
