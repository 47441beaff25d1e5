"""Slides as large as those of an archive, made in minutes: what benchmarks of whole slides work on.

The synthetic slide's maker (``wsi_pipe.synthetic``) draws the level at 4 um/px, tissue, holes, pen and debris and all.
To draw 40x so would take hours: finer levels are that level enlarged, with a grain that averages to nothing and gives
JPEG tiles the size that they have on scanned slides. What tissue is found on, what lies where and how many tiles there
are is the maker's own; only what cells look like is not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic.slide import SyntheticSlide
from wsi_pipe.synthetic.spec import SlideSpec

__all__ = ["DOWNSAMPLES", "MPP", "make_real_slide", "size_for_tissue"]

MPP = 0.25
DOWNSAMPLES = (1, 4, 16)
"""What Aperio writes at 40x, but for the last level of a few hundred pixels."""
TILE_PX = 256
TISSUE = 0.55
_GRAIN_PX = 512


def size_for_tissue(cm2: float) -> int:
    """Pixels a side of level 0 of a square slide with so much tissue."""
    side_um = (cm2 * 1e8 / TISSUE) ** 0.5
    unit = DOWNSAMPLES[-1] * TILE_PX
    return max(round(side_um / MPP / unit), 1) * unit


@dataclasses.dataclass(frozen=True)
class _Enlarged:
    """A finer level out of a coarse one: uint8 (H, W, 3) ``coarse``, ``times`` as large, with grain on what is dark."""

    coarse: NDArray[np.uint8]
    times: int
    grain: NDArray[np.float32]

    @property
    def size_px(self) -> IntPair:
        return (self.coarse.shape[1] * self.times, self.coarse.shape[0] * self.times)

    def tile(self, column: int, row: int) -> NDArray[np.uint8]:
        """Pixels of a tile."""
        import cv2

        side = TILE_PX // self.times
        part = self.coarse[row * side : (row + 1) * side, column * side : (column + 1) * side]
        whole = cv2.resize(part, (TILE_PX, TILE_PX), interpolation=cv2.INTER_LINEAR)
        if int(part.min()) > 215:  # glass, which is smooth
            return np.asarray(whole, np.uint8)
        y, x = row * TILE_PX % _GRAIN_PX, column * TILE_PX % _GRAIN_PX
        grain = self.grain[y : y + TILE_PX, x : x + TILE_PX]
        amount = np.float32(1) - whole.astype(np.float32) / np.float32(245)
        return np.clip(whole + grain * amount, 0, 255).astype(np.uint8)


def _grain(seed: int, sigma_px: float, amplitude: float) -> NDArray[np.float32]:
    """Noise that is seamless, of mean 0, float32 (_GRAIN_PX, _GRAIN_PX, 1)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(_GRAIN_PX)[:, None], np.fft.rfftfreq(_GRAIN_PX)[None])
    total = np.zeros((_GRAIN_PX, _GRAIN_PX))
    for sigma in (sigma_px, sigma_px / 3):
        spectrum = np.fft.rfft2(rng.normal(size=total.shape)) * np.exp(-2 * (np.pi * sigma * frequency) ** 2)
        spectrum[0, 0] = 0
        layer = np.fft.irfft2(spectrum, total.shape)
        total += layer / layer.std()
    return (total / total.std() * amplitude).astype(np.float32)[..., None]


def make_real_slide(path: Path, size_px: int, *, seed: int = 3, marks: bool = True) -> SyntheticSlide:
    """Write a 40x slide with levels 1, 4 and 16 as JPEG; the slide at 4 um/px, whose ``truth`` is also this one's.

    size_px: of a side, a multiple of 4,096. marks: pen and debris too.
    """
    coarse_mpp = MPP * DOWNSAMPLES[-1]
    side = size_px // DOWNSAMPLES[-1]
    spec = SlideSpec(
        seed=seed, size_px=(side, side), mpp=coarse_mpp, tissue_fraction=TISSUE, pen=marks, debris=marks, pale=marks
    )
    slide = SyntheticSlide(spec)
    coarse = slide.region(0, 0, side, side)
    levels = [_Enlarged(coarse, DOWNSAMPLES[-1] // d, _grain(seed, 6.0 / d**0.5, 70.0)) for d in DOWNSAMPLES[:-1]]
    write_pyramid(path, [*levels, coarse], mpp=MPP, quality=80, subsampling="420", tile_px=TILE_PX)
    return slide
