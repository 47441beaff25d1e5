"""A colour image whose red, green and blue lie in three grey images, as bioformats2raw and raw2ometiff write H&E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import WHITE, RGBArray
from wsi_pipe.slides.native import NativeImage

__all__ = ["ColourPlanes"]


class ColourPlanes:
    """Three images of one size in equal blocks, red, green and blue, as one; see ProbedImage.

    Raises UnsupportedSlideError where they differ in size or blocks.
    """

    def __init__(self, name: str, planes: Sequence[NativeImage]) -> None:
        first = planes[0]
        for plane in planes[1:]:
            if (plane.size_px, plane.block_px, plane.origin_px) != (first.size_px, first.block_px, first.origin_px):
                raise UnsupportedSlideError(f"{name}: the red, green and blue planes differ in size or tiles")
        self._planes = tuple(planes)
        self.size_px = first.size_px
        self.block_px = first.block_px
        self.origin_px = first.origin_px
        self.reduces = tuple(r for r in first.reduces if all(r in plane.reduces for plane in planes))

    @property
    def codec(self) -> str:
        """The name of the compression."""
        return str(getattr(self._planes[0], "codec", "stored"))

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch; a block is missing where all three planes lack it."""
        found = zip(*(plane.fetch(cells) for plane in self._planes), strict=True)
        return [None if all(part is None for part in parts) else parts for parts in found]

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        stored = [
            None if part is None else plane.decode(cell, part, reduce)[..., 0]
            for plane, part in zip(self._planes, data, strict=True)
        ]
        shape = next(values.shape for values in stored if values is not None)
        out: RGBArray = np.empty((*shape, 3), np.uint8)
        for colour, values in enumerate(stored):
            out[..., colour] = WHITE if values is None else values
        return out

    def probe(self) -> None:
        """See ProbedImage.probe."""
        for plane in self._planes:
            if (probe := getattr(plane, "probe", None)) is not None:
                probe()
