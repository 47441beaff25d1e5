"""Where the coordinates of a GeoJSON count from, and its areas placed on the slide.

Some scanners lay what they scanned somewhere on a larger canvas (Leica SCN, MIRAX). OpenSlide counts from the
canvas's corner, and so do bags and CLAM and TRIDENT; QuPath crops such a slide to the scan's bounds and counts from
their corner. GeoJSON is what QuPath reads and writes, so here, and nowhere else, its frame is met. On slides without
bounds the two are one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.tissue.areas import FARTHEST, Area, Rings, read_areas
from wsi_pipe.tissue.outline import fill_polygons

__all__ = ["FRAMES", "MEMBER", "Bounds", "Frame", "Placed", "frame_statement", "place_areas", "qupath_origin"]

Frame = Literal["image", "qupath"]
FRAMES: tuple[Frame, ...] = ("image", "qupath")

Bounds = tuple[int, int, int, int]
"""(x, y, width, height) of the scanned part in level-0 pixels of the whole image."""

MEMBER = "wsi_pipe"
"""The member of a FeatureCollection in which this program states what GeoJSON has no words for. QuPath ignores it, and
drops it on export: a file without it is another program's."""

_FITS = 0.9
"""Share of the areas that must lie within the scan for a frame to fit: annotations may hang over the edge."""
_LEAST_ON_SLIDE = 0.5
_NAMED = 3
"""Objects named one by one in a note."""
_RASTER = 64


@dataclass(frozen=True)
class Placed:
    """The areas of a GeoJSON on a slide.

    areas: in level-0 pixels of the whole image, as they were drawn, also where they hang over its edge. beyond: all
    that is not on the slide, one polygon (a box with the slide as its hole), where any of them does, else nothing.
    frame, origin_l0: what the file's coordinates count from. notes: what was decided or left out, one line each.
    """

    areas: tuple[Area, ...]
    beyond: tuple[Rings, ...]
    frame: Frame
    origin_l0: FloatPair
    notes: tuple[str, ...]


def qupath_origin(bounds_l0: Bounds | None) -> IntPair:
    """The level-0 pixel from which QuPath counts: the corner of the scan's bounds, or of the whole image."""
    return (bounds_l0[0], bounds_l0[1]) if bounds_l0 else (0, 0)


def frame_statement(origin_l0: FloatPair) -> dict[str, Any]:
    """What a file in QuPath's frame says of it, for its member ``wsi_pipe``."""
    whole = [int(v) if float(v).is_integer() else float(v) for v in origin_l0]
    return {"frame": "qupath", "origin_l0": whole}


def place_areas(
    data: object,
    size_l0: IntPair,
    bounds_l0: Bounds | None = None,
    *,
    frame: str | None = None,
    slack_l0: FloatPair = (1.0, 1.0),
) -> Placed:
    """The areas of parsed GeoJSON in level-0 pixels of the whole image.

    size_l0: (width, height) of the slide. frame: "image" or "qupath" for files that do not say. Without it, a file
    written by an earlier version of this program counts from the image; any other from the frame in which its areas
    lie on the scan, and from QuPath's where they do in both. slack_l0: by how much areas may reach over the edge
    without a note, (x, y).

    Raises MaskError when the data is not GeoJSON, its statement is broken, or more than half of the area lies off the
    slide.
    """
    if frame is not None and frame not in FRAMES:
        raise MaskError(f"the frame {frame!r} is neither image nor qupath", remedy="give --frame image or qupath")
    areas, notes = read_areas(data)
    stated = _stated(data)
    qupath = qupath_origin(bounds_l0)
    if stated is not None:
        used, origin = stated
        if used == "qupath" and origin != qupath:
            notes.append(f"the file counts from {_pair(origin)}, but this slide's scan begins at {_pair(qupath)}")
    elif qupath == (0, 0):
        used, origin = ("qupath", (0.0, 0.0))
    else:
        used, note = _chosen(areas, size_l0, bounds_l0 or (0, 0, *size_l0), frame)
        origin = (float(qupath[0]), float(qupath[1])) if used == "qupath" else (0.0, 0.0)
        if areas:
            notes.append(note)
    moved = [area.moved(origin) for area in areas]
    kept, beyond, more = _on_slide(moved, size_l0, slack_l0)
    return Placed(tuple(kept), beyond, used, origin, (*notes, *more))


