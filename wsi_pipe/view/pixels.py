"""What the browser shows of a slide: square pictures of a pyramid by powers of two, and single tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair, TileGrid
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import read_tiles

__all__ = ["VIEW_PX", "DeepZoom", "jpeg", "tile_pixels"]

VIEW_PX = 512
"""Side of a picture. Larger ones are fewer requests, and decode fewer blocks of the file twice."""

QUALITY = 85


def jpeg(pixels: NDArray[np.uint8], quality: int = QUALITY) -> bytes:
    """A JPEG of uint8 (H, W, 3)."""
    done, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "uint8 RGB can be encoded"
    return encoded.tobytes()


@dataclass(frozen=True)
class DeepZoom:
    """The pyramid of pictures of a slide of ``size_l0`` (width, height) level-0 pixels.

    Level ``max_level`` is level 0 of the slide, each level below it half as large, down to one pixel, as Deep Zoom has
    it. A picture covers ``VIEW_PX`` squared pixels of its level, less at the right and lower edges.
    """

    size_l0: IntPair

    @property
    def max_level(self) -> int:
        """The level of full resolution."""
        return math.ceil(math.log2(max(max(self.size_l0), 1)))

    def size_px(self, level: int) -> IntPair:
        """(width, height) of a level in its own pixels."""
        scale = 2 ** (self.max_level - level)
        return (math.ceil(self.size_l0[0] / scale), math.ceil(self.size_l0[1] / scale))

    def holds(self, level: int, column: int, row: int) -> bool:
        """Whether there is such a picture."""
        if not 0 <= level <= self.max_level:
            return False
        width, height = self.size_px(level)
        return 0 <= column * VIEW_PX < width and 0 <= row * VIEW_PX < height

    def read(self, slide: Slide, level: int, column: int, row: int) -> NDArray[np.uint8]:
        """Pixels of a picture, uint8 (h, w, 3): those that a grid of such tiles would get.

        Raises ValueError where there is no such picture, SlideReadError where the file cannot be read.
        """
        if not self.holds(level, column, row):
            raise ValueError(f"no picture {column}, {row} at level {level}")
        scale = 2 ** (self.max_level - level)
        corner = np.array([[column * VIEW_PX * scale, row * VIEW_PX * scale]], np.float64)
        width, height = self.size_px(level)
        width, height = min(width - column * VIEW_PX, VIEW_PX), min(height - row * VIEW_PX, VIEW_PX)
        # No larger than what lies on the slide: of a coarse level that is a small part of a picture's ground.
        side = max(width, height)
        pixels: NDArray[np.uint8] = read_tiles(slide, corner, float(side * scale), side, threads=1)[0]
        return pixels[:height, :width]


def tile_pixels(slide: Slide, grid: TileGrid, row: int) -> NDArray[np.uint8]:
    """The pixels of one tile, uint8 (S, S, 3), as an encoder gets them. Raises SlideReadError."""
    corner = grid.corners_l0[row : row + 1]
    tile: NDArray[np.uint8] = read_tiles(slide, corner, grid.tile_size_l0, grid.spec.size_px, threads=1)[0]
    return tile
