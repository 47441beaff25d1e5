"""Whether a padded level shows the same as the next finer one, at the scale that is stated for it."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE
from wsi_pipe.slides.native import NativeImage

__all__ = ["shows_the_same"]

SIDE_PX = 1024
"""Side of what is read of the finer level for one place."""

LEAST_PX = 24
"""Below this side, a place of the coarser level tells too little."""

LOOKED_AT, COMPARED = 12, 3
STRUCTURE = 3.0
"""Standard deviation of grey values above which a place shows more than glass."""

LIKE = 0.6
"""Correlation of low-passes above which two places show the same; focus, codecs and sharpening leave 0.9 and more."""


def shows_the_same(finer: NativeImage, coarser: NativeImage, ratio: FloatPair, other: FloatPair) -> bool:
    """Whether ``coarser`` is ``finer`` at ``ratio`` (x, y; finer pixels per coarser pixel), rather than at ``other``.

    A few places that show structure are compared, far from the corner, where a wrong scale shows most. Places of bare
    glass tell nothing, and where there are only such, what is stated holds. Raises SlideReadError, CodecError.
    """
    width, height = coarser.size_px
    side = (min(int(SIDE_PX / ratio[0]), width), min(int(SIDE_PX / ratio[1]), height))
    if min(side) < LEAST_PX:
        return True
    places = [
        (x, y, grey)
        for x, y in _places(coarser, side)
        if float((grey := _low(_read(coarser, x, y, *side))).std()) > STRUCTURE
    ]
    places.sort(key=lambda place: -(place[0] + place[1]) * float(place[2].std()))
    stated: list[float] = []
    rather: list[float] = []
    for x, y, grey in places[:COMPARED]:
        stated.append(_correlation(grey, _at(finer, x, y, side, ratio)))
        rather.append(_correlation(grey, _at(finer, x, y, side, other)))
    if not stated:
        return True
    mean = math.fsum(stated) / len(stated)
    return mean >= LIKE and mean >= math.fsum(rather) / len(rather) - 0.02


def _places(image: NativeImage, side: IntPair) -> list[IntPair]:
    """Corners of places spread over an image, the far ones first."""
    across, down = (
        np.unique(np.linspace(0, max(full - part, 0), 5).astype(int))
        for full, part in zip(image.size_px, side, strict=True)
    )
    found = sorted(((int(x), int(y)) for x in across for y in down), key=lambda place: -place[0] - place[1])
    return found[:: max(len(found) // LOOKED_AT, 1)]


def _at(finer: NativeImage, x: int, y: int, side: IntPair, ratio: FloatPair) -> NDArray[np.float32]:
    left, top = round(x * ratio[0]), round(y * ratio[1])
    width, height = max(round(side[0] * ratio[0]), 1), max(round(side[1] * ratio[1]), 1)
    pixels = _read(finer, left, top, width, height)
    return _low(np.asarray(cv2.resize(pixels, side, interpolation=cv2.INTER_AREA), np.uint8))


def _read(image: NativeImage, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """A region, uint8 (height, width, 3); white off the image and where a tile is missing."""
    out = np.full((height, width, 3), WHITE, np.uint8)
    block_w, block_h = image.block_px
    last_x, last_y = min(x + width, image.size_px[0]), min(y + height, image.size_px[1])
    columns, rows = range(x // block_w, -(-last_x // block_w)), range(y // block_h, -(-last_y // block_h))
    cells = [(column, row) for row in rows for column in columns]
    for (column, row), data in zip(cells, image.fetch(cells), strict=True):
        if data is None:
            continue
        block = image.decode((column, row), data, 1)
        x0, y0 = max(column * block_w, x), max(row * block_h, y)
        x1, y1 = min((column + 1) * block_w, last_x), min((row + 1) * block_h, last_y)
        part = block[y0 - row * block_h : y1 - row * block_h, x0 - column * block_w : x1 - column * block_w]
        out[y0 - y : y1 - y, x0 - x : x1 - x] = part
    return out


def _low(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), 2.0), np.float32)


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    first, second = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / norm if norm > 0 else 0.0
