"""Frozen values for pyramids, tile specifications, tissue masks and tile grids.

Frames and units are in the names: ``_l0`` is level-0 pixels of the whole image, ``_px`` pixels of the thing
itself, ``_um`` micrometres, ``mpp`` micrometres per pixel. Pairs are (x, y) or (width, height).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import ConfigError, MaskError

__all__ = [
    "MPP_BOUNDS",
    "FloatPair",
    "IntPair",
    "Level",
    "Pyramid",
    "TileGrid",
    "TileSpec",
    "TissueMask",
    "in_mpp_bounds",
    "level_label",
    "parse_resolution",
]

FloatPair = tuple[float, float]
IntPair = tuple[int, int]

MICROMETRES_PER_MAGNIFICATION = 10.0
"""The convention behind labels such as "20x": magnification = 10 / mpp."""

MPP_BOUNDS = (0.05, 20.0)
"""Level 0 of a slide lies inside: the finest objectives give 0.06 um/px, and 20 um/px is a view of the whole glass."""

ISOTROPY_TOLERANCE = 0.01
"""mpp in x and y that differ by no more than this (relative) count as one value."""


def in_mpp_bounds(x: float, y: float) -> bool:
    """Whether a microscope can have both, as um per level-0 pixel."""
    return all(math.isfinite(value) and MPP_BOUNDS[0] <= value <= MPP_BOUNDS[1] for value in (x, y))


def level_label(mpp: float) -> str:
    """The label of a resolution: ``10 / mpp`` in ``:g`` format plus ``x`` (0.5 -> "20x", 4 -> "2.5x")."""
    return f"{MICROMETRES_PER_MAGNIFICATION / mpp:g}x"


_RESOLUTION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(x|um|µm|μm|mpp|um/px)\s*$", re.IGNORECASE)


def parse_resolution(text: str) -> float:
    """Micrometres per pixel from "20x" (by the 10/magnification convention) or "0.5um".

    Raises ConfigError when the text is neither, or not above zero.
    """
    match = _RESOLUTION.match(text)
    value = float(match.group(1)) if match else math.nan
    if match is None or not math.isfinite(value) or value <= 0:
        raise ConfigError(
            f"resolution {text!r} is not understood",
            remedy="write a magnification such as 20x or micrometres per pixel such as 0.5um",
        )
    return MICROMETRES_PER_MAGNIFICATION / value if match.group(2).lower() == "x" else value


@dataclass(frozen=True, slots=True)
class Level:
    """One image of a pyramid.

    size_px: (width, height) of the level. downsample: level-0 pixels per level pixel, (x, y), exact.
    """

    size_px: IntPair
    downsample: FloatPair


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The levels of a slide, finest first, and its resolution.

    mpp: micrometres per level-0 pixel, (x, y), or None where neither file nor user states it.
    """

    levels: tuple[Level, ...]
    mpp: FloatPair | None = None

    @classmethod
    def from_sizes(cls, sizes_px: Sequence[IntPair], mpp: FloatPair | None = None) -> Pyramid:
        """A pyramid from the levels' sizes (width, height), finest first.

        A level whose size is level 0 over a whole number, rounded down or up, is at exactly that whole number,
        whatever the ratio of the sizes says (3567 over 1783 is 2, not 2.0006); otherwise the ratio counts.
        """
        width, height = sizes_px[0]
        levels = [Level((width, height), (1.0, 1.0))]
        for size in sizes_px[1:]:
            whole = _whole_downsample((width, height), size)
            exact = (width / size[0], height / size[1]) if whole is None else (float(whole), float(whole))
            levels.append(Level(size, exact))
        return cls(tuple(levels), mpp)

    @property
    def size_l0(self) -> IntPair:
        """(width, height) of level 0 in pixels."""
        return self.levels[0].size_px

    @property
    def isotropic_mpp(self) -> FloatPair | None:
        """The mpp to compute with: the mean for both axes where they differ by at most 1 %, else each its own."""
        if self.mpp is None:
            return None
        x, y = self.mpp
        if abs(x - y) <= ISOTROPY_TOLERANCE * max(x, y):
            mean = x if x == y else (x + y) / 2
            return (mean, mean)
        return (x, y)

    def with_mpp(self, mpp: FloatPair | None) -> Pyramid:
        """The same levels at another resolution."""
        return Pyramid(self.levels, mpp)


