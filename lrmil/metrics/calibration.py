"""Temperature scaling (Guo et al. 2017) and the bins of a reliability diagram."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.figures import ECE_BINS

__all__ = ["Reliability", "fit_temperature", "reliability", "softmax"]

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 0.05, 20.0


def softmax(logits: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities, float64 (N, C), of logits (N, C) over a temperature."""
    z = np.asarray(logits, np.float64) / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the negative log-likelihood of validation slides; it never changes the ranking.

    logits: (N, C). labels: int (N,). The loss is convex in 1 / temperature, so there is one minimum; it is looked for
    between 0.05 and 20. Returns 1.0 where validation data say nothing about it: no slides, one class only, or all
    slides classified rightly (then the best temperature would be 0, that is, certainty).
    Raises FiguresError when shapes do not fit or a logit is not finite.
    """
    from scipy.optimize import minimize_scalar

    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise FiguresError(f"logits {z.shape} and labels {y.shape} do not fit: (N, C) and (N,) are needed")
    if not np.isfinite(z).all():
        raise FiguresError("a logit is NaN or infinite")
    if len(set(y.tolist())) < 2:
        return 1.0
    margins = z - z[np.arange(len(y)), y][:, None]
    if (margins <= 0).all():
        return 1.0

    def loss(inverse: float) -> float:
        scaled = inverse * margins
        peak = scaled.max(axis=1)
        return float((peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1))).mean())

    found = minimize_scalar(
        loss, bounds=(1 / GREATEST_TEMPERATURE, 1 / LEAST_TEMPERATURE), method="bounded", options={"xatol": 1e-6}
    )
    return 1 / float(found.x)


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
