"""Whether a smaller image is a level of a larger one: the same picture, compared after a low-pass.

Names and marks tell most levels from macros and labels; content tells the rest. A few windows of the smaller image,
where it has most to show, are compared with what lies there in the larger one, both averaged over cells of
``CELL_PX`` pixels of the smaller: wide enough that the filter a writer made its levels with, a compression or a shift
of a pixel does not matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, paste
from wsi_pipe.slides.native import NativeImage

__all__ = ["MAX_WINDOW_PX", "bright_planes", "is_alike"]

CELL_PX, WINDOW_CELLS = 8, 4
PLACES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
"""Where windows are looked for, as fractions of the image."""

SEARCH_PX = 1024
"""Side of the part of an image that is searched for a window."""

MAX_WINDOW_PX = 4096
"""Side of a window of the larger image; a factor that would need more is compared over fewer cells."""

ALIKE, FAR = 8.0, 20.0
"""Mean difference of cells, in grey values: right levels have up to 3 by filters and compression; above FAR it is
another picture whatever its pattern."""

HUE = 4.0
"""Mean difference of red and blue above green, in grey values: right levels have up to 1.5."""

STRUCTURE = 6.0
"""Standard deviation of cells, in grey values, from which their pattern says something."""

BRIGHT = 100
"""Median grey value from which a channel's background counts as lit."""

SAME_PATTERN, OTHER_PATTERN = 0.8, 0.5


def is_alike(finer: NativeImage, coarser: NativeImage, factor: FloatPair) -> bool:
    """Whether ``coarser`` shows what ``finer`` shows; ``factor``: finer pixels to one of the coarser, (x, y).

    Raises CodecError or SlideReadError where a tile does not decode.
    """
    side = CELL_PX * WINDOW_CELLS
    while side > CELL_PX and side * max(factor) > MAX_WINDOW_PX:
        side -= CELL_PX
    size = (min(side, coarser.size_px[0]), min(side, coarser.size_px[1]))
    differences, hues, pairs = [], [], []
    for corner in dict.fromkeys(_window(coarser, place, size) for place in PLACES):
        small = _read(coarser, corner, size)
        at = (round(corner[0] * factor[0]), round(corner[1] * factor[1]))
        large = _read(finer, at, (max(round(size[0] * factor[0]), 1), max(round(size[1] * factor[1]), 1)))
        rows, columns = max(size[1] // CELL_PX, 1), max(size[0] // CELL_PX, 1)
        a, b = _cells(small, rows, columns), _cells(large, rows, columns)
        differences.append(float(np.abs(a - b).mean()))
        hues.append(float(np.abs((a - a[..., 1:2]) - (b - b[..., 1:2])).mean()))
        pairs.append((a.mean(2).ravel(), b.mean(2).ravel()))
    difference = float(np.mean(differences))
    one, other = (np.concatenate(values) for values in zip(*pairs, strict=True))
    pattern = max(float(one.std()), float(other.std())) > STRUCTURE
    same = _correlation(one, other)
    if pattern and same < OTHER_PATTERN:
        return False
    if float(np.mean(hues)) > HUE:
        return False
    return difference <= ALIKE or (difference <= FAR and pattern and same >= SAME_PATTERN)


def bright_planes(name: str, image: NativeImage) -> str:
    """The note on three planes that say nothing of themselves, where they are the colours of a brightfield picture.

    Light that is let through is bright in all three, light that glows lies on black. Raises NotAPictureError where one
    is dark.
    """
    side = 256
    medians = []
    for place in PLACES:
        corner = [int(p * max(s - side, 0)) for p, s in zip(place, image.size_px, strict=True)]
        size = (min(side, image.size_px[0]), min(side, image.size_px[1]))
        medians.append(np.median(_read(image, (corner[0], corner[1]), size), axis=(0, 1)))
    if np.min(np.median(medians, axis=0)) < BRIGHT:
        raise NotAPictureError(
            f"{name}: three channels that are not said to be red, green and blue, on a dark background",
            remedy="export the picture that is meant as 8-bit RGB",
        )
    return "three channels without names are taken for red, green and blue, as their background is bright"


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's r; 0 where one of them is flat."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 1e-9 else 0.0


def _window(image: NativeImage, place: FloatPair, size: IntPair) -> IntPair:
    """The corner of the window with most structure in the block at ``place``, in pixels of the image."""
    (width, height), (block_w, block_h) = image.size_px, image.block_px
    cell = (int(place[0] * (width - 1)) // block_w, int(place[1] * (height - 1)) // block_h)
    x0, y0 = cell[0] * block_w, cell[1] * block_h
    span = (min(block_w, width - x0), min(block_h, height - y0))
    # Of a long strip, one large block or a small image, the part around the place.
    wide, high = (max(min(SEARCH_PX, side // 2), part) for side, part in zip(image.size_px, size, strict=True))
    x0 += min(max(int(place[0] * width) - x0 - wide // 2, 0), max(span[0] - wide, 0))
    y0 += min(max(int(place[1] * height) - y0 - high // 2, 0), max(span[1] - high, 0))
    span = (min(span[0], wide), min(span[1], high))
    grey = _read(image, (x0, y0), span).mean(2)
    best, corner = -1.0, (x0, y0)
    for top in range(0, max(span[1] - size[1], 0) + 1, size[1]):
        for left in range(0, max(span[0] - size[0], 0) + 1, size[0]):
            spread = float(grey[top : top + size[1], left : left + size[0]].std())
            if spread > best:
                best, corner = spread, (x0 + left, y0 + top)
    return (min(corner[0], width - size[0]), min(corner[1], height - size[1]))


def _read(image: NativeImage, corner: IntPair, size: IntPair) -> RGBArray:
    out = np.full((size[1], size[0], 3), WHITE, np.uint8)
    block_w, block_h = image.block_px
    x1, y1 = min(corner[0] + size[0], image.size_px[0]), min(corner[1] + size[1], image.size_px[1])
    columns = range(max(corner[0], 0) // block_w, -(-x1 // block_w))
    rows = range(max(corner[1], 0) // block_h, -(-y1 // block_h))
    cells = [(column, row) for row in rows for column in columns]
    for cell, data in zip(cells, image.fetch(cells), strict=True):
        if data is not None:
            block = image.decode(cell, data, 1)
            x, y = cell[0] * block_w, cell[1] * block_h
            inside = block[: min(block_h, image.size_px[1] - y), : min(block_w, image.size_px[0] - x)]
            paste(out, inside, x - corner[0], y - corner[1])
    return out


def _cells(pixels: RGBArray, rows: int, columns: int) -> NDArray[np.float64]:
    """Means over ``rows`` x ``columns`` cells, (rows, columns, 3)."""
    y = np.linspace(0, pixels.shape[0], rows + 1).round().astype(int)
    x = np.linspace(0, pixels.shape[1], columns + 1).round().astype(int)
    return np.array(
        [[pixels[y[r] : y[r + 1], x[c] : x[c + 1]].mean((0, 1)) for c in range(columns)] for r in range(rows)]
    )
