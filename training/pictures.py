"""The pictures of a run folder: what the network is shown, and how it learns."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from training.folder import read_metrics, write

matplotlib.use("Agg")
# Okabe and Ito's blue, vermilion and purple: told apart by everyone.
SIM, BSIM, BOTH, OTHER = "#0072B2", "#D55E00", "#CC79A7", "#666666"


def colour_of(sim_weight: float | None) -> str:
    """Of a run with this sim_weight; None: of what was not pretrained."""
    return OTHER if sim_weight is None else {1.0: SIM, 0.0: BSIM}.get(sim_weight, BOTH)


def marks(axis) -> list:
    """What a legend shows of the three."""
    return [axis.plot([], [], "o", color=c, label=n)[0] for c, n in ((SIM, "SIM"), (BOTH, "both"), (BSIM, "BSIM"))]


def _shown(view, recipe):
    """A normalised view [3, H, W] as an array that matplotlib shows."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    return (view.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def draw_views(path: Path, sources, a, b, mixture, recipes, count=8) -> None:
    """A row an image: source, view a, view b, and, with a mixture, the partner's view a, the mixture and its w."""
    count = min(count, len(a))
    columns = ["source", "view a", "view b"] + (["partner's view a", "mixture"] if mixture else [])
    figure = Figure(figsize=(1.5 * len(columns), 1.55 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for n in range(count):
        tiles = [sources[n].permute(1, 2, 0).cpu().numpy(), _shown(a[n], recipes[0]), _shown(b[n], recipes[1])]
        if mixture:
            tiles += [_shown(a[mixture.partner[n]], recipes[0]), _shown(mixture.images[n, :3], recipes[0])]
        for axis, tile, title in zip(axes[n], tiles, columns):
            axis.imshow(tile, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if n == 0:
                axis.set_title(title, fontsize=10)
        if mixture:
            axes[n, -1].set_xlabel(f"w = {mixture.weight[n]:.2f}", fontsize=9)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: loss, k-NN, spread of the embeddings, learning rate."""
    lines = read_metrics(folder)
    figure = Figure(figsize=(9, 6), layout="constrained")
    (loss, knn), (spread, rate) = figure.subplots(2, 2)

    def curve(axis, key, **style):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points), **style)
        return points

    curve(loss, "sim", color=SIM, label="SIM")
    curve(loss, "bsim", color=BSIM, label="BSIM")
    loss.set(title="loss", xlabel="step")
    loss.legend()
    if curve(knn, "knn", color="black", marker="o", markersize=4, label="k-NN"):
        for first in (line for line in lines if "knn_pixels" in line):
            knn.axhline(first["knn_pixels"], color=OTHER, linestyle="--", label="raw pixels")
            named = "initial weights" if "knn_initial" in first else "random network"
            knn.axhline(first.get("knn_initial", first.get("knn_random")), color=OTHER, linestyle=":", label=named)
        knn.legend()
    knn.set(title="k-NN top-1 on held-out images (%)", xlabel="step")
    curve(spread, "feature_std", color="black")
    spread.set(title="spread of embeddings (1: all over the sphere, 0: collapsed)", xlabel="step")
    spread.set_ylim(bottom=0)
    spread.title.set_fontsize(10)
    curve(rate, "lr", color="black")
    rate.set(title="learning rate", xlabel="step")
    for axis in (loss, knn, spread, rate):
        axis.grid(alpha=0.3)
    write(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
