"""Pen, ink and dark debris on an overview, by their optical densities.

With r, g and b the densities of red, green and blue light (haematoxylin has r : g : b of about 65 : 70 : 29, eosin
7 : 99 : 11, DAB 27 : 57 : 78; Ruifrok and Johnston 2001):

- black pen, dark debris: dense, and the least dense channel is nearly as dense as the densest;
- blue: red is absorbed clearly more than green; haematoxylin absorbs green at least as much;
- green: green is absorbed clearly less than red, and less than blue;
- red: green and blue are absorbed alike and red hardly at all; eosin passes blue, DAB and blood absorb red too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import SegmentSettings
from wsi_pipe.geometry import FloatPair
from wsi_pipe.tissue.shapes import Planes, box_of, close_gaps, components, grow

__all__ = ["Marks", "find_marks"]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

_PORE_UM = 16.0
_BLED_MARGINS = 5.0
"""Ink runs up to 0.2 mm from a stroke: so many times ``mark_margin_um``."""
_BLED_RISE = 1.01
_BLED_SMOOTH_UM = 8.0
_BLED_COSINE = 0.985
"""Of the angle between two colours in OD; 10 degrees. Eosin is 13 degrees or more from red ink."""


class Marks(NamedTuple):
    """core: pen and debris, bool (H, W). halo: their faint rims."""

    core: Bools
    halo: Bools


def find_marks(od: Planes, um_per_px: FloatPair, settings: SegmentSettings) -> Marks:
    """Pen and debris of an overview's optical density, planes of float32 (H, W)."""
    import cv2

    core = np.zeros(od.r.shape, bool)
    halo = np.zeros_like(core)
    kinds: list[tuple[NDArray[np.int64], Callable[[Floats, Floats, Floats], Bools], bool]] = []
    if settings.drop_dark:
        # Keratin and folds are as dense, but coloured; what lets no light through in any channel has no colour left.
        some = np.flatnonzero(od.least > settings.dark_od)
        least, most = od.least.ravel()[some], od.most.ravel()[some]
        dark = (least > 0.68 * most) | (least > 2 * settings.dark_od)
        kinds.append((some[dark], _is_grey, False))
    if settings.drop_pen:
        # All that is asked of ink, but for its density, is asked of the few pixels that have that.
        strong = np.flatnonzero(od.most > settings.pen_od)
        r, g, b = od.part(strong)
        # Over tissue the two add up: even then red is absorbed more than green, and a lot.
        blue = (r > b) & ((r > 1.25 * g) | ((r > 2 * settings.pen_od) & (r > 1.05 * g)))
        green = (r > 1.35 * g) & (b > 1.05 * g)
        red = (g > 2 * settings.pen_od) & (b > 0.72 * g) & (b < 1.3 * g) & (r < 0.10 * g)
        # Over tissue: denser than pools of blood, which absorb more red for it.
        red |= (g > 4 * settings.pen_od) & (b > 0.62 * g) & (b < 1.3 * g) & (r < 0.18 * g)
        kinds.append((strong[blue], _is_cold, True))
        kinds.append((strong[green], _is_cold, True))
        kinds.append((strong[red], _is_warm, True))
    least_px = settings.mark_area_um2 / (um_per_px[0] * um_per_px[1])
    for pixels, alike, inks in kinds:
        sure = np.zeros_like(core)
        sure.ravel()[pixels] = True
        # Noise in what is nearly black leaves pores: one mark is one piece.
        closed = close_gaps(sure, um_per_px, _PORE_UM)
        if np.count_nonzero(closed) < least_px:
            continue
        box = box_of(closed)
        labels, stats = components(np.ascontiguousarray(closed[box]))
        large = stats[:, cv2.CC_STAT_AREA] * (um_per_px[0] * um_per_px[1]) >= settings.mark_area_um2
        large[0] = False
        if not large.any():
            continue
        found: Bools = np.zeros_like(core)
        found[box] = large[labels]
        core |= found
        # Ink thins out at its rim and lenses fringe black with colour: what is near, and faint or alike, goes too.
        rim = np.flatnonzero(grow(found, settings.mark_margin_um, um_per_px) & ~found)
        halo.ravel()[rim[alike(*od.part(rim))]] = True
        if inks:
            halo |= _bled(od, found, um_per_px, settings)
    return Marks(core, halo)


def _is_grey(r: Floats, g: Floats, b: Floats) -> Bools:
    return np.asarray(np.minimum(np.minimum(r, g), b) > 0.5 * np.maximum(np.maximum(r, g), b), bool)


def _is_cold(r: Floats, g: Floats, b: Floats) -> Bools:
    return r > 1.05 * g


def _is_warm(r: Floats, g: Floats, b: Floats) -> Bools:
    return (b > 0.6 * g) & (r < 0.25 * g)


def _bled(od: Planes, found: Bools, um_per_px: FloatPair, settings: SegmentSettings) -> Bools:
    """Ink that has run: what leads away from a stroke in just its colour, ever fainter, off and beyond its margin.

    The colour is the stroke's own, measured where it is least dense: there it lies on glass and not on tissue.
    """
    import cv2

    zone = grow(found, _BLED_MARGINS * settings.mark_margin_um, um_per_px)
    part = box_of(zone)
    sx, sy = (max(_BLED_SMOOTH_UM / um, 0.3) for um in um_per_px)
    dense = np.stack(od.part(part), axis=2)
    soft = np.asarray(cv2.GaussianBlur(dense, (0, 0), sigmaX=sx, sigmaY=sy), np.float32)
    length = np.sqrt(np.einsum("ijk,ijk->ij", soft, soft))
    own = found[part]
    faint = own & (length <= np.quantile(length[own], 0.3))
    ink = np.median(soft[faint] / length[faint][:, None], axis=0)
    cosine = soft @ (ink / np.linalg.norm(ink)) / np.maximum(length, 1e-6)
    # What smoothing carries over from the stroke onto clear glass is no ink.
    clear = od.most[part] <= settings.stain_min
    alike = zone[part] & ~own & (cosine >= _BLED_COSINE) & ~clear
    out = np.zeros_like(found)
    out[part] = _run(length, own, alike)
    return out


def _run(length: Floats, own: Bools, alike: Bools) -> Bools:
    """What of ``alike`` is reached from ``own`` by steps from pixel to pixel on which ``length`` does not rise.

    Away from the stroke ink only fades; tissue in its way, of much the same colour, grows dense again.
    """
    # A rim, so that every pixel has eight neighbours.
    open_px, dense = np.pad(alike, 1).ravel(), np.pad(length, 1).ravel()
    width = alike.shape[1] + 2
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    # All of the stroke but its edge has only itself around it.
    around = np.asarray(_touching(alike) & own)
    fresh = np.flatnonzero(np.pad(around, 1).ravel())
    reached = np.zeros(open_px.shape, bool)
    while len(fresh):
        nearby = fresh[:, None] + steps
        falls = open_px[nearby] & ((dense[fresh] * np.float32(_BLED_RISE))[:, None] >= dense[nearby])
        reached[nearby[falls]] = True
        fresh = np.unique(nearby[falls])
        open_px[fresh] = False
    return reached.reshape(alike.shape[0] + 2, width)[1:-1, 1:-1]


def _touching(mask: Bools) -> Bools:
    """The mask and the eight neighbours of its pixels."""
    import cv2

    return np.asarray(cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0, bool)
