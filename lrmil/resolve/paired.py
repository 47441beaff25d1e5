"""The difference of two AUCs on the same cases, with an interval that holds on either side.

DeLong's interval is symmetric, while an AUC near 1 is not: against a margin it says "not worse" too often (measured in
docs/resolve.md). Here each AUC has its own interval (``lrmil.metrics.auc``), and the two are put together by MOVER with
the correlation of their errors over cases (Zou and Donner 2008; Newcombe 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lrmil.metrics.auc import Auc, AucInterval, auc_difference, mean_auc

__all__ = ["Paired", "paired_difference"]


class Paired(NamedTuple):
    """A's mean AUC less B's, with its interval; NaN ends and the reason where there is none."""

    value: float
    low: float
    high: float
    reason: str | None = None


def paired_difference(a: Sequence[Auc], b: Sequence[Auc], *, level: float = 0.95) -> Paired:
    """The mean of A's AUCs less that of B's, pair by pair on the same cases of one numbering (folds, or classes).

    Pairs in which either is undefined are left out. No interval where ``mean_auc`` has none.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not math.isnan(x.value + y.value)]
    if not pairs:
        return Paired(math.nan, math.nan, math.nan, "undefined in every fold")
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    of_a, of_b = _mean(first, level), _mean(second, level)
    value = of_a.value - of_b.value
    if math.isnan(of_a.low) or math.isnan(of_b.low):
        return Paired(value, math.nan, math.nan, of_a.reason or of_b.reason)
    errors = [np.sum([auc.pos + auc.neg for auc in own], axis=0) for own in (first, second)]
    size = math.sqrt(float(errors[0] @ errors[0]) * float(errors[1] @ errors[1]))
    if not errors[0].any() and not errors[1].any():
        # Both order all slides rightly: what is known of the difference is DeLong's pseudo-case.
        alike = auc_difference(first, second, level=level)
        return Paired(value, alike.low, alike.high, alike.reason)
    # Where one of them shows no error there is nothing to correlate, and the wider interval is taken.
    together = float(np.clip(errors[0] @ errors[1] / size, -1, 1)) if size > 0 else 0.0
    down = _apart(of_a.value - of_a.low, of_b.high - of_b.value, together)
    up = _apart(of_a.high - of_a.value, of_b.value - of_b.low, together)
    return Paired(value, max(value - down, -1.0), min(value + up, 1.0))


def _mean(aucs: Sequence[Auc], level: float) -> AucInterval:
    """The mean with its interval: that of one AUC over all cases where folds test different ones."""
    apart = sum(int(auc.members.sum()) for auc in aucs) == int(np.any([auc.members for auc in aucs], axis=0).sum())
    found = mean_auc(aucs, level=level)
    if not apart or math.isnan(found.low) or len({auc.of_class for auc in aucs}) > 1:
        return found
    k = len(aucs)
    joint = Auc(
        found.value,
        sum(auc.positives for auc in aucs),
        sum(auc.negatives for auc in aucs),
        np.sum([auc.pos for auc in aucs], axis=0) / k,
        np.sum([auc.neg for auc in aucs], axis=0) / k,
        np.any([auc.members for auc in aucs], axis=0),
    )
    return mean_auc([joint], level=level)


def _apart(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(one * one + other * other - 2 * correlation * one * other, 0.0))
