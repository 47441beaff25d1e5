"""A synthetic slide: pixels of any region and level, and the truth about them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair, TissueMask
from wsi_pipe.synthetic.plan import MAP_UM, SlidePlan, draw_marks, make_plan
from wsi_pipe.synthetic.render import block_size_px, blurred_block, finish_block, optical_block, render_block
from wsi_pipe.synthetic.spec import SlideSpec

__all__ = ["LevelView", "SyntheticSlide", "Truth"]

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

_CACHE_BYTES = 192 << 20
_MARK_OD = 0.15
_LARGE_PX = 8192 * 8192


@dataclass(frozen=True)
class Truth:
    """What a synthetic slide shows. Masks are bool (H, W) at one scale; polygons are rings (x, y) in level-0 pixels.

    tissue: without pen and debris. lesions: outer rings, float64 (N, 2). fold: where tissue lies twice. bubble: with
    what their rings surround. blurred: out of focus.
    """

    label: int
    tissue: TissueMask
    pen: Bools
    debris: Bools
    lesion: Bools
    tissue_polygons: tuple[NDArray[np.float64], ...]
    lesion_polygons: tuple[NDArray[np.float64], ...]
    fold: Bools
    bubble: Bools
    blurred: Bools


class SyntheticSlide:
    """An H&E-like slide as a pure function of its ``SlideSpec``; pixels are made when asked for."""

    def __init__(self, spec: SlideSpec) -> None:
        self.spec = spec
        self.plan: SlidePlan = make_plan(spec)
        self._blocks: OrderedDict[tuple[int, int], Bytes] = OrderedDict()
        self._sharp: OrderedDict[tuple[int, int], Bytes] = OrderedDict()

    @property
    def size_px(self) -> IntPair:
        """(width, height) of level 0."""
        return self.spec.size_px

    @property
    def mpp(self) -> float:
        """Micrometres per level-0 pixel."""
        return self.spec.mpp

    @property
    def label(self) -> int:
        """1 where there is a lesion to find, else 0."""
        return self.spec.label

    def region(self, x: int, y: int, width: int, height: int) -> Bytes:
        """Level-0 pixels, uint8 (height, width, 3); white off the slide."""
        out = np.full((height, width, 3), 255, np.uint8)
        side = block_size_px(self.mpp)
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, self.size_px[0]), min(y + height, self.size_px[1])
        if x0 >= x1 or y0 >= y1:
            return out
        for row in range(y0 // side, (y1 - 1) // side + 1):
            for column in range(x0 // side, (x1 - 1) // side + 1):
                block = self._block(column, row)
                left, top = column * side, row * side
                a, b = max(x0, left), max(y0, top)
                c, d = min(x1, left + side), min(y1, top + side)
                out[b - y : d - y, a - x : c - x] = block[b - top : d - top, a - left : c - left]
        return out

    def _block(self, column: int, row: int) -> Bytes:
        key = (column, row)
        block = self._blocks.get(key)
        if block is None:
            if self.plan.blur.any():
                around = {(c, r): self._sharp_block(column + c, row + r) for c in (-1, 0, 1) for r in (-1, 0, 1)}
                block = finish_block(self.plan, column, row, blurred_block(self.plan, column, row, around))
            else:
                block = render_block(self.plan, column, row)
            self._keep(self._blocks, key, block, rows=1)
        else:
            self._blocks.move_to_end(key)
        return block

    def _sharp_block(self, column: int, row: int) -> Bytes:
        """A block before the sensor saw it, for the blur to reach into."""
        key = (column, row)
        if key not in self._sharp:
            self._keep(self._sharp, key, optical_block(self.plan, column, row), rows=3)
        return self._sharp[key]

    def _keep(self, blocks: OrderedDict[tuple[int, int], Bytes], key: tuple[int, int], block: Bytes, rows: int) -> None:
        """Tiles are asked for in rows: a row of blocks is kept, so that each is made once a level."""
        blocks[key] = block
        across = -(-self.size_px[0] // block.shape[1]) + 1
        limit = max(across, 1) * rows + 2 * (rows - 1)
        while len(blocks) > limit and len(blocks) * block.nbytes > _CACHE_BYTES * rows:
            blocks.popitem(last=False)

    def level(self, downsample: int, tile_px: int = 256) -> LevelView:
        """A level of the pyramid, at 1 / ``downsample`` of level 0 by averaging, tile by tile."""
        return LevelView(self, downsample, tile_px)

    def levels(self, downsamples: Sequence[int] = (1, 4)) -> list[Bytes]:
        """Whole levels in memory, uint8 (H, W, 3) each, for ``ArraySlide`` or small files."""
        full = self.region(0, 0, *self.size_px)
        return [full if d == 1 else average(full, d) for d in downsamples]

    def overview(self, um_per_px: float = 8.0) -> tuple[Bytes, tuple[float, float], tuple[float, float]]:
        """The whole slide, area-averaged: (rgb, um_per_px, scale_l0), made block row by block row."""
        import cv2

        width, height = (max(1, round(n * self.mpp / um_per_px)) for n in self.size_px)
        # A large slide is first averaged over whole pixels, so that no more than a row of blocks is in memory.
        is_large = self.size_px[0] * self.size_px[1] > _LARGE_PX
        step = max(1, int(um_per_px / self.mpp / 4)) if is_large else 1
        side = block_size_px(self.mpp)
        band = max(step, side // step * step)
        bands = []
        for y in range(0, self.size_px[1], band):
            rows = min(band, self.size_px[1] - y)
            bands.append(average(self.region(0, y, self.size_px[0], rows), step))
        small = np.concatenate(bands)
        rgb = cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA)
        scale = (self.size_px[0] / width, self.size_px[1] / height)
        return np.asarray(rgb, np.uint8), (scale[0] * self.mpp, scale[1] * self.mpp), scale

    def truth(self, size_px: IntPair | None = None) -> Truth:
        """What the slide shows; masks of ``size_px`` (width, height) over the whole slide, by default at 8 um."""
        if size_px is None:
            size_px = (
                max(1, round(self.spec.size_um[0] / MAP_UM)),
                max(1, round(self.spec.size_um[1] / MAP_UM)),
            )
        scale = (self.size_px[0] / size_px[0], self.size_px[1] / size_px[1])
        um = (scale[0] * self.mpp, scale[1] * self.mpp)
        pen = softened(draw_marks(self.plan.pen, 0, 0, um, size_px), self.spec.ink_bleed_um, um).max(axis=2) > _MARK_OD
        debris = draw_marks(self.plan.debris, 0, 0, um, size_px).max(axis=2) > _MARK_OD
        covered = _resampled(self.plan.edge_um, um, size_px) > 0
        lesion = (_resampled(self.plan.lesion_um, um, size_px) > 0) & covered
        tissue = covered & ~pen & ~debris
        reason = None if tissue.any() else "the slide was made without tissue"
        discs = tuple(mark._replace(width_um=0.0) for mark in self.plan.bubbles)
        return Truth(
            label=self.label,
            tissue=TissueMask(tissue, scale, reason),
            pen=pen,
            debris=debris,
            lesion=lesion,
            tissue_polygons=_outlines(self.plan.edge_um, self.mpp),
            lesion_polygons=_outlines(self.plan.lesion_um, self.mpp),
            fold=(_resampled(self.plan.fold, um, size_px) > 0.5) & covered,
            bubble=draw_marks(discs, 0, 0, um, size_px).max(axis=2) > _MARK_OD,
            blurred=_resampled(self.plan.blur, um, size_px) > 0.5,
        )


class LevelView:
    """A level of a synthetic slide that hands out tiles; what ``write_pyramid`` streams."""

    def __init__(self, slide: SyntheticSlide, downsample: int, tile_px: int) -> None:
        self.slide, self.downsample, self.tile_px = slide, downsample, tile_px
        width, height = slide.size_px
        self.size_px: IntPair = (max(1, width // downsample), max(1, height // downsample))

    def tile(self, column: int, row: int) -> Bytes:
        """Pixels of a tile, uint8 (h, w, 3), cut at the level's borders."""
        d, t = self.downsample, self.tile_px
        width = min(t, self.size_px[0] - column * t)
        height = min(t, self.size_px[1] - row * t)
        return average(self.slide.region(column * t * d, row * t * d, width * d, height * d), d)


