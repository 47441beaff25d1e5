"""Shapes of masks: gaps, pieces and lines, in micrometres."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair

__all__ = ["close_gaps", "components", "disc", "drop_lines", "extremes", "grow"]

Bools = NDArray[np.bool_]

_LINE_ASPECT = 20.0


def extremes(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Smallest and largest of three channels, the last axis; numpy's own reduction is slow along a short one."""
    a, b, c = values[..., 0], values[..., 1], values[..., 2]
    return np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)


def disc(radius_um: float, um_per_px: FloatPair) -> NDArray[np.uint8]:
    """An elliptic structuring element, uint8 (h, w), that is a disc of ``radius_um`` on the slide."""
    rx, ry = radius_um / um_per_px[0], radius_um / um_per_px[1]
    x, y = np.arange(-int(rx), int(rx) + 1), np.arange(-int(ry), int(ry) + 1)
    return ((x[None] / max(rx, 0.5)) ** 2 + (y[:, None] / max(ry, 0.5)) ** 2 <= 1).astype(np.uint8)


def grow(mask: Bools, radius_um: float, um_per_px: FloatPair) -> Bools:
    """The mask and all within ``radius_um`` of it."""
    import cv2

    grown: Bools = cv2.dilate(mask.astype(np.uint8), disc(radius_um, um_per_px)) > 0
    return grown


def close_gaps(mask: Bools, um_per_px: FloatPair, radius_um: float) -> Bools:
    """Morphological closing by a disc; the picture's edge neither adds to the mask nor takes from it."""
    import cv2

    element = disc(radius_um, um_per_px)
    py, px = element.shape[0] // 2, element.shape[1] // 2
    if py == 0 and px == 0:
        return mask
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), py, py, px, px, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, element)
    inside: Bools = closed[py : py + mask.shape[0], px : px + mask.shape[1]] > 0
    return inside


def components(mask: Bools) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """4-connected pieces: labels int32 (H, W), 0 off the mask, and cv2's statistics int32 (n, 5)."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return np.asarray(labels, np.int32), np.asarray(stats, np.int32)


def drop_lines(
    labels: NDArray[np.int32],
    stats: NDArray[np.int32],
    keep: NDArray[np.bool_],
    um_per_px: FloatPair,
    width_um: float,
) -> NDArray[np.bool_]:
    """``keep``, bool (n,), without pieces that are straight, thinner than ``width_um`` and 20 times as long as wide."""
    import cv2

    kept = keep.copy()
    for label in np.flatnonzero(keep):
        x, y, w, h, area = (int(v) for v in stats[label])
        area_um2 = area * um_per_px[0] * um_per_px[1]
        length_um = float(np.hypot(w * um_per_px[0], h * um_per_px[1]))
        # A cheap bound first: only what is thin on average can be a line.
        if area_um2 > length_um * width_um or length_um < _LINE_ASPECT * min(um_per_px):
            continue
        rows, columns = np.nonzero(labels[y : y + h, x : x + w] == label)
        points = np.stack([columns * um_per_px[0], rows * um_per_px[1]], axis=1).astype(np.float32)
        sides = np.asarray(cv2.minAreaRect(points)[1]) + max(um_per_px)
        if sides.min() <= width_um and sides.max() >= _LINE_ASPECT * sides.min():
            kept[label] = False
    return kept
