"""Intervals of shares (accuracy, sensitivity, specificity) that hold near 0 and 1, by case.

Wilson's interval (1927), which is never of zero width, at the number of slides that the cases are worth: slides of a
case that are right and wrong together tell less than as many cases (design effect, Kish 1965).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Share", "mean_share", "share_of", "wilson"]


@dataclass(frozen=True)
class Share:
    """A share of slides with its 95 % interval, NaN where there are none. cases: that it rests on."""

    value: float
    low: float
    high: float
    cases: int


def wilson(share: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Lower and upper end of a share of ``n`` independent slides; n need not be whole."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The share itself is inside, whatever rounding does to the last digit.
    return float(max(min(centre - half, share), 0.0)), float(min(max(centre + half, share), 1.0))


def share_of(hits: NDArray[np.bool_], cases: NDArray[np.int64]) -> Share:
    """The share of slides that are hits. hits: bool (N,). cases: a number for each slide's case."""
    if not len(hits):
        return Share(np.nan, np.nan, np.nan, 0)
    value = float(hits.mean())
    _, place, sizes = np.unique(cases, return_inverse=True, return_counts=True)
    count = len(sizes)
    # With all right or all wrong nothing is seen of how slides of a case agree, so they are taken to agree wholly.
    effect = float((sizes**2).sum() / sizes.sum())
    if 0 < value < 1 and count > 1:
        off = np.bincount(place, weights=hits - value)
        variance = count / (count - 1) * float((off**2).sum()) / len(hits) ** 2
        effect = float(np.clip(variance / (value * (1 - value) / len(hits)), 1.0, effect))
    return Share(value, *wilson(value, len(hits) / effect), count)


def mean_share(shares: Sequence[Share]) -> Share:
    """The mean of shares of different slides, such as the recalls of classes or folds, by MOVER (Zou and Donner 2008).

    Shares that are undefined are left out.
    """
    there = [share for share in shares if not np.isnan(share.value)]
    if not there:
        return Share(np.nan, np.nan, np.nan, 0)
    value = float(np.mean([share.value for share in there]))
    down = float(np.sqrt(sum((share.value - share.low) ** 2 for share in there))) / len(there)
    up = float(np.sqrt(sum((share.high - share.value) ** 2 for share in there))) / len(there)
    return Share(value, max(value - down, 0.0), min(value + up, 1.0), sum(share.cases for share in there))
