"""Aligned tile grids from a pyramid, a tissue mask and settings.

The finest request decides at which resolution tiles are really cut. Where the slide's own resolution times a power of
two (a *dyadic scale*) lies within ``mpp_tolerance`` of it, all grids are laid at that scale, so that tiles come out of
the file pixel for pixel; otherwise at exactly what was asked for. Coarser grids are exact whole multiples.

A grid is therefore the same whether or not a finer one is asked for with it, as long as the factor between them is a
power of two: then either both lie within the tolerance of a dyadic scale or neither does. With another factor (20x
with 6.667x, say) the coarser grid alone may find no dyadic scale where the finer one does, and its tiles then differ
in size by at most ``mpp_tolerance`` between the two calls. ``TileGrid.mpp_effective`` always tells which was used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import TileSettings
from wsi_pipe.errors import MissingMppError, ResolutionError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid, TileGrid, TileSpec, TissueMask

__all__ = ["plan_grids", "tissue_fractions"]

FACTOR_TOLERANCE = 1e-6
"""Relative distance from a whole number within which the factor between two requests counts as whole."""

FRACTION_EPSILON = 1e-9
"""Rounding of area sums: a fraction this close below the threshold has reached it."""

UPSAMPLING_EPSILON = 1e-9
"""Relative rounding of resolutions: a request this close to the limit has not passed it."""


@dataclass(frozen=True)
class _Scale:
    """Where the finest grid is cut: um per tile pixel and level-0 pixels per tile pixel, both (x, y)."""

    mpp: FloatPair
    downsample: FloatPair


def plan_grids(pyramid: Pyramid, mask: TissueMask, settings: TileSettings) -> tuple[TileGrid, ...]:
    """The grids that ``settings`` asks for, coarsest first, each finer one with its parents in the one before.

    Tissue is judged on cells of about ``judge_um`` (the whole number of cells to a tile that comes nearest): a tile is
    kept if one judging cell inside it has a tissue fraction of at least ``min_tissue``; a tile smaller than a judging
    cell is judged by its own fraction. Off the slide is not tissue. Tiles that begin on the slide and reach beyond
    its edge count. A tile whose parent is not kept is dropped, so that every tile has its parent.

    Raises MissingMppError when the pyramid states no resolution; ResolutionError when a request is finer than the
    slide by more than ``max_upsampling`` (unless ``allow_upsampling``), or when the factor between two neighbouring
    requests is not a whole number.
    """
    specs = settings.specs
    slide_mpp = pyramid.isotropic_mpp
    if slide_mpp is None:
        raise MissingMppError(
            "the slide states no resolution, so no grid can be laid",
            remedy="give it in micrometres per level-0 pixel: --slide-mpp X, or the column mpp of the slides CSV",
        )
    factors = [_whole_factor(coarse, fine) for coarse, fine in pairwise(specs)]
    finest = _finest_scale(slide_mpp, specs[-1].mpp, settings)

    grids: list[TileGrid] = []
    running = _running_sums(mask)
    for i, spec in enumerate(specs):
        multiple = math.prod(factors[i:])
        mpp = (finest.mpp[0] * multiple, finest.mpp[1] * multiple)
        downsample = (finest.downsample[0] * multiple, finest.downsample[1] * multiple)
        coarser = (grids[-1], factors[i - 1]) if grids else None
        grids.append(_lay(pyramid.size_l0, slide_mpp, mask, running, settings, spec, mpp, downsample, coarser))
    return tuple(grids)


def _whole_factor(coarse: TileSpec, fine: TileSpec) -> int:
    ratio = coarse.mpp / fine.mpp
    factor = round(ratio)
    if abs(ratio - factor) > FACTOR_TOLERANCE * ratio:
        below, above = (fine.mpp * k for k in (math.floor(ratio), math.ceil(ratio)))
        choices = f"{above:g}um" if math.floor(ratio) == 1 else f"{below:g}um or {above:g}um"
        raise ResolutionError(
            f"grids at {coarse.mpp:g} and {fine.mpp:g} um/px do not align: "
            f"their factor is {ratio:.6g}, which is not a whole number",
            remedy=f"ask for {choices} with {fine.mpp:g}um",
        )
    return factor


def _finest_scale(slide_mpp: FloatPair, request: float, settings: TileSettings) -> _Scale:
    """Where the finest grid is cut; the dyadic scale near the request if there is one."""
    coarsest_axis = max(slide_mpp)
    finer_by = (coarsest_axis - request) / coarsest_axis
    # mpp that differ between the axes are resampled each by its own; no one scale fits both pixel for pixel.
    if slide_mpp[0] == slide_mpp[1]:
        power = round(math.log2(request / slide_mpp[0]))
        dyadic = slide_mpp[0] * 2.0**power
        # Scales finer than level 0 count too where upsampling that far is allowed: not to save work, but so that
        # coarser grids stay where they are without this one.
        if (power >= 0 or settings.allow_upsampling) and abs(dyadic - request) <= settings.mpp_tolerance * request:
            return _Scale((dyadic, dyadic), (2.0**power, 2.0**power))
    if finer_by > settings.max_upsampling + UPSAMPLING_EPSILON and not settings.allow_upsampling:
        raise ResolutionError(
            f"{request:g} um/px is {finer_by:.1%} finer than the slide's {coarsest_axis:g} um/px "
            f"(at most {settings.max_upsampling:.0%} is served)",
            remedy=f"ask for {coarsest_axis:g}um or coarser, or allow it with --allow-upsampling",
        )
    return _Scale((request, request), (request / slide_mpp[0], request / slide_mpp[1]))


def _lay(
    size_l0: IntPair,
    slide_mpp: FloatPair,
    mask: TissueMask,
    running: NDArray[np.int32],
    settings: TileSettings,
    spec: TileSpec,
    mpp: FloatPair,
    downsample: FloatPair,
    coarser: tuple[TileGrid, int] | None,
) -> TileGrid:
    """One grid; ``coarser`` is the next coarser grid and the whole factor to it."""
    tile = (spec.size_px * downsample[0], spec.size_px * downsample[1])
    stride = _stride(spec, downsample)
    # A cell that would begin on the slide by nothing but rounding is none.
    columns, rows = (max(math.ceil(size / step - 1e-9), 1) for size, step in zip(size_l0, stride, strict=True))
    kept = _judge(size_l0, mask, running, settings, spec, downsample, (columns, rows))
    parent_row: NDArray[np.int32] | None = None
    if coarser is not None:
        column_of, row_of = (_parents(np.arange(n), spec, coarser[1]) for n in (columns, rows))
        row_at = _rows_by_cell(coarser[0], int(column_of[-1]) + 1, int(row_of[-1]) + 1)
        parents = row_at[row_of[:, None], column_of[None, :]]
        kept &= parents >= 0
        parent_row = parents[kept]
    row, column = np.nonzero(kept)
    fractions = tissue_fractions(mask, size_l0, (0.0, 0.0), stride, tile, (columns, rows), running)
    return TileGrid(
        spec=spec,
        mpp_effective=mpp,
        origin_l0=(0.0, 0.0),
        stride_l0=stride,
        tile_size_l0=tile,
        cells=np.stack([column, row], axis=1).astype(np.int32),
        tissue=fractions[kept].astype(np.float32),
        parent=parent_row,
        upsampled=any(m < s * (1 - UPSAMPLING_EPSILON) for m, s in zip(mpp, slide_mpp, strict=True)),
        min_tissue=settings.min_tissue,
    )


def _stride(spec: TileSpec, downsample: FloatPair) -> FloatPair:
    step_px = spec.size_px - spec.overlap_px
    return (step_px * downsample[0], step_px * downsample[1])


def _judge(
    size_l0: IntPair,
    mask: TissueMask,
    running: NDArray[np.int32],
    settings: TileSettings,
    spec: TileSpec,
    downsample: FloatPair,
    shape: IntPair,
) -> NDArray[np.bool_]:
    """Which cells of a grid of ``shape`` (columns, rows) are kept, bool (rows, columns)."""
    # The requested size counts, not the effective one: 32 cells to a tile of 4096 um, also where a scale 2.4 %
    # larger is cut. So the judging cells of a grid are those of every finer one, and the tiles at 128 um.
    count = max(math.floor(spec.size_um / settings.judge_um + 0.5), 1)
    overlap = spec.overlap_px / spec.size_px
    side = (spec.size_px * downsample[0] / count, spec.size_px * downsample[1] / count)
    # Judging cells overlap as tiles do: they lie where tiles of their size would. More than ``count`` of them may
    # then lie inside one tile.
    step = (side[0] * (1 - overlap), side[1] * (1 - overlap))
    inside = math.floor((count - 1) / (1 - overlap) + FRACTION_EPSILON) + 1
    cells = ((shape[0] - 1) * count + inside, (shape[1] - 1) * count + inside)
    fractions = tissue_fractions(mask, size_l0, (0.0, 0.0), step, side, cells, running)
    tissue = fractions >= settings.min_tissue - FRACTION_EPSILON
    by_row = np.zeros((shape[1], cells[0]), bool)
    for i in range(inside):
        by_row |= tissue[i : i + (shape[1] - 1) * count + 1 : count]
    kept = np.zeros((shape[1], shape[0]), bool)
    for i in range(inside):
        kept |= by_row[:, i : i + (shape[0] - 1) * count + 1 : count]
    return kept


def tissue_fractions(
    mask: TissueMask,
    size_l0: IntPair,
    origin_l0: FloatPair,
    stride_l0: FloatPair,
    tile_size_l0: FloatPair,
    shape: IntPair,
    running: NDArray[np.int32] | None = None,
) -> NDArray[np.float64]:
    """Area of tissue over area of tile for each cell of a regular grid, float64 (rows, columns), exact.

    shape: (columns, rows). running: the mask's sums down its columns, where several grids share them. Mask pixels that
    a tile cuts count by the part inside it; what lies off the slide or off the mask is not tissue, also where the last
    mask pixels reach beyond the slide.
    """
    height, width = mask.mask.shape
    limit = (min(size_l0[0] / mask.scale_l0[0], width), min(size_l0[1] / mask.scale_l0[1], height))
    starts = [origin_l0[axis] + np.arange(shape[axis]) * stride_l0[axis] for axis in (0, 1)]
    edges = [
        (
            np.clip(starts[axis] / mask.scale_l0[axis], 0, limit[axis]),
            np.clip((starts[axis] + tile_size_l0[axis]) / mask.scale_l0[axis], 0, limit[axis]),
        )
        for axis in (0, 1)
    ]
    # A running sum is linear between pixel edges, so its value at a fractional edge is exact. One axis at a time.
    rows = _running_sums(mask) if running is None else running
    by_row = _at(rows, edges[1][1]) - _at(rows, edges[1][0])
    columns = np.zeros((shape[1], width + 1), np.float64)
    np.cumsum(by_row, axis=1, out=columns[:, 1:])
    across = np.ascontiguousarray(columns.T)
    area = (_at(across, edges[0][1]) - _at(across, edges[0][0])).T
    tile_area = (tile_size_l0[0] / mask.scale_l0[0]) * (tile_size_l0[1] / mask.scale_l0[1])
    # Differences of sums round: nothing is tissue by -1e-17.
    return np.clip(area / tile_area, 0.0, 1.0)


def _running_sums(mask: TissueMask) -> NDArray[np.int32]:
    """Sums of a mask's pixels down its columns, int32 (H + 1, W), from 0 on."""
    rows = np.zeros((mask.mask.shape[0] + 1, mask.mask.shape[1]), np.int32)
    # Row by row: numpy's own sum along this axis goes down column by column.
    for above, own, below in zip(rows[:-1], mask.mask, rows[1:], strict=True):
        np.add(above, own, out=below)
    return rows


