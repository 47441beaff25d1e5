"""What a cascade may lose against reading every slide at high resolution.

A slide is kept at low resolution where its uncertainty lies below the threshold, and is read at high resolution
otherwise. Raising the threshold keeps more slides. The loss of a slide must never fall when that happens: conformal
risk control rests on it. So each loss counts what is lost and not what is won: a slide that low resolution gets right
and high resolution wrong does not pay for another. By that ``error`` is never below the difference of the error rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError, SettingsError

__all__ = ["LOSSES", "SlideLosses", "loss_of"]

Array = NDArray[np.float64]
LOSSES = ("disagree", "error", "miss")


@dataclass(frozen=True)
class SlideLosses:
    """The loss of each slide under either decision, and whose slide it is.

    kept, read: float64 (N,), 0 or 1, where the slide is kept at low resolution or read at high; ``read`` is at most
    ``kept``. uncertainty: float64 (N,). cases: int64 (N,), numbers from 0, all of them with slides.
    """

    kept: Array
    read: Array
    uncertainty: Array
    cases: NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many cases there are."""
        return int(self.cases.max()) + 1 if len(self.cases) else 0

    @property
    def weights(self) -> Array:
        """What a slide adds to the mean over cases of the mean over a case's slides, times the cases: float64 (N,)."""
        return np.asarray(1.0 / np.bincount(self.cases, minlength=self.count)[self.cases])

    @property
    def binary(self) -> bool:
        """Whether the loss of a case is 0 or 1, as where each has one slide."""
        return len(self.cases) == self.count

    def risk(self, threshold: float) -> float:
        """The mean loss over cases of a cascade with that threshold."""
        loss = np.where(self.uncertainty < threshold, self.kept, self.read)
        return float(loss @ self.weights / self.count)

    def share_read(self, threshold: float) -> float:
        """The share of slides that are read at high resolution, by case."""
        return float((self.uncertainty >= threshold) @ self.weights / self.count)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> SlideLosses:
        """Some of the slides, their cases numbered anew."""
        cases = np.unique(self.cases[rows], return_inverse=True)[1].astype(np.int64)
        return SlideLosses(self.kept[rows], self.read[rows], self.uncertainty[rows], cases)


def loss_of(
    name: str,
    labels: ArrayLike,
    low: ArrayLike,
    reference: ArrayLike,
    *,
    read: ArrayLike | None = None,
    positive: int = 1,
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Losses of slides kept at low resolution and read at high, float64 (N,), and which slides count, bool (N,).

    labels: int (N,). low, reference: probabilities (N, C) at low resolution, and at high resolution of all tiles, which
    is what the cascade is compared with. read: those of the tiles that the cascade reads, where that is not all.

    "disagree": another class than the reference. "error": wrong where the reference is right. "miss": a slide of the
    class ``positive`` that the reference finds and the cascade does not; other slides do not count. The loss of a slide
    that is kept is at least that of reading it, so that keeping more never loses less. Raises SettingsError for another
    name, FiguresError where the shapes differ.
    """
    y = np.asarray(labels, np.int64)
    probabilities = [np.asarray(low, np.float64), np.asarray(reference, np.float64)]
    probabilities.append(probabilities[1] if read is None else np.asarray(read, np.float64))
    if y.ndim != 1 or any(p.ndim != 2 or p.shape != probabilities[0].shape or len(p) != len(y) for p in probabilities):
        raise FiguresError(f"labels {y.shape} and probabilities {[p.shape for p in probabilities]} do not fit")
    of_low, of_all, of_read = (p.argmax(axis=1) for p in probabilities)
    counts = np.ones(len(y), bool)
    if name == "disagree":
        kept, after = of_low != of_all, of_read != of_all
    elif name == "error":
        kept, after = (of_low != y) & (of_all == y), (of_read != y) & (of_all == y)
    elif name == "miss":
        counts = y == positive
        found = of_all == positive
        kept, after = found & (of_low != positive), found & (of_read != positive)
    else:
        raise SettingsError(f"no loss is called {name!r}", remedy=f"choose one of {', '.join(LOSSES)}")
    return np.maximum(kept, after).astype(np.float64), after.astype(np.float64), counts
