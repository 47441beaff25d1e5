"""Blocks that go from the file into their places in one call: where they go, and who can do it.

With many reading threads it is Python's lock that bounds how many tiles come out, not the processor. A slide that reads
into a room gets numbers and addresses, and needs the lock again when all blocks are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import Plane, RGBArray

__all__ = ["ReadBlocks", "ReadsInto", "Room"]


@dataclass(frozen=True)
class Room:
    """Where decoded blocks go: addresses of their first rows and bytes from row to row, both int64 (n,).

    arrays: what the addresses lie in, so that it stays. Made by ``at``, ``stack`` and ``of`` alone, which see to it
    that every block lies in its array.
    """

    addresses: NDArray[np.int64]
    strides: NDArray[np.int64]
    size_px: IntPair
    arrays: tuple[RGBArray, ...]

    @classmethod
    def at(cls, tiles: RGBArray, offsets: NDArray[np.int64], size_px: IntPair) -> Self:
        """Blocks of ``size_px`` (width, height) in tiles.

        tiles: uint8 (B, H, W, 3), contiguous. offsets: int64 (n,), how many bytes into them the first pixel of each
        block goes; that it lies in one tile is the caller's care. Raises ValueError for a block beyond the array.
        """
        address, read_only = tiles.__array_interface__["data"]
        if (
            tiles.dtype != np.uint8
            or tiles.ndim != 4
            or tiles.shape[3] != 3
            or read_only
            or not tiles.flags.c_contiguous
        ):
            raise ValueError(f"blocks do not go into an array of {tiles.shape} {tiles.dtype}")
        per_row = tiles.strides[1]
        last = tiles.nbytes - (size_px[1] - 1) * per_row - 3 * size_px[0]
        if len(offsets) and (offsets.min() < 0 or offsets.max() > last):
            raise ValueError(f"blocks of {size_px} do not lie in tiles of {tiles.shape}")
        return cls(address + offsets, np.full(len(offsets), per_row, np.int64), size_px, (tiles,))

    @classmethod
    def of(cls, blocks: Sequence[RGBArray], size_px: IntPair) -> Self:
        """Blocks of their own: uint8 (height, width, 3), contiguous. Raises ValueError for others."""
        addresses = []
        for block in blocks:
            address, read_only = block.__array_interface__["data"]
            if block.shape != (size_px[1], size_px[0], 3) or block.dtype != np.uint8 or read_only:
                raise ValueError(f"a block of {size_px} does not go into an array of {block.shape} {block.dtype}")
            if not block.flags.c_contiguous:
                raise ValueError("a block's array must be contiguous")
            addresses.append(address)
        stride = np.full(len(addresses), size_px[0] * 3, np.int64)
        return cls(np.array(addresses, np.int64), stride, size_px, tuple(blocks))

    @classmethod
    def stack(cls, blocks: RGBArray) -> Self:
        """Blocks side by side: uint8 (n, height, width, 3), contiguous. Raises ValueError for others."""
        address, read_only = blocks.__array_interface__["data"]
        if blocks.dtype != np.uint8 or blocks.ndim != 4 or blocks.shape[3] != 3 or read_only:
            raise ValueError(f"blocks do not go into an array of {blocks.shape} {blocks.dtype}")
        if not blocks.flags.c_contiguous:
            raise ValueError("the blocks' array must be contiguous")
        count, height, width, _ = blocks.shape
        addresses = address + np.arange(count) * (3 * width * height)
        return cls(addresses, np.full(count, 3 * width, np.int64), (width, height), (blocks,))

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, rows: NDArray[np.int64]) -> Room:
        """Some of the blocks' places."""
        return Room(self.addresses[rows], self.strides[rows], self.size_px, self.arrays)

    def join(self, other: Room) -> Room:
        """The places of both, one after the other. Raises ValueError where blocks differ in size."""
        if other.size_px != self.size_px:
            raise ValueError(f"blocks of {self.size_px} and of {other.size_px}")
        addresses = np.concatenate([self.addresses, other.addresses])
        strides = np.concatenate([self.strides, other.strides])
        return Room(addresses, strides, self.size_px, self.arrays + other.arrays)


@dataclass(frozen=True)
class ReadBlocks:
    """What came of reading blocks into a room: which are done, bool (n,), and seconds of fetching, on the clock and of
    the processor."""

    done: NDArray[np.bool_]
    fetch_s: float = 0.0
    fetch_cpu_s: float = 0.0


@runtime_checkable
class ReadsInto(Protocol):
    """A slide that can fetch and decode many blocks in one call, all of it without Python's lock."""

    def reads_into(self, plane: Plane) -> bool:
        """Whether blocks of this plane can be had so."""

    def read_into(self, plane: Plane, cells: NDArray[np.int64], room: Room) -> ReadBlocks:
        """Fetch and decode blocks (column, row), int64 (n, 2), into ``room``; ``fetch`` and ``decode`` have the others.

        Blocks at the plane's edge, missing ones and all that is in any way unusual or damaged are not done, and what is
        in their places is undefined; nothing is raised.
        """