def _whole_downsample(full: IntPair, size: IntPair) -> int | None:
    """The whole number that takes ``full`` to ``size`` by rounding down (or up) in both axes, if there is one."""
    # k gives size by rounding down when size <= full/k < size + 1, by rounding up when size - 1 < full/k <= size.
    down_low = max(math.floor(f / (s + 1)) + 1 for f, s in zip(full, size, strict=True))
    down_high = min(f // s for f, s in zip(full, size, strict=True))
    up_low = max(-(-f // s) for f, s in zip(full, size, strict=True))
    up_high = min((math.ceil(f / (s - 1)) - 1) if s > 1 else down_high for f, s in zip(full, size, strict=True))
    ratio = math.sqrt(full[0] / size[0] * full[1] / size[1])
    ranges = [(low, high) for low, high in ((down_low, down_high), (up_low, up_high)) if low <= high]
    # A tiny level fits many whole numbers: a power of two is what pyramid writers use, rounding either way.
    for low, high in ranges:
        powers = [1 << k for k in range(low.bit_length() - 1, high.bit_length()) if low <= 1 << k <= high]
        if powers:
            return min(powers, key=lambda k: abs(math.log(k / ratio)))
    for low, high in ranges:
        return min(max(round(ratio), low), high)
    return None


@dataclass(frozen=True, slots=True, order=True)
class TileSpec:
    """A requested resolution and tile size.

    mpp: micrometres per tile pixel. size_px: side of the tile in pixels. overlap_px: pixels shared with the next
    tile, at least 0 and less than size_px.
    """

    mpp: float
    size_px: int = 256
    overlap_px: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ConfigError(f"resolution {self.mpp} um/px must be above zero")
        if self.size_px < 1:
            raise ConfigError(f"tile size {self.size_px} px must be at least 1")
        if not 0 <= self.overlap_px < self.size_px:
            raise ConfigError(
                f"overlap {self.overlap_px} px must be at least 0 and less than the tile's {self.size_px} px"
            )

    @property
    def label(self) -> str:
        """The level's name in bags and on the command line, such as "20x"."""
        return level_label(self.mpp)

    @property
    def size_um(self) -> float:
        """Side of the tile in micrometres."""
        return self.size_px * self.mpp


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is.

    mask: bool (H, W); pixel (column c, row r) covers level-0 x in [c, c + 1) * scale_l0[0], likewise y.
    scale_l0: level-0 pixels per mask pixel, (x, y). empty_reason: why nothing was kept, where nothing was.
    """

    mask: NDArray[np.bool_]
    scale_l0: FloatPair
    empty_reason: str | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_:
            raise MaskError(f"a tissue mask must be a 2-D bool array, not {self.mask.dtype} {self.mask.shape}")

    @property
    def is_empty(self) -> bool:
        """True where no pixel is tissue."""
        return not self.mask.any()

    def area_um2(self, mpp: FloatPair) -> float:
        """Tissue area in um2 on a slide of ``mpp`` (x, y) micrometres per level-0 pixel."""
        pixel = self.scale_l0[0] * mpp[0] * self.scale_l0[1] * mpp[1]
        return float(np.count_nonzero(self.mask)) * pixel


@dataclass(frozen=True)
class TileGrid:
    """The kept tiles of one slide at one resolution, in row-major order of their cells.

    spec: what was asked for. mpp_effective: micrometres per tile pixel, (x, y), at which tiles are really cut.
    origin_l0, stride_l0, tile_size_l0: (x, y) floats in level-0 pixels; the tile of cell (c, r) covers
    ``origin + cell * stride`` to that plus ``tile_size``. cells: int32 (N, 2), column and row. tissue: float32 (N,)
    in [0, 1]. parent: int32 (N,), the row in the next coarser grid that holds the tile, or None for the coarsest.
    upsampled: the slide is coarser than the request. min_tissue: the threshold that the tiles passed.
    """

    spec: TileSpec
    mpp_effective: FloatPair
    origin_l0: FloatPair
    stride_l0: FloatPair
    tile_size_l0: FloatPair
    cells: NDArray[np.int32]
    tissue: NDArray[np.float32]
    parent: NDArray[np.int32] | None = None
    upsampled: bool = False
    min_tissue: float = field(default=0.0)

    def __post_init__(self) -> None:
        n = len(self.cells)
        if self.cells.shape != (n, 2) or self.tissue.shape != (n,):
            raise ValueError(f"cells {self.cells.shape} and tissue {self.tissue.shape} do not belong together")
        if self.parent is not None and self.parent.shape != (n,):
            raise ValueError(f"parent {self.parent.shape} does not belong to {n} tiles")

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, rows: NDArray[np.integer[Any]] | slice) -> TileGrid:
        """Some of the tiles, in the order of ``rows``: indices or a slice.

        ``parent`` goes along: it still numbers rows of the whole next coarser grid, so that what is taken belongs
        beside that one, and not beside a part of it.
        """
        parent = None if self.parent is None else self.parent[rows]
        return dataclasses.replace(self, cells=self.cells[rows], tissue=self.tissue[rows], parent=parent)

    def spread(self, most: int) -> TileGrid:
        """At most ``most`` of the tiles, spread evenly over the grid, in its order; see ``take``."""
        rows = np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(np.int64)
        return self.take(np.unique(rows))

    @property
    def label(self) -> str:
        """The level's name, such as "20x"."""
        return self.spec.label

    @property
    def scale_l0(self) -> FloatPair:
        """Level-0 pixels per tile pixel, (x, y)."""
        return (self.tile_size_l0[0] / self.spec.size_px, self.tile_size_l0[1] / self.spec.size_px)

    @cached_property
    def corners_l0(self) -> NDArray[np.float64]:
        """Exact top-left corners, float64 (N, 2), level-0 pixels."""
        corners: NDArray[np.float64] = np.asarray(self.origin_l0) + self.cells.astype(np.float64) * self.stride_l0
        return corners

    @cached_property
    def coords(self) -> NDArray[np.int64]:
        """Top-left corners rounded to whole level-0 pixels, int64 (N, 2), as other tools read them."""
        return np.rint(self.corners_l0).astype(np.int64)
