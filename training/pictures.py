"""The pictures of a run folder: what the network is shown, and how it learns."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    """curves.png from metrics.jsonl: loss, accuracy, what is measured without labels, spread, learning rate."""
    lines = read_metrics(folder)
    first: dict = next((line for line in lines if "knn_pixels" in line), {})
    figure = Figure(figsize=(13, 6), layout="constrained")
    (loss, few, rank), (rate, spread, sphere) = figure.subplots(2, 3)

    def curve(axis, key, **style):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points), **{"color": "black", **style})
        return points

    curve(loss, "sim", color=SIM, label="SIM")
    curve(loss, "bsim", color=BSIM, label="BSIM")
    loss.set(title="loss")
    start = "initial" if "knn_initial" in first else "random"
    accuracies = [("five_labels", "5 labels a class", SIM), ("one_label", "1 label a class", BSIM)]
    for key, label, colour in [*accuracies, ("knn", "k-NN, all labels", "black")]:
        curve(few, key, color=colour, marker="o", markersize=4, label=label)
        for other, line in (("pixels", "--"), (start, ":")):
            if first.get(f"{key}_{other}") is not None:
                few.axhline(first[f"{key}_{other}"], color=colour, linestyle=line, linewidth=1)
    few.set(title=f"accuracy in % (dashed: raw pixels, dotted: {start} weights)" if first else "accuracy: no labels")
    few.set_ylim(top=min(100, few.get_ylim()[1]))
    curve(rank, "effective_rank", marker="o", markersize=4)
    rank.set(title="effective rank of features", ylim=(0, None))
    curve(sphere, "alignment", color=SIM, marker="o", markersize=4, label="alignment (lower: views closer)")
    curve(sphere, "uniformity", color=BSIM, marker="o", markersize=4, label="uniformity (lower: more even)")
    sphere.set(title="features of held-out images on the sphere")
    values = [y for _, y in curve(spread, "feature_std")]
    spread.set(title="spread of embeddings (0: collapsed)", ylim=(0, 1.05 * max([1, *values])))
    curve(rate, "lr")
    rate.set(title="learning rate")
    for axis in (loss, few, rank, rate, spread, sphere):
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        axis.title.set_fontsize(10)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.6)
    write(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))


def draw_neighbours(path: Path, queries, near, names=None) -> None:
    """A row a held-out image: the image, then its nearest in the bank. names: a class under each, or None.

    queries: uint8 [Q, 3, H, W]; near: uint8 [Q, K, 3, H, W]; names: Q rows of 1 + K words.
    """
    count, nearest = near.shape[:2]
    figure = Figure(figsize=(1.1 * (nearest + 1), (1.3 if names else 1.1) * count + 0.4), layout="constrained")
    axes = figure.subplots(count, nearest + 1, squeeze=False)
    for n in range(count):
        for k, (axis, image) in enumerate(zip(axes[n], [queries[n], *near[n]])):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if names:
                right = k > 0 and names[n][k] == names[n][0]
                axis.set_xlabel(names[n][k][:14], fontsize=8, color=SIM if right or k == 0 else BSIM)
            if n == 0 and k < 2:
                axis.set_title(("held out", "nearest")[k], fontsize=9)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))
