"""Seamless textures of stroma, cytoplasm, fat and sensor noise; made once per resolution, the same in every process."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PERIOD_UM", "Textures", "textures", "window"]

PERIOD_UM = 768.0
"""The textures repeat after this; slides shift, mirror and mix them."""

_BASE_PX = 1024
"""Textures are drawn at 0.75 um/px and resized to the slide's."""

Bytes = NDArray[np.uint8]


class Textures(NamedTuple):
    """Square, seamless, uint8 but for angle.

    fibres: collagen, two variants. angle: of the first variant's fibres at 8 um, radians, float32. grain: cytoplasm,
    mean 128. fat: distance from the nearest membrane between fat cells, 4 a um. noise: of the sensor, int8.
    """

    fibres: tuple[Bytes, Bytes]
    angles: tuple[NDArray[np.float32], NDArray[np.float32]]
    grain: Bytes
    fat: Bytes
    noise: NDArray[np.int8]


def window(texture: NDArray[Any], x: int, y: int, width: int, height: int) -> NDArray[Any]:
    """A window of a seamless texture, at any position and of any size."""
    rows = (y + np.arange(height)) % texture.shape[0]
    columns = (x + np.arange(width)) % texture.shape[1]
    r0, c0 = int(rows[0]), int(columns[0])
    if r0 + height <= texture.shape[0] and c0 + width <= texture.shape[1]:
        return texture[r0 : r0 + height, c0 : c0 + width]
    wrapped: NDArray[Any] = texture[rows][:, columns]
    return wrapped


@lru_cache(maxsize=4)
def textures(mpp: float) -> Textures:
    """The textures at ``mpp`` um/px, to the nearest whole number of pixels in a period."""
    size = max(8, round(PERIOD_UM / mpp))
    fibres, angles, grain, fat = _base()
    noise = np.random.default_rng(20_052).standard_normal((size, size)) * 1.6
    return Textures(
        fibres=(_resized(fibres[0], size), _resized(fibres[1], size)),
        angles=angles,
        grain=_resized(grain, size),
        fat=_resized(fat, size),
        noise=np.clip(np.rint(noise), -7, 7).astype(np.int8),
    )


@lru_cache(maxsize=1)
def _base() -> tuple[tuple[Bytes, Bytes], tuple[NDArray[np.float32], NDArray[np.float32]], Bytes, Bytes]:
    rng = np.random.default_rng(20_051)
    (first, first_angle), (second, second_angle) = _fibres(rng), _fibres(rng)
    grain = _stretched(_noise(_BASE_PX, 0.8, rng) + 0.8 * _noise(_BASE_PX, 3.4, rng), 26.0)
    return (first, second), (first_angle, second_angle), grain, _fat(rng)


def _resized(texture: Bytes, size: int) -> Bytes:
    import cv2

    if size == texture.shape[0]:
        return texture
    # A margin, so that the interpolation at the borders sees the other side.
    margin = texture.shape[0] // 8
    wrapped = np.pad(texture, margin, mode="wrap")
    scale = size / texture.shape[0]
    padded = round(wrapped.shape[0] * scale)
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    start = (padded - size) // 2
    return np.ascontiguousarray(cv2.resize(wrapped, (padded, padded), interpolation=way)[start:, start:][:size, :size])


def _noise(size: int, sigma_px: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Seamless Gaussian noise of standard deviation 1, smoothed by ``sigma_px``."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)).astype(np.float32))
    smooth = np.fft.irfft2(spectrum * np.exp(-2 * (np.pi * sigma_px * frequency) ** 2), s=(size, size))
    return np.asarray(smooth / smooth.std(), np.float32)


def _stretched(values: NDArray[np.float32], spread: float) -> Bytes:
    normal = (values - values.mean()) / values.std()
    return np.asarray(np.clip(128 + spread * normal, 0, 255), np.uint8)


def _fibres(rng: np.random.Generator) -> tuple[Bytes, NDArray[np.float32]]:
    """Wavy bundles: noise smeared along a direction field (line integral convolution; Cabral and Leedom 1993)."""
    import cv2

    n = _BASE_PX
    angle = 1.0 * _noise(n, 130.0, rng) + 0.28 * _noise(n, 24.0, rng) + rng.uniform(0, np.pi)
    dx, dy = np.cos(angle), np.sin(angle)
    xs, ys = np.meshgrid(np.arange(n, dtype=np.float32), np.arange(n, dtype=np.float32))
    source = 0.8 * _noise(n, 0.8, rng) + 0.9 * _noise(n, 2.2, rng)
    total = source.copy()
    step = 2.5
    for sign in (1.0, -1.0):
        x, y = xs.copy(), ys.copy()
        for _ in range(8):
            vx = cv2.remap(dx, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_WRAP)
            vy = cv2.remap(dy, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_WRAP)
            x += sign * step * vx
            y += sign * step * vy
            total += cv2.remap(source, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    total /= total.std()
    # Bundles are cut by clefts: the darkest quarter becomes gaps between fibres.
    texture = _stretched(total + 0.5 * _noise(n, 18.0, rng), 58.0)
    coarse = angle[:: n // 96, :: n // 96].astype(np.float32)
    return texture, coarse


def _fat(rng: np.random.Generator) -> Bytes:
    """Fat cells of about 75 um: distance to the border of a relaxed Voronoi mosaic."""
    import cv2
    from scipy.spatial import cKDTree

    count, size = 10, 256
    pitch = size / count
    grid = np.stack(np.meshgrid(np.arange(count), np.arange(count)), axis=-1).reshape(-1, 2) + 0.5
    grid[:, 0] += 0.5 * (np.arange(len(grid)) // count % 2)
    centres = ((grid + rng.uniform(-0.33, 0.33, grid.shape)) * pitch) % size
    ys, xs = np.mgrid[0:size, 0:size]
    points = np.stack([xs, ys], axis=-1).reshape(-1, 2) + 0.5
    distances = np.asarray(cKDTree(centres, boxsize=np.full(2, float(size))).query(points, k=2)[0])
    border_um = (distances[:, 1] - distances[:, 0]).reshape(size, size) / 2 * (PERIOD_UM / size)
    steps = np.clip(border_um * 4, 0, 255).astype(np.float32)
    wrapped = np.pad(steps, 8, mode="wrap")
    factor = _BASE_PX // size
    large = cv2.resize(wrapped, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return np.clip(large[8 * factor : -8 * factor, 8 * factor : -8 * factor], 0, 255).astype(np.uint8)
