"""Random numbers as pure functions of where they are used, so that a slide is the same however it is cut up."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["field", "generator", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seed: int, *keys: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each combination of integer keys (broadcast): SplitMix64 (Steele et al. 2014)."""
    state = np.asarray(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.int64).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose, independent of those for other purposes."""
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *purpose.encode()])


def field(shape: tuple[int, int], wavelength_px: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth noise, float32 (H, W), of mean about 0 and standard deviation about 1, smooth below the wavelength."""
    import cv2

    step = max(wavelength_px / 2, 1.0)
    coarse = (int(np.ceil(shape[0] / step)) + 4, int(np.ceil(shape[1] / step)) + 4)
    noise = cv2.GaussianBlur(rng.standard_normal(coarse).astype(np.float32), (0, 0), 0.7)
    scale = np.array([[1 / step, 0, 1.5], [0, 1 / step, 1.5]], np.float32)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    out = cv2.warpAffine(noise, scale, (shape[1], shape[0]), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(out * 2.4, np.float32)
