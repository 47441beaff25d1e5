"""From which plane tiles are cut and how, and which native blocks which tiles need, in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import Plane

__all__ = ["BlockPlan", "Cut", "alike", "choose_cut", "plan_blocks"]

SCALE_TOLERANCE = 1e-9
"""Relative distance within which two scales are one."""

NEAR_SCALE = 1.02
"""A plane this little finer than the request is too coarse to resample from."""

CORNER_TOLERANCE = 1e-6
"""Distance in plane pixels within which a corner lies on a pixel's edge."""


@dataclass(frozen=True)
class Cut:
    """How tiles come out of a plane.

    shrink: side of the boxes (a power of two) whose means take the place of plane pixels, 1 for none; the pixels that
    result are *sample pixels*. by_block: blocks are shrunk as soon as they are decoded; otherwise a tile's patch is,
    once complete. ratio: sample pixels per tile pixel, (x, y): exactly 1 where tiles are cut pixel for pixel.
    """

    plane: Plane
    shrink: int
    by_block: bool
    ratio: FloatPair

    @property
    def pixel_for_pixel(self) -> bool:
        """Tile pixels are sample pixels: nothing is interpolated."""
        return self.ratio == (1.0, 1.0)

    @property
    def sample_l0(self) -> FloatPair:
        """Level-0 pixels per sample pixel, (x, y)."""
        return (self.plane.downsample[0] * self.shrink, self.plane.downsample[1] * self.shrink)


def choose_cut(planes: tuple[Plane, ...], scale_l0: FloatPair, corners_l0: NDArray[np.float64]) -> Cut:
    """The plane and the way for tiles of ``scale_l0`` (level-0 pixels per tile pixel) at ``corners_l0``.

    1. Pixel for pixel from a plane of that very scale whose pixels the corners meet.
    2. At a dyadic scale (level 0 times a power of two): means of 2 x 2, 4 x 4, ... boxes of the coarsest finer dyadic
       plane whose pixels the corners meet.
    3. Else resampled from the coarsest plane at least as fine; from the finest where none is. A plane finer by less
       than 2 %, which no grid meets at the default tolerance, is passed over: nearly every tile pixel would fall
       between two plane pixels somewhere, and lose the detail that lies there (33 dB).
    """
    for plane in planes:
        same = all(abs(s / d - 1) <= SCALE_TOLERANCE for s, d in zip(scale_l0, plane.downsample, strict=True))
        if same and _aligned(corners_l0, plane):
            return Cut(plane, 1, True, (1.0, 1.0))
    if (power := _power_of_two(scale_l0)) is not None:
        for plane in sorted(planes, key=lambda p: -p.downsample[0]):
            own = _power_of_two(plane.downsample)
            if own is not None and own < power and _aligned(corners_l0, plane):
                shrink = 2 ** (power - own)
                by_block = _whole_boxes(plane, shrink) and _aligned(corners_l0, plane, shrink)
                return Cut(plane, shrink, by_block, (1.0, 1.0))
    plane = _coarsest_fine_enough(planes, scale_l0)
    ratio = (scale_l0[0] / plane.downsample[0], scale_l0[1] / plane.downsample[1])
    # Far from the request, box means go first: they cost little, and what is left (2 to 4 sample pixels to a tile
    # pixel) still leaves the filter its shape.
    shrink = 2 ** max(math.floor(math.log2(min(ratio))) - 1, 0)
    while shrink > 1 and not _whole_boxes(plane, shrink):
        shrink //= 2
    return Cut(plane, shrink, True, (ratio[0] / shrink, ratio[1] / shrink))


