"""A slide's attention over the stained slide, with its name, class, probability, a legend and a scale bar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.pictures import ColourBar, viridis, with_panel, write_image

__all__ = ["Caption", "attention_layer", "attention_overlay", "attention_picture", "draw_attention", "shares"]

LONGEST_PX = 2000
LEAST_PX = 800
TILE_PX = 32
"""Sides in pixels: of a picture at most; of one with an overview at least; of a tile without an overview at most."""

PALEST, DENSEST = 0.12, 0.68
"""Opacity of tiles of no attention, which show the stain, and of the highest."""

GLASS = 0.92
"""Pixels this near to the brightest of the slide, in every channel, are glass."""

LEAST_TISSUE = 0.02
"""A tile with less than this share of pixels that are no glass is coloured whole: pale tissue is not to vanish."""


@dataclass(frozen=True)
class Caption:
    """What stands below a heatmap. um_per_unit: micrometres per unit of the coordinates, for the scale bar."""

    title: str = ""
    um_per_unit: float | None = None


def shares(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """Attention as a share of its maximum, float32 (N,) in [0, 1]: equal attention is 1 everywhere."""
    highest = float(attention.max(initial=0.0))
    if highest <= 0:
        return np.zeros(len(attention), np.float32)
    return np.asarray(attention / highest, np.float32)


def attention_layer(
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    size_px: tuple[int, int],
    scale: tuple[float, float],
    *,
    smooth: bool = False,
) -> NDArray[np.float32]:
    """Attention as a share of its maximum, float32 (H, W) in [0, 1], NaN where there is no tile.

    coords: float64 (N, 2) top-left corners; tile_size: (x, y) in the same unit. size_px: (width, height) of the layer.
    scale: units per pixel, (x, y). smooth: blurred over half a tile, among tiles alone; without it each tile is what it
    is.
    """
    import cv2

    values = shares(attention)
    width, height = size_px
    layer = np.full((height, width), np.nan, np.float32)
    low = np.rint(coords / scale).astype(int)
    high = np.maximum(np.rint((coords + tile_size) / scale).astype(int), low + 1)
    # Highest last, so that where tiles overlap the higher attention is seen.
    for i in np.argsort(values, kind="stable").tolist():
        (x0, y0), (x1, y1) = low[i], high[i]
        layer[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = values[i]
    if smooth:
        there = np.isfinite(layer)
        sigma = [max(side / unit / 2, 0.5) for side, unit in zip(tile_size, scale, strict=True)]
        blurred, weight = (
            cv2.GaussianBlur(part, (0, 0), sigmaX=sigma[0], sigmaY=sigma[1], borderType=cv2.BORDER_CONSTANT)
            for part in (np.where(there, layer, 0).astype(np.float32), there.astype(np.float32))
        )
        layer = np.where(there, blurred / np.maximum(weight, 1e-6), np.nan).astype(np.float32)
    return layer


def attention_overlay(
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    *,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
    longest_px: int = LONGEST_PX,
    smooth: bool = False,
) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """The slide with its attention in colour over the tissue, uint8 (H, W, 3), and the units per pixel (x, y).

    coords, tile_size, attention, smooth: as for ``attention_layer``. overview: uint8 (H, W, 3) of the whole slide,
    which is ``extent`` (width, height) in the unit of the coordinates. Glass within tiles stays clear. Without an
    overview the tiles' own bounding box is shown. longest_px: of the picture's sides.
    """
    import cv2

    size = np.asarray(tile_size, np.float64)
    if overview is None or extent is None:
        coords = coords - coords.min(axis=0)
        span = coords.max(axis=0) + size
        scale = max(span.max() / longest_px, size.max() / TILE_PX, 1e-9)
        width, height = np.maximum(np.rint(span / scale).astype(int), 1).tolist()
        picture = np.full((height, width, 3), 255, np.uint8)
        scales = (float(scale), float(scale))
    else:
        picture = _sized(overview, longest_px)
        height, width = picture.shape[:2]
        scales = (extent[0] / width, extent[1] / height)
    layer = attention_layer(coords, (float(size[0]), float(size[1])), attention, (width, height), scales, smooth=smooth)
    there = np.isfinite(layer)
    if overview is not None:
        there &= _tissue(picture, coords, size, scales)
    level = np.rint(np.nan_to_num(layer[there]) * 255).astype(np.uint8)
    opacity = (PALEST + (DENSEST - PALEST) * np.nan_to_num(layer[there]))[:, None]
    picture[there] = np.rint((1 - opacity) * picture[there] + opacity * viridis()[level]).astype(np.uint8)
    if overview is None:
        # Nothing of the slide is known: where tiles are is told by a line around them.
        edge = np.isfinite(layer).astype(np.uint8)
        lines = edge - cv2.erode(edge, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        picture[lines > 0] = (picture[lines > 0] * 0.7).astype(np.uint8)
    return picture, scales


def attention_picture(
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    *,
    caption: Caption | None = None,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
    longest_px: int = LONGEST_PX,
    smooth: bool = False,
) -> NDArray[np.uint8]:
    """``attention_overlay`` with a panel below it: title, legend, colour bar and scale bar; uint8 (H, W, 3).

    The colour bar runs from 0 to the slide's highest attention, which the legend states beside what every tile would
    have if attention were spread evenly: flat attention looks flat, and is told to be.
    """
    caption = caption or Caption()
    picture, scales = attention_overlay(
        coords, tile_size, attention, overview=overview, extent=extent, longest_px=longest_px, smooth=smooth
    )
    count = len(attention)
    highest, even = float(attention.max(initial=0.0)), float(attention.sum()) / max(count, 1)
    noun = "tile" if count == 1 else "tiles"
    lines = [f"highest {highest:.3g}; spread evenly over {count:,} {noun} it would be {even:.3g}"]
    um_per_px = None if caption.um_per_unit is None else caption.um_per_unit * scales[0]
    ramp = np.linspace(0.0, 1.0, 256)[:, None]
    opacity = PALEST + (DENSEST - PALEST) * ramp
    # As it lies over a mid-stained tissue.
    colours = np.rint((1 - opacity) * np.array([205, 150, 190]) + opacity * viridis()).astype(np.uint8)
    return with_panel(
        picture,
        title=caption.title,
        lines=lines,
        um_per_px=um_per_px,
        bar=ColourBar("attention, share of the highest", (0.0, 1.0), colours),
    )


def draw_attention(
    path: Path,
    coords: NDArray[np.float64],
    tile_size: tuple[float, float],
    attention: NDArray[np.float32],
    *,
    caption: Caption | None = None,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
) -> None:
    """Write ``attention_picture`` as PNG or JPEG. Raises OutputError when it cannot be written."""
    write_image(
        path, attention_picture(coords, tile_size, attention, caption=caption, overview=overview, extent=extent)
    )


def _sized(overview: NDArray[np.uint8], longest_px: int) -> NDArray[np.uint8]:
    """A copy at most ``longest_px`` long, and at least LEAST_PX where that is no more: small slides are enlarged."""
    import cv2

    longest = max(overview.shape[:2])
    zoom = min(longest_px, max(longest, min(LEAST_PX, longest_px))) / longest
    if zoom == 1:
        return overview.copy()
    size = (max(1, round(overview.shape[1] * zoom)), max(1, round(overview.shape[0] * zoom)))
    way = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(overview, size, interpolation=way), np.uint8)


def _tissue(
    picture: NDArray[np.uint8],
    coords: NDArray[np.float64],
    size: NDArray[np.float64],
    scales: tuple[float, float],
) -> NDArray[np.bool_]:
    """Where colour may lie, bool (H, W): what is no glass, and tiles that would have none of it whole."""
    import cv2

    # The brightest of a slide is its glass; a slide without any has none to be left clear.
    brightest = np.maximum(np.percentile(picture.reshape(-1, 3), 99, axis=0), 200)
    clear = np.all(picture >= GLASS * brightest, axis=2)
    # Holes of a few pixels are within cells.
    clear = cv2.morphologyEx(clear.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0
    tissue = np.asarray(~clear, np.bool_)
    low = np.maximum(np.rint(coords / scales).astype(int), 0)
    high = np.rint((coords + size) / scales).astype(int)
    for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True):
        tile = tissue[y0:y1, x0:x1]
        if tile.size and tile.mean() < LEAST_TISSUE:
            tile[:] = True
    return tissue
