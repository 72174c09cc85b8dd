"""A linear classifier on frozen features: the published protocol, or minutes instead of a day.

python -m eval.linear --run runs/byol-digits-001
accelerate launch -m eval.linear --run runs/moco --protocol sgd --preset moco
"""

from eval.settings import Linear
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Linear, "eval.linear")

import hashlib
import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from timm.optim import Lars
from torch import nn

from eval.command import Task, protocol
from eval.features import labelled_features, topk_accuracy
from eval.supervised import check_batch, fit
from flags import UserError
from loading.batches import SPLIT, generator

# What was published for ImageNet and ResNet-50: rate for each 256 images, images a step, weight decay.
PRESETS = {
    "moco": dict(optimizer="sgd", lr=30.0, batch_size=256, weight_decay=0.0),  # He et al., section 4.1
    "simsiam": dict(optimizer="lars", lr=0.1, batch_size=4096, weight_decay=0.0),  # appendix A: 1.6 at 4,096 images
}
ENOUGH = 5_000  # rows of which a fifth tells strengths apart; a fifth of 1,000 chose one that cost 3 of top-1
STRENGTHS = 10.0 ** np.arange(-4, 4)  # C of scikit-learn's logistic regression, on features of unit variance


def fit_logistic(features, labels, strength: float):
    """scikit-learn's multinomial LogisticRegression with C = `strength`, of features [N, D] and labels [N]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a class or two of a small run may stay separable
        return LogisticRegression(C=strength, max_iter=1000).fit(features, labels)


def refuse_few(labels, said: str = "--protocol features") -> None:
    """Raise UserError where labels [N] leave nothing to choose the strength of the regularisation by."""
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(classes) < 2 or counts.max() < 2:
        raise UserError(
            f"{said}: {len(labels)} images of {len(classes)} classes to train on, of which no part can be held out to "
            "choose the regularisation by; want two or more of a class, or --protocol sgd"
        )


def held_out_parts(labels, seed: int) -> list[np.ndarray]:
    """Masks [N], bool, each of a fifth of every class: as many as hold 1,000 rows together, at most five."""
    order = torch.randperm(len(labels), generator=generator(seed, SPLIT)).numpy()
    fold = np.full(len(labels), -1)  # a class of one row is never held out
    for number in np.unique(labels):
        rows = order[labels[order] == number]
        if len(rows) > 1:
            fold[rows] = np.arange(len(rows)) // max(1, len(rows) // 5)
    parts = [fold == part for part in range(min(5, math.ceil(ENOUGH / len(labels))))]
    return [held for held in parts if held.any()]  # two rows of each class leave nothing for a third part


def choose_strength(features, labels, seed: int):
    """(C, accuracy in per cent by C): chosen on rows that are held out, a fifth of them at a time."""
    refuse_few(labels)
    parts = held_out_parts(labels, seed)
    accuracy = {}
    for strength in STRENGTHS:
        models = [fit_logistic(features[~held], labels[~held], strength) for held in parts]
        right = [m.predict(features[held]) == labels[held] for m, held in zip(models, parts)]
        accuracy[float(strength)] = 100 * float(np.concatenate(right).mean())
    return max(accuracy, key=lambda strength: accuracy[strength]), accuracy


def from_features(task) -> dict:
    train, labels = (x.cpu().numpy() for x in labelled_features(task, task.train))
    test, truth = labelled_features(task, task.test)
    if not task.accelerator.is_main_process:
        return {}
    centre, scale = train.mean(0), train.std(0) + 1e-6
    train = (train - centre) / scale
    strength, accuracy = choose_strength(train, labels, task.seed)
    task.chosen.update(C=strength, accuracy_by_C=accuracy)
    model = fit_logistic(train, labels, strength)
    scores = torch.full((len(truth), len(task.train.names)), -math.inf)
    scores[:, model.classes_] = torch.from_numpy(_decision(model, (test.cpu().numpy() - centre) / scale)).float()
    return topk_accuracy(scores, truth.cpu())


def _decision(model, features):
    """[N, classes], for two classes too, where scikit-learn gives one column."""
    found = model.decision_function(features)
    return np.stack([-found, found], 1) if found.ndim == 1 else found


def by_sgd(task, epochs, batch_size, lr, weight_decay, optimizer) -> dict:
    """Crop and flip, a cosine to zero, batch statistics frozen (He et al., 2020, section 4.1; SimSiam, appendix A)."""
    check_batch(batch_size, len(task.train.rows), task.accelerator.num_processes)
    network = task.backbone.network.requires_grad_(False)
    classifier = nn.Linear(network.num_features, len(task.train.names))
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    kind = Lars if optimizer == "lars" else torch.optim.SGD
    descent = kind(classifier.parameters(), lr=lr * batch_size / 256, momentum=0.9, weight_decay=weight_decay)
    model = nn.Sequential(network, classifier)
    fit(task, model, task.train.rows, descent, epochs=epochs, batch_size=batch_size)
    return topk_accuracy(*labelled_features(task, task.test, model))


def fingerprint(network) -> str:
    """Of every weight and buffer: two networks with the same one are the same."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@protocol(Linear)
def linear(task: Task, s: Linear) -> dict:
    said = {"batch_size": s.batch_size, "lr": s.lr, "weight_decay": s.weight_decay}
    before = fingerprint(task.backbone.network)
    if s.protocol == "features":
        refuse_few(task.train.labels, f"--dataset {s.dataset or task.backbone.config.get('dataset')}")
        metrics = from_features(task)
    else:
        few = max(1, len(task.train.rows) // 8) // task.accelerator.num_processes * task.accelerator.num_processes
        preset = PRESETS[s.preset]
        rule = (
            preset | {"batch_size": min(few, preset["batch_size"])} | {k: v for k, v in said.items() if v is not None}
        )
        task.chosen.update(rule)
        metrics = by_sgd(task, s.epochs, **rule)
    if fingerprint(task.backbone.network) != before:
        raise RuntimeError("the backbone's weights changed: this is no linear evaluation")
    return metrics


if __name__ == "__main__":
    launch(linear, "eval.linear")
