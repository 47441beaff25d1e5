"""A slide that lies in memory: for tests, for synthetic slides, and for whoever has pixels but no file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from wsi_pipe.geometry import FloatPair, IntPair, Pyramid
from wsi_pipe.slides.base import BaseSlide, Plane, RGBArray, SlideInfo
from wsi_pipe.slides.native import user_mpp

__all__ = ["ArraySlide"]


class ArraySlide(BaseSlide):
    """A pyramid of arrays.

    levels: uint8 (H, W, 3) each, finest first. mpp: micrometres per level-0 pixel, one value or (x, y). block_px:
    (width, height) of the blocks that the planes are cut into. missing: blocks (level, column, row) that are taken for
    not stored. Raises ValueError for no level, an array of another kind, or a level that is not smaller than the last.
    """

    def __init__(
        self,
        levels: Sequence[RGBArray],
        *,
        mpp: float | FloatPair | None = None,
        path: str = "memory",
        block_px: IntPair = (256, 256),
        missing: AbstractSet[tuple[int, int, int]] = frozenset(),
        associated: Mapping[str, RGBArray] | None = None,
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError("an array slide needs at least one level")
        for array in levels:
            if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
                raise ValueError(f"a level must be uint8 (H, W, 3) with pixels in it, not {array.dtype} {array.shape}")
        sizes = [(array.shape[1], array.shape[0]) for array in levels]
        for finer, coarser in itertools.pairwise(sizes):
            if coarser[0] > finer[0] or coarser[1] > finer[1] or coarser == finer:
                raise ValueError(f"levels must fall in size: {coarser} comes after {finer}")
        if min(block_px) < 1:
            raise ValueError(f"blocks of {block_px} px are empty")
        given = user_mpp(mpp)
        self._levels = tuple(levels)
        self._missing = frozenset(missing)
        self._associated = dict(associated or {})
        self.pyramid = Pyramid.from_sizes(sizes, given)
        self.planes = tuple(
            Plane(index, 1, level.downsample, level.size_px, block_px)
            for index, level in enumerate(self.pyramid.levels)
        )
        self.info = SlideInfo(
            path=path,
            vendor="array",
            reader="array",
            reader_reason="the pixels are in memory",
            fingerprint=_fingerprint(levels),
            mpp_source="none" if given is None else "user",
        )

    def fetch(self, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        """See Slide.fetch."""
        found: list[Any] = []
        for column, row in cells:
            if (plane.level, column, row) in self._missing:
                found.append(None)
                continue
            width, height = plane.block_px
            block = self._levels[plane.level][row * height : (row + 1) * height, column * width : (column + 1) * width]
            self.stats.add(bytes_fetched=block.nbytes, requests=1)
            found.append(block)
        return found

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        """See Slide.decode."""
        self.stats.add(decoded=1)
        pixels: RGBArray = data
        return pixels

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images."""
        return dict(self._associated)


def _fingerprint(levels: Sequence[RGBArray]) -> str:
    digest = hashlib.sha256()
    for array in levels:
        digest.update(f"{array.shape[1]}x{array.shape[0]};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
