"""The votes of k-NN against one query after another in float64, and what they rank."""

import numpy as np
import pytest
import torch

from eval.features import topk_accuracy
from eval.knn import knn_log_votes, knn_predict, knn_votes


def brute_force(queries, bank, labels, k, temperature):
    """Wu et al., section 3.4, one query after another, in float64."""
    found = []
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for query in queries:
        cosine = bank @ (query / np.linalg.norm(query))
        nearest = np.argsort(-cosine)[:k]
        votes = np.zeros(labels.max() + 1)
        for i in nearest:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        found.append(votes / np.exp(cosine[nearest[0]] / temperature))
    return np.array(found)


@pytest.mark.parametrize("tile", [1, 1000, 1 << 24])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_is_the_brute_force_one_on_every_query(k, tile):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    centres = rng.normal(size=(6, 12))
    bank, queries = centres[labels] + rng.normal(size=(300, 12)), rng.normal(size=(90, 12)) + centres[[0] * 90]
    wanted = brute_force(queries, bank, labels, k, 0.1)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (queries, bank)]
    votes = knn_votes(*tensors, torch.tensor(labels), k=k, temperature=0.1, tile=tile)
    np.testing.assert_allclose(votes.numpy(), wanted, rtol=1e-3, atol=1e-6)
    predicted = knn_predict(*tensors, torch.tensor(labels), k=k, temperature=0.1, tile=tile)
    assert predicted.tolist() == wanted.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.1, 1.0, 10.0])
def test_votes_do_not_vanish_at_any_temperature(temperature):
    """Against float64 with the largest exponent taken out, which no float32 exponential would survive at 0.001."""
    rng = np.random.default_rng(1)
    labels, k = rng.integers(1, 9, 400), 30
    queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 400, 8)))
    cosine = queries @ bank.T
    nearest = np.argsort(-cosine, 1)[:, :k]
    wanted = np.full((400, 9), -np.inf)
    for n, row in enumerate(nearest):
        for name in set(labels[row]):
            own = cosine[n, row[labels[row] == name]] / temperature
            wanted[n, name] = own.max() + np.log(np.exp(own - own.max()).sum()) - cosine[n, row[0]] / temperature
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (queries, bank)]
    found = knn_log_votes(*tensors, torch.tensor(labels), k=k, temperature=temperature).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-6 / temperature)
    agrees = knn_predict(*tensors, torch.tensor(labels), k=k, temperature=temperature).numpy() == wanted.argmax(1)
    assert agrees.mean() > 0.995 and np.isneginf(found[:, 0]).all()


def test_only_classes_with_votes_are_ranked():
    """One neighbour votes for one class: top-5 is top-1, not 1 + 4 classes that nobody named."""
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 10, 500))
    queries, bank = torch.tensor(rng.normal(size=(2, 500, 4)), dtype=torch.float32)
    found = topk_accuracy(knn_log_votes(queries, bank, labels, k=1), torch.tensor(rng.integers(0, 10, 500)))
    assert found["top5"] == found["top1"] < 20
    scores = torch.tensor([[0.0, -1.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]])
    ranked = [topk_accuracy(scores, torch.tensor([label]))["top5"] for label in range(6)]
    assert ranked == [100, 100, 0, 0, 0, 0]
