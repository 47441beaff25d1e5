"""A slide made of images in native tiles: the planes they give, clipping, white borders, and errors with a place.

TIFF, NDPI and DICOM differ in where a tile lies and how it decodes; all else is here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import MPP_BOUNDS, FloatPair, IntPair, Pyramid, in_mpp_bounds
from wsi_pipe.slides.base import WHITE, BaseSlide, Plane, ReadStats, RGBArray, SlideInfo, paste
from wsi_pipe.slides.codecs.decode import CodecError, reduce_by_mean
from wsi_pipe.slides.codecs.fastjpeg import ReadTiles
from wsi_pipe.slides.room import ReadBlocks, Room

__all__ = ["NativeImage", "NativeSlide", "ProbedImage", "build_pyramid", "only_picture", "read_whole", "user_mpp"]

MAX_SIDE_PX = 1 << 24
MAX_BLOCK_BYTES = 1 << 28
"""What one block may take decoded, of any format."""

MAX_TILE_BYTES = 1 << 26
"""What a tile of a scanner's file may take decoded: 4,700 px a side; the largest seen have 4,096."""

MAX_WHOLE_PX = 1 << 26
"""Pixels of an associated image; the largest macro images seen have a twentieth of that."""

MAX_ANISOTROPY = 0.02
"""Relative difference of a level's downsamples in x and y beyond which it is taken for another picture."""


