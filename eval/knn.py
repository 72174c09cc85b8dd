"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018, section 3.4)."""

import torch
import torch.nn.functional as F


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