def average(rgb: Bytes, factor: int) -> Bytes:
    """Means over whole boxes of ``factor`` x ``factor`` pixels, uint8; what does not fill a box is left out."""
    import cv2

    if factor == 1:
        return rgb
    height, width = max(1, rgb.shape[0] // factor), max(1, rgb.shape[1] // factor)
    part = rgb[: height * factor, : width * factor]
    return np.asarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def softened(od: NDArray[np.float32], sigma_um: float, um: tuple[float, float]) -> NDArray[np.float32]:
    """Density of ink that has bled."""
    import cv2

    if sigma_um == 0:
        return od
    return np.asarray(cv2.GaussianBlur(od, (0, 0), sigmaX=sigma_um / um[0], sigmaY=sigma_um / um[1]), np.float32)


def _resampled(values: NDArray[np.float32], um: tuple[float, float], size_px: IntPair) -> NDArray[np.float32]:
    """A map at the centres of pixels of ``um`` micrometres."""
    import cv2

    matrix = np.array(
        [[um[0] / MAP_UM, 0, 0.5 * um[0] / MAP_UM - 0.5], [0, um[1] / MAP_UM, 0.5 * um[1] / MAP_UM - 0.5]], np.float64
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    out: Any = cv2.warpAffine(values, matrix, size_px, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(out, np.float32)


def _outlines(signed_um: NDArray[np.float32], mpp: float) -> tuple[NDArray[np.float64], ...]:
    """Outer rings of where a signed distance is positive, in level-0 pixels."""
    import cv2

    fine = cv2.resize(signed_um, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    contours, _ = cv2.findContours((fine > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    scale = MAP_UM / 4 / mpp
    return tuple((c[:, 0, :].astype(np.float64) + 0.5) * scale for c in contours if len(c) >= 3)
