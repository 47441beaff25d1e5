"""All figures at once, for many weightings of the same slides.

A bootstrap replicate is a weight for each slide (how often its case was drawn), so one sort of the scores serves all
replicates, and every figure is a matrix product or a cumulative sum over weights (R, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError

__all__ = ["LOWER_IS_BETTER", "NAMES", "check", "confusion", "figures", "undefined_reasons", "weighted_figures"]

Array = NDArray[np.float64]

NAMES = (
    "auc",
    "average_precision",
    "balanced_accuracy",
    "accuracy",
    "sensitivity",
    "specificity",
    "kappa",
    "f1_macro",
    "f1_weighted",
    "brier",
    "ece",
    "loss",
)
LOWER_IS_BETTER = frozenset({"brier", "ece", "loss"})
ECE_BINS = 15
ECE_SLIDES = 10
"""Slides a bin of the calibration error at least, on average: with fewer, it is chance that is summed up."""
LEAST_PROBABILITY = 1e-12
CHUNK_BYTES = 64 << 20


def check(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], Array]:
    """Labels int64 (N,) and probabilities float64 (N, C), checked.

    Raises FiguresError when shapes differ, nothing is there, a label is not a class, or rows do not sum to 1.
    """
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    if p.ndim != 2 or p.shape[1] < 2 or y.shape != p.shape[:1]:
        raise FiguresError(f"labels {y.shape} and probabilities {p.shape} do not fit: (N,) and (N, C) are needed")
    if not len(y):
        raise FiguresError("there are no slides to compute figures of")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise FiguresError(f"labels from {y.min()} to {y.max()} do not fit {p.shape[1]} classes")
    # Written so that NaN fails too.
    if not (p >= 0).all() or not (np.abs(p.sum(axis=1) - 1) < 1e-3).all():
        raise FiguresError("probabilities must be at least 0 and sum to 1 in each row")
    return y, p


def figures(labels: ArrayLike, probabilities: ArrayLike, *, positive: int = 1) -> dict[str, float]:
    """All figures of ``NAMES`` over slides of equal weight; NaN where one is undefined (see undefined_reasons).

    labels: int (N,). probabilities: (N, C). positive: which of two classes is looked for. Definitions:

    - auc: area under the ROC by Mann and Whitney, ties counted half; of the positive class for two classes, else the
      mean of each class against the rest.
    - average_precision: sum of precision times step of recall over distinct scores; likewise over classes.
    - balanced_accuracy: mean recall over the classes that occur. f1_macro, f1_weighted: over the classes that occur or
      are predicted, plain and weighted by occurrence; 0 for a class that is never hit.
    - sensitivity, specificity: share of the positive and of the other class that is called so, for two classes only.
    - kappa: agreement beyond chance (Cohen 1960), unweighted.
    - brier: mean squared distance of probabilities and truth (Brier 1950), halved for two classes as is usual.
    - ece: expected calibration error of the predicted class (Guo et al. 2017) without what chance adds to it: in up to
      15 bins of equal numbers, at least 10 slides each, the gap is the root of its square less the variance that a
      calibrated model would show there (the correction of Kumar, Liang and Ma 2019), 0 where that is below 0.
    - loss: mean negative log-likelihood, probabilities not below 1e-12.
    """
    y, p = check(labels, probabilities)
    return {
        name: float(values[0])
        for name, values in weighted_figures(y, p, np.ones((1, len(y))), positive=positive).items()
    }


def undefined_reasons(labels: ArrayLike, classes: Sequence[str]) -> dict[str, str]:
    """Why figures are undefined for these labels: figure -> reason."""
    y = np.asarray(labels, np.int64)
    counts = np.bincount(y, minlength=len(classes)) if len(y) else np.zeros(len(classes), np.int64)
    lacking = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if not len(y):
        return dict.fromkeys(NAMES, "there are no slides")
    if not lacking:
        return {} if len(classes) == 2 else dict.fromkeys(("sensitivity", "specificity"), "there are more classes")
    there = [name for name, count in zip(classes, counts, strict=True) if count]
    if len(there) == 1:
        reason = f"all slides are {there[0]}"
    else:
        reason = f"no slide is {' or '.join(lacking)}"
    return dict.fromkeys(("auc", "average_precision", "sensitivity", "specificity", "kappa"), reason)


def confusion(labels: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Counts, int64 (classes, classes): row is the true class, column the predicted one."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def weighted_figures(
    y: NDArray[np.int64], p: Array, weights: Array, *, positive: int = 1, drawn: bool = False
) -> dict[str, Array]:
    """Figures for R weightings at once: name -> (R,). weights: (R, N), at least 0; NaN where undefined.

    y and p as ``check`` gives them. drawn: the weights are replicates of a bootstrap, in which chance is at work twice.
    Memory is bounded by working on chunks of weightings.
    """
    step = max(1, CHUNK_BYTES // (8 * max(len(y), 1)))
    parts = [_chunk(y, p, weights[i : i + step], positive, 2 if drawn else 1) for i in range(0, len(weights), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


def _chunk(y: NDArray[np.int64], p: Array, weights: Array, positive: int, chance: int) -> dict[str, Array]:
    classes = p.shape[1]
    columns = [positive] if classes == 2 else list(range(classes))
    ranked = [ranking(y == c, p[:, c], weights) for c in columns]
    predicted = p.argmax(axis=1)
    cells = np.zeros((len(y), classes * classes))
    cells[np.arange(len(y)), y * classes + predicted] = 1
    matrix = (weights @ cells).reshape(-1, classes, classes)
    truth = np.eye(classes)[y]
    brier = ((p - truth) ** 2).sum(axis=1) / (2 if classes == 2 else 1)
    loss = -np.log(np.maximum(p[np.arange(len(y)), y], LEAST_PROBABILITY))
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights.sum(axis=1)
        hits = np.diagonal(matrix, axis1=1, axis2=2)
        true, called = matrix.sum(axis=2), matrix.sum(axis=1)
        recall = hits / true
        f1 = np.where(true + called > 0, 2 * hits / (true + called), np.nan)
        balanced = np.where(true > 0, recall, 0).sum(axis=1) / (true > 0).sum(axis=1)
        agreed = (true * called).sum(axis=1) / total**2
        seen = hits.sum(axis=1) / total
        two = recall if classes == 2 else np.full((len(weights), 2), np.nan)
        macro = np.where(np.isnan(f1), 0, f1).sum(axis=1) / (~np.isnan(f1)).sum(axis=1)
        return {
            "auc": np.mean([auc for auc, _ in ranked], axis=0),
            "average_precision": np.mean([ap for _, ap in ranked], axis=0),
            "balanced_accuracy": balanced,
            "accuracy": seen,
            "sensitivity": two[:, positive if classes == 2 else 1],
            "specificity": two[:, 1 - positive if classes == 2 else 0],
            "kappa": np.where(agreed < 1, (seen - agreed) / (1 - agreed), np.nan),
            "f1_macro": macro,
            "f1_weighted": (np.where(np.isnan(f1), 0, f1) * true).sum(axis=1) / total,
            "brier": weights @ brier / total,
            "ece": _ece(p.max(axis=1), predicted == y, weights, chance),
            "loss": weights @ loss / total,
        }


def ranking(positive: NDArray[np.bool_], scores: Array, weights: Array) -> tuple[Array, Array]:
    """AUC and average precision, (R,) each, from one sort."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the end of each group of equal scores
    w = weights[:, order]
    # Weight of positives and negatives at or above each distinct score.
    above_pos = np.cumsum(w * positive[order], axis=1)[:, last]
    above_neg = np.cumsum(w * ~positive[order], axis=1)[:, last]
    pos, neg = above_pos[:, -1], above_neg[:, -1]
    gain_pos = np.diff(above_pos, axis=1, prepend=0)
    gain_neg = np.diff(above_neg, axis=1, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A positive beats the negatives strictly below it and half of those that tie.
        wins = (gain_pos * (neg[:, None] - above_neg + gain_neg / 2)).sum(axis=1)
        auc = wins / (pos * neg)
        precision = above_pos / (above_pos + above_neg)
        average = np.where(gain_pos > 0, gain_pos * precision, 0).sum(axis=1) / pos
    undefined = (pos == 0) | (neg == 0)
    auc[undefined] = np.nan
    average[undefined] = np.nan
    return auc, average


def _ece(confidence: Array, correct: NDArray[np.bool_], weights: Array, chance: int) -> Array:
    """The debiased calibration error of R weightings, (R,). chance: how often sampling variance is in a gap."""
    # Bins by rank; equal confidences stay together, or the order of the slides would count.
    count = int(np.clip(len(confidence) // ECE_SLIDES, 1, ECE_BINS))
    edges = np.quantile(confidence, np.arange(1, count) / count)
    bins = np.searchsorted(edges, confidence, side="left")
    member = np.zeros((len(confidence), count))
    member[np.arange(len(confidence)), bins] = 1
    size = weights @ member
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = (weights @ (member * (correct - confidence)[:, None])) / size
        noise = chance * (weights @ (member * (confidence * (1 - confidence))[:, None])) / size**2
        true = np.sqrt(np.maximum(gap**2 - noise, 0))
        return np.asarray(np.where(size > 0, size * true, 0).sum(axis=1) / weights.sum(axis=1))
