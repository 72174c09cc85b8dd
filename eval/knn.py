"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018, section 3.4).

python -m eval.knn --run runs/byol-digits-001
"""

from eval.settings import KNN
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(KNN, "eval.knn")

import torch
import torch.nn.functional as F

from eval.command import Task, protocol
from eval.features import double, labelled_features, topk_accuracy, unit
from loading.batches import SPLIT, generator

DRAWS = 100  # of the labelled images, of which few_labels is the mean
SHOTS = {"one_label": 1, "five_labels": 5}  # labelled images a class
FEW_QUERIES = 4_000  # images that are classified, at most


@torch.no_grad()
def knn_log_votes(queries, bank, labels, *, k=200, temperature=0.1, tile=1 << 24):
    """Logarithms [M, classes] of the votes: each of a query's k nearest bank rows votes e^(cosine / temperature).

    queries: [M, D] float, bank: [N, D], labels: [N] int64 >= 0. -inf for a class that none of the k rows has. All are
    relative to the vote of the nearest row, and none underflows, however low the temperature. At most `tile`
    similarities are held at once. k is lowered to N where it is above.
    """
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    k, classes = min(k, len(bank)), int(labels.max()) + 1
    votes = torch.full((len(queries), classes), -torch.inf, device=queries.device)
    step = max(1, tile // len(bank))
    for part, of_part in zip(queries.split(step), votes.split(step)):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        vote, of = (similarity - similarity[:, :1]) / temperature, labels[nearest]
        of_part.scatter_reduce_(1, of, vote, "amax")  # the largest of each class, then the others beside it
        beside = (vote - of_part.gather(1, of)).exp()
        of_part += torch.zeros_like(of_part).scatter_add_(1, of, beside).clamp(min=1).log()
    return votes


def knn_votes(queries, bank, labels, **options):
    """Votes [M, classes] float for each class, as `knn_log_votes`, relative to that of the nearest row."""
    return knn_log_votes(queries, bank, labels, **options).exp()


def knn_predict(queries, bank, labels, **options):
    """Classes [M] int64 with the most of `knn_log_votes`."""
    return knn_log_votes(queries, bank, labels, **options).argmax(1)


def neighbours(labels) -> int:
    """k for a bank of this size: Wu et al.'s 200, but at most a tenth of a class (a small bank has no 200 alike)."""
    return max(1, min(200, len(labels) // (10 * (int(labels.max()) + 1))))


def pixels(images):
    """At most 32 x 32 pixels, as one row an image."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1) if images.shape[-1] > 32 else images.flatten(1)


def few_labels(bank, classes, queries, truth, shots: int, seed: int, draws: int = DRAWS) -> tuple[float, float] | None:
    """Accuracy in per cent of the nearest class mean of `shots` labelled images a class, and its standard error.

    bank [N, D] and queries [M, D]: features, normalised here. classes [N] int64: all of 0 to C - 1. truth [M] int64.
    The mean over `draws` draws of the labelled images, the same for the same seed; None where a class has too few.
    """
    counts = classes.bincount()
    if int(counts.min()) < shots:
        return None
    asked = torch.linspace(0, len(queries) - 1, min(FEW_QUERIES, len(queries)), dtype=torch.float64).long()
    bank, queries, truth = unit(bank), unit(queries)[asked], truth[asked]  # all over, as rows may be in order of class
    order, found = generator(seed, SPLIT), []
    for _ in range(draws):
        shuffled = torch.randperm(len(bank), generator=order).to(bank.device)
        by_class = shuffled[classes[shuffled].argsort(stable=True)]  # the rows of each class in a random order
        starts = counts.cumsum(0) - counts
        picked = by_class[starts[:, None] + torch.arange(shots, device=bank.device)]
        means = F.normalize(bank[picked].mean(1), dim=1)
        found.append(double((queries @ means.T).argmax(1) == truth).mean() * 100)
    accuracies = torch.stack(found)
    return float(accuracies.mean()), float(accuracies.std() / draws**0.5)


def with_few(bank, classes, queries, truth, seed: int, end: str = "") -> dict:
    """{"one_label": accuracy, "one_label_se": its standard error, ...}; None where a class has too few images."""
    found: dict[str, float | None] = {}
    for name, shots in SHOTS.items():
        of_few = few_labels(bank, classes, queries, truth, shots, seed)
        found |= {f"{name}{end}": of_few and of_few[0], f"{name}{end}_se": of_few and of_few[1]}
    return found


@protocol(KNN)
def knn(task: Task, s: KNN) -> dict:
    train, test = task.train, task.test
    task.chosen["k"] = k = s.k or neighbours(train.labels)
    bank, classes = labelled_features(task, train)
    queries, truth = labelled_features(task, test)
    few = with_few(bank, classes, queries, truth, s.seed)
    votes = topk_accuracy(knn_log_votes(queries, bank, classes, k=k, temperature=s.temperature), truth)
    bank, classes = labelled_features(task, train, pixels)
    queries, truth = labelled_features(task, test, pixels)
    queries, bank = queries - bank.mean(0), bank - bank.mean(0)
    few |= with_few(bank, classes, queries, truth, s.seed, "_pixels")
    for name, shots in SHOTS.items():
        if few[name] is None:
            task.say(f"{name} is left out: a class has fewer than {shots} images to train on")
    few = {k: v for k, v in few.items() if v is not None}
    of_pixels = knn_log_votes(queries, bank, classes, k=k, temperature=s.temperature)
    return few | votes | {"pixels_top1": topk_accuracy(of_pixels, truth)["top1"]}


if __name__ == "__main__":
    launch(knn, "eval.knn")
