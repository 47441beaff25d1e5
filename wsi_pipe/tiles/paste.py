"""Decoded blocks into the tiles that they touch: a whole group in one call without Python's lock, where that was built.

With many reading threads it is that lock that bounds how many tiles come out, and a tile that does not lie on the
slide's own blocks is put together from about nine of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.compiled import load_compiled
from wsi_pipe.slides.base import WHITE, RGBArray, paste

__all__ = ["Held", "hold", "paste_blocks"]

_ABI = 1


class Held(NamedTuple):
    """A block that is kept until its tiles are made. pixels: uint8 (h, w, 3), contiguous; None for a missing block.

    where: address of the first pixel (0 where it is missing), width, height.
    """

    pixels: RGBArray | None
    where: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """What its pixels take."""
        return 3 * self.where[1] * self.where[2] if self.pixels is not None else 0


def hold(block: RGBArray | None, block_px: tuple[int, int]) -> Held:
    """Make a block ready for pasting. block_px: (width, height) that a missing one is white over."""
    if block is None:
        return Held(None, (0, *block_px))
    if block.dtype != np.uint8 or block.ndim != 3 or block.shape[2] != 3:
        raise ValueError(f"a block of {block.shape} {block.dtype} is not RGB")
    pixels = np.ascontiguousarray(block)
    return Held(pixels, (pixels.__array_interface__["data"][0], pixels.shape[1], pixels.shape[0]))


@lru_cache(maxsize=1)
def _function() -> Any:
    """The C library's, or None where it was not built."""
    library = load_compiled(__file__, "paste", _ABI)
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.wsi_paste.restype = ctypes.c_int
    library.wsi_paste.argtypes = [number, pointer, pointer, pointer, pointer, number, number, number]
    return library.wsi_paste


def paste_blocks(
    blocks: Sequence[Held], places: NDArray[np.int64], tiles: RGBArray, numbers: NDArray[np.int64]
) -> None:
    """Copy what each block has of its tile; white where the block is missing.

    places: int64 (n, 2), where the block's corner (x, y) lies in its tile, inside or not. tiles: uint8 (B, H, W, 3),
    contiguous. numbers: int64 (n,), the tile of each block. Raises ValueError for arrays of another kind.
    """
    count = len(blocks)
    address, read_only = tiles.__array_interface__["data"]
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3 or read_only or not tiles.flags.c_contiguous:
        raise ValueError(f"blocks do not go into an array of {tiles.shape} {tiles.dtype}")
    if places.shape != (count, 2) or numbers.shape != (count,):
        raise ValueError(f"{places.shape} places and {numbers.shape} tiles for {count} blocks")
    if not count:
        return
    function = _function()
    if function is None:
        for block, (left, top), number in zip(blocks, places.tolist(), numbers.tolist(), strict=True):
            if not 0 <= number < len(tiles):
                raise ValueError(f"there is no tile {number} of {len(tiles)}")
            width, height = block.where[1:]
            pixels = np.full((height, width, 3), WHITE, np.uint8) if block.pixels is None else block.pixels
            paste(tiles[number], pixels, left, top)
        return
    where = np.array([block.where for block in blocks], np.int64)
    places, numbers = np.ascontiguousarray(places, np.int64), np.ascontiguousarray(numbers, np.int64)
    found = function(
        count, _address(where), _address(places), _address(numbers), address, len(tiles), tiles.shape[2], tiles.shape[1]
    )
    if found:
        raise ValueError(f"there are no tiles {numbers.min()} to {numbers.max()} of {len(tiles)}")


def _address(array: NDArray[np.int64]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
