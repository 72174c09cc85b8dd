"""Is it learning? Figures of held-out images during a run: with few labels, and without any."""

import torch
from torch import nn

from bsim import alignment, make_view, uniformity
from data import Source
from eval.features import BAD, double, features, refuse_not_finite, unit
from eval.knn import knn_predict, neighbours, with_few
from flags import progress
from loading.batches import VIEW, Batches, Feed, generator
from loading.images import after_crop

MEASURED, VIEWED = 2_000, 1_000  # held-out images of the rank and the uniformity, and of the alignment, at most
SHOWN, NEAREST, AMONG = 10, 8, 5_000  # rows and columns of neighbours.png, and images that are looked through
FEWEST = 10  # of fewer these figures mean nothing


def rankme(x) -> float:
    """The effective rank of features x [N, D] as they are, neither centred nor of unit length: from 1 to min(N, D).

    e to the entropy of the singular values, divided by their sum (RankMe: Garrido et al., 2023, arXiv 2210.02885,
    equation 1). 1 where all features are 0.
    """
    values = torch.linalg.svdvals(double(x))
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def of_views(accelerator, images, rows, recipes, network, *, workers: int, seed: int, shown: bool = True):
    """Unit features of two views of the images at `rows`, on every process.

    Batches are whole, of 256 where there are as many images; up to 255 of them, drawn at random, are not seen.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    size = min(256, len(rows))
    size -= size % world
    share = dict(batch_size=size, part_size=size // world, rank=rank, world=world, seed=seed)
    batches = Batches(Source(images, rows, None, None, 0, None), recipes, **share)
    workers = workers if images.in_workers else 0
    feed = Feed(batches, 0, batches.steps_per_epoch, workers, pin=False)
    recipes = tuple(after_crop(recipe) for recipe in recipes) if images.in_workers else recipes
    found: tuple[list, list] = ([], [])
    shown = shown and accelerator.is_main_process
    with progress(batches.steps_per_epoch * size, shown=shown, unit=" images", named="two views") as bar:
        for step, pair in enumerate(feed):
            draws = generator(seed, VIEW, step, rank)
            for side, pixels, recipe in zip(found, pair, recipes):
                side.append(network(make_view(pixels.to(accelerator.device), recipe, generator=draws)).float())
            bar.update(size)
    both = [accelerator.gather(torch.cat(side)) for side in found]
    for values in both:
        refuse_not_finite(values, "features of views")
    return tuple(unit(values) for values in both)


def figures(accelerator, source: Source, network, recipes, *, image_size: int, workers: int, seed: int) -> dict:
    """What metrics.jsonl gets of `network`, a module or a function of images, at an evaluation.

    With labels knn, and one_label and five_labels with their standard errors (_se); of a module also effective_rank,
    alignment and uniformity of held-out images. None for a figure that would mean nothing. recipes: the run's views.
    """
    module = isinstance(network, nn.Module)
    options = dict(image_size=image_size, normal=(recipes[0].mean, recipes[0].std), workers=workers, delay=5)
    if module:
        network.eval()
    found: dict = {}
    if source.queries is not None:
        values, truth = features(accelerator, network, source.queries, **options)
        found |= _with_labels(accelerator, source, network, values, truth, seed, options)
        values = values[truth > BAD]
    elif source.held_out is not None:
        values, known = features(accelerator, network, source.held_out, **options)
        values = values[known > BAD]
    if module:
        found |= _without_labels(accelerator, source, network, values[:MEASURED], recipes, workers, seed)
        network.train()
    return found


def _with_labels(accelerator, source, network, queries, truth, seed, options):
    images, rows = source.bank
    bank, labels = features(accelerator, network, (images, rows.sort().values), **options)  # eval.knn's order and draws
    known, asked = labels >= 0, truth >= 0
    bank, queries = bank[known], queries[asked]
    if not isinstance(network, nn.Module):  # pixels have no direction of their own
        queries, bank = queries - bank.mean(0), bank - bank.mean(0)
    names, classes = labels[known].unique(return_inverse=True)
    predicted = knn_predict(queries, bank, classes, k=neighbours(classes))
    found = {"knn": float((names[predicted] == truth[asked]).float().mean() * 100)}
    numbers = torch.searchsorted(names, truth[asked]).clamp(max=len(names) - 1)
    numbers = torch.where(names[numbers] == truth[asked], numbers, -1)  # a class that the bank has not
    return found | with_few(bank, classes, queries, numbers, seed)


def _without_labels(accelerator, source, network, values, recipes, workers, seed):
    if len(values) < FEWEST:
        return dict.fromkeys(("effective_rank", "alignment", "uniformity"))
    held_out = source.queries or source.held_out
    assert held_out is not None
    images, rows = held_out
    options = dict(workers=workers, seed=seed, shown=False)
    a, b = of_views(accelerator, images, rows[:VIEWED].sort().values, recipes, network, **options)
    return {
        "effective_rank": rankme(values),
        "alignment": float(alignment(a, b)),
        "uniformity": float(uniformity(unit(values))),
    }


def nearest(accelerator, source: Source, network, *, image_size: int, normal, workers: int):
    """(images [Q, 3, H, W], their nearest ones [Q, K, 3, H, W], classes or None) by the cosine of features.

    The images are the first held-out ones; the nearest are of the bank, none of which is held out.
    """
    options = dict(image_size=image_size, normal=normal, workers=workers, delay=5)
    held_out = source.queries or source.held_out
    among = source.bank or source.among
    assert held_out is not None and among is not None
    (images, rows), (others, bank) = held_out, among
    rows, bank = rows[:SHOWN], bank[:AMONG]
    network.eval()
    x, y = (unit(features(accelerator, network, part, **options)[0]) for part in ((images, rows), (others, bank)))
    network.train()
    found = bank[(x @ y.T).topk(min(NEAREST, len(bank))).indices.cpu()]
    near = torch.stack([others.whole(own, image_size)[0] for own in found])
    names = None
    if source.queries is not None:
        names = [[*_classes(images, row[None]), *_classes(others, own)] for row, own in zip(rows, found)]
    return images.whole(rows, image_size)[0], near, names


def _classes(images, rows):
    names = getattr(images.table.features["label"], "names", None)
    return ["?" if i < 0 else names[i] if names else str(i) for i in images.labels(rows).tolist()]
