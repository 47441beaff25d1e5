"""Shapes of masks: gaps, pieces and lines, in micrometres."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair

__all__ = ["Planes", "box_of", "close_gaps", "components", "disc", "drop_lines", "grow", "grow_values", "planes_of"]

Bools = NDArray[np.bool_]

_LINE_ASPECT = 20.0
_LEAST_REACH_PX = 4
"""From which on distances are measured in place of every pixel's surroundings."""
_MOST_BOXES = 5


class Planes(NamedTuple):
    """Red, green and blue apart, contiguous (H, W) each, and the least and the most of the three.

    Whatever goes through a picture goes through planes several times as fast as through pixels of three.
    """

    r: NDArray[Any]
    g: NDArray[Any]
    b: NDArray[Any]
    least: NDArray[Any]
    most: NDArray[Any]

    @classmethod
    def of(cls, r: NDArray[Any], g: NDArray[Any], b: NDArray[Any]) -> Self:
        """The three with their extremes."""
        return cls(r, g, b, np.minimum(np.minimum(r, g), b), np.maximum(np.maximum(r, g), b))

    def part(self, where: tuple[slice, slice] | NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Red, green and blue of a box, or of pixels by their numbers in reading order."""
        if isinstance(where, tuple):
            return self.r[where], self.g[where], self.b[where]
        return self.r.ravel()[where], self.g.ravel()[where], self.b.ravel()[where]


def planes_of(rgb: NDArray[np.uint8]) -> Planes:
    """A picture's planes, uint8."""
    import cv2

    return Planes.of(*(np.asarray(plane) for plane in cv2.split(rgb)))


def box_of(mask: Bools) -> tuple[slice, slice]:
    """(rows, columns) of the smallest box that holds all of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def disc(radius_um: float, um_per_px: FloatPair) -> NDArray[np.uint8]:
    """An elliptic structuring element, uint8 (h, w), that is a disc of ``radius_um`` on the slide."""
    rx, ry = radius_um / um_per_px[0], radius_um / um_per_px[1]
    x, y = np.arange(-int(rx), int(rx) + 1), np.arange(-int(ry), int(ry) + 1)
    return ((x[None] / max(rx, 0.5)) ** 2 + (y[:, None] / max(ry, 0.5)) ** 2 <= 1).astype(np.uint8)


def grow(mask: Bools, radius_um: float, um_per_px: FloatPair) -> Bools:
    """The mask and all within ``radius_um`` of it."""
    import cv2

    element = disc(radius_um, um_per_px)
    grown: Bools = np.zeros_like(mask)
    if not mask.any():
        return grown
    # Nothing happens further away than the disc reaches.
    reach_y, reach_x = element.shape[0] // 2, element.shape[1] // 2
    rows, columns = box_of(mask)
    part = (
        slice(max(rows.start - reach_y, 0), rows.stop + reach_y),
        slice(max(columns.start - reach_x, 0), columns.stop + reach_x),
    )
    own = mask[part].astype(np.uint8)
    reached = _squares_reached(element) if max(reach_x, reach_y) > _LEAST_REACH_PX else None
    if reached is None:
        grown[part] = cv2.dilate(own, element) > 0
    else:
        away = cv2.distanceTransform(1 - own, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        grown[part] = away < np.sqrt(np.float32(reached + 0.5))
    return grown


def _squares_reached(element: NDArray[np.uint8]) -> int | None:
    """The square of the distance that a disc reaches in pixels, where it reaches all at that distance or nearer and
    nothing beyond; None of one that is no circle."""
    y, x = np.indices(element.shape)
    squares = (y - element.shape[0] // 2) ** 2 + (x - element.shape[1] // 2) ** 2
    inside = int(squares[element > 0].max())
    # What lies beyond the element's own box is further away than its sides are.
    side = min(element.shape[0] // 2, element.shape[1] // 2) + 1
    return inside if inside < side**2 and (squares[element == 0] > inside).all() else None


def grow_values(values: NDArray[np.float32], radius_um: float, um_per_px: FloatPair) -> NDArray[np.float32]:
    """At each pixel the largest value within ``radius_um`` of it.

    A disc is the union of the boxes that its rows span, and boxes are quick: the largest over each, then of these.
    """
    import cv2

    element = disc(radius_um, um_per_px)
    boxes: dict[int, int] = {}
    for y, row in enumerate(element):
        height = 2 * abs(y - element.shape[0] // 2) + 1
        width = int(row.sum())
        boxes[width] = max(boxes.get(width, 0), height)
    if len(boxes) > _MOST_BOXES:
        return np.asarray(cv2.dilate(values, element), np.float32)
    found = [cv2.dilate(values, np.ones((height, width), np.uint8)) for width, height in boxes.items()]
    most = found[0]
    for other in found[1:]:
        most = cv2.max(most, other)
    return np.asarray(most, np.float32)


def close_gaps(mask: Bools, um_per_px: FloatPair, radius_um: float) -> Bools:
    """Morphological closing by a disc; the picture's edge neither adds to the mask nor takes from it."""
    import cv2

    element = disc(radius_um, um_per_px)
    if not mask.any():
        return mask
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
