"""Where horizontal lines run inside polygons: what masks are filled from and areas are measured by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import MaskError

__all__ = ["Polygon", "Ring", "Spans", "scan_polygons"]

Ring = NDArray[Any]
"""Vertices (x, y) of a closed ring, numbers (N, 2), the first one not repeated at the end."""

Polygon = Sequence[Ring]
"""An outer ring, then its holes."""

_CROSSINGS_AT_ONCE = 1 << 22
"""Bounds the memory of what is sorted at a time to some 300 MiB."""

_MOST_CROSSINGS = 1 << 29
"""A minute's work. Outlines that people and classifiers draw are below a thousandth of it."""


class Spans(NamedTuple):
    """Stretches of lines inside polygons, in the order of their lines.

    line: int64 (n,), index of the line. left, right: float64 (n,), x of both ends. owner: int64 (n,), index of the
    polygon; stretches of one polygon on one line do not overlap, those of different ones may.
    """

    line: NDArray[np.int64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]
    owner: NDArray[np.int64]


def scan_polygons(
    polygons: Iterable[Polygon], lines_y: NDArray[np.float64], most_lines: int | None = None
) -> Iterator[tuple[int, int, Spans]]:
    """(first line, line after the last, spans) of band after band of lines; bands that no polygon meets are left out.

    lines_y: float64 (L,), ascending. most_lines: in a band. Within a polygon the even-odd rule counts, so holes are
    holes and rings may cross themselves, whichever way they turn. Raises MaskError for outlines that cross the lines
    more often than can be worked through.
    """
    rings: list[Ring] = []
    owners: list[int] = []
    for number, polygon in enumerate(polygons):
        rings += polygon
        owners += [number] * len(polygon)
    if not rings or not len(lines_y):
        return
    lengths = np.array([len(ring) for ring in rings])
    a = np.concatenate(rings).astype(np.float64)
    following = np.arange(1, len(a) + 1)
    ends = np.cumsum(lengths)
    following[ends - 1] = ends - lengths
    b = a[following]
    owner = np.repeat(np.array(owners, np.int64), lengths)
    rising = b[:, 1] < a[:, 1]
    top, bottom = np.where(rising[:, None], b, a), np.where(rising[:, None], a, b)
    # Lines that lie in [top, bottom) of an edge.
    first = np.searchsorted(lines_y, top[:, 1], "left")
    last = np.searchsorted(lines_y, bottom[:, 1], "left")
    met = last > first
    top, bottom, owner, first, last = top[met], bottom[met], owner[met], first[met], last[met]
    if not len(top):
        return
    slope = (bottom[:, 0] - top[:, 0]) / (bottom[:, 1] - top[:, 1])
    size = len(lines_y) + 1
    crossings = np.cumsum(np.bincount(first, minlength=size) - np.bincount(last, minlength=size))[:-1]
    if int(crossings.sum()) > _MOST_CROSSINGS:
        raise MaskError(
            f"the outlines of {len(a):,} points cross the slide {int(crossings.sum()):,} times, which is too intricate",
            remedy="simplify them (in QuPath: Objects > Annotations > Simplify shape)",
        )
    for start, end in _bands(crossings, most_lines or len(lines_y)):
        here = np.flatnonzero((first < end) & (last > start))
        if not len(here):
            continue
        low, high = np.maximum(first[here], start), np.minimum(last[here], end)
        count = high - low
        edge = np.repeat(here, count)
        line = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        x = top[edge, 0] + slope[edge] * (lines_y[line] - top[edge, 1])
        # A closed ring crosses a line an even number of times: in the order of x, the crossings of one polygon with a
        # line are the ends of its stretches in turn.
        order = np.lexsort((x, owner[edge], line))
        line, x, whose = line[order], x[order], owner[edge][order]
        yield start, end, Spans(line[::2], x[::2], x[1::2], whose[::2])


def _bands(crossings: NDArray[np.int64], most_lines: int) -> Iterator[tuple[int, int]]:
    """Bands of lines of bounded length and, but for single lines, of bounded work."""
    total = np.concatenate([[0], np.cumsum(crossings)])
    start = 0
    while start < len(crossings):
        fits = int(np.searchsorted(total, total[start] + _CROSSINGS_AT_ONCE, "right")) - 1
        end = min(max(fits, start + 1), start + most_lines, len(crossings))
        yield start, end
        start = end
