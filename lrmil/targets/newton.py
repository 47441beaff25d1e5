"""Logistic regression of two classes on few numbers by Newton's method, all inner folds in one stack of matrices.

A quasi-Newton search takes hundreds of evaluations for a path of penalties, each a dozen calls for a matrix that is
multiplied in microseconds. Newton's method takes a handful of steps from one penalty to the next, and a step solves
the systems of all folds at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_NUMBERS", "newton_paths"]

Array = NDArray[np.float64]
MOST_NUMBERS = 256
"""Numbers a row with which solving is still cheaper than searching."""
STEPS, HALVINGS, ENOUGH = 50, 30, 1e-7
"""Most steps for a penalty, most halvings of one, and the largest part of a gradient with which it ends."""


def newton_paths(
    values: Array, labels: NDArray[np.int64], weights: Array, kept: NDArray[np.bool_], penalties: Sequence[float]
) -> list[tuple[Array, Array]]:
    """For each of falling penalties: weights (F, 2, R) and biases (F, 2) of F fits, each to a part of the rows.

    values: (N, R). labels: (N,), 0 or 1, both among the rows of each part. weights: (N,), of the rows' losses. kept:
    (F, N), the rows of each part. Minimises what ``logistic_path`` does, whose two rows of weights are each other's
    negative at the least value: penalty / 2 * |weights|^2 is penalty / 4 * d^2 of their difference d.
    """
    count, width = values.shape
    rows = np.concatenate([values, np.ones((count, 1))], axis=1)
    share = kept * weights
    share /= share.sum(axis=1, keepdims=True)
    sign = np.where(labels == 1, 1.0, -1.0)
    at = np.zeros((len(kept), width + 1))
    found = []
    for penalty in penalties:
        ridge = np.full(width + 1, penalty / 2)
        # The bias is free.
        ridge[-1] = 0.0
        at = _least(at, rows, share, sign, ridge)
        half = at / 2
        weight = np.stack([-half[:, :-1], half[:, :-1]], axis=1)
        found.append((weight, np.stack([-half[:, -1], half[:, -1]], axis=1)))
    return found


def _least(at: Array, rows: Array, share: Array, sign: Array, ridge: Array) -> Array:
    """Where the penalised loss of each fit is least, (F, R + 1), from ``at`` on."""
    loss, margin = _loss(at, rows, share, sign, ridge)
    for _ in range(STEPS):
        # The probability of the wrong class, and how fast it changes.
        wrong = 1 / (1 + np.exp(np.minimum(margin, 700.0)))
        gradient = -(share * sign * wrong) @ rows + ridge * at
        if np.abs(gradient).max() <= ENOUGH:
            break
        curve = share * wrong * (1 - wrong)
        hessian = (rows.T * curve[:, None, :]) @ rows
        diagonal = np.arange(rows.shape[1])
        # Far out, where no row is near the border, the bias would have no curvature at all.
        hessian[:, diagonal, diagonal] += ridge + 1e-12
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        wanted = 1e-4 * (step * gradient).sum(axis=1)
        size = np.ones(len(at))
        for _ in range(HALVINGS):
            there = at - size[:, None] * step
            new, new_margin = _loss(there, rows, share, sign, ridge)
            short = new > loss - size * wanted + 1e-15
            if not short.any():
                break
            size[short] /= 2
        at, loss, margin = there, new, new_margin
    return at


def _loss(at: Array, rows: Array, share: Array, sign: Array, ridge: Array) -> tuple[Array, Array]:
    """The penalised loss of each fit, (F,), and each row's margin in it, (F, N)."""
    margin = (at @ rows.T) * sign
    # log(1 + exp(-m)) without overflow.
    log_loss = np.maximum(-margin, 0) + np.log1p(np.exp(-np.abs(margin)))
    return (share * log_loss).sum(axis=1) + (ridge * at * at).sum(axis=1) / 2, margin
