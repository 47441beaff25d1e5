"""Ridge regression from sums over parts of the data, so that the data need not be in memory at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIDGE", "RidgeSums"]

RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties tried, relative to the mean variance of the inputs."""


class _Sums:
    """X'X, X'Y, the sum of squares of Y, and the number of rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = np.zeros((inputs, inputs))
        self.moment = np.zeros((inputs, outputs))
        self.square = 0.0
        self.count = 0

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        self.gram += x.T @ x
        self.moment += x.T @ y
        self.square += float(np.vdot(y, y))
        self.count += len(x)

    def solve(self, penalty: float) -> NDArray[np.float64]:
        strength = penalty * np.trace(self.gram) / len(self.gram)
        regular = strength * np.eye(len(self.gram))
        regular[-1, -1] = 1e-9 * strength
        result: NDArray[np.float64] = np.linalg.solve(self.gram + regular, self.moment)
        return result

    def error(self, weights: NDArray[np.float64]) -> float:
        """Sum of (Y - X W)^2."""
        return self.square - 2 * float(np.vdot(weights, self.moment)) + float(np.vdot(weights, self.gram @ weights))


class RidgeSums:
    """What a ridge regression needs of its data, which are added part by part and not kept.

    inputs: columns of X, the last of which is 1 and hardly penalised. outputs: columns of Y. Takes
    2 * inputs * (inputs + outputs) * 8 bytes.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self._fitted, self._held = _Sums(inputs, outputs), _Sums(inputs, outputs)

    def add(self, x: NDArray[np.float64], y: NDArray[np.floating[Any]], held: NDArray[np.bool_]) -> None:
        """x: (M, inputs). y: (M, outputs). held: bool (M,), rows that the penalty is chosen on."""
        target = np.asarray(y, np.float64)
        for sums, rows in ((self._fitted, ~held), (self._held, held)):
            if rows.any():
                sums.add(x[rows], target[rows])

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._fitted.count + self._held.count

    def solve(self, penalty: float | None = None) -> NDArray[np.float64]:
        """Weights (inputs, outputs) from all rows; by default at the penalty that predicts the held-out ones best from
        the others, or at a penalty of 1 where one of the two parts is empty."""
        fitted, held = self._fitted, self._held
        if penalty is None and not (fitted.count and held.count):
            penalty = 1.0
        if penalty is None:
            penalty = RIDGE[int(np.argmin([held.error(fitted.solve(p)) for p in RIDGE]))]
        whole = _Sums(*fitted.moment.shape)
        whole.gram, whole.moment = fitted.gram + held.gram, fitted.moment + held.moment
        return whole.solve(penalty)
