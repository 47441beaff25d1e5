"""What pictures of every kind are as slides: the slide itself, a picture that is decoded whole, colours on white."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.native import NativeImage, NativeSlide, build_pyramid

__all__ = ["BLOCK_PX", "MAX_WHOLE_BYTES", "ImageSlide", "Unpadded", "WholeImage", "check_whole", "colours"]

BLOCK_PX = (1024, 1024)

MAX_WHOLE_BYTES = 1 << 32
"""What an image may take unpacked where it cannot be decoded in parts: about 37,800 px square."""

CONVERT = "convert it to a tiled TIFF first: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --Q 90"


class ImageSlide(NativeSlide):
    """A slide over a plain image or TIFF; see ``open_image``."""

    def __init__(
        self, info: SlideInfo, images: Sequence[NativeImage], mpp: FloatPair | None, close: Callable[[], None]
    ) -> None:
        super().__init__(info, build_pyramid(info.path, images, mpp), images)
        self._close = close
        self._closed = False

    def fetch(self, plane: Any, cells: Sequence[IntPair]) -> list[Any]:
        """See Slide.fetch."""
        if self._closed:
            raise SlideReadError(f"{self.info.path}: the slide is closed")
        return super().fetch(plane, cells)

    def close(self) -> None:
        """See Slide.close."""
        self._closed = True
        self._close()
        super().close()


class WholeImage:
    """An image that is decoded whole, once, when its first block is asked for; see NativeImage.

    ``load`` gives uint8 (h, w, 1 to 4), and raises CodecError.
    """

    reduces: tuple[int, ...] = (1,)
    block_px: IntPair = BLOCK_PX
    origin_px: IntPair = (0, 0)

    def __init__(self, size_px: IntPair, load: Callable[[], RGBArray]) -> None:
        self.size_px = size_px
        self._load: Callable[[], RGBArray] = load
        self._lock = threading.Lock()
        self._pixels: RGBArray | None = None

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch."""
        return list(cells)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._load()
                if self._pixels.shape[:2] != (self.size_px[1], self.size_px[0]):
                    raise CodecError(f"the image is of another size than stated: {self._pixels.shape}")
        x, y = cell[0] * self.block_px[0], cell[1] * self.block_px[1]
        return colours(self._pixels[y : y + self.block_px[1], x : x + self.block_px[0]])


class Unpadded:
    """An image without what it is padded with on the right and below; see NativeImage."""

    def __init__(self, image: NativeImage, size_px: IntPair) -> None:
        self.image = image
        self.size_px = size_px
        self.block_px, self.origin_px, self.reduces = image.block_px, image.origin_px, image.reduces

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch."""
        return self.image.fetch(cells)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        return self.image.decode(cell, data, reduce)


def check_whole(name: str, size_px: IntPair, channels: int) -> None:
    """Raise UnsupportedSlideError where an image is too large to be unpacked."""
    size = size_px[0] * size_px[1] * channels
    if size > MAX_WHOLE_BYTES:
        raise UnsupportedSlideError(
            f"{name}: {size_px[0]} x {size_px[1]} px take {size / 2**30:.1f} GiB unpacked, and the format has no tiles",
            remedy=CONVERT,
        )


def colours(pixels: NDArray[np.uint8]) -> RGBArray:
    """Grey, grey with alpha, RGB or RGBA, uint8 (h, w, 1 to 4), as RGB on white (h, w, 3)."""
    from wsi_pipe.slides.openslide import flatten

    channels = pixels.shape[2]
    if channels not in (1, 2, 3, 4):
        raise CodecError(f"{channels} channels are not grey or RGB")
    if channels <= 2:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    return flatten(pixels) if pixels.shape[2] == 4 else np.ascontiguousarray(pixels)
