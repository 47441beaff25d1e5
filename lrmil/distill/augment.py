"""Augmentation of LR tiles that leaves tile and children aligned: turns move both, stain moves colours only.

Whole batches, where they lie: on a GPU a core that turned tile after tile would keep the student waiting.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["stain_mixes", "stained", "turned"]

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)


def turned(pixels: Tensor, symmetry: Tensor) -> Tensor:
    """Tiles uint8 (B, S, S, 3), each after the symmetry that ``children.turn`` applies to its child map.

    symmetry: int64 (B,), 0 to 7, on the same device.
    """
    for bit in (1, 2, 4):
        changed = pixels.transpose(1, 2) if bit == 4 else pixels.flip(2 if bit == 1 else 1)
        pixels = torch.where((symmetry & bit).bool()[:, None, None, None], changed, pixels)
    return pixels


def stain_mixes(drawn: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
    """What ``stained`` takes, (B, 4, 3): stains scaled by 1 +- strength and shifted by +- strength / 5.

    drawn: (B, 2, 3) even numbers from 0 to 1, of the scale and of the shift of each stain. In the space of stain
    densities, after Tellez et al. 2018 (IEEE TMI 37, HED-light). The three stains mix linearly in optical density, so
    a 3 x 3 matrix of densities and an offset do it.
    """
    scale = 1 + strength * (2 * drawn[:, 0] - 1)
    shift = strength / 5 * (2 * drawn[:, 1] - 1)
    matrix = (HED_FROM_RGB[None] * scale[:, None, :]) @ RGB_FROM_HED
    return np.concatenate([matrix, (shift @ RGB_FROM_HED)[:, None]], 1).astype(np.float32)


def stained(pixels: Tensor, mixes: Tensor) -> Tensor:
    """Tiles uint8 (B, S, S, 3) in other stains. mixes: (B, 4, 3) of ``stain_mixes``, on the same device.

    The density of a grey value v is log(256 / (v + 1)); what comes out is rounded to whole grey values.
    """
    matrix, offset = mixes[:, :3], mixes[:, 3:]
    values = torch.log1p(pixels.flatten(1, 2).float())
    # log(256) off and on again, so that logarithms are mixed as densities are.
    whole = math.log(256.0)
    values = torch.baddbmm(whole - whole * matrix.sum(1, keepdim=True) - offset, values, matrix)
    # In two steps, as densities are turned back: expm1 is another function near 0.
    return values.exp_().sub_(1.0).round_().clamp_(0, 255).to(torch.uint8).view(pixels.shape)