def _box(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float64)


def _stated(data: object) -> tuple[Frame, FloatPair] | None:
    """What the file says of its frame; files of this program that say nothing are of a version that knew only one."""
    member = data.get(MEMBER) if isinstance(data, Mapping) else None
    if member is None:
        return None
    try:
        used = member.get("frame", "image")
        x, y = member["origin_l0"] if used != "image" else (0, 0)
        origin = (float(x), float(y))
        if used not in FRAMES or not all(abs(value) <= FARTHEST for value in origin):
            raise ValueError(f"frame {used!r}, origin {origin}")
        return used, origin
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MaskError(
            f"the member {MEMBER!r} of the GeoJSON is broken: {error!r}",
            remedy="delete that member and give --frame, or make the file again",
        ) from error


def _chosen(areas: Sequence[Area], size_l0: IntPair, bounds: Bounds, given: str | None) -> tuple[Frame, str]:
    """The frame of a file that does not say, on a slide where it matters, and the note that says so."""
    x, y, width, height = bounds
    drawn = _Outlines(areas)
    shares: dict[Frame, float] = {
        "qupath": drawn.share_inside((0, 0, width, height)),
        "image": drawn.share_inside(bounds),
    }
    fits = [name for name in ("qupath", "image") if shares[name] >= _FITS]
    if given is not None:
        used: Frame = "image" if given == "image" else "qupath"
        why = f"--frame {used}"
        other: Frame = "qupath" if used == "image" else "image"
        if areas and used not in fits and other in fits:
            why += f", though {1 - shares[used]:.0%} of it then lies outside of the scan; --frame {other} would fit"
    elif len(fits) == 1:
        used = "qupath" if "qupath" in fits else "image"
        why = "the file does not say, and otherwise it would not lie on the scan"
    elif fits:
        used = "qupath"
        why = "the file does not say; --frame image if it counts from the whole image"
    else:
        used = "image" if shares["image"] > shares["qupath"] else "qupath"
        why = f"the file does not say; {shares[used]:.0%} of it then lies on the scan"
    place = f"the corner of the scan's bounds at {_pair((x, y))}, as in QuPath" if used == "qupath" else (
        f"the corner of the whole image, {_pair((x, y))} before the scan's bounds"
    )  # fmt: skip
    return used, f"coordinates are counted from {place} ({why})"


def _on_slide(
    areas: Sequence[Area], size_l0: IntPair, slack: FloatPair
) -> tuple[list[Area], tuple[Rings, ...], list[str]]:
    """Areas that lie on the slide, in part at least; what lies beyond its edge, if any of them does; and notes of what
    does not count. Raises MaskError where that is most of it."""
    drawn = _Outlines(areas)
    if not areas or ((drawn.first >= 0).all() and (drawn.last <= size_l0).all()):
        return list(areas), (), []
    counts = np.array([len(area.polygons) for area in areas])
    starts = np.cumsum(counts) - counts
    low, high = np.minimum.reduceat(drawn.first, starts), np.maximum.reduceat(drawn.last, starts)
    off: NDArray[np.bool_] = np.asarray((high <= 0).any(axis=1) | (low >= size_l0).any(axis=1))
    over: NDArray[np.bool_] = ~off & (
        (low < -np.asarray(slack)).any(axis=1) | (high > np.asarray(size_l0) + slack).any(axis=1)
    )

    def named(which: NDArray[np.bool_]) -> str:
        places = np.flatnonzero(which)
        listed = [f"{areas[i].where}, from {_pair(low[i])} to {_pair(high[i])}" for i in places[:_NAMED]]
        return "; ".join(listed) + (f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else "")

    notes = []
    slide = f"the slide of {size_l0[0]} x {size_l0[1]} px"
    if off.any() or over.any():
        share = drawn.share_inside((0, 0, *size_l0))
        if share < _LEAST_ON_SLIDE:
            raise MaskError(
                f"{1 - share:.0%} of the areas lie outside {slide}: {named(off | over)}",
                remedy="the file must be of this slide, in level-0 pixels and not in um or pixels of another level",
            )
        if over.any():
            notes.append(f"cut at the edge of {slide}: {named(over)}")
        if off.any():
            notes.append(f"left out, off {slide}: {named(off)}")
    beyond = [_box(-FARTHEST, -FARTHEST, FARTHEST, FARTHEST), _box(0, 0, *size_l0)]
    return [area for area, gone in zip(areas, off, strict=True) if not gone], (beyond,), notes


