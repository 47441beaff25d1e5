"""Pictures of nuclei, drawn once per resolution and stamped where a slide has them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "ORIENTATIONS", "Kind", "sprites", "stamp"]

ORIENTATIONS = 16
_VARIANTS = 8
_FINEST_UM = 0.12


class Kind(NamedTuple):
    """A kind of nucleus: half axes in um, how much they vary, irregularity, and density of stain (255 is 2 OD).

    rim, centre: stain at the membrane and inside, over the mean. clumps: contrast of chromatin. nucleoli: how many.
    """

    long_um: float
    short_um: float
    spread: float
    irregular: float
    density: float
    rim: float
    centre: float
    clumps: float
    nucleoli: int


KINDS = {
    "epithelial": Kind(4.6, 3.4, 0.10, 0.05, 96.0, 1.15, 0.95, 0.22, 0),
    "fibroblast": Kind(6.4, 1.4, 0.22, 0.10, 92.0, 1.0, 1.0, 0.12, 0),
    "lymphocyte": Kind(3.0, 2.8, 0.07, 0.04, 128.0, 1.0, 1.05, 0.18, 0),
    "tumour": Kind(5.7, 4.4, 0.22, 0.12, 98.0, 1.25, 0.88, 0.30, 1),
    # The same stain in all as "epithelial": the area is 1.32 times as large, so the density is less by as much.
    "vesicular": Kind(5.3, 3.9, 0.10, 0.07, 96.0 / 1.32, 1.75, 0.62, 0.10, 1),
}


@lru_cache(maxsize=32)
def sprites(kind: str, mpp: float) -> NDArray[np.uint8]:
    """Stain of the nuclei of a kind, uint8 (ORIENTATIONS, variants, S, S), 255 for 2 OD; the first one lies along x."""
    import cv2

    shape = KINDS[kind]
    rng = np.random.default_rng([77, *kind.encode()])
    half = int(np.ceil(shape.long_um * (1 + 2 * shape.spread) / mpp)) + 2
    side = 2 * half
    # Drawn finer than needed and averaged, which antialiases.
    oversampling = int(np.clip(round(mpp / _FINEST_UM), 1, 6))
    fine = side * oversampling
    axis = ((np.arange(fine) + 0.5) / oversampling - half).astype(np.float32)
    x, y = np.meshgrid(axis * mpp, axis * mpp)
    out = np.zeros((ORIENTATIONS, _VARIANTS, side, side), np.uint8)
    for variant in range(_VARIANTS):
        scale = np.exp(shape.spread * np.clip(rng.standard_normal(2), -1.8, 1.8))
        long_um, short_um = shape.long_um * scale[0], shape.short_um * scale[1]
        phases, sizes = rng.uniform(0, 2 * np.pi, 3), rng.standard_normal(3) * shape.irregular / np.array([1, 1.5, 2])
        clumps = [_blobs(rng, 14, 0.9), _blobs(rng, 10, 0.6)]
        spots = rng.uniform(-0.35, 0.35, (shape.nucleoli, 2))
        for step in range(ORIENTATIONS):
            angle = np.pi * step / ORIENTATIONS + rng.uniform(-0.5, 0.5) * np.pi / ORIENTATIONS
            u = (x * np.cos(angle) + y * np.sin(angle)) / long_um
            v = (-x * np.sin(angle) + y * np.cos(angle)) / short_um
            theta = np.arctan2(v, u)
            bulge = 1 + sum(s * np.cos((k + 2) * theta + p) for k, (s, p) in enumerate(zip(sizes, phases, strict=True)))
            radius = np.hypot(u, v) / bulge
            edge_um = max(0.35, 0.6 * mpp) / short_um
            body = np.clip((1 - radius) / edge_um + 0.5, 0, 1)
            ring = np.exp(-(((radius - 0.86) / 0.13) ** 2))
            stain = shape.centre + (shape.rim - shape.centre) * ring
            for signed, blobs in zip((1.0, -1.0), clumps, strict=True):
                for bx, by, width in blobs:
                    stain = stain + signed * shape.clumps * np.exp(-(((u - bx) ** 2 + (v - by) ** 2) / width**2))
            for sx, sy in spots:
                stain = stain + 0.9 * np.exp(-(((u - sx) * long_um) ** 2 + ((v - sy) * short_um) ** 2) / 0.9**2)
            stain = stain * (shape.density / max(float((stain * body).sum() / body.sum()), 1e-6))
            small = cv2.resize((stain * body).astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
            out[step, variant] = np.clip(np.rint(small), 0, 255)
    return out


def _blobs(rng: np.random.Generator, count: int, reach: float) -> NDArray[np.float64]:
    """Positions and widths of chromatin clumps in units of the half axes, float64 (count, 3)."""
    place = rng.uniform(-reach, reach, (count, 2))
    return np.concatenate([place, rng.uniform(0.12, 0.26, (count, 1))], axis=1)


def stamp(
    canvas: NDArray[np.uint8],
    bank: NDArray[np.uint8],
    x_px: NDArray[np.float64],
    y_px: NDArray[np.float64],
    angle: NDArray[np.float64],
    variant: NDArray[np.float64],
) -> None:
    """Draw nuclei centred on (x, y) of the canvas, the denser stain winning; what lies off the canvas is cut.

    angle: radians, modulo pi. variant: in [0, 1).
    """
    if len(x_px) == 0:
        return
    side = bank.shape[-1]
    height, width = canvas.shape
    step = np.rint(angle / np.pi * ORIENTATIONS).astype(np.int64) % ORIENTATIONS
    which = np.minimum((variant * bank.shape[1]).astype(np.int64), bank.shape[1] - 1)
    left = np.rint(x_px).astype(np.int64) - side // 2
    top = np.rint(y_px).astype(np.int64) - side // 2
    near = (left > -side) & (top > -side) & (left < width) & (top < height)
    for i in np.flatnonzero(near):
        x0, y0 = int(left[i]), int(top[i])
        picture = bank[step[i], which[i]]
        cx, cy = max(0, -x0), max(0, -y0)
        part = picture[cy : height - y0, cx : width - x0]
        place = canvas[y0 + cy : y0 + side, x0 + cx : x0 + side]
        np.maximum(place, part, out=place)
