"""Outlines of a mask along its pixel edges, and masks from outlines: exact inverses of each other."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.tissue.spans import Polygon, scan_polygons

__all__ = ["fill_polygons", "trace_mask"]

_BAND_PIXELS = 1 << 24
"""Pixels that are filled at a time: bounds the memory of the counters to 64 MiB."""

# A grid point sees four pixels: bits 1, 2, 4, 8 are those above left, above right, below left, below right.
_CORNER = np.array([bin(code).count("1") in (1, 3) for code in range(16)])
_ABOVE_LEFT, _ABOVE_RIGHT, _BELOW_LEFT, _BELOW_RIGHT = 1, 2, 4, 8
_SADDLE_DOWN, _SADDLE_UP = _ABOVE_LEFT | _BELOW_RIGHT, _ABOVE_RIGHT | _BELOW_LEFT
_TURN = np.zeros(256, np.uint8)
"""1 where outlines turn at a point, by its code."""
_TURN[:16] = _CORNER
_TURN[[_SADDLE_DOWN, _SADDLE_UP]] = 1


def trace_mask(mask: NDArray[np.bool_]) -> list[list[NDArray[np.int64]]]:
    """Polygons of a mask's 4-connected pieces, each an outer ring and then its holes, in reading order.

    mask: bool (H, W). Rings are int64 (N, 2) grid points (x, y), 0 to W and 0 to H, at turns only; outer rings run
    clockwise on the screen, holes counter-clockwise. No ring touches itself, so each polygon is valid to GEOS and JTS.
    """
    import cv2

    if not mask.any():
        return []
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    code = padded[:-1, :-1] | padded[:-1, 1:] << 1 | padded[1:, :-1] << 2 | padded[1:, 1:] << 3
    turns = np.flatnonzero(cv2.LUT(code, _TURN))
    ys, xs = np.divmod(turns, width + 1)
    codes = code.ravel()[turns]
    del code
    # Where two pixels meet at a point only, the point is a turn of both: it is listed twice.
    repeat = np.where((codes == _SADDLE_DOWN) | (codes == _SADDLE_UP), 2, 1)
    xs, ys, codes = np.repeat(xs, repeat), np.repeat(ys, repeat), np.repeat(codes, repeat)
    n = len(xs)
    second = np.zeros(n, bool)
    second[1:] = (xs[1:] == xs[:-1]) & (ys[1:] == ys[:-1])

    # Along a row of the grid, turns pair off: the first with the second, the third with the fourth. So they do along
    # a column. Of a point listed twice, the first ends the edge from the left, and the second begins that to the right.
    by_row = np.arange(n)
    horizontal = by_row ^ 1
    # The two pixels stay apart: where they are above left and below right, the edge from the left meets the one from
    # above; where they are above right and below left, it meets the one to below.
    below = second ^ (codes == _SADDLE_UP)
    by_column = np.lexsort((below, ys, xs))
    vertical = np.empty(n, np.int64)
    vertical[by_column[0::2]] = by_column[1::2]
    vertical[by_column[1::2]] = by_column[0::2]

    labels = np.asarray(cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1], np.int32)
    rings = _walk(horizontal.tolist(), vertical.tolist(), xs, ys)
    return _group(rings, labels)


def _walk(
    horizontal: list[int], vertical: list[int], xs: NDArray[np.int64], ys: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Closed walks that alternate between horizontal and vertical edges, cut where they touch themselves."""
    points = np.stack([xs, ys], axis=1).astype(np.int64)
    width = int(xs.max()) + 1
    key = ys * width + xs
    seen = bytearray(len(horizontal))
    rings = []
    for start in range(len(horizontal)):
        if seen[start]:
            continue
        walk = []
        here = start
        while not seen[here]:
            there = horizontal[here]
            seen[here] = seen[there] = 1
            walk += [here, there]
            here = vertical[there]
        loop = np.array(walk)
        keys = key[loop].tolist()
        if len(set(keys)) == len(keys):
            rings.append(points[loop])
        else:
            rings += [points[loop[part]] for part in _simple_parts(keys)]
    return rings


def _simple_parts(keys: list[int]) -> list[list[int]]:
    """Positions of a walk, cut into walks that visit no point twice."""
    parts: list[list[int]] = []
    stack: list[int] = []
    place: dict[int, int] = {}
    for position, k in enumerate(keys):
        if k in place:
            first = place[k]
            part = stack[first:]
            for p in part[1:]:
                del place[keys[p]]
            del stack[first + 1 :]
            parts.append(part)
            stack[first] = position
        else:
            place[k] = len(stack)
            stack.append(position)
    parts.append(stack)
    return parts


def _group(rings: list[NDArray[np.int64]], labels: NDArray[np.int32]) -> list[list[NDArray[np.int64]]]:
    """Rings as polygons: outer ring first, turned clockwise on the screen; holes the other way."""
    height, width = labels.shape
    outer: dict[int, NDArray[np.int64]] = {}
    holes: dict[int, list[NDArray[np.int64]]] = {}
    for ring in rings:
        # The topmost, then leftmost, vertex: the pixel to its lower right is inside the ring; that is tissue for an
        # outer ring, and for a hole it is not, but the pixel above is.
        x, y = ring[np.argmin(ring[:, 1] * (width + 1) + ring[:, 0])].tolist()
        label = int(labels[y, x]) if y < height and x < width else 0
        is_outer = label != 0
        if _is_clockwise(ring) != is_outer:
            ring = ring[::-1]
        if is_outer:
            outer[label] = ring
        else:
            holes.setdefault(int(labels[y - 1, x]), []).append(ring)
    return [[ring, *holes.get(label, [])] for label, ring in sorted(outer.items())]


def _is_clockwise(ring: NDArray[np.int64]) -> bool:
    """Whether a ring runs clockwise on the screen (y down), by the shoelace formula."""
    x, y = ring[:, 0], ring[:, 1]
    inner = np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])
    return bool(inner + x[-1] * y[0] - x[0] * y[-1] > 0)


def fill_polygons(polygons: Iterable[Polygon], size_px: IntPair) -> NDArray[np.bool_]:
    """The mask, bool (H, W), of the pixels whose centre lies in any of the polygons.

    Rings in pixels, pixel (c, r) covering [c, c + 1) x [r, r + 1), whichever way they turn. Within a polygon the
    even-odd rule counts, so holes are holes and rings may cross themselves; polygons may overlap each other and reach
    beyond the mask. A centre exactly on an edge counts on the left and top sides. Raises MaskError for outlines too
    intricate to be filled (see ``scan_polygons``).
    """
    width, height = size_px
    mask = np.zeros((height, width), bool)
    band = max(1, _BAND_PIXELS // (width + 1))
    for r0, r1, spans in scan_polygons(polygons, np.arange(height, dtype=np.float64) + 0.5, band):
        left, right = (np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64) for x in (spans.left, spans.right))
        cover = np.zeros((r1 - r0, width + 1), np.int32)
        np.add.at(cover, (spans.line - r0, left), 1)
        np.add.at(cover, (spans.line - r0, right), -1)
        np.cumsum(cover, axis=1, out=cover)
        mask[r0:r1] = cover[:, :-1] > 0
    return mask