class _Outlines:
    """The polygons of areas all at once: there may be a hundred thousand.

    first, last: corners of each polygon's box, float64 (n, 2). ground: their area by the shoelace formula, (n,); of a
    ring that crosses itself at least a little of its box.
    """

    def __init__(self, areas: Sequence[Area]) -> None:
        self.polygons = [rings for area in areas for rings in area.polygons]
        rings = [ring for polygon in self.polygons for ring in polygon]
        if not rings:
            self.first = self.last = np.zeros((0, 2))
            self.ground = np.zeros(0)
            return
        lengths = np.array([len(ring) for ring in rings])
        starts = np.cumsum(lengths) - lengths
        points = np.concatenate(rings)
        following = np.concatenate([points[1:], points[:1]])
        following[starts + lengths - 1] = points[starts]
        corner = np.repeat(points[starts], lengths, axis=0)
        a, b = points - corner, following - corner
        sizes = np.abs(np.add.reduceat(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], starts)) / 2
        outer = np.cumsum([0, *(len(polygon) for polygon in self.polygons[:-1])])
        self.first = np.minimum.reduceat(points, starts)[outer]
        self.last = np.maximum.reduceat(points, starts)[outer]
        span = self.last - self.first
        without_holes = 2 * sizes[outer] - np.add.reduceat(sizes, outer)
        self.ground = np.maximum(np.maximum(without_holes, 1e-3 * span[:, 0] * span[:, 1]), 1e-12)

    def share_inside(self, box: Bounds) -> float:
        """Share of the ground that lies in a box (x, y, width, height), from 0 to 1; 1 where there is none."""
        low = np.array(box[:2], float)
        high = low + box[2:]
        within = (self.first >= low).all(axis=1) & (self.last <= high).all(axis=1)
        touching = (self.last > low).all(axis=1) & (self.first < high).all(axis=1) & ~within
        inside = float(self.ground[within].sum())
        for i in np.flatnonzero(touching):
            part = _part_inside(self.polygons[i], self.first[i], self.last[i], low, high)
            inside += float(self.ground[i]) * part
        total = float(self.ground.sum())
        return inside / total if total else 1.0


def _part_inside(
    rings: Rings,
    first: NDArray[np.float64],
    last: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> float:
    """Share of one polygon that lies in a box, from a raster over it."""
    step = np.maximum((last - first) / _RASTER, 1e-9)
    filled = fill_polygons([[(ring - first) / step for ring in rings]], (_RASTER, _RASTER))
    x, y = (first + (np.arange(_RASTER)[:, None] + 0.5) * step).T
    here = ((y >= low[1]) & (y < high[1]))[:, None] & ((x >= low[0]) & (x < high[0]))[None]
    return float(filled[here].sum() / filled.sum()) if filled.any() else float(here.mean())


def _pair(values: Any) -> str:
    return f"({values[0]:g}, {values[1]:g})"