class NativeImage(Protocol):
    """One image of a file, in blocks.

    size_px: (width, height). block_px: (width, height) of a block. origin_px: where block (0, 0) begins, see Plane.
    reduces: the codec's reductions, 1 first; they divide the origin.
    """

    size_px: IntPair
    block_px: IntPair
    origin_px: IntPair
    reduces: tuple[int, ...]

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Raw data of blocks (column, row); None for a missing one. Raises SlideReadError."""

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """Pixels of a block, uint8 (h, w, 3): the whole block, or at least what lies in the image. Raises CodecError.

        Each side is the block's over ``reduce``, rounded up.
        """


@runtime_checkable
class BatchImage(Protocol):
    """An image that can decode many blocks at once."""

    def decode_into(self, datas: Sequence[Any], outs: Sequence[RGBArray], reduce: int) -> list[bool]:
        """Decode whole blocks into ``outs``, and say which were done; ``decode`` has the others, with its errors."""


@runtime_checkable
class RoomImage(Protocol):
    """An image that can fetch and decode many blocks in one call."""

    def reads_into(self) -> bool:
        """Whether it can, as it is stored and where it lies."""

    def read_into(self, cells: NDArray[np.int64], room: Room, reduce: int) -> ReadTiles:
        """Fetch and decode whole blocks (column, row), int64 (n, 2), into ``room``; see ``fastjpeg.read_tiles``."""


class ProbedImage(NativeImage, Protocol):
    """An image whose structure this package read by itself, and proves on opening."""

    def probe(self) -> None:
        """Decode one block, so that a misunderstanding shows on opening and not in the middle of a run.

        Raises UnsupportedSlideError when it does not decode, SlideOpenError or SlideReadError when the file lacks it.
        """


class NativeSlide(BaseSlide):
    """A slide over native images, one a level, finest first."""

    def __init__(
        self, info: SlideInfo, pyramid: Pyramid, images: Sequence[NativeImage], stats: ReadStats | None = None
    ) -> None:
        super().__init__()
        self.info = info
        self.pyramid = pyramid
        self.images = tuple(images)
        if stats is not None:
            self.stats = stats
        planes = [
            _plane(level, image, reduce, self.pyramid.levels[level].downsample)
            for level, image in enumerate(self.images)
            for reduce in image.reduces
            if reduce == 1 or (image.block_px[0] % reduce == 0 and image.block_px[1] % reduce == 0)
        ]
        self.planes = tuple(sorted(planes, key=lambda p: (p.downsample[0] * p.downsample[1], p.reduce)))
        # Asked once: whether an object keeps to a protocol takes as long to find out as reading a tile's place.
        self._rooms = [image if isinstance(image, RoomImage) else None for image in self.images]

    def fetch(self, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        """See Slide.fetch."""
        return self.images[plane.level].fetch(cells)

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        """See Slide.decode."""
        image, reduce = self.images[plane.level], plane.reduce
        block_w, block_h = image.block_px
        width = min(block_w, image.size_px[0] - image.origin_px[0] - cell[0] * block_w)
        height = min(block_h, image.size_px[1] - image.origin_px[1] - cell[1] * block_h)
        try:
            if reduce == 1 or (width == block_w and height == block_h):
                pixels = image.decode(cell, data, reduce)
                out_w, out_h = -(-width // reduce), -(-height // reduce)
                if pixels.shape[0] < out_h or pixels.shape[1] < out_w:
                    raise CodecError(f"{pixels.shape[1]} x {pixels.shape[0]} px were stored, {out_w} x {out_h} needed")
                pixels = pixels[:out_h, :out_w]
            else:
                # The encoder filled the rest of an edge tile with anything; a codec's reduction would mix that in.
                pixels = reduce_by_mean(image.decode(cell, data, 1)[:height, :width], reduce, WHITE)
        except CodecError as error:
            raise SlideReadError(
                f"{self.info.path}: level {plane.level}, tile column {cell[0]}, row {cell[1]}: {error}",
                remedy="the file is damaged: copy it again, or leave the slide out",
            ) from error
        except MemoryError as error:
            raise SlideReadError(
                f"{self.info.path}: level {plane.level}, tile column {cell[0]}, row {cell[1]}: out of memory"
            ) from error
        self.stats.add(decoded=1)
        return pixels

    def decode_into(
        self, plane: Plane, cells: Sequence[IntPair], datas: Sequence[Any], outs: Sequence[RGBArray]
    ) -> list[bool]:
        """See DecodesInto.decode_into."""
        image = self.images[plane.level]
        if not isinstance(image, BatchImage):
            return [False] * len(cells)
        # Blocks at the edge are clipped, and reduced in a way of their own.
        columns, rows = image.size_px[0] // image.block_px[0], image.size_px[1] // image.block_px[1]
        whole = [i for i, (column, row) in enumerate(cells) if column < columns and row < rows]
        found = image.decode_into([datas[i] for i in whole], [outs[i] for i in whole], plane.reduce)
        done = [False] * len(cells)
        for i, good in zip(whole, found, strict=True):
            done[i] = good
        self.stats.add(decoded=sum(found))
        return done

    def reads_into(self, plane: Plane) -> bool:
        """See ReadsInto.reads_into."""
        image = self._rooms[plane.level]
        return image is not None and image.reads_into()

    def read_into(self, plane: Plane, cells: NDArray[np.int64], room: Room) -> ReadBlocks:
        """See ReadsInto.read_into."""
        image, native = self._rooms[plane.level], self.images[plane.level]
        assert image is not None
        # Blocks at the edge are clipped, and reduced in a way of their own.
        columns, rows = native.size_px[0] // native.block_px[0], native.size_px[1] // native.block_px[1]
        column, row = cells.T
        if not len(cells) or (column.max() < columns and row.max() < rows):
            found = image.read_into(cells, room, plane.reduce)
            done = found.done
        else:
            inside = np.flatnonzero((column < columns) & (row < rows))
            found = image.read_into(cells[inside], room.take(inside), plane.reduce)
            done = np.zeros(len(cells), np.bool_)
            done[inside] = found.done
        self.stats.add(decoded=int(np.count_nonzero(done)))
        return ReadBlocks(done, found.read_s, found.read_cpu_s)


def _plane(level: int, image: NativeImage, reduce: int, downsample: FloatPair) -> Plane:
    width, height = image.size_px
    return Plane(
        level=level,
        reduce=reduce,
        downsample=(downsample[0] * reduce, downsample[1] * reduce),
        size_px=(-(-width // reduce), -(-height // reduce)),
        block_px=(image.block_px[0] // reduce, image.block_px[1] // reduce),
        origin_px=(image.origin_px[0] // reduce, image.origin_px[1] // reduce),
    )


def build_pyramid(name: str, images: Sequence[NativeImage], mpp: FloatPair | None) -> Pyramid:
    """The pyramid of images, finest first.

    Raises UnsupportedSlideError when a size is out of bounds, or the images are not one picture at falling sizes.
    """
    for image in images:
        (width, height), (block_w, block_h) = image.size_px, image.block_px
        if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX):
            raise UnsupportedSlideError(f"{name}: an image of {width} x {height} px is out of bounds")
        if block_w < 1 or block_h < 1 or block_w * block_h * 3 > MAX_BLOCK_BYTES:
            raise UnsupportedSlideError(f"{name}: tiles of {block_w} x {block_h} px are out of bounds")
    sizes = [image.size_px for image in images]
    for finer, coarser in itertools.pairwise(sizes):
        if coarser[0] >= finer[0] or coarser[1] > finer[1]:
            raise UnsupportedSlideError(f"{name}: levels of {finer} and {coarser} px do not form a pyramid")
    for width, height in sizes[1:]:
        x, y = sizes[0][0] / width, sizes[0][1] / height
        # A small level is rounded to whole pixels, by up to one each way.
        slack = MAX_ANISOTROPY + 1 / width + 1 / height
        if abs(x - y) > slack * max(x, y):
            raise UnsupportedSlideError(
                f"{name}: a level of {width} x {height} px has another shape than level 0 of "
                f"{sizes[0][0]} x {sizes[0][1]} px"
            )
    return Pyramid.from_sizes(sizes, mpp)


def read_whole(image: NativeImage) -> RGBArray:
    """A whole small image, such as a label, uint8 (h, w, 3). Raises CodecError, SlideReadError."""
    width, height = image.size_px
    block_w, block_h = image.block_px
    if width * height > MAX_WHOLE_PX:
        raise CodecError(f"{width} x {height} px are too many for an associated image")
    out = np.full((height, width, 3), WHITE, np.uint8)
    cells = [(c, r) for r in range(-(-height // block_h)) for c in range(-(-width // block_w))]
    for cell, data in zip(cells, image.fetch(cells), strict=True):
        if data is not None:
            paste(out, image.decode(cell, data, 1), cell[0] * block_w, cell[1] * block_h)
    return out


def user_mpp(mpp: float | FloatPair | None) -> FloatPair | None:
    """A resolution given by the user as (x, y). Raises ValueError where no microscope has it."""
    if mpp is None:
        return None
    pair = (float(mpp[0]), float(mpp[1])) if isinstance(mpp, tuple) else (float(mpp), float(mpp))
    if not all(np.isfinite(value) and value > 0 for value in pair):
        raise ValueError(f"mpp {mpp} must be above zero")
    if not in_mpp_bounds(*pair):
        low, high = MPP_BOUNDS
        raise ValueError(f"mpp {mpp} is outside {low:g} to {high:g} um per level-0 pixel")
    return pair


def only_picture(name: str, scene: int | None, z: int | None, *, what: str = "the file holds one picture") -> None:
    """Raise NotAPictureError where another scan or focal plane than the first is asked for.

    For readers, and for files, that have no such thing; ``what`` says which it is.
    """
    asked = [f"--{option} {n}" for option, n in (("scene", scene), ("z", z)) if n not in (None, 0)]
    if asked:
        raise NotAPictureError(f"{name}: {' '.join(asked)} was asked for, but {what}", remedy="leave the option out")


def to_rgb(pixels: NDArray[np.uint8]) -> RGBArray:
    """Grey (h, w, 1) as RGB; RGB as it is."""
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
