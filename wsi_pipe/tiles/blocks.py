"""Many blocks of a job at once: out of the file, decoded, and into their tiles where that needs no copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import DecodesInto, Plane, RGBArray, Slide
from wsi_pipe.slides.room import ReadsInto, Room
from wsi_pipe.tiles.paste import Held, hold
from wsi_pipe.tiles.timing import Stopwatch

__all__ = ["Decoded", "Targets", "decode_at_once", "read_at_once"]


@dataclass(frozen=True)
class Targets:
    """Where the blocks of a job belong.

    pixels: uint8 (B, S, S, 3), tiles that are being made. offsets: int64 (n,), how many bytes into them the first pixel
    of each block goes, where the block, as it is decoded, is part of one tile and of no other; -1 where not. later:
    bool (n,), whether other jobs' tiles need the block too. block_px: (width, height) of a block.
    """

    pixels: RGBArray
    offsets: NDArray[np.int64]
    later: NDArray[np.bool_]
    block_px: IntPair


@dataclass
class Decoded:
    """Blocks that are decoded, by number in their job: in their tiles already, or on their own."""

    in_place: set[int] = field(default_factory=set)
    alone: dict[int, Held] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number in self.in_place or number in self.alone


def read_at_once(
    slide: ReadsInto, plane: Plane, cells: NDArray[np.int64], targets: Targets, clock: Stopwatch
) -> Decoded:
    """Fetch and decode blocks (column, row), int64 (n, 2), in one call without Python's lock, as many as that does."""
    if not len(cells):
        return Decoded()
    inside = np.flatnonzero(targets.offsets >= 0)
    outside: NDArray[np.int64] = np.zeros(0, np.int64)
    alone: list[RGBArray] = []
    if len(inside) == len(cells):
        room = Room.at(targets.pixels, targets.offsets, targets.block_px)
    else:
        room, outside, alone = _room_beside(targets)
        room = Room.at(targets.pixels, targets.offsets[inside], targets.block_px).join(room)
        cells = cells[np.concatenate([inside, outside])]
    found = slide.read_into(plane, cells, room)
    clock.lap_decode(found.fetch_s, found.fetch_cpu_s)
    count = len(inside)
    in_place = inside if found.done.all() else inside[found.done[:count]]
    where = zip(room.addresses[count:].tolist(), repeat(targets.block_px[0]), repeat(targets.block_px[1]))
    own = zip(outside.tolist(), map(Held, alone, where), found.done[count:].tolist(), strict=True)
    return Decoded(set(in_place.tolist()), {i: block for i, block, done in own if done})


def _room_beside(targets: Targets) -> tuple[Room, NDArray[np.int64], list[RGBArray]]:
    """Room for blocks that do not go straight into tiles, their numbers, and the arrays."""
    width, height = targets.block_px
    beside = targets.offsets < 0
    later = np.flatnonzero(beside & targets.later)
    # What no other job needs goes all at once, when the job's tiles are made, and so may lie in one array.
    together = np.flatnonzero(beside & ~targets.later)
    stack = np.empty((len(together), height, width, 3), np.uint8)
    single = [np.empty((height, width, 3), np.uint8) for _ in range(len(later))]
    room = Room.stack(stack).join(Room.of(single, targets.block_px))
    return room, np.concatenate([together, later]), [*stack, *single]


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
    per_tile, per_row = targets.pixels.strides[:2]
    offsets = targets.offsets[numbers].tolist()
    outs: list[RGBArray] = []
    for offset in offsets:
        if offset >= 0:
            tile, rest = divmod(offset, per_tile)
            y, x = rest // per_row, rest % per_row // 3
            outs.append(targets.pixels[tile, y : y + height, x : x + width])
        else:
            outs.append(np.empty((height, width, 3), np.uint8))
    chosen: Sequence[IntPair] = [cells[i] for i in numbers]
    done = slide.decode_into(plane, chosen, [fetched[i] for i in numbers], outs)
    found = list(zip(numbers, outs, offsets, done, strict=True))
    return Decoded(
        {i for i, _, offset, good in found if good and offset >= 0},
        {i: hold(out, targets.block_px) for i, out, offset, good in found if good and offset < 0},
    )
