"""How features lie on the sphere: what the paper claims of BSIM, in numbers and in one picture.

python -m eval.geometry --run runs/sim --beside runs/bsim
"""

from eval.settings import Geometry
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Geometry, "eval.geometry")

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from bsim import alignment, uniformity
from eval.command import Task, protocol
from eval.features import double, features, unit
from eval.learning import of_views
from eval.weights import has_weights_of, load_method
from flags import UserError
from loading.batches import SPLIT, generator, whole_images
from methods import METHODS
from training import folder as run_folder
from training.folder import write
from training.pictures import colour_of
from training.resolve import view_recipes
from training.weights import Backbone, load_backbone

QUERIES, NEAREST = 10, 5  # rows and columns of the neighbours in the picture


class Cloud(NamedTuple):
    """What the picture shows of a run."""

    name: str
    features: torch.Tensor  # [N, D] of unit length
    shares: torch.Tensor  # [D], the share of variance in each direction, falling
    colour: str


def _singular_values(x) -> torch.Tensor:
    """Of centred x [N, D], falling; 1, 0, ... where the rows differ by no more than rounding."""
    x, eps = double(x), torch.finfo(x.dtype).eps
    centred = x - x.mean(0)
    values = torch.linalg.svdvals(centred)
    if centred.norm() <= 8 * eps * x.norm():
        values = torch.zeros_like(values)
        values[0] = 1
    return values


def variance_shares(x) -> torch.Tensor:
    """The share of the variance of x [N, D] in each principal direction: [min(N, D)], falling, of sum 1.

    Of constant features all counts as in the first direction, as it does of features on a line.
    """
    values = _singular_values(x) ** 2
    return values / values.sum()


def effective_rank(x) -> float:
    """e to the entropy of the normalised singular values of centred x [N, D] (Roy and Vetterli, 2007): 1 to D.

    It is 1 of constant features, as of features on a line.
    """
    values = _singular_values(x)
    values = values / values.sum()
    return float(torch.special.entr(values).sum().exp())


def measures(x, a, b) -> dict:
    """Numbers of unit features x [N, D] of images, and a, b [M, D] of two views of each (Wang and Isola, 2020).

    Of a single image only the alignment.
    """
    found = {"alignment": float(alignment(a, b))}
    if len(x) < 2:
        return found
    shares = variance_shares(x)
    return found | {
        "uniformity": float(uniformity(x)),
        "effective_rank": effective_rank(x),
        "variance_1": 100 * float(shares[0]),
        "variance_10": 100 * float(shares[:10].sum()),
        "variance_shares": [round(100 * share, 4) for share in shares.tolist()],
    }


def recipes_of(loaded: Backbone):
    """The two recipes of the run's method; of a network that nobody pretrained, SimCLR's."""
    config = loaded.config
    recipes = METHODS[config.get("method", "simclr")].views(loaded.image_size)
    recipes = tuple(recipe._replace(mean=loaded.mean, std=loaded.std) for recipe in recipes)
    return view_recipes(config, recipes) if config else recipes


def networks_of(task, run: str, loaded: Backbone) -> dict[str, torch.nn.Module]:
    """The backbone, and the backbone with the projector where a checkpoint has one that belongs to these weights."""
    device = task.accelerator.device
    backbone = loaded.network.to(device).eval()
    found = {"": backbone}
    if loaded.config and run_folder.last_checkpoint(loaded.folder):
        method = load_method(loaded)
        if has_weights_of(method.backbone, backbone):
            found["embedding_"] = torch.nn.Sequential(backbone, method.projector.to(device).eval())
        else:
            task.say(f"{run}: embedding_... is left out: the projector of the last checkpoint is of other weights")
    return found


def measure(task, loaded, networks, rows):
    """(metrics, unit features of the backbone, which of the images could be read), of each of `networks`."""
    part, metrics, first = task.test, {}, None
    for name, network in networks.items():
        options = dict(image_size=loaded.image_size, normal=(loaded.mean, loaded.std), workers=task.workers)
        seen = dict(workers=task.workers, seed=task.seed)
        options["say"] = task.say if first is None else None  # once: they are the same images
        x, known = features(task.accelerator, network, (part.images, rows), **options)
        good = known >= 0
        x = unit(x[good])
        first = x if first is None else first
        views = of_views(task.accelerator, part.images, rows, recipes_of(loaded), network, **seen)
        metrics |= {name + k: v for k, v in measures(x, *views).items()}
    return metrics, first, good


