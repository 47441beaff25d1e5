"""Multinomial logistic regression with an L2 penalty, and its losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrmil.metrics.figures import Array
from lrmil.targets.newton import MOST_NUMBERS, newton_paths

__all__ = ["log_losses", "logistic_path"]


def log_losses(logits: Array, labels: NDArray[np.int64]) -> Array:
    """Negative log-likelihood of each row, (N,)."""
    peak = logits.max(axis=1)
    total = np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak
    return np.asarray(total - logits[np.arange(len(labels)), labels])


def logistic_path(
    values: Array, labels: NDArray[np.int64], weights: Array, classes: int, penalties: Sequence[float]
) -> list[tuple[Array, Array]]:
    """Multinomial logistic regression for each of falling penalties: weights (C, R) and biases (C,).

    Minimises the weighted mean of the negative log-likelihood + penalty / 2 * |weights|^2; the biases are free. Each
    begins where the one before ended.
    """
    width = values.shape[1]
    if classes == 2 and width <= MOST_NUMBERS:
        everything = np.ones((1, len(labels)), bool)
        return [(weight[0], bias[0]) for weight, bias in newton_paths(values, labels, weights, everything, penalties)]
    from scipy.optimize import minimize

    truth = np.eye(classes)[labels]
    share = (weights / weights.sum())[:, None]

    def loss(flat: Array, penalty: float) -> tuple[float, Array]:
        weight, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        z = values @ weight.T + bias
        z -= z.max(axis=1, keepdims=True)
        e = np.exp(z)
        total = e.sum(axis=1, keepdims=True)
        value = float((share * truth * (np.log(total) - z)).sum() + penalty / 2 * (weight * weight).sum())
        off = share * (e / total - truth)
        return value, np.concatenate([(off.T @ values + penalty * weight).ravel(), off.sum(axis=0)])

    at = np.zeros(classes * (width + 1))
    found = []
    for penalty in penalties:
        at = minimize(loss, at, (penalty,), jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-6}).x
        found.append((at[: classes * width].reshape(classes, width).copy(), at[classes * width :].copy()))
    return found
