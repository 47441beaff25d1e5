"""A slide's attention over its thumbnail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.files import atomic_path

__all__ = ["attention_layer", "attention_picture", "draw_attention", "write_png"]

LONGEST_PX = 1600
LEAST_PX = 800
TILE_PX = 32
"""Sides in pixels: of a picture at most; of one with an overview at least; of a tile without an overview at most."""
OPACITY = 0.55


def attention_layer(
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    size_px: tuple[int, int],
    scale: tuple[float, float],
) -> NDArray[np.float32]:
    """Percentile of attention, float32 (H, W) in [0, 1], NaN where there is no tile.

    coords: float64 (N, 2) top-left corners; tile_size: (x, y) in the same unit. size_px: (width, height) of the layer.
    scale: units per pixel, (x, y). Percentiles, since attention itself falls over orders of magnitude; equal attention
    has an equal percentile.
    """
    from scipy.stats import rankdata

    ranks = rankdata(attention, method="average") / len(attention)
    width, height = size_px
    layer = np.full((height, width), np.nan, np.float32)
    low = np.rint(coords / scale).astype(int)
    high = np.maximum(np.rint((coords + tile_size) / scale).astype(int), low + 1)
    # Highest last, so that where tiles overlap the higher attention is seen.
    for i in np.argsort(ranks, kind="stable").tolist():
        (x0, y0), (x1, y1) = low[i], high[i]
        layer[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = ranks[i]
    return layer


def attention_picture(
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    *,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """A heatmap of a slide, uint8 (H, W, 3): its overview in grey where there is one, attention percentiles in colour
    over it.

    coords, tile_size, attention: as for ``attention_layer``. overview: uint8 (H, W, 3) of the whole slide, which is
    ``extent`` (width, height) in the unit of the coordinates. Without an overview the tiles' own bounding box is shown.
    """
    import cv2
    from matplotlib import colormaps

    size = np.asarray(tile_size, np.float64)
    if overview is None or extent is None:
        coords = coords - coords.min(axis=0)
        span = coords.max(axis=0) + size
        scale = max(span.max() / LONGEST_PX, size.max() / TILE_PX, 1e-9)
        width, height = np.maximum(np.rint(span / scale).astype(int), 1).tolist()
        grey = np.full((height, width), 255, np.uint8)
        scales = (scale, scale)
    else:
        # Grey, so that no colour of the stain is taken for attention. A small slide's overview is enlarged by a whole
        # factor, so that tiles have sharp edges.
        factor = max(LEAST_PX // max(overview.shape[:2]), 1)
        grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY).repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = grey.shape
        scales = (extent[0] / width, extent[1] / height)
    layer = attention_layer(coords, (float(size[0]), float(size[1])), attention, (width, height), scales)
    palette = np.rint(colormaps["viridis"](np.arange(256))[:, :3] * 255).astype(np.float32)
    picture = np.repeat(grey[..., None], 3, axis=2)
    there = np.isfinite(layer)
    colours = palette[np.rint(layer[there] * 255).astype(np.uint8)]
    picture[there] = np.rint((1 - OPACITY) * picture[there] + OPACITY * colours).astype(np.uint8)
    return picture


def draw_attention(
    path: Path,
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    *,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
) -> None:
    """Write ``attention_picture`` as PNG. Raises OutputError when it cannot be written."""
    write_png(path, attention_picture(coords, tile_size, attention, overview=overview, extent=extent))


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture uint8 (H, W, 3). Raises OutputError when it cannot be written."""
    from matplotlib.image import imsave

    with atomic_path(path) as temporary:
        imsave(temporary, picture, format="png")
