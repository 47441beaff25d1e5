"""Arithmetic on pictures, and the tables that turn positions and fibres into amounts of stain.

Amounts of stain are uint8, 255 for 2 units of density. Tables are uint8 (256,), for cv2.LUT.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EDGE",
    "EPITHELIUM",
    "FAT_EOSIN",
    "FAT_HAEMA",
    "FIBRE_EOSIN",
    "FIBRE_HAEMA",
    "GLAND_EOSIN",
    "GLAND_HAEMA",
    "LUMEN",
    "as_bytes",
    "blend",
    "grains",
    "outline",
]

# cv2 states no pixel type of what it returns; within this package the names say it.
Bytes = NDArray[Any]


@lru_cache(maxsize=8)
def grains(cell: int, grain: int) -> NDArray[np.int16]:
    """Random patterns of light and dark grains, int16 (64, cell, cell) of -1, 0 and 1, each with the sum 0."""
    rng = np.random.default_rng(90)
    n = cell // grain
    signs = np.zeros((64, n * n), np.int16)
    half = n * n // 2
    signs[:, :half], signs[:, half : 2 * half] = 1, -1
    square = rng.permuted(signs, axis=1).reshape(64, n, n).repeat(grain, axis=1).repeat(grain, axis=2)
    return np.pad(square, ((0, 0), (0, cell - n * grain), (0, cell - n * grain)))


def outline(
    theta: NDArray[Any],
    radius: NDArray[Any] | float,
    sizes: NDArray[Any],
    phases: NDArray[Any],
) -> NDArray[Any]:
    """Radius of a gland in a direction: a circle with three harmonics."""
    waves: NDArray[Any] = np.zeros_like(theta)
    for k in range(3):
        waves = waves + sizes[..., k] * np.cos((k + 2) * theta + phases[..., k])
    return radius * (1 + waves)


def as_bytes(values: NDArray[Any]) -> Bytes:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def blend(first: Bytes, second: Bytes, weight: Bytes) -> Bytes:
    """``first`` where the weight is 255, ``second`` where it is 0."""
    import cv2

    a = cv2.multiply(first, weight, scale=1 / 255)
    b = cv2.multiply(second, cv2.bitwise_not(weight), scale=1 / 255)
    return np.asarray(cv2.add(a, b))


def _table(points: list[tuple[float, float]]) -> Bytes:
    """A lookup table through (level, value) points."""
    x, y = zip(*points, strict=True)
    return as_bytes(np.interp(np.arange(256), x, y))


FIBRE_EOSIN = _table([(0, 2), (50, 14), (90, 42), (150, 60), (255, 82)])
FIBRE_HAEMA = _table([(0, 0), (90, 3), (255, 9)])
# Levels of a gland: 64 is the lumen's border, 128 the outer one; a cleft parts it from the stroma.
EPITHELIUM = _table([(0, 255), (128, 255), (133, 0), (255, 0)])
GLAND_EOSIN = _table([(0, 0), (62, 0), (66, 62), (80, 46), (128, 40), (255, 40)])
GLAND_HAEMA = _table([(0, 0), (62, 0), (66, 16), (100, 20), (128, 26), (255, 26)])
LUMEN = _table([(0, 6), (58, 14), (66, 255), (126, 255), (131, 190), (137, 255), (255, 255)])
EDGE = _table([(0, 0), (122, 0), (134, 255), (255, 255)])
FAT_EOSIN = _table([(0, 58), (3, 54), (7, 8), (11, 0), (255, 0)])
FAT_HAEMA = _table([(0, 10), (4, 8), (9, 0), (255, 0)])
