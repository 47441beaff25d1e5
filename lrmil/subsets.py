"""Which high-resolution tiles of a slide are read: those below the low-resolution tiles with most attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import SettingsError

__all__ = ["chosen_rows", "drawn_rows"]


def chosen_rows(attention: ArrayLike, parents: ArrayLike, budget: float) -> NDArray[np.int64]:
    """Rows of the high-resolution tiles to be read, int64 (M,), ascending.

    attention: (L,) of the low-resolution tiles. parents: (H,), the low-resolution row of each high-resolution tile, -1
    for none. budget: share of the H tiles that may be read, 1 for all. Low-resolution tiles are taken by falling
    attention, each with all its children, until the next one's would exceed the budget; the first that has children is
    always taken. Raises SettingsError for a budget outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise SettingsError(f"budget {budget} must lie above 0 and not above 1", remedy="1 reads all tiles")
    above = np.asarray(parents, np.int64)
    if budget == 1:
        return np.arange(len(above))
    scores = np.asarray(attention, np.float64)
    children = np.bincount(above[above >= 0], minlength=len(scores))
    order = np.argsort(-scores, kind="stable")
    order = order[children[order] > 0]
    # Rounding must not take a tile from a budget that is a whole number of them.
    taken = int(np.searchsorted(np.cumsum(children[order]), budget * len(above) + 1e-9, side="right"))
    kept = np.zeros(len(scores), bool)
    kept[order[: max(taken, 1)]] = True
    return np.flatnonzero((above >= 0) & kept[above])


def drawn_rows(attention: ArrayLike, parents: ArrayLike, budget: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """As ``chosen_rows``, of low-resolution tiles drawn without replacement with chances in proportion to attention.

    The order of ``log(attention)`` with Gumbel noise is such a draw (Yellott 1977; Kool et al. 2019).
    """
    scores = np.asarray(attention, np.float64)
    noisy = np.log(np.maximum(scores, np.finfo(np.float64).tiny)) + rng.gumbel(size=len(scores))
    return chosen_rows(noisy, parents, budget)
