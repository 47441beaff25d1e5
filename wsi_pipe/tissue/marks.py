"""Pen, ink and dark debris on an overview, by their optical densities.

With r, g and b the densities of red, green and blue light (haematoxylin has r : g : b of about 65 : 70 : 29, eosin
7 : 99 : 11, DAB 27 : 57 : 78; Ruifrok and Johnston 2001):

- black pen, dark debris: dense, and the least dense channel is nearly as dense as the densest;
- blue: red is absorbed clearly more than green; haematoxylin absorbs green at least as much;
- green: green is absorbed clearly less than red, and less than blue;
- red: green and blue are absorbed alike and red hardly at all; eosin passes blue, DAB and blood absorb red too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import SegmentSettings
from wsi_pipe.geometry import FloatPair
from wsi_pipe.tissue.shapes import close_gaps, components, extremes, grow

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


def find_marks(od: Floats, um_per_px: FloatPair, settings: SegmentSettings) -> Marks:
    """Pen and debris of an overview's optical density, float32 (H, W, 3)."""
    import cv2

    core = np.zeros(od.shape[:2], bool)
    halo = np.zeros_like(core)
    r, g, b = od[..., 0], od[..., 1], od[..., 2]
    least, densest = extremes(od)
    kinds: list[tuple[Bools, Bools, bool]] = []
    if settings.drop_dark:
        # Keratin and folds are as dense, but coloured; what lets no light through in any channel has no colour left.
        dark = (least > settings.dark_od) & ((least > 0.68 * densest) | (least > 2 * settings.dark_od))
        kinds.append((dark, least > 0.5 * densest, False))
    if settings.drop_pen:
        strong = densest > settings.pen_od
        # Over tissue the two add up: even then red is absorbed more than green, and a lot.
        blue = (r > b) & ((strong & (r > 1.25 * g)) | ((r > 2 * settings.pen_od) & (r > 1.05 * g)))
        green = strong & (r > 1.35 * g) & (b > 1.05 * g)
        red = strong & (g > 2 * settings.pen_od) & (b > 0.72 * g) & (b < 1.3 * g) & (r < 0.10 * g)
        # Over tissue: denser than pools of blood, which absorb more red for it.
        red |= (g > 4 * settings.pen_od) & (b > 0.62 * g) & (b < 1.3 * g) & (r < 0.18 * g)
        kinds.append((blue, (r > 1.05 * g), True))
        kinds.append((green, (r > 1.05 * g), True))
        kinds.append((red, (b > 0.6 * g) & (r < 0.25 * g), True))
    pixel_um2 = um_per_px[0] * um_per_px[1]
    for sure, alike, inks in kinds:
        # Noise in what is nearly black leaves pores: one mark is one piece.
        labels, stats = components(close_gaps(sure, um_per_px, _PORE_UM))
        large = stats[:, cv2.CC_STAT_AREA] * pixel_um2 >= settings.mark_area_um2
        large[0] = False
        if not large.any():
            continue
        found: Bools = large[labels]
        core |= found
        # Ink thins out at its rim and lenses fringe black with colour: what is near, and faint or alike, goes too.
        halo |= grow(found, settings.mark_margin_um, um_per_px) & ~found & alike
        if inks:
            halo |= _bled(od, found, um_per_px, settings)
    return Marks(core, halo)


def _bled(od: Floats, found: Bools, um_per_px: FloatPair, settings: SegmentSettings) -> Bools:
    """Ink that has run: what leads away from a stroke in just its colour, ever fainter, off and beyond its margin.

    The colour is the stroke's own, measured where it is least dense: there it lies on glass and not on tissue.
    """
    import cv2

    zone = grow(found, _BLED_MARGINS * settings.mark_margin_um, um_per_px)
    rows, columns = np.flatnonzero(zone.any(axis=1)), np.flatnonzero(zone.any(axis=0))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    sx, sy = (max(_BLED_SMOOTH_UM / um, 0.3) for um in um_per_px)
    soft = np.asarray(cv2.GaussianBlur(np.ascontiguousarray(od[part]), (0, 0), sigmaX=sx, sigmaY=sy), np.float32)
    length = np.sqrt(np.einsum("ijk,ijk->ij", soft, soft))
    own = found[part]
    faint = own & (length <= np.quantile(length[own], 0.3))
    ink = np.median(soft[faint] / length[faint][:, None], axis=0)
    cosine = soft @ (ink / np.linalg.norm(ink)) / np.maximum(length, 1e-6)
    # What smoothing carries over from the stroke onto clear glass is no ink.
    clear = extremes(od[part])[1] <= settings.stain_min
    alike = zone[part] & ~own & (cosine >= _BLED_COSINE) & ~clear
    # Away from the stroke ink only fades; tissue in its way, of much the same colour, grows dense again.
    run, fresh = own, own
    element = np.ones((3, 3), np.uint8)
    while fresh.any():
        nearby = cv2.dilate(np.where(fresh, length, np.float32(0)), element)
        fresh = alike & ~run & (nearby * _BLED_RISE >= length)
        run = run | fresh
    out = np.zeros_like(found)
    out[part] = run & ~own
    return out
