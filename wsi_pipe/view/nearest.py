"""Tiles whose features are most alike, in one slide or in a job."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag import read_level
from wsi_pipe.errors import BagError

__all__ = ["nearest_tiles"]

Found = tuple[float, int, int]
"""Cosine similarity, number of the slide, row of the tile."""


def nearest_tiles(
    query: NDArray[np.floating],
    bags: Iterable[tuple[int, Path]],
    label: str,
    encoder: str,
    count: int = 10,
    *,
    but: tuple[int, int] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Found]:
    """The ``count`` tiles of largest cosine similarity to ``query`` (D,), best first.

    bags: numbers and paths, read one after the other, so that memory is one slide's. Bags that lack the features, or
    hold others of another dimension, have no part in it. but: the tile asked about. stopped: asked between bags; what
    was found so far is the answer then.
    """
    wanted = np.asarray(query, np.float32)
    wanted = wanted / (np.linalg.norm(wanted) or 1.0)
    best: list[Found] = []
    for number, path in bags:
        if stopped():
            break
        try:
            values = np.asarray(read_level(path, label, encoder).features, np.float32)
        except BagError:
            continue
        if not len(values) or values.shape[1:] != wanted.shape:
            continue
        norms = np.linalg.norm(values, axis=1)
        alike = values @ wanted / np.where(norms > 0, norms, 1.0)
        if but is not None and but[0] == number:
            alike[but[1]] = -np.inf
        top = np.argsort(-alike, kind="stable")[:count]
        best += [(float(alike[i]), number, int(i)) for i in top if np.isfinite(alike[i])]
        best = heapq.nsmallest(count, best, key=lambda found: (-found[0], found[1], found[2]))
    return best
