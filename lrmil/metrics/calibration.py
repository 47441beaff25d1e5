"""From logits to probabilities that mean something, and the bins of a reliability diagram.

Temperature scaling (Guo et al. 2017) with a bias, as in vector scaling with one factor, shrunk to no change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.figures import ECE_BINS, Array

__all__ = ["Calibration", "Reliability", "calibrate", "reliability", "softmax"]

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 0.05, 20.0
LEAST_CASES, LEAST_TOTAL = 8, 50
"""Cases of every class, and of all together, that are needed to fit anything."""
PENALTIES = (2.0, 6.0, 20.0, 60.0)
FOLDS = 5
CLEARLY_BETTER = 0.5
"""Standard errors by which a fit must beat no change in cross-validation: most small sets cannot tell."""


def softmax(logits: ArrayLike, temperature: float = 1.0, bias: Sequence[float] = ()) -> NDArray[np.float64]:
    """Probabilities, float64 (N, C), of logits (N, C) over a temperature, with a bias (C,) added where there is one."""
    z = np.asarray(logits, np.float64) / temperature
    if len(bias):
        z = z + np.asarray(bias, np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Calibration:
    """What makes logits probabilities: ``softmax(logits / temperature + bias)``.

    bias: one a class, or none. method: "none", "prior" (the classes' weights in training are taken back) or "fitted"
    (temperature and bias of validation cases besides). note: why it is what it is, for the model's card.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    method: str = "none"
    note: str = ""

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, float64 (N, C), of logits (N, C)."""
        return softmax(logits, self.temperature, self.bias)


def calibrate(
    logits: ArrayLike, labels: ArrayLike, cases: Sequence[str] | None = None, *, class_weights: Sequence[float] = ()
) -> Calibration:
    """The calibration of a model from its validation slides.

    logits: (N, C). labels: int (N,). cases: of each slide; those of one case stay together. class_weights: (C,), of the
    cross-entropy that the model was trained with. A model trained so learns p(c) * weight(c), up to a factor (Elkan
    2001), so the logarithms of the weights are taken off first. What is left, a factor 1 / T and a bias for each class,
    is fitted to validation slides, shrunk to T = 1 and no bias: the penalty is the one of ``PENALTIES`` with the least
    loss in cross-validation by case, "no change" among them and chosen unless another is better by
    ``CLEARLY_BETTER`` standard errors. Nothing is fitted to fewer than ``LEAST_TOTAL`` cases, or ``LEAST_CASES`` of a
    class; the note says so.

    Raises FiguresError when shapes do not fit or a logit is not finite.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise FiguresError(f"logits {z.shape} and labels {y.shape} do not fit: (N, C) and (N,) are needed")
    if not np.isfinite(z).all():
        raise FiguresError("a logit is NaN or infinite")
    classes = z.shape[1]
    prior = np.zeros(classes) if not len(class_weights) else -np.log(np.asarray(class_weights, np.float64))
    prior = prior - prior.mean()
    weighted = bool(np.abs(prior).max() > 1e-12) if classes else False
    plain = Calibration(1.0, tuple(prior.tolist()) if weighted else (), "prior" if weighted else "none")
    numbers = case_numbers(cases, len(y))
    least = min((len(np.unique(numbers[y == c])) for c in range(classes)), default=0)
    total = len(np.unique(numbers))
    if least < LEAST_CASES or total < LEAST_TOTAL:
        note = f"not fitted: {total} validation cases, {least} of a class; {LEAST_TOTAL} and {LEAST_CASES} are needed"
        return replace(plain, note=note)
    scores = z + prior
    losses = _held_out(scores, y, numbers)
    totals = {penalty: rows.mean() for penalty, rows in losses.items()}
    best = min((penalty for penalty in PENALTIES), key=lambda penalty: float(totals[penalty]))
    gain = losses[None] - losses[best]
    by_case = np.bincount(numbers, weights=gain)
    error = float(by_case.std(ddof=1) * np.sqrt(len(by_case)))
    if not float(by_case.sum()) > CLEARLY_BETTER * error:
        return replace(plain, note="not fitted: in cross-validation it was not better than no change")
    scale, bias = _fit(scores, y, best)
    note = f"fitted to {len(y)} validation slides of {len(by_case)} cases, penalty {best:g}"
    whole = scale * prior + bias
    return Calibration(1 / scale, tuple((whole - whole.mean()).tolist()), "fitted", note)


def _held_out(scores: Array, y: NDArray[np.int64], cases: NDArray[np.int64]) -> dict[float | None, Array]:
    """Negative log-likelihood of each slide, (N,), when its case is left out: by penalty, and None for no change."""
    found: dict[float | None, Array] = {None: _losses(scores, y, 1.0, np.zeros(scores.shape[1]))}
    folds = _folds(y, cases)
    for penalty in PENALTIES:
        rows = np.empty(len(y))
        for fold in range(FOLDS):
            out = folds == fold
            rows[out] = _losses(scores[out], y[out], *_fit(scores[~out], y[~out], penalty))
        found[penalty] = rows
    return found


def _folds(y: NDArray[np.int64], cases: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fold for each slide: cases are dealt out class by class, in an order that does not depend on the ids' order."""
    count = int(cases.max()) + 1
    label = np.zeros(count, np.int64)
    label[cases] = y
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(label[order], kind="stable")]
    fold = np.empty(count, np.int64)
    fold[order] = np.arange(count) % FOLDS
    return fold[cases]


def _losses(scores: Array, y: NDArray[np.int64], scale: float, bias: Array) -> Array:
    z = scale * scores + bias
    peak = z.max(axis=1)
    return np.asarray(peak + np.log(np.exp(z - peak[:, None]).sum(axis=1)) - z[np.arange(len(y)), y])


def _fit(scores: Array, y: NDArray[np.int64], penalty: float) -> tuple[float, Array]:
    """Scale and bias (C,) that minimise the summed loss + penalty * (log(scale)^2 + |bias|^2)."""
    from scipy.optimize import minimize

    truth = np.eye(scores.shape[1])[y]

    def loss(parameters: Array) -> tuple[float, Array]:
        scale, bias = float(np.exp(parameters[0])), parameters[1:]
        z = scale * scores + bias
        z = z - z.max(axis=1, keepdims=True)
        e = np.exp(z)
        total = e.sum(axis=1, keepdims=True)
        off = e / total - truth
        value = float((np.log(total[:, 0]) - z[truth > 0]).sum() + penalty * parameters @ parameters)
        slope = np.concatenate([[scale * (off * scores).sum()], off.sum(axis=0)]) + 2 * penalty * parameters
        return value, slope

    limits = [(np.log(1 / GREATEST_TEMPERATURE), np.log(1 / LEAST_TEMPERATURE))]
    found = minimize(
        loss, np.zeros(1 + scores.shape[1]), jac=True, method="L-BFGS-B", bounds=limits + [(-20, 20)] * scores.shape[1]
    )
    return float(np.exp(found.x[0])), np.asarray(found.x[1:])


class Reliability(NamedTuple):
    """Bins of equal width over the predicted class's probability, NaN where a bin is empty.

    confidence, accuracy: means, float64 (bins,). slides: int64 (bins,), how many. low, high: 95 % interval of
    accuracy by Wilson (1927).
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    slides: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS) -> Reliability:
    """Confidence against accuracy in bins that are closed above, as in the expected calibration error."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    top = p.max(axis=1)
    place = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    hits = np.bincount(place, weights=p.argmax(axis=1) == y, minlength=bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        confidence = np.bincount(place, weights=top, minlength=bins) / count
        accuracy = hits / count
        z = 1.959963984540054
        centre = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * np.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    low = np.where(count > 0, np.maximum(centre - half, 0), math.nan)
    high = np.where(count > 0, np.minimum(centre + half, 1), math.nan)
    return Reliability(confidence, accuracy, count, low, high)
