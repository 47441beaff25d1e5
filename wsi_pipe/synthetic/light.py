"""The scanner's light on a synthetic slide, by fields of view: vignette, steps, tints, and what it leaves unscanned.

Blocks are square, uint8 (side, side, 3); x_px, y_px: their corner on the slide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.synthetic.chance import uniform
from wsi_pipe.synthetic.paint import as_bytes
from wsi_pipe.synthetic.plan import MAP_UM, SlidePlan
from wsi_pipe.synthetic.spec import SlideSpec

__all__ = ["leave_unscanned", "lit", "tinted"]

_FIELD_OF_VIEW_UM = 620.0

# cv2 states no pixel type of what it returns; within this module the name says it.
Bytes = NDArray[Any]


def lit(spec: SlideSpec, rgb: Bytes, x_px: int, y_px: int) -> Bytes:
    """Vignette within each field of view, and steps of brightness between them."""
    import cv2

    if not spec.stitching:
        return rgb
    side = rgb.shape[0]
    gains, views, indices = [], [], []
    for start in (x_px, y_px):
        position = (start + np.arange(side) + 0.5) * spec.mpp / _FIELD_OF_VIEW_UM
        gains.append((1 - 0.012 * (2 * (position % 1) - 1) ** 2).astype(np.float32))
        view, index = np.unique(np.floor(position).astype(np.int64), return_inverse=True)
        views.append(view)
        indices.append(index)
    step = 255 * (1 - 0.022 * uniform(spec.seed, 601, views[0][None], views[1][:, None])).astype(np.float32)
    gain = (gains[1][:, None] * gains[0][None] * step[indices[1]][:, indices[0]]).astype(np.uint8)
    return np.asarray(cv2.multiply(rgb, cv2.merge([gain, gain, gain]), scale=1 / 255))


def tinted(spec: SlideSpec, rgb: Bytes, x_px: int, y_px: int) -> Bytes:
    """What tinted glass, lilac fields and a lamp that drifts leave of the light."""
    import cv2

    side = rgb.shape[0]
    if spec.tint == (1.0, 1.0, 1.0) and not spec.field_tint and not spec.lamp_drift:
        return rgb
    left = np.ones((side, side, 3), np.float32) * np.array(spec.tint, np.float32)
    if spec.field_tint:
        columns, rows = (
            np.floor((start + np.arange(side) + 0.5) * spec.mpp / _FIELD_OF_VIEW_UM).astype(np.int64)
            for start in (x_px, y_px)
        )
        lilac = uniform(spec.seed, 603, columns[None], rows[:, None]) < 0.5
        left[lilac] *= np.array([1 - spec.field_tint / 4, 1 - spec.field_tint, 1], np.float32)
    if spec.lamp_drift:
        share = np.clip((x_px + np.arange(side) + 0.5) / spec.size_px[0], 0, 1)
        left[..., 1] *= (1 - spec.lamp_drift * share).astype(np.float32)[None]
    return as_bytes(cv2.multiply(rgb.astype(np.float32), left))


def leave_unscanned(plan: SlidePlan, rgb: Bytes, x_px: int, y_px: int) -> None:
    """Pure white (or black) where whole fields of view hold no tissue and were not scanned, as some scanners do."""
    spec, side = plan.spec, rgb.shape[0]
    size = _FIELD_OF_VIEW_UM
    first = [int(o * spec.mpp // size) for o in (x_px, y_px)]
    last = [int((o + side) * spec.mpp // size) for o in (x_px, y_px)]
    for r in range(first[1], last[1] + 1):
        for c in range(first[0], last[0] + 1):
            c0, r0 = int(c * size / MAP_UM), int(r * size / MAP_UM)
            k = int(np.ceil(size / MAP_UM))
            view = plan.edge_um[r0 : r0 + k, c0 : c0 + k]
            if uniform(spec.seed, 602, c, r) < 0.5 and (view.size == 0 or view.max() < -40):
                x, y = ((n * size / spec.mpp) - o for n, o in ((c, x_px), (r, y_px)))
                width = size / spec.mpp
                rgb[max(0, round(y)) : max(0, round(y + width)), max(0, round(x)) : max(0, round(x + width))] = (
                    255 if spec.unscanned == "white" else 0
                )
