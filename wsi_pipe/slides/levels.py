"""The scale of a level: what the file states of it first, sizes second."""

from __future__ import annotations

import math

from wsi_pipe.geometry import FloatPair, IntPair, Pyramid

__all__ = ["level_downsample", "level_share"]

WHOLE_TOLERANCE = 0.01 + 1e-9
"""A stated ratio this near to a whole number means that number: spacings are written with few digits."""

PADDING_TILES = 2
"""By how much a level may be larger than its share of level 0: Philips pads to an even number of tiles."""


def level_downsample(full: IntPair, size: IntPair, stated: FloatPair | None, tile: IntPair) -> FloatPair | None:
    """Level-0 pixels per pixel of a level, (x, y); None where what is stated and the sizes contradict each other.

    full, size: (width, height) of level 0 and of the level. stated: the level's pixel size over level 0's, (x, y), if
    the file tells both. tile: (width, height) of a tile, to whole numbers of which levels may be padded.
    """
    by_size = Pyramid.from_sizes([full, size]).levels[1].downsample
    if stated is None:
        return by_size
    whole = (_whole(stated[0]), _whole(stated[1]))
    if whole[0] and whole[1] and _covers(whole, full, size, tile):
        return whole
    # Sizes are exact to a pixel, spacings to the digits that are written.
    if all(abs(r / s - 1) <= WHOLE_TOLERANCE for r, s in zip(stated, by_size, strict=True)):
        return by_size
    return stated if min(stated) > 0 and _covers(stated, full, size, tile) else None


def level_share(full: IntPair, downsample: FloatPair) -> IntPair:
    """(width, height) of level 0 at a scale, rounded up."""
    return (math.ceil(full[0] / downsample[0] - 1e-6), math.ceil(full[1] / downsample[1] - 1e-6))


def _whole(ratio: float) -> float:
    """The whole number above 1 that a stated ratio means, 0 for none; a power of two before others."""
    if not 0.5 < ratio < 1e9:
        return 0.0
    near = [2.0 ** round(math.log2(ratio)), float(round(ratio))]
    return next((k for k in near if k > 1 and abs(ratio / k - 1) <= WHOLE_TOLERANCE), 0.0)


def _covers(downsample: FloatPair, full: IntPair, size: IntPair, tile: IntPair) -> bool:
    """Whether a level at this scale has all of level 0, and no more beyond it than padding."""
    shares = (full[0] / downsample[0], full[1] / downsample[1])
    return all(
        share - 1 <= side <= share + PADDING_TILES * block
        for side, share, block in zip(size, shares, tile, strict=True)
    )
