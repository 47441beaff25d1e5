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
    kinds: list[tuple[Bools, Bools]] = []
    if settings.drop_dark:
        # Keratin and folds are as dense, but coloured; what lets no light through in any channel has no colour left.
        dark = (least > settings.dark_od) & ((least > 0.68 * densest) | (least > 2 * settings.dark_od))
        kinds.append((dark, least > 0.5 * densest))
    if settings.drop_pen:
        strong = densest > settings.pen_od
        # Over tissue the two add up: even then red is absorbed more than green, and a lot.
        blue = (r > b) & ((strong & (r > 1.25 * g)) | ((r > 2 * settings.pen_od) & (r > 1.05 * g)))
        green = strong & (r > 1.35 * g) & (b > 1.05 * g)
        red = strong & (g > 2 * settings.pen_od) & (b > 0.72 * g) & (b < 1.3 * g) & (r < 0.10 * g)
        # Over tissue: denser than pools of blood, which absorb more red for it.
        red |= (g > 4 * settings.pen_od) & (b > 0.62 * g) & (b < 1.3 * g) & (r < 0.18 * g)
        kinds.append((blue, (r > 1.05 * g)))
        kinds.append((green, (r > 1.05 * g)))
        kinds.append((red, (b > 0.6 * g) & (r < 0.25 * g)))
    pixel_um2 = um_per_px[0] * um_per_px[1]
    for sure, alike in kinds:
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
    return Marks(core, halo)