def _at(sums: NDArray[np.int32] | NDArray[np.float64], position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of a running sum at fractional positions in [0, rows - 1]."""
    below = np.minimum(position.astype(np.int64), len(sums) - 2)
    part = (position - below)[:, None]
    result: NDArray[np.float64] = sums[below] * (1 - part) + sums[below + 1] * part
    return result


def _parents(cell: NDArray[np.int64], spec: TileSpec, factor: int) -> NDArray[np.int64]:
    """Column (or row) of the coarser cell that holds a tile's centre; on the border, the one that holds the tile.

    In whole pixels of the finer grid, so nothing rounds; the coarser grid has the same tile size and overlap.
    """
    step = spec.size_px - spec.overlap_px
    parent: NDArray[np.int64] = (2 * cell * step + spec.size_px - 1) // (2 * factor * step)
    return parent


def _rows_by_cell(grid: TileGrid, columns: int, rows: int) -> NDArray[np.int32]:
    """Row of ``grid`` at each cell, int32 (rows, columns), -1 where no tile is kept."""
    if len(grid):
        columns = max(columns, int(grid.cells[:, 0].max()) + 1)
        rows = max(rows, int(grid.cells[:, 1].max()) + 1)
    table = np.full((rows, columns), -1, np.int32)
    table[grid.cells[:, 1], grid.cells[:, 0]] = np.arange(len(grid), dtype=np.int32)
    return table
