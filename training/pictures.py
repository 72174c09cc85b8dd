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
    rows, under = [], []
    for n in range(min(count, len(a))):
        rows.append([sources[n].permute(1, 2, 0).cpu().numpy(), _shown(a[n], recipes[0]), _shown(b[n], recipes[1])])
        if mixture:
            rows[-1] += [_shown(a[mixture.partner[n]], recipes[0]), _shown(mixture.images[n, :3], recipes[0])]
            under.append([("", OTHER)] * 4 + [(f"w = {mixture.weight[n]:.2f}", "black")])
    columns = ["source", "view a", "view b"] + (["partner's view a", "mixture"] if mixture else [])
    _draw_rows(path, rows, columns, under, inches=1.5)


def _draw_rows(path: Path, rows, titles, under, inches: float) -> None:
    """Images [H, W, 3] in rows, words above the first row, and a word and its colour below each image.

    On one pair of axes: a pair for each image takes seconds.
    """
    size, gap = 10, 1.3 / inches  # an image is 10 wide; the gap below it holds a word
    high = size + (1.5 * gap if under else 0.5)
    width, height = len(rows[0]) * (size + 0.5), len(rows) * high
    figure = Figure(figsize=(inches * width / size, inches * (height + 2 * gap) / size))
    axis = figure.add_axes((0, 0, 1, 1))
    for n, row in enumerate(rows):
        for k, image in enumerate(row):
            left, top = k * (size + 0.5) + 0.25, n * high
            axis.imshow(image, extent=(left, left + size, top + size, top), interpolation="nearest")
            if under:
                word, colour = under[n][k]
                axis.text(left + size / 2, top + size + gap / 5, word, color=colour, fontsize=8, ha="center", va="top")
    for k, title in enumerate(titles):
        axis.text(k * (size + 0.5) + 0.25 + size / 2, -gap / 3, title, fontsize=9, ha="center", va="bottom")
    axis.set(xlim=(0, width), ylim=(height, -2 * gap))
    axis.axis("off")
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
    rows = [[image.permute(1, 2, 0).numpy() for image in (query, *of)] for query, of in zip(queries, near)]
    under = [[(name[:14], SIM if name == row[0] else BSIM) for name in row] for row in names or []]
    _draw_rows(path, rows, ["held out", "nearest"], under, inches=1.1)
