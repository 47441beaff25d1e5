"""Augmentation of LR tiles that leaves tile and children aligned: turns move both, stain moves colours only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["stain_jitter", "turn_tile"]

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)


def turn_tile(tile: NDArray[np.uint8], symmetry: int) -> NDArray[np.uint8]:
    """A tile (S, S, 3) after the symmetry that ``children.turn`` applies to its child map."""
    if symmetry & 1:
        tile = tile[:, ::-1]
    if symmetry & 2:
        tile = tile[::-1]
    return np.swapaxes(tile, 0, 1) if symmetry & 4 else tile


def stain_jitter(tile: NDArray[np.uint8], strength: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A tile uint8 (S, S, 3) whose stains are scaled by 1 +- strength and shifted by +- strength / 5.

    In the space of stain densities, after Tellez et al. 2018 (IEEE TMI 37, HED-light). One table a channel: the three
    stains mix linearly in optical density, so a 3 x 3 matrix and an offset do it.
    """
    if strength == 0:
        return tile
    scale = rng.uniform(1 - strength, 1 + strength, 3)
    shift = rng.uniform(-strength / 5, strength / 5, 3)
    matrix = (HED_FROM_RGB * scale) @ RGB_FROM_HED
    density = _DENSITY[tile] @ matrix.astype(np.float32) + (shift @ RGB_FROM_HED).astype(np.float32)
    return np.asarray(np.clip(np.rint(256.0 * np.exp(-density) - 1.0), 0, 255), np.uint8)


_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1.0) / 256.0)
