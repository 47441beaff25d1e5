"""How well numbers and grades are told, for many weightings of the same slides; see ``lrmil.metrics.figures``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrmil.metrics.figures import Array

__all__ = ["auc_of", "grade_figures", "number_figures"]


def number_figures(truth: Array, told: Array, weights: Array) -> dict[str, Array]:
    """Pearson's r, R2, mean absolute and root mean squared error: name -> (R,); NaN where undefined.

    truth, told: (N,). weights: (R, N). R2 is 1 - residual / total sum of squares, below 0 for what is worse than the
    mean of the truth.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights.sum(1)
        mean_x, mean_y = weights @ told / total, weights @ truth / total
        # Sums of squares about each weighting's own mean; numbers are centred first, so that nothing cancels.
        x, y = told - told.mean(), truth - truth.mean()
        mx, my = mean_x - told.mean(), mean_y - truth.mean()
        xx = np.maximum(weights @ (x * x) / total - mx**2, 0)
        yy = np.maximum(weights @ (y * y) / total - my**2, 0)
        xy = weights @ (x * y) / total - mx * my
        off = told - truth
        squared = weights @ (off * off) / total
        tiny = 1e-20 * max(float(np.abs(truth).max(initial=0.0)), 1e-30) ** 2
        varies = (xx > tiny) & (yy > tiny)
        return {
            "pearson": np.where(varies, xy / np.sqrt(xx * yy), np.nan),
            "r2": np.where(yy > tiny, 1 - squared / yy, np.nan),
            "mae": weights @ np.abs(off) / total,
            "rmse": np.sqrt(squared),
        }


def grade_figures(truth: NDArray[np.int64], told: NDArray[np.int64], levels: int, weights: Array) -> dict[str, Array]:
    """Quadratic-weighted kappa, accuracy, and mean absolute error in grades: name -> (R,).

    truth, told: grades from 0, (N,). Kappa is 1 - observed / expected squared distance (Cohen 1968); NaN where all are
    of one grade in both.
    """
    far = (np.arange(levels)[:, None] - np.arange(levels)[None, :]) ** 2.0
    cells = np.zeros((len(truth), levels * levels))
    cells[np.arange(len(truth)), truth * levels + told] = 1
    matrix = (weights @ cells).reshape(-1, levels, levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights.sum(1)
        observed = (matrix * far).sum((1, 2)) / total
        chance = matrix.sum(2)[:, :, None] * matrix.sum(1)[:, None, :]
        expected = (chance * far).sum((1, 2)) / total**2
        return {
            "kappa_quadratic": np.where(expected > 0, 1 - observed / expected, np.nan),
            "mae": weights @ np.abs(truth - told).astype(np.float64) / total,
            "accuracy": np.trace(matrix, axis1=1, axis2=2) / total,
        }


def auc_of(positive: NDArray[np.bool_], scores: Array, weights: Array) -> tuple[Array, Array]:
    """AUC and average precision of one label for R weightings, (R,) each; weights of 0 leave a slide out."""
    from lrmil.metrics.figures import ranking

    return ranking(positive, scores, weights)
