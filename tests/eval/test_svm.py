"""VOC 2007: the average precision by hand, the SVM's minimum and cost, the draws of few images a class."""

import numpy as np
import pytest

import eval.voc07 as module
from eval.voc07 import COSTS, average_precisions, draw, full, low_shot, svm

GRID = [0.1, 1.0, 10.0]  # in the place of the 26 costs, which would take a minute


def test_map_is_that_of_a_case_by_hand():
    """Seven images, two classes; -1 are images that do not count.

    Class 0, by falling score: yes no no yes yes. Precision 1, 1/2, 1/3, 2/4, 3/5 at recall 1/3, 1/3, 1/3, 2/3, 1.
    Made falling, precision at the three recalls is 1, 3/5, 3/5. AP = (1 + 3/5 + 3/5) / 3 = 11/15.
    (VOC 2007's 11 recalls would give (4 x 1 + 7 x 3/5) / 11 = 41/55, scikit-learn's (1 + 1/2 + 3/5) / 3 = 7/10.)
    Class 1, by falling score: no yes no yes. Precision 0, 1/2, 1/3, 2/4 at recall 0, 1/2, 1/2, 1. AP = 1/2.
    mAP = (11/15 + 1/2) / 2 = 37/60.
    """
    truth = np.array([[1, 0, 0, 1, 1, -1, -1], [-1, 0, 1, -1, 0, 1, -1]]).T
    scores = np.array([[5.0, 4, 3, 2, 1, 9, -9], [8.0, 4, 3, -8, 2, 1, 2.5]]).T
    found = average_precisions(truth, scores)
    assert found == pytest.approx([11 / 15, 1 / 2], abs=1e-12)
    assert found.mean() == pytest.approx(37 / 60, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(7)
    assert average_precisions(truth[shuffled], np.exp(scores[shuffled])) == pytest.approx(found, abs=1e-12)
    assert average_precisions(truth, np.zeros((7, 2))) == pytest.approx([3 / 5, 1 / 2])  # all alike: one point


def test_average_precision_is_its_formula():
    rng = np.random.default_rng(1)
    for _ in range(20):
        true, score = rng.integers(0, 2, 30), rng.normal(size=30)
        true[0] = 1
        order = np.argsort(-score)
        precision = [true[order[: i + 1]].mean() for i in range(30)]
        area = sum(max(precision[i:]) / true.sum() for i in range(30) if true[order[i]])
        assert average_precisions(true[:, None], score[:, None]) == pytest.approx([area], abs=1e-12)


def test_the_svm_minimises_the_benchmarks_objective():
    """|w|^2 / 2 + b^2 / 2 + C sum of s (1 - y (w x + b))_+^2, s = 2 for a positive: by Newton steps of its own."""
    rng = np.random.default_rng(2)
    x, y, cost = rng.normal(size=(60, 5)), np.where(rng.random(60) < 0.3, 1, -1), 0.5
    ones, w = np.append(x, np.ones((60, 1)), 1), np.zeros(6)
    for _ in range(50):
        margin = 1 - y * (ones @ w)
        weight = 2 * cost * np.where(y > 0, 2, 1) * (margin > 0)
        gradient = w - ones.T @ (weight * y * margin)
        w = w - np.linalg.solve(np.eye(6) + (ones.T * weight) @ ones, gradient)
    assert np.linalg.norm(gradient) < 1e-9
    model = svm(cost).fit(x, y)
    assert np.append(model.coef_[0], model.intercept_) == pytest.approx(w, abs=2e-3)


def test_the_grid_is_the_benchmarks():
    assert len(COSTS) == 26 and COSTS[0] == 1e-7 and COSTS[-1] == 100 and 2**-19 in COSTS and 2**-4 in COSTS


def blobs(rng, n, classes=4):
    """Features of length 1 [n, 8] float64 and truth [n, classes]: a class is a direction."""
    truth = (rng.random((n, classes)) < 0.3).astype(np.int8)
    x = truth @ np.eye(8)[:classes] + 0.25 * rng.normal(size=(n, 8))
    return x / np.linalg.norm(x, axis=1, keepdims=True), truth


def test_images_that_do_not_count_change_nothing():
    """What is -1 for a class is neither trained on nor judged: any features there give the same scores."""
    rng = np.random.default_rng(3)
    (x, truth), (queries, _) = blobs(rng, 90), blobs(rng, 40)
    truth[:30, 0] = -1
    wrong = x.copy()
    wrong[:30] = -x[:30]
    first, costs = full(x, truth[:, :1], queries, folds=3)
    second, again = full(wrong, truth[:, :1], queries, folds=3)
    assert np.array_equal(first, second) and costs == again
    counted = np.where(truth == -1, 0, truth)  # as the benchmark's code trains, with them as negatives
    assert not np.allclose(full(x, counted[:, :1], queries, folds=3)[0], first)


def test_the_cost_is_chosen_in_training_alone_and_each_class_has_its_own():
    rng = np.random.default_rng(4)
    (x, truth), (queries, asked) = blobs(rng, 100, classes=2), blobs(rng, 80, classes=2)
    truth[:, 1] = rng.random(100) < 0.3  # a class that cannot be learnt
    scores, costs = full(x, truth, queries, folds=3)
    assert full(x, truth[:, :1], queries[:5], folds=3)[1] == costs[:1] and costs[0] != costs[1]
    found = average_precisions(asked, scores)
    assert found[0] > 0.9 and found[1] < found[0] - 0.2
    assert by_folds(x, truth[:, 0], costs[0]) == max(by_folds(x, truth[:, 0], cost) for cost in COSTS)


def by_folds(x, truth, cost):
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    found = []
    for learn, judge in StratifiedKFold(3).split(x, truth):
        scores = svm(cost).fit(x[learn], np.where(truth[learn] == 1, 1, -1)).decision_function(x[judge])
        found.append(average_precision_score(truth[judge], scores))
    return np.mean(found)


def test_a_draw():
    rng = np.random.default_rng(5)
    truth = rng.choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=(200, 4)).astype(np.int8)
    drawn = draw(truth, 5, seed=0, number=0)
    assert ((drawn == 1).sum(0) == 5).all() and ((drawn == 0).sum(0) == 15).all()
    assert (drawn == truth)[drawn >= 0].all()
    assert np.array_equal(drawn, draw(truth, 5, seed=0, number=0))
    for other in (draw(truth, 5, seed=0, number=1), draw(truth, 5, seed=1, number=0)):
        assert not np.array_equal(drawn, other)


def test_low_shot_is_the_mean_over_draws_at_one_cost(monkeypatch):
    monkeypatch.setattr(module, "COSTS", GRID)
    rng = np.random.default_rng(6)
    (x, truth), (queries, asked) = blobs(rng, 120), blobs(rng, 80)
    by_cost = []
    for cost in GRID:
        maps = []
        for number in range(5):
            drawn = draw(truth, 2, seed=0, number=number)
            scores = []
            for c in range(4):
                rows = drawn[:, c] >= 0
                model = svm(cost).fit(x[rows], np.where(drawn[rows, c] == 1, 1, -1))
                scores.append(model.decision_function(queries))
            maps.append(average_precisions(asked, np.stack(scores, 1)).mean())
        by_cost.append((np.mean(maps), np.std(maps)))
    mean, std = max(by_cost)
    found = low_shot(x, truth, queries, asked, 2, seed=0)
    assert found == pytest.approx({"map_2": 100 * mean, "map_2_std": 100 * std}) and std > 0
    more = low_shot(x, truth, queries, asked, 8, seed=0)["map_8"]
    assert more > found["map_2"]
