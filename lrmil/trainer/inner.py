"""Folds inside the training cases, on which a penalty, an epoch or a model is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.metrics.cases import case_numbers
from lrmil.targets import Classification, Target

__all__ = ["INNER_FOLDS", "inner_folds", "target_folds"]

INNER_FOLDS = 5
LEAST_OF_STRATUM = 2 * INNER_FOLDS
"""Slides of a stratum of a target that is no classification; fewer are dealt out with another stratum's."""


def inner_folds(
    labels: NDArray[np.int64], cases: Sequence[str], classes: int, *, count: int = INNER_FOLDS, seed: int = 0
) -> NDArray[np.int64] | None:
    """A fold for each slide, int64 (N,), so that slides of a case stay together and classes are dealt out evenly.

    labels: (N,). At most ``count`` folds, and no more than the rarest class has cases. None where a class has fewer
    than two cases, or where leaving out a fold would leave out a class: nothing can be chosen inside such a part.
    """
    number = case_numbers(cases, len(labels))
    label = np.zeros(int(number.max()) + 1, np.int64)
    np.maximum.at(label, number, labels)
    count = min(count, *(len(np.unique(number[labels == c])) for c in range(classes)))
    if count < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    fold = np.empty(len(label), np.int64)
    fold[order] = np.arange(len(label)) % count
    found: NDArray[np.int64] = fold[number]
    kept = [set(labels[found != k].tolist()) for k in range(count)]
    return found if all(len(present) == classes for present in kept) else None


def target_folds(
    target: Target, truth: NDArray[Any], cases: Sequence[str], *, seed: int = 0
) -> NDArray[np.int64] | None:
    """``inner_folds`` for any target, even over its strata; only a classification needs each of them in every part."""
    names, strata = target.strata(truth)
    if isinstance(target, Classification):
        return inner_folds(strata, cases, len(names), seed=seed)
    counts = np.bincount(np.maximum(strata, 0), minlength=len(names))
    common = int(counts.argmax())
    groups = np.where(counts[np.maximum(strata, 0)] < LEAST_OF_STRATUM, common, np.maximum(strata, 0))
    there, number = np.unique(groups, return_inverse=True)
    found = inner_folds(number.astype(np.int64), cases, len(there), seed=seed)
    return found if found is not None or len(there) == 1 else inner_folds(np.zeros_like(strata), cases, 1, seed=seed)
