"""How unsure a model is of a slide: the scores by which a cascade tells which slides are read at high resolution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import SettingsError

__all__ = ["SCORES", "disagreement", "entropy", "margin", "uncertainty"]

Array = NDArray[np.float64]
SCORES = ("margin", "entropy", "disagreement")
"""The first preferred where nothing tells them apart. The last needs several models of one slide."""


def margin(probabilities: ArrayLike) -> Array:
    """1 less the difference of the two largest probabilities, float64 (N,), of probabilities (N, C); 0 is sure."""
    p = np.sort(np.asarray(probabilities, np.float64), axis=1)
    return np.asarray(1 - (p[:, -1] - p[:, -2]))


def entropy(probabilities: ArrayLike) -> Array:
    """Entropy as a share of the largest, float64 (N,), of probabilities (N, C); 0 is sure, 1 knows nothing."""
    p = np.asarray(probabilities, np.float64)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(axis=1) / np.log(p.shape[1]))


def disagreement(members: ArrayLike) -> Array:
    """What several models contradict each other, float64 (N,), of their probabilities (M, N, C).

    The Jensen-Shannon divergence of the models' predictions as a share of log C: the entropy of their mean less the
    mean of their entropies (mutual information of prediction and model: Lakshminarayanan et al. 2017).
    """
    p = np.asarray(members, np.float64)
    if p.ndim != 3 or len(p) < 2:
        raise SettingsError("models disagree only where there are several", remedy="choose another score: --score")
    # Rounding may leave a little below nothing.
    return np.asarray(np.maximum(entropy(p.mean(axis=0)) - np.mean([entropy(own) for own in p], axis=0), 0.0))


def uncertainty(members: ArrayLike) -> Mapping[str, Array]:
    """Every score that the models' probabilities (M, N, C) allow, by name; one model cannot disagree."""
    p = np.asarray(members, np.float64)
    mean = p.mean(axis=0)
    found = {"margin": margin(mean), "entropy": entropy(mean)}
    return found | ({"disagreement": disagreement(p)} if len(p) > 1 else {})