@protocol(Geometry)
def geometry(task: Task, s: Geometry) -> dict:
    if s.out and Path(s.out).exists():
        raise UserError(f"--out {s.out}: exists; name another picture")
    if s.out and not Path(s.out).absolute().parent.is_dir():
        raise UserError(f"--out {s.out}: there is no folder {Path(s.out).parent}")
    beside = {name.strip(): load_backbone(name.strip()) for name in (s.beside or "").split(",") if name.strip()}
    runs = {run: (loaded, networks_of(task, run, loaded)) for run, loaded in {s.run: task.backbone, **beside}.items()}
    part = task.test
    order = torch.randperm(len(part.rows), generator=generator(task.seed, SPLIT))[: s.images]
    rows = part.rows[order.sort().values]
    metrics: dict = {}
    clouds: list[Cloud] = []
    for run, (loaded, networks) in runs.items():
        found, x, good = measure(task, loaded, networks, rows)
        metrics = metrics or found
        colour = colour_of(loaded.config.get("sim_weight"))
        clouds.append(Cloud(name_of(loaded, run), x.cpu(), variance_shares(x).cpu(), colour))
    if len(clouds[0].features) < 2:
        task.say("of a single image there is only the alignment, and no picture")
    elif task.accelerator.is_main_process:
        path = Path(s.out) if s.out else free_name(task.backbone.folder)
        side = min(96, task.backbone.image_size)
        shown = torch.cat([batch for batch, _ in whole_images(part.images, rows[good.cpu()], side)])
        draw(path, clouds, shown)
        task.say(f"look at {path}")
    return metrics


def name_of(loaded, run) -> str:
    """What stands above a run in the picture."""
    config = loaded.config
    if not config:
        return f"{run}, random weights" if loaded.file is None else str(run)
    kind = {0: "BSIM", 1: "SIM"}.get(
        config["sim_weight"], f"{config['sim_weight']:g} SIM, {1 - config['sim_weight']:g} BSIM"
    )
    return f"{config['method']}, {kind}"


def free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"geometry{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path


def draw(path: Path, clouds, images) -> None:
    """A column a run: density on the circle after a projection to two dimensions, neighbours; below, all spectra."""
    figure = Figure(figsize=(3.4 * max(2, len(clouds)), 10.5), layout="constrained")
    figure.set_facecolor("white")
    grid = figure.add_gridspec(3, len(clouds), height_ratios=(3, 4.6, 2.6))
    for i, cloud in enumerate(clouds):
        axis = figure.add_subplot(grid[0, i], projection="polar")
        directions = cloud.features - cloud.features.mean(0)
        plane = directions @ torch.linalg.svd(directions, full_matrices=False).Vh[:2].T
        angles = torch.atan2(plane[:, 1], plane[:, 0]).numpy()  # of constant features all 0
        around = np.linspace(-np.pi, np.pi, 361)
        density = gaussian_kde(np.concatenate([angles + turn for turn in (-2 * np.pi, 0, 2 * np.pi)]), 0.05)(around) * 3
        axis.fill_between(around, 1, 1 + density * 2 * np.pi, color=cloud.colour, alpha=0.5, linewidth=0)
        axis.plot(around, np.ones_like(around), color="black", linewidth=0.8)
        axis.plot(around, 1 + np.ones_like(around), color="black", linewidth=0.5, linestyle=":")
        axis.set(xticks=[], yticks=[], ylim=(0, max(2.7, 1.1 + density.max() * 2 * np.pi)))
        axis.set_title(f"{cloud.name}\ndensity by angle (dotted: even)", fontsize=9)
        axis.spines["polar"].set_visible(False)

        axis = figure.add_subplot(grid[1, i])
        queries = torch.linspace(0, len(images) - 1, min(QUERIES, len(images))).long()
        near = (cloud.features[queries] @ cloud.features.T).topk(min(NEAREST + 1, len(images))).indices
        tiles = rearrange(images[near].numpy(), "r c d h w -> (r h) (c w) d")
        axis.imshow(tiles, interpolation="nearest")
        across = near.shape[1]
        side = tiles.shape[1] / across
        axis.axvline(side - 0.5, color="white", linewidth=3)
        axis.set(xticks=[side / 2, side * (1 + across) / 2], xticklabels=["query", "its nearest images"], yticks=[])
        axis.tick_params(length=0)
    axis = figure.add_subplot(grid[2, :])
    for cloud, style in zip(clouds, ("-", "--", ":", "-.") * len(clouds)):
        axis.plot(np.arange(1, len(cloud.shares) + 1), 100 * cloud.shares, style, color=cloud.colour, label=cloud.name)
    low = 100 * min(float(cloud.shares[: max(1, cloud.features.shape[1] * 9 // 10)].min()) for cloud in clouds)
    axis.set(xscale="log", yscale="log", xlabel="direction, by its share", ylabel="share of the variance (%)")
    axis.set_ylim(bottom=max(1e-4, low / 2))
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


if __name__ == "__main__":
    launch(geometry, "eval.geometry")
