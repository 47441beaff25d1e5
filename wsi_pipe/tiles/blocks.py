"""Many blocks of a job at once: out of the file, decoded, and into their tiles where that needs no copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import DecodesInto, Plane, RGBArray, Slide
from wsi_pipe.slides.room import ReadsInto, Room
from wsi_pipe.tiles.timing import Stopwatch

__all__ = ["Decoded", "Targets", "decode_at_once", "read_at_once"]


@dataclass(frozen=True)
class Targets:
    """Where the blocks of a job belong.

    pixels: uint8 (B, S, S, 3), tiles that are being made. tile: int64 (n,), the first of them that each block touches.
    places: int64 (n, 2), where the block's corner (x, y) lies in it. straight: bool (n,), whether the block, as it is
    decoded, is part of that tile and of no other. block_px: (width, height) of a block.
    """

    pixels: RGBArray
    tile: NDArray[np.int64]
    places: NDArray[np.int64]
    straight: NDArray[np.bool_]
    block_px: IntPair

    def within(self) -> NDArray[np.bool_]:
        """Which blocks lie wholly in their tile, bool (n,): they go there without a copy."""
        last = (self.pixels.shape[2] - self.block_px[0], self.pixels.shape[1] - self.block_px[1])
        return np.asarray(self.straight & ((self.places >= 0) & (self.places <= last)).all(1))


@dataclass
class Decoded:
    """Blocks that are decoded, by number in their job: in their tiles already, or on their own."""

    in_place: set[int] = field(default_factory=set)
    alone: dict[int, RGBArray] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number in self.in_place or number in self.alone


def read_at_once(
    slide: ReadsInto, plane: Plane, cells: NDArray[np.int64], targets: Targets, clock: Stopwatch
) -> Decoded:
    """Fetch and decode blocks (column, row), int64 (n, 2), in one call without Python's lock, as many as that does."""
    if not len(cells):
        return Decoded()
    width, height = targets.block_px
    within = targets.within()
    inside, outside = np.flatnonzero(within), np.flatnonzero(~within)
    room = Room.within(targets.pixels, targets.tile[inside], targets.places[inside], targets.block_px)
    order, alone = inside, list[RGBArray]()
    if len(outside):
        alone = [np.empty((height, width, 3), np.uint8) for _ in range(len(outside))]
        room, order = room.join(Room.of(alone, targets.block_px)), np.concatenate([inside, outside])
    found = slide.read_into(plane, cells[order], room)
    clock.lap_decode(found.fetch_s, found.fetch_cpu_s)
    count = len(inside)
    own = zip(outside.tolist(), alone, found.done[count:].tolist(), strict=True)
    return Decoded(set(inside[found.done[:count]].tolist()), {i: block for i, block, done in own if done})


def decode_at_once(
    slide: Slide,
    plane: Plane,
    cells: Mapping[int, IntPair],
    fetched: Mapping[int, Any],
    targets: Targets,
) -> Decoded:
    """Decode fetched blocks in one call, as many as that does. cells, fetched: by number in the job.

    One call takes Python's lock once, where blocks one by one would take it several times each.
    """
    numbers = [i for i, data in fetched.items() if data is not None]
    if not isinstance(slide, DecodesInto) or not numbers:
        return Decoded()
    width, height = targets.block_px
    within = targets.within()[numbers].tolist()
    outs: list[RGBArray] = []
    for i, inside in zip(numbers, within, strict=True):
        if inside:
            x, y = targets.places[i].tolist()
            outs.append(targets.pixels[int(targets.tile[i]), y : y + height, x : x + width])
        else:
            outs.append(np.empty((height, width, 3), np.uint8))
    chosen: Sequence[IntPair] = [cells[i] for i in numbers]
    done = slide.decode_into(plane, chosen, [fetched[i] for i in numbers], outs)
    found = list(zip(numbers, outs, within, done, strict=True))
    return Decoded(
        {i for i, _, inside, good in found if good and inside},
        {i: out for i, out, inside, good in found if good and not inside},
    )
