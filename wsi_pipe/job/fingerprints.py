"""What makes work stale: versions of the stages, fingerprints over a grid's pixels and over how they are encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wsi_pipe.config import fingerprint
from wsi_pipe.encoders.naming import slug_of
from wsi_pipe.geometry import TileGrid

__all__ = ["EXTRACT_VERSION", "SEGMENT_VERSION", "TILE_VERSION", "features_fingerprint", "grid_fingerprint"]

SEGMENT_VERSION = 2
TILE_VERSION = 1
EXTRACT_VERSION = 1
"""Raised when a change to a stage changes its results. What an earlier version made is known by its own number
(``wsi_pipe.job.fits``), kept, and made anew only where the user says so."""


def grid_fingerprint(slide_fingerprint: str, grid: TileGrid) -> str:
    """SHA-256 over which pixels a grid's tiles hold: features of an unchanged grid stay valid when others change."""
    content = hashlib.sha256(np.ascontiguousarray(grid.cells).tobytes()).hexdigest()
    return fingerprint(slide_fingerprint, content, grid.spec.size_px, grid.origin_l0, grid.stride_l0, grid.tile_size_l0)


def features_fingerprint(
    source: str,
    reader: str,
    *,
    encoder: str,
    weights_sha256: str,
    precision: str,
    transform: Mapping[str, Any],
    dim: int,
    layers: Sequence[int],
    dtype: str,
    version: int | None = None,
) -> str:
    """SHA-256 over a grid (``source``, see ``grid_fingerprint``) and everything that its features depend on.

    encoder: its name as given; an alias of it, and a file that was moved, are the same encoder. version: of this stage,
    by default the one of now.
    """
    how = (slug_of(encoder), weights_sha256, precision, transform, dim)
    return fingerprint(
        "extract", EXTRACT_VERSION if version is None else version, source, reader, how, tuple(layers), dtype
    )
