"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018, section 3.4).

python -m eval.knn --run runs/byol-digits-001
"""

from eval.settings import KNN
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(KNN, "eval.knn")

import torch
import torch.nn.functional as F
from torch import nn

from eval.command import Task, protocol
from eval.features import features, labelled_features, topk_accuracy


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


def knn_accuracy(accelerator, source, network, **options):
    """k-NN accuracy in per cent; pixels, which have no direction of their own, are centred first."""
    module = isinstance(network, nn.Module)
    if module:
        network.eval()
    bank, labels = features(accelerator, network, source.bank, **options)
    queries, truth = features(accelerator, network, source.queries, **options)
    if module:
        network.train()
    else:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    known, asked = labels >= 0, truth >= 0
    names, classes = labels[known].unique(return_inverse=True)
    predicted = knn_predict(queries[asked], bank[known], classes, k=neighbours(classes))
    return float((names[predicted] == truth[asked]).float().mean() * 100)


@protocol(KNN)
def knn(task: Task, s: KNN) -> dict:
    train, test = task.train, task.test
    task.chosen["k"] = k = s.k or neighbours(train.labels)
    bank, classes = labelled_features(task, train)
    queries, truth = labelled_features(task, test)
    metrics = topk_accuracy(knn_log_votes(queries, bank, classes, k=k, temperature=s.temperature), truth)
    bank, classes = labelled_features(task, train, pixels)
    queries, truth = labelled_features(task, test, pixels)
    centre = bank.mean(0)
    votes = knn_log_votes(queries - centre, bank - centre, classes, k=k, temperature=s.temperature)
    return metrics | {"pixels_top1": topk_accuracy(votes, truth)["top1"]}


if __name__ == "__main__":
    launch(knn, "eval.knn")
