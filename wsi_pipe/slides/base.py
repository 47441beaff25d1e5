"""What every slide reader gives: a pyramid, facts about the file, and pixels in native blocks.

A *plane* is one way to get the whole slide at one scale: a level as stored, or a level that the codec decodes at
1/2, 1/4 or 1/8 (JPEG's DCT scaling, JPEG 2000's wavelet levels). A plane is cut into *blocks*, the native tiles of
the file where it has any. ``wsi_pipe.tiles`` plans by blocks, fetches and decodes each once, and knows no format.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, IntPair, Pyramid

__all__ = [
    "BaseSlide",
    "DecodesInto",
    "Held",
    "Plane",
    "ReadStats",
    "Slide",
    "SlideInfo",
    "blocks_of_region",
]

RGBArray = NDArray[np.uint8]

WHITE = 255
"""Off the slide, under transparency and where a native tile is missing, the picture is white."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One scale at which a reader gives the whole slide.

    level: index into the pyramid. reduce: the codec's reduction (1, 2, 4 or 8). downsample: level-0 pixels per plane
    pixel, (x, y). size_px: (width, height) of the plane. block_px: (width, height) of a block. origin_px: where block
    (0, 0) begins, at or before the plane's corner, so that blocks can be a file's tiles wherever those lie. Block
    (c, r) covers plane pixels from (origin x + c * width, origin y + r * height), clipped to the plane on the right and
    below; what it has to the left of the plane or above is white.
    """

    level: int
    reduce: int
    downsample: FloatPair
    size_px: IntPair
    block_px: IntPair
    origin_px: IntPair = (0, 0)

    @property
    def blocks(self) -> IntPair:
        """(columns, rows) of blocks."""
        (width, height), (x, y) = self.size_px, self.origin_px
        return (-(-(width - x) // self.block_px[0]), -(-(height - y) // self.block_px[1]))

    def corner_px(self, cell: IntPair) -> IntPair:
        """Plane pixel (x, y) at the top-left corner of a block."""
        return (
            self.origin_px[0] + cell[0] * self.block_px[0],
            self.origin_px[1] + cell[1] * self.block_px[1],
        )


@dataclass(frozen=True)
class SlideInfo:
    """Facts about an open slide.

    path: as given (a path or URL). vendor: "aperio", "hamamatsu", ..., "generic". reader: the reader's name;
    reader_reason: why this one, one line. mpp_source: where the resolution comes from, such as "user" or
    "aperio.MPP", "none" where it is not known. objective_power: the scan's nominal magnification, if stated.
    icc: the embedded colour profile, recorded and not applied. bounds_l0: (x, y, width, height) of the scanned part.
    fingerprint: SHA-256 over size, first and last MiB and level table; independent of path and time. scene, z: which
    scan and which focal plane were asked for, from 0. notes: what the user should know of how the file was understood,
    such as a level that was left out, one line each.
    """

    path: str
    vendor: str
    reader: str
    reader_reason: str
    fingerprint: str
    mpp_source: str = "none"
    objective_power: float | None = None
    icc: bytes | None = None
    bounds_l0: tuple[int, int, int, int] | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    scene: int | None = None
    z: int | None = None
    notes: tuple[str, ...] = ()


class ReadStats:
    """Counts of what a slide read, added up over threads: bytes fetched, requests, blocks decoded and missing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_fetched = 0
        self.requests = 0
        self.blocks_decoded = 0
        self.blocks_missing = 0

    def add(self, *, bytes_fetched: int = 0, requests: int = 0, decoded: int = 0, missing: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self.bytes_fetched += bytes_fetched
            self.requests += requests
            self.blocks_decoded += decoded
            self.blocks_missing += missing


@runtime_checkable
class Slide(Protocol):
    """An open slide. Every method may be called from several threads at once."""

    @property
    def info(self) -> SlideInfo:
        """Facts about the file."""

    @property
    def pyramid(self) -> Pyramid:
        """Levels and resolution."""

    @property
    def planes(self) -> tuple[Plane, ...]:
        """All planes, finest first; among planes of one scale the cheapest to read first."""

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""

    def fetch(self, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        """The raw data of blocks (column, row), in their order: opaque to the caller, None for a missing block.

        Input and output only, no decoding. Raises SlideReadError when the file ends or the network fails.
        """

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        """Pixels of one fetched block, uint8 (h, w, 3), clipped to the plane. Raises SlideReadError on bad data."""

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> RGBArray:
        """Pixels of a region, uint8 (height, width, 3); x, y, width and height in pixels of ``level``.

        What lies off the slide is white. Raises ValueError for a level that does not exist or a size below 1,
        SlideReadError when the data cannot be decoded.
        """

    def associated_images(self) -> Mapping[str, RGBArray]:
        """Label, macro, thumbnail and so on, uint8 (h, w, 3), as far as the file has them."""

    def close(self) -> None:
        """Release the file; closing twice is fine."""


@runtime_checkable
class DecodesInto(Protocol):
    """A slide that can decode many blocks at once into given places, which spares a copy and turns at Python's lock."""

    def decode_into(
        self, plane: Plane, cells: Sequence[IntPair], datas: Sequence[Any], outs: Sequence[RGBArray]
    ) -> list[bool]:
        """Decode fetched blocks into ``outs``, and say which were done; Slide.decode has the others, with its errors.

        datas: as ``fetch`` gave them, none of them None. outs: uint8 (h, w, 3) of a whole block, rows anywhere; where
        a block is not done, what is in them is undefined.
        """


class Held(Protocol):
    """A hold on something that others may remove once it is released, such as the mark on a cached copy."""

    def release(self) -> object:
        """Let go; releasing twice is fine."""


class BaseSlide:
    """What readers share: region reads made of blocks, counting, and the context manager.

    A subclass sets ``info``, ``pyramid`` and ``planes`` in its constructor and gives ``fetch`` and ``decode``.
    copy: the mark on the local copy that a slide behind a URL is read from; it stays in the cache until ``close``.
    """

    info: SlideInfo
    pyramid: Pyramid
    planes: tuple[Plane, ...]
    copy: Held | None = None

    def __init__(self) -> None:
        self.stats = ReadStats()

    def fetch(self, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        """See Slide.fetch; a reader whose decoder does its own reading keeps this one."""
        return list(cells)

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        """See Slide.decode."""
        raise TypeError(f"{type(self).__name__} must define decode")

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> RGBArray:
        """See Slide.read_region."""
        self.check_region(level, width, height)
        plane = next(p for p in self.planes if p.level == level and p.reduce == 1)
        out = np.full((height, width, 3), WHITE, np.uint8)
        cells = blocks_of_region(plane, x, y, width, height)
        for cell, data in zip(cells, self.fetch(plane, cells), strict=True):
            if data is None:
                self.stats.add(missing=1)
                continue
            block = self.decode(plane, cell, data)
            left, top = plane.corner_px(cell)
            paste(out, block, left - x, top - y)
        return out

    def check_region(self, level: int, width: int, height: int) -> None:
        """Raise ValueError for a level that does not exist or a size below 1."""
        if not 0 <= level < len(self.pyramid.levels):
            raise ValueError(
                f"level {level} does not exist: {self.info.path} has levels 0 to {len(self.pyramid.levels) - 1}"
            )
        if width < 1 or height < 1:
            raise ValueError(f"a region of {width} x {height} px is empty: width and height must be at least 1")

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images."""
        return {}

    def close(self) -> None:
        """See Slide.close; a subclass that closes more calls this one last."""
        if self.copy is not None:
            self.copy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def blocks_of_region(plane: Plane, x: int, y: int, width: int, height: int) -> list[IntPair]:
    """Blocks (column, row) of ``plane`` that a region in plane pixels touches, row by row; none off the plane."""
    block_w, block_h = plane.block_px
    columns, rows = plane.blocks
    x, y = x - plane.origin_px[0], y - plane.origin_px[1]
    first_column, last_column = max(x // block_w, 0), min((x + width - 1) // block_w, columns - 1)
    first_row, last_row = max(y // block_h, 0), min((y + height - 1) // block_h, rows - 1)
    return [(c, r) for r in range(first_row, last_row + 1) for c in range(first_column, last_column + 1)]


def paste(out: RGBArray, block: RGBArray, x: int, y: int) -> None:
    """Copy the part of ``block`` that lies inside ``out`` when its top-left corner is at (x, y) of ``out``."""
    height, width = block.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, out.shape[1]), min(y + height, out.shape[0])
    if x0 < x1 and y0 < y1:
        out[y0:y1, x0:x1] = block[y0 - y : y1 - y, x0 - x : x1 - x]
