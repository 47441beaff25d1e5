"""Three plain classifiers of vectors. All give probabilities (m, C) of ``test`` (m, D) from ``train`` (n, D)."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

__all__ = ["STRENGTHS", "few_shot_rows", "linear", "neighbours", "prototypes"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of regularisation that the linear probe chooses from."""
NEIGHBOURS = 20
TEMPERATURE = 0.07
"""As DINO weighs neighbours by their similarity (Caron et al., Emerging properties in self-supervised vision
transformers, ICCV 2021)."""
INNER_FOLDS = 3


def linear(train: Array, labels: Labels, cases: Labels, test: Array, classes: int, seed: int) -> Array:
    """Logistic regression on standardised features, classes of equal weight.

    The strength of its L2 penalty is the one of least loss over inner folds of whole cases; where a class has too few
    cases for them, 0.1.
    """
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale[scale == 0] = 1
    x, z = (train - mean) / scale, (test - mean) / scale
    return _fitted(x, labels, _strength(x, labels, cases, seed), z, classes)


def _fitted(x: Array, y: Labels, strength: float, z: Array, classes: int) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    out = np.zeros((len(z), classes))
    if len(np.unique(y)) == 1:
        out[:, y[0]] = 1
        return out
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    with warnings.catch_warnings():
        # Of separable classes the last digits take long, and tell nothing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    out[:, model.classes_] = model.predict_proba(z)
    return out


def _strength(x: Array, y: Labels, cases: Labels, seed: int) -> float:
    from sklearn.model_selection import StratifiedGroupKFold

    least = min(len(np.unique(cases[y == label])) for label in np.unique(y))
    if least < INNER_FOLDS:
        return 0.1
    folds = StratifiedGroupKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    loss = np.zeros(len(STRENGTHS))
    count = int(y.max()) + 1
    for inner, outer in folds.split(x, y, cases):
        for place, strength in enumerate(STRENGTHS):
            p = _fitted(x[inner], y[inner], strength, x[outer], count)
            loss[place] -= np.log(np.maximum(p[np.arange(len(outer)), y[outer]], 1e-6)).sum()
    return STRENGTHS[int(loss.argmin())]


def _directions(values: Array, centre: Array) -> Array:
    moved = values - centre
    size = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(moved / np.where(size > 0, size, 1))


def neighbours(train: Array, labels: Labels, test: Array, classes: int) -> Array:
    """The votes of the 20 nearest by cosine about the training mean, each of the weight exp(cosine / 0.07)."""
    centre = train.mean(axis=0)
    similar = _directions(test, centre) @ _directions(train, centre).T
    k = min(NEIGHBOURS, len(train))
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(test))[:, None]
    weights = np.exp((similar[rows, nearest] - 1) / TEMPERATURE)
    votes = np.zeros((len(test), classes))
    np.add.at(votes, (rows, labels[nearest]), weights)
    total = votes.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, votes / np.where(total > 0, total, 1), 1 / classes))


def few_shot_rows(labels: Labels, cases: Labels, shots: int, rng: np.random.Generator) -> Labels | None:
    """Rows of ``shots`` samples of each class, of as many cases; None where a class has fewer cases."""
    rows: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        there = np.unique(cases[own])
        if len(there) < shots:
            return None
        drawn = rng.choice(there, shots, replace=False).tolist()
        rows += [int(rng.choice(own[cases[own] == case])) for case in drawn]
    return np.array(rows, np.int64)


def prototypes(train: Array, labels: Labels, test: Array, classes: int) -> Array:
    """The nearest mean of a class, by the distance of directions about the mean of all shots.

    Source: Wang et al., SimpleShot, arXiv 1911.04623 (CL2N). Probabilities are a softmax of the negative squares.
    """
    centre = train.mean(axis=0)
    x, z = _directions(train, centre), _directions(test, centre)
    scores = np.full((len(test), classes), -np.inf)
    for label in np.unique(labels):
        scores[:, label] = -np.square(z - x[labels == label].mean(axis=0)).sum(axis=1)
    scores -= scores.max(axis=1, keepdims=True)
    out = np.exp(scores)
    return np.asarray(out / out.sum(axis=1, keepdims=True))
