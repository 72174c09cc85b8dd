"""The logistic regression on frozen features: how the strength of its regularisation is chosen."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from eval.linear import _decision, choose_strength, fit_logistic, held_out_parts


@pytest.mark.parametrize("rows, parts", [(50, 5), (1000, 5), (2500, 2), (4990, 2), (5000, 1), (9000, 1)])
def test_few_rows_are_held_out_in_turn(rows, parts):
    """Of 1,000 rows a fifth is too few to choose by. No row is held out twice, and each class gives a fifth."""
    labels = np.arange(rows) % 10
    held = held_out_parts(labels, 0)
    assert len(held) == parts and sum(part.astype(int) for part in held).max() == 1
    assert all(np.bincount(labels[part]).tolist() == [rows // 50] * 10 for part in held)


def test_a_class_of_one_row_is_never_held_out_and_of_two_rows_twice():
    labels = np.array([0, 1, 1, 2, 2])
    held = held_out_parts(labels, 0)
    assert [sorted(labels[part].tolist()) for part in held] == [[1, 2], [1, 2]]
    assert sorted(np.flatnonzero(held[0] | held[1])) == [1, 2, 3, 4]


def test_the_accuracy_of_a_strength_is_that_of_cross_validation():
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 4
    features = rng.normal(size=(100, 20)) + labels[:, None] / 2
    folds = PredefinedSplit(np.argmax(held_out_parts(labels, 0), axis=0))
    _, accuracy = choose_strength(features, labels, 0)
    for strength, found in accuracy.items():
        model = LogisticRegression(C=strength, max_iter=1000)
        assert found == pytest.approx(100 * (cross_val_predict(model, features, labels, cv=folds) == labels).mean())


def test_the_strength_is_chosen_on_held_out_rows():
    """Noise in many directions wants a strong one, clean classes do not: the choice follows, and repeats."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    noisy = rng.normal(size=(200, 150)).astype(np.float32)
    noisy[:, 0] += labels
    clean = (rng.normal(size=(200, 2)) * 0.1 + labels[:, None] * 0.05).astype(np.float32)
    strong, accuracy = choose_strength(noisy, labels, 0)
    weak, _ = choose_strength(clean, labels, 0)
    assert strong < weak and choose_strength(noisy, labels, 0) == (strong, accuracy)
    assert accuracy[strong] == max(accuracy.values())


def test_classes_without_a_training_image_and_two_classes():
    features = np.array([[0.0], [1.0], [0.1], [0.9]], dtype=np.float32)
    model = fit_logistic(features, np.array([0, 1, 0, 1]), 1.0)
    assert _decision(model, features).argmax(1).tolist() == [0, 1, 0, 1]
