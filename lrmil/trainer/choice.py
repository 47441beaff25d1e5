"""``--model auto``: a linear model, attention, or the mean of both, by cases that were left out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrmil.metrics import figures, softmax
from lrmil.trainer.linear import log_losses

__all__ = ["SHARES", "Choice", "choose_share"]

Array = NDArray[np.float64]
SHARES = (0.5, 0.25, 0.75, 0.0, 1.0)
"""Of the linear model, the first preferred: the mean of two models is rarely much worse than the better of them."""
CLEARLY_BETTER = 0.5
"""Standard errors by which another share must beat one that is preferred."""


@dataclass(frozen=True)
class Choice:
    """share: of the linear model in the logits; 0 is attention alone, 1 the linear model alone.

    figures: loss and AUC of bags whose cases were left out, by candidate.
    """

    share: float
    figures: Mapping[str, Mapping[str, float]]

    def said(self, attention: str, where: str) -> str:
        """The choice in words. attention: name of the attention model. where: what the figures were found on."""
        chosen = {0.0: attention, 1.0: "linear"}.get(
            self.share, f"{self.share:g} linear + {1 - self.share:g} {attention}"
        )
        found = ", ".join(f"{name} AUC {f['auc']:.3f} (loss {f['loss']:.3f})" for name, f in self.figures.items())
        return f"auto chose {chosen}; on {where}: {found}"


def choose_share(linear: Array, attention: Array, labels: NDArray[np.int64], weights: Array, name: str) -> Choice:
    """The share of the linear model, from logits (N, C) of bags that neither model was fitted to.

    labels: (N,). weights: (N,), of the bags' losses. name: of the attention model. The share is the first of
    ``SHARES`` whose mean loss no other beats by ``CLEARLY_BETTER`` standard errors of the difference.
    """
    rows = {share: log_losses(share * linear + (1 - share) * attention, labels) for share in SHARES}
    rows = {share: losses * weights / weights.mean() for share, losses in rows.items()}
    best = min(rows, key=lambda share: float(rows[share].mean()))
    share = best
    for candidate, losses in rows.items():
        worse = losses - rows[best]
        if worse.mean() <= CLEARLY_BETTER * worse.std(ddof=1) / np.sqrt(len(worse)):
            share = candidate
            break
    shown = {"linear": linear, name: attention}
    if 0 < share < 1:
        shown["both"] = share * linear + (1 - share) * attention
    found = {key: figures(labels, softmax(logits)) for key, logits in shown.items()}
    return Choice(share, {key: {what: f[what] for what in ("auc", "loss")} for key, f in found.items()})