def alike(planes: tuple[Plane, ...], scale_l0: FloatPair, corners_l0: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Corners sorted into sets that are cut in one way: rows of ``corners_l0``, each in one set."""
    scales = dict.fromkeys([*(plane.downsample for plane in planes), scale_l0])
    meets = np.stack([_meets(corners_l0, scale) for scale in scales], axis=1)
    _, kind = np.unique(meets, axis=0, return_inverse=True)
    return [np.flatnonzero(kind.ravel() == k) for k in range(int(kind.max(initial=-1)) + 1)]


def _meets(corners_l0: NDArray[np.float64], pixel_l0: FloatPair) -> NDArray[np.bool_]:
    """Which corners lie on corners of pixels of that size."""
    corners = corners_l0 / pixel_l0
    on: NDArray[np.bool_] = np.abs(corners - np.rint(corners)) <= CORNER_TOLERANCE
    return np.logical_and(on[:, 0], on[:, 1])


def _aligned(corners_l0: NDArray[np.float64], plane: Plane, shrink: int = 1) -> bool:
    return bool(_meets(corners_l0, (plane.downsample[0] * shrink, plane.downsample[1] * shrink)).all())


def _whole_boxes(plane: Plane, shrink: int) -> bool:
    """Whether boxes of that side, laid from the plane's corner, never lie in two blocks."""
    return all(length % shrink == 0 for length in (*plane.block_px, *plane.origin_px))


def _power_of_two(scale: FloatPair) -> int | None:
    """k where both axes are 2**k, k at least 0."""
    power = round(math.log2(scale[0]))
    if power < 0 or any(abs(s / 2.0**power - 1) > SCALE_TOLERANCE for s in scale):
        return None
    return power


def _coarsest_fine_enough(planes: tuple[Plane, ...], scale_l0: FloatPair) -> Plane:
    fine = [p for p in planes if _is_finer(p, scale_l0, 1.0 if p.downsample == (1.0, 1.0) else NEAR_SCALE)]
    # max() keeps the first of equals, and planes of one scale stand cheapest first.
    return max(fine, key=lambda p: p.downsample[0] * p.downsample[1]) if fine else planes[0]


def _is_finer(plane: Plane, scale_l0: FloatPair, margin: float) -> bool:
    """Whether a plane's pixels, ``margin`` times as large, are still no larger than those asked for."""
    return all(d * margin <= s * (1 + SCALE_TOLERANCE) for d, s in zip(plane.downsample, scale_l0, strict=True))


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks each job decodes, and which blocks each tile is put together from.

    Tiles come in *groups* of neighbours. A group's job decodes the blocks that no earlier group needed, so that each
    is decoded once; a block's number is its row in ``cells``.

    cells: (column, row), int64 (blocks, 2), ordered by job, then in file order. job_start: (jobs + 1,) into cells.
    tile_start: (tiles + 1,) into tile_block, which numbers the blocks that a tile touches. uses: int64 (blocks,), how
    many tiles touch each. first_tile: the first of them. last_group: the last group with one of them. serves: for each
    job, the groups that need its blocks, and its own.
    """

    cells: NDArray[np.int64]
    job_start: NDArray[np.int64]
    tile_start: NDArray[np.int64]
    tile_block: NDArray[np.int64]
    uses: NDArray[np.int64]
    first_tile: NDArray[np.int64]
    last_group: NDArray[np.int64]
    serves: tuple[tuple[int, ...], ...]


def plan_blocks(
    corners: NDArray[np.int64],
    patch_px: IntPair,
    block_px: IntPair,
    plane_px: IntPair,
    group_of_tile: NDArray[np.int64],
) -> BlockPlan:
    """Plan the blocks for patches at ``corners`` on a plane of ``plane_px`` (width, height), all in sample pixels.

    group_of_tile: int64 (tiles,), non-decreasing from 0 without gaps.
    """
    first = np.maximum(corners, 0) // block_px
    last = (np.minimum(corners + np.asarray(patch_px), plane_px) - 1) // block_px
    columns = -(-plane_px[0] // block_px[0])
    outside = (corners >= plane_px) | (corners + np.asarray(patch_px) <= 0)
    across, down = np.where(outside, 0, np.maximum(last - first + 1, 0)).T
    count = across * down
    tile_start = np.concatenate([[0], np.cumsum(count)])
    tile = np.repeat(np.arange(len(corners)), count)
    nth = np.arange(len(tile)) - tile_start[tile]
    column = first[tile, 0] + nth % across[tile]
    row = first[tile, 1] + nth // across[tile]
    block_ids, first_use, block_of_use = np.unique(row * columns + column, return_index=True, return_inverse=True)
    # Uses stand in the order of tiles, so a block's first use is that by the first tile that needs it.
    job_of_block = group_of_tile[tile[first_use]]
    by_job = np.argsort(job_of_block, kind="stable")
    number = np.empty_like(by_job)
    number[by_job] = np.arange(len(by_job))
    tile_block = number[block_of_use]
    last_group = np.zeros(len(block_ids), np.int64)
    np.maximum.at(last_group, tile_block, group_of_tile[tile])

    groups = int(group_of_tile[-1]) + 1 if len(group_of_tile) else 0
    job_of_use = np.concatenate([np.arange(groups), job_of_block[block_of_use]])
    served = np.unique(job_of_use * groups + np.concatenate([np.arange(groups), group_of_tile[tile]]))
    bounds = np.searchsorted(served, np.arange(groups + 1) * groups).tolist()
    return BlockPlan(
        cells=np.stack([block_ids % columns, block_ids // columns], axis=1)[by_job],
        job_start=np.searchsorted(job_of_block[by_job], np.arange(groups + 1)),
        tile_start=tile_start,
        tile_block=tile_block,
        uses=np.bincount(tile_block, minlength=len(block_ids)),
        first_tile=tile[first_use][by_job],
        last_group=last_group,
        serves=tuple(tuple((served[a:b] % groups).tolist()) for a, b in pairwise(bounds)),
    )
