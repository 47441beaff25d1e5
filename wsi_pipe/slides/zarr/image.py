"""One level of an OME-Zarr image: its chunks are the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.zarr.multiscales import Multiscale
from wsi_pipe.slides.zarr.store import GuardedStore, reading

__all__ = ["ZarrImage", "middle_plane"]

RUN_BYTES = 1 << 24
"""What neighbouring chunks are read in one call, decoded: zarr fetches them side by side."""


def middle_plane(count: int) -> int:
    """The plane that is taken where none is asked for: the middle one, the lower of two."""
    return (count - 1) // 2


class ZarrImage:
    """One level, in one focal plane.

    z: the plane, None for the middle one. planes: how many there are. Raises NotAPictureError where the array holds
    several time points, or no such plane, UnsupportedSlideError where its shape is not that of a picture.
    """

    origin_px: IntPair = (0, 0)
    reduces: tuple[int, ...] = (1,)

    def __init__(self, store: GuardedStore, array: Any, image: Multiscale, path: str, z: int | None) -> None:
        self._store, self._array, self._path = store, array, path
        self._name = store.name
        if array.ndim != len(image.axes):
            raise UnsupportedSlideError(
                f"{self._name}: the array {path} has {array.ndim} dimensions, the OME metadata name {len(image.axes)}"
            )
        length = dict(zip(image.axes, array.shape, strict=True))
        chunk = dict(zip(image.axes, array.chunks, strict=True))
        if length.get("t", 1) != 1:
            raise NotAPictureError(
                f"{self._name}: {length['t']} time points, where a slide has one", remedy="export one of them"
            )
        self.size_px = (int(length["x"]), int(length["y"]))
        self.block_px = (min(int(chunk["x"]), self.size_px[0]), min(int(chunk["y"]), self.size_px[1]))
        self.channels = int(length.get("c", 1))
        self.dtype = str(array.dtype)
        self.planes = int(length.get("z", 1))
        if min(*self.size_px, *self.block_px, self.planes, self.channels) < 1:
            raise UnsupportedSlideError(f"{self._name}: the array {path} is empty")
        if z is not None and z >= self.planes:
            raise NotAPictureError(
                f"{self._name}: --z {z} was asked for, but the level {path} has {self.planes} focal planes",
                remedy=f"give 0 to {self.planes - 1}",
            )
        self.z = middle_plane(self.planes) if z is None else z
        self._axes = image.axes
        fill = array.fill_value
        self._fill = 0 if fill is None else int(fill) & 255 if self.dtype == "uint8" else 0

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Pixels of each block, uint8 (h, w, 3) clipped to the image; None where a chunk is not stored.

        Zarr reads and decodes in one go. A chunk that is not stored and one of nothing but 0 are the same to its
        writers, which leave such out. Raises SlideReadError.
        """
        found: list[Any] = [None] * len(cells)
        for run in self._runs(cells):
            first, last = cells[run[0]], cells[run[-1]]
            with reading(self._name, f"level {self._path}, tile column {first[0]} to {last[0]}, row {first[1]}"):
                strip = self._read(first, len(run))
            for i, at in enumerate(run):
                pixels = strip[:, i * self.block_px[0] : (i + 1) * self.block_px[0]]
                found[at] = pixels if self._fill or pixels.any() else None
        return found

    def _runs(self, cells: Sequence[IntPair]) -> list[list[int]]:
        """Indices of neighbours in a row, a few megabytes of them at most."""
        most = max(RUN_BYTES // (self.block_px[0] * self.block_px[1] * 3), 1)
        runs: list[list[int]] = []
        for i, (column, row) in enumerate(cells):
            last = cells[runs[-1][-1]] if runs else None
            if last is not None and last == (column - 1, row) and len(runs[-1]) < most:
                runs[-1].append(i)
            else:
                runs.append([i])
        return runs

    def _read(self, cell: IntPair, count: int) -> RGBArray:
        x, y = cell[0] * self.block_px[0], cell[1] * self.block_px[1]
        spans = {
            "x": slice(x, min(x + count * self.block_px[0], self.size_px[0])),
            "y": slice(y, min(y + self.block_px[1], self.size_px[1])),
            "c": slice(0, 3), "z": slice(self.z, self.z + 1), "t": slice(0, 1),
        }  # fmt: skip
        pixels = np.asarray(self._array[tuple(spans[axis] for axis in self._axes)])
        order = [self._axes.index(axis) for axis in ("z", "t", "y", "x", "c") if axis in self._axes]
        pixels = pixels.transpose(order).reshape(
            pixels.shape[self._axes.index("y")], pixels.shape[self._axes.index("x")], 3
        )
        return np.ascontiguousarray(pixels, np.uint8)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        assert reduce == 1
        pixels: RGBArray = data
        return pixels

    def probe(self) -> None:
        """See ProbedImage.probe."""
        self.fetch([(0, 0)])
