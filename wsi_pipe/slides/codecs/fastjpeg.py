"""This package's own JPEG decoder, where it was built: whole batches of tiles in one call, without Python's lock.

``_jpeg.c`` decodes the common kind of tile (baseline, 8 bits, 4:4:4, 4:2:2, 4:2:0 or grey) to the very bytes that
libjpeg-turbo gives, and leaves whatever is unusual or damaged to it. Where no compiler was at hand on installation,
libjpeg-turbo does it all; WSI_PIPE_JPEG=libjpeg asks for that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.compiled import load_compiled
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.room import Room

__all__ = ["ReadTiles", "decode_tiles", "jpeg_decoder_name", "read_tiles", "reads_tiles"]

_ABI = 2
_UINT8 = np.dtype(np.uint8)
_VARIABLE = "WSI_PIPE_JPEG"


@dataclass(frozen=True)
class _Functions:
    """The C library's. read: None where files cannot be read that way."""

    decode: Any
    read: Any


@lru_cache(maxsize=1)
def _library() -> tuple[_Functions | None, str]:
    """The functions of the C library, or None, and one line on which decoder is in use and why."""
    if os.environ.get(_VARIABLE, "").strip().lower() == "libjpeg":
        return None, f"libjpeg-turbo, as {_VARIABLE} asks"
    if sys.byteorder != "little":
        return None, "libjpeg-turbo"
    library = load_compiled(__file__, "jpeg", _ABI)
    if library is not None:
        decode, read = library.wsi_jpeg_decode, getattr(library, "wsi_jpeg_read", None)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        decode.restype = None
        decode.argtypes = [
            number, pointer, pointer, pointer, pointer, pointer, ctypes.c_char_p, number, *[ctypes.c_int] * 7,
        ]  # fmt: skip
        if read is not None:
            read.restype = number
            read.argtypes = [ctypes.c_int, *decode.argtypes, pointer]
        return _Functions(decode, read), "this package's own decoder, and by libjpeg-turbo where that declines"
    return None, "libjpeg-turbo (this package's own decoder was not built)"


def jpeg_decoder_name() -> str:
    """Which JPEG decoder is in use, and why, for people."""
    return _library()[1]


def decode_tiles(
    datas: Sequence[bytes | memoryview],
    outs: Sequence[NDArray[np.uint8]],
    size_px: IntPair,
    components: int,
    *,
    ycbcr: bool,
    reduce: int,
    tables: bytes = b"",
    portable: bool = False,
) -> list[bool]:
    """Decode tiles of one image into arrays, and say which were; what is left of the others' arrays is undefined.

    datas: the streams. outs: uint8 (ceil(h / reduce), ceil(w / reduce), 3), or (..., components), pixels side by side
    and rows anywhere. size_px: (width, height) of each tile. ycbcr: whether three components are YCbCr even where the
    stream does not say so; RGB otherwise. tables: segments that belong at the start of each stream. portable: do
    without the processor's vector instructions, for tests.

    A tile that is not decoded may be perfect: nothing is said about why. Raises ValueError when an array does not fit.
    """
    functions, _ = _library()
    count = len(datas)
    if functions is None or not count:
        return [False] * count
    channels = outs[0].shape[2]
    shape = (-(-size_px[1] // reduce), -(-size_px[0] // reduce), channels)
    pixel = (channels, 1)
    if channels not in (components, 3):
        raise ValueError(f"arrays of {channels} channels for {components} components")
    # Every array's address costs its dict; all else here is kept out of numpy, since it happens under Python's lock,
    # which with many threads is what there is least of.
    addresses: list[int] = []
    strides: list[int] = []
    for out in outs:
        # The library writes wherever it is told to, so this is the last place to look.
        address, read_only = out.__array_interface__["data"]
        if out.shape != shape or (out.dtype is not _UINT8 and out.dtype != _UINT8) or read_only:
            raise ValueError(f"an array of {out.shape} {out.dtype} for a tile of {shape}")
        step = out.strides
        if step[1:] != pixel:
            raise ValueError(f"an array with strides {step} for {components} components")
        addresses.append(address)
        strides.append(step[0])
    # The arrays keep what the addresses point to. Nothing, as b"", has no address that would be asked for.
    views = [np.frombuffer(data or b"\0", _UINT8) for data in datas]
    sources = [view.__array_interface__["data"][0] for view in views]
    places = np.array([sources, [view.size for view in views], addresses, strides], np.int64)
    done = np.zeros(count, np.uint8)
    at = places.__array_interface__["data"][0]
    row = places.strides[0]
    functions.decode(
        count, at, at + row, at + 2 * row, at + 3 * row, done.__array_interface__["data"][0], tables, len(tables),
        *size_px, components, ycbcr, reduce, channels, portable,
    )  # fmt: skip
    return done.astype(bool).tolist()


@dataclass(frozen=True)
class ReadTiles:
    """What came of ``read_tiles``: which tiles are decoded, bool (n,), how often was read, and seconds of reading.

    read_s is time on the clock, read_cpu_s of the processor.
    """

    done: NDArray[np.bool_]
    requests: int = 0
    read_s: float = 0.0
    read_cpu_s: float = 0.0


def reads_tiles() -> bool:
    """Whether ``read_tiles`` can do anything here."""
    functions, _ = _library()
    return functions is not None and functions.read is not None


def read_tiles(
    descriptor: int,
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    room: Room,
    size_px: IntPair,
    components: int,
    *,
    ycbcr: bool,
    reduce: int,
    tables: bytes = b"",
) -> ReadTiles:
    """Read tiles of an image out of an open file and decode them into ``room``, in one call without Python's lock.

    offsets, sizes: int64 (n,), where their streams lie; those of size 0 are not there. The caller bounds the sizes. All
    else as for ``decode_tiles``: a tile that could not be read or decoded is not done, and nothing is said about why.
    Raises ValueError when the room is of another size or for another number of tiles.
    """
    functions, _ = _library()
    count = len(offsets)
    side = (-(-size_px[0] // reduce), -(-size_px[1] // reduce))
    if room.size_px != side or len(room) != count or len(sizes) != count:
        raise ValueError(f"room for {len(room)} blocks of {room.size_px} for {count} tiles of {side}")
    if functions is None or functions.read is None or not count:
        return ReadTiles(np.zeros(count, np.bool_))
    numbers = np.concatenate([offsets, sizes, room.addresses, room.strides], dtype=np.int64)
    done = np.zeros(count, np.uint8)
    spent = (ctypes.c_int64 * 2)()
    at, row = numbers.__array_interface__["data"][0], 8 * count
    requests = functions.read(
        descriptor, count, at, at + row, at + 2 * row, at + 3 * row, done.__array_interface__["data"][0], tables,
        len(tables), *size_px, components, ycbcr, reduce, 3, False, spent,
    )  # fmt: skip
    return ReadTiles(done.view(np.bool_), max(requests, 0), spent[0] / 1e9, spent[1] / 1e9)
