"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import nn

import batches
from bsim import ViewRecipe, make_view


@torch.no_grad()
def knn_predict(queries, bank, labels, *, k=200, temperature=0.1, tile=1 << 24):
    """Classes by votes: each of a query's k nearest bank rows votes e^(cosine / temperature) for its label.

    queries: [M, D] float, bank: [N, D], labels: [N] int64 >= 0. Returns [M] int64. At most `tile` similarities are
    held at once. k is lowered to N where it is above.
    """
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    k, classes = min(k, len(bank)), int(labels.max()) + 1
    predicted = []
    for part in queries.split(max(1, tile // len(bank))):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def neighbours(labels) -> int:
    """k for a bank of this size: Wu et al.'s 200, but at most a tenth of a class (a small bank has no 200 alike)."""
    return max(1, min(200, len(labels) // (10 * (int(labels.max()) + 1))))


def pixels(images):
    """At most 32 x 32 pixels, as one row an image."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1) if images.shape[-1] > 32 else images.flatten(1)


@torch.no_grad()
def features(accelerator, network, part, *, image_size, workers=0):
    """Features and labels (-1: none, or a bad image) of (images, rows) on every process; each computes its share."""
    images, rows = part
    rank, world = accelerator.process_index, accelerator.num_processes
    padded = rows[torch.arange(-(-len(rows) // world) * world) % len(rows)]
    clean = ViewRecipe(image_size, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
    found, readable = [], []
    for batch, good in batches.whole_images(images, padded[rank::world], image_size, workers=workers):
        view = make_view(batch.to(accelerator.device), clean, generator=torch.Generator())
        with accelerator.autocast():
            found.append(network(view).float())
        readable.append(good.to(accelerator.device))

    def everyones(parts):
        return accelerator.gather(torch.cat(parts)).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(rows)]

    labels = images.labels(rows).to(accelerator.device)
    return everyones(found), labels.masked_fill(~everyones(readable), -1)


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
