"""The whole slide in one small picture, streamed block by block in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.cores import available_cores
from wsi_pipe.errors import MissingMppError, ResolutionError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE, Plane, RGBArray, Slide, paste
from wsi_pipe.slides.room import ReadsInto, Room

__all__ = ["Overview", "overview_scale", "read_overview", "read_thumbnail"]

BLOCKS_PER_JOB = 16
"""Blocks that are fetched at once and decoded by one thread."""

PIXELS_PER_JOB = 1 << 24
"""Upper limit to the pixels of a job, for files with large blocks: 48 MiB decoded."""

REDUCED_COST = {1: 1.0, 2: 0.5, 4: 0.35, 8: 0.3}
"""Cost of decoding a stored pixel at 1/1, 1/2, 1/4 and 1/8: most of it is entropy decoding, which reduction keeps."""

MAX_PRODUCT = 200_000
"""Multiplications in one matrix product, below the 262,144 from which OpenBLAS starts threads. Those fight with ours:
on a busy machine they cost twenty times the processor time of the product."""

PIXELS_PER_STRETCH = 1 << 21
"""Pixels that one thread decodes at once where boxes are whole: 6 MiB, and 24 more while means are taken."""

MAX_BOX = 64
"""Plane pixels to a side of the largest box whose sums are exact in float32."""

MAX_PIXELS = 48_000_000
"""Of a picture, which takes 12 bytes for each while it is made: 250 x 190 mm at 32 um/px, more than any glass slide."""

COARSEST_UM = 32.0
"""A picture that would be larger is made coarser, but not coarser than this: tissue would not be found on it."""

SCALE_EPSILON = 1e-9


@dataclass(frozen=True)
class Overview:
    """A picture of the whole slide.

    rgb: uint8 (H, W, 3); pixel (column c, row r) is the mean of level-0 x in [c, c + 1) * scale_l0[0], likewise y;
    beyond the slide's edge it is white. scale_l0: level-0 pixels per picture pixel, (x, y). um_per_px: (x, y).
    """

    rgb: RGBArray
    scale_l0: FloatPair
    um_per_px: FloatPair


EXACT_PX = 0.125
"""A level this near to level 0's size over its downsample was neither cropped nor squeezed to speak of."""


def read_overview(slide: Slide, mpp: float = 8.0, *, threads: int | None = None) -> Overview:
    """The whole slide at about ``mpp`` um/px, each pixel the mean over its area.

    The plane that costs least among those at least as fine is read once, block by block; memory is the picture (as
    float32) and a few blocks. The result does not depend on ``threads`` (default: the cores this process may use).

    A picture of more than MAX_PIXELS is made coarser, down to COARSEST_UM.

    Raises MissingMppError when the slide states no resolution, ResolutionError when it would be larger than any slide
    is, SlideReadError when it cannot be read.
    """
    slide_mpp = slide.pyramid.isotropic_mpp
    if slide_mpp is None:
        raise MissingMppError(
            f"{slide.info.path} states no resolution, so a picture at {mpp:g} um/px cannot be made",
            remedy="give it in micrometres per level-0 pixel: --slide-mpp X, or the column mpp of the slides CSV",
        )
    scale = _within_limit(slide, slide_mpp, mpp)
    rgb = _average(slide, scale, threads or available_cores())
    return Overview(rgb, scale, (scale[0] * slide_mpp[0], scale[1] * slide_mpp[1]))


def read_thumbnail(slide: Slide, max_px: int = 1024, *, threads: int | None = None) -> RGBArray:
    """The whole slide, uint8 (H, W, 3), its longer side ``max_px`` or that of level 0 where that is less.

    Streamed as ``read_overview`` does, and needs no resolution. Raises ValueError for a side below 1, SlideReadError.
    """
    if max_px < 1:
        raise ValueError(f"a thumbnail of {max_px} px shows nothing")
    width, height = slide.pyramid.size_l0
    wanted = max(max(width, height) / max_px, 1.0)
    scale = overview_scale(wanted)
    if scale > wanted:
        # At least as fine, so that it is shrunk and never blown up.
        scale = max(scale - (1 << max(math.floor(math.log2(wanted)) - 2, 0)), 1)
    rgb = _average(slide, (float(scale), float(scale)), threads or available_cores())
    size = (max(round(width / wanted), 1), max(round(height / wanted), 1))
    if (rgb.shape[1], rgb.shape[0]) == size:
        return rgb
    import cv2

    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _within_limit(slide: Slide, slide_mpp: FloatPair, mpp: float) -> FloatPair:
    """Level-0 pixels to a picture pixel, (x, y). Raises ResolutionError where none would do."""
    width, height = slide.pyramid.size_l0
    wanted = mpp
    while True:
        scale = (float(overview_scale(wanted / slide_mpp[0])), float(overview_scale(wanted / slide_mpp[1])))
        if math.ceil(width / scale[0]) * math.ceil(height / scale[1]) <= MAX_PIXELS:
            return scale
        if wanted >= COARSEST_UM:
            size_mm = (width * slide_mpp[0] / 1000, height * slide_mpp[1] / 1000)
            raise ResolutionError(
                f"{slide.info.path}: at {slide_mpp[0]:g} um/px its {width} x {height} px would be "
                f"{size_mm[0]:,.0f} x {size_mm[1]:,.0f} mm, larger than any slide",
                remedy="give the resolution of level 0 in um/px and not the magnification: --slide-mpp 0.5 for 20x",
            )
        wanted = min(wanted * math.sqrt(2), COARSEST_UM)


def overview_scale(wanted: float) -> int:
    """The whole number of level-0 pixels to a picture pixel, within 1/8 of ``wanted`` where that is above 4.

    It is a small multiple of a power of two, so that levels and codec-reduced planes come to whole boxes, and does
    not depend on which planes a reader has.
    """
    if wanted <= 1:
        return 1
    step: int = 1 << max(math.floor(math.log2(wanted)) - 2, 0)
    return step * round(wanted / step)


def cheapest_plane(slide: Slide, scale: FloatPair) -> Plane:
    """The plane that costs least to decode among those fine enough for ``scale``; the finest if none is.

    Fine enough is at least as fine, for a level whose size is level 0's over a whole number without a rest. Another
    may have been cropped or squeezed by up to a pixel of its own when it was written, no one knows which: it has to be
    twice as fine, so that two files of one slide give the same tissue.
    """
    size_l0 = slide.pyramid.size_l0

    def is_fine(plane: Plane) -> bool:
        level = slide.pyramid.levels[plane.level]
        rests = (abs(w / d - s) for w, d, s in zip(size_l0, level.downsample, level.size_px, strict=True))
        slack = 1.0 if max(rests) < EXACT_PX else 2.0
        return all(d * slack <= s * (1 + SCALE_EPSILON) for d, s in zip(plane.downsample, scale, strict=True))

    fine = [plane for plane in slide.planes if is_fine(plane)]

    def cost(plane: Plane) -> float:
        size = slide.pyramid.levels[plane.level].size_px
        return size[0] * size[1] * REDUCED_COST.get(plane.reduce, 1.0)

    # min() keeps the first of equals, and planes of one scale stand cheapest first.
    return min(fine, key=cost) if fine else slide.planes[0]


def _average(slide: Slide, scale: FloatPair, threads: int) -> RGBArray:
    plane = cheapest_plane(slide, scale)
    width, height = (math.ceil(size / s - SCALE_EPSILON) for size, s in zip(slide.pyramid.size_l0, scale, strict=True))
    factor = (scale[0] / plane.downsample[0], scale[1] / plane.downsample[1])
    whole = _whole_boxes(plane, factor)
    if whole is not None:
        return _box_means(slide, plane, whole, (width, height), threads)
    # Sums of what is darker than white: what no block covers stays white.
    darker = np.zeros((height, width, 3), np.float32)
    columns, rows = (
        [
            _axis_weights(
                plane.corner_px((n, n))[axis], plane.block_px[axis], plane.size_px[axis], factor[axis], out_px
            )
            for n in range(plane.blocks[axis])
        ]
        for axis, out_px in ((0, width), (1, height))
    )

    def reduce(cell: IntPair, block: RGBArray) -> NDArray[np.float32]:
        across, down = columns[cell[0]][1], rows[cell[1]][1]
        h, w = block.shape[:2]
        ink = (WHITE - block).astype(np.float32).reshape(h, w * 3)
        rows_done = _product(down[:, :h], ink).reshape(-1, w, 3)
        part = _product(across[:, :w], rows_done.transpose(1, 0, 2).reshape(w, -1))
        return part.reshape(len(across), len(down), 3).transpose(1, 0, 2)

    for cell, part in _mapped_blocks(slide, plane, reduce, threads):
        # Blocks are added in file order by this one thread, so rounding is the same on any number of threads.
        x, y = columns[cell[0]][0], rows[cell[1]][0]
        darker[y : y + part.shape[0], x : x + part.shape[1]] += part
    np.subtract(WHITE + 0.5, darker, out=darker)
    return np.clip(darker, 0, WHITE, out=darker).astype(np.uint8)


def _whole_boxes(plane: Plane, factor: FloatPair) -> int | None:
    """Plane pixels to a side of a picture pixel where all picture pixels are whole boxes within the plane's blocks, and
    their means come out exactly: a power of two. Else None."""
    side = round(factor[0])
    if factor[0] != side or factor[1] != side or side & (side - 1) or side > MAX_BOX:
        return None
    fits = all(n % side == 0 for n in (*plane.block_px, *plane.origin_px))
    return side if fits else None


def _box_means(slide: Slide, plane: Plane, side: int, size_px: IntPair, threads: int) -> RGBArray:
    """The picture of ``size_px`` (width, height) as means of boxes of ``side`` pixels, a stretch of blocks at a time.

    The same, bit for bit, as the sums of ``_average``, which are exact for such boxes. All blocks of a stretch come out
    of the file in one call where the slide can do that.
    """
    (columns, rows), (block_w, block_h) = plane.blocks, plane.block_px
    left, top = plane.origin_px
    out = np.empty((size_px[1], size_px[0], 3), np.uint8)
    step = max(PIXELS_PER_STRETCH // (block_w * block_h), 1)
    stretches = ((row, c, min(c + step, columns)) for row in range(rows) for c in range(0, columns, step))

    def put(row: int, begin: int, end: int) -> None:
        x, y = left + begin * block_w, top + row * block_h
        # What lies before the plane's corner is none of it.
        pixels = _means(_stretch(slide, plane, row, begin, end)[max(-y, 0) :, max(-x, 0) :], side)
        place = out[max(y, 0) // side :, max(x, 0) // side :][: len(pixels), : pixels.shape[1]]
        place[:] = pixels[: len(place), : place.shape[1]]

    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="overview") as pool:
        try:
            for stretch in stretches:
                pending.append(pool.submit(put, *stretch))
                if len(pending) > 2 * threads:
                    pending.popleft().result()
            for future in pending:
                future.result()
        finally:
            for future in pending:
                future.cancel()
    return out


def _stretch(slide: Slide, plane: Plane, row: int, begin: int, end: int) -> RGBArray:
    """Blocks of a row side by side, uint8 (h, w, 3), h and w of whole blocks; white where there is nothing."""
    block_w, block_h = plane.block_px
    pixels = np.full((1, block_h, (end - begin) * block_w, 3), WHITE, np.uint8)
    columns = np.arange(begin, end)
    done = np.zeros(len(columns), np.bool_)
    reader: object = slide
    if isinstance(reader, ReadsInto) and reader.reads_into(plane):
        cells = np.stack([columns, np.full(len(columns), row)], axis=1)
        room = Room.at(pixels, (columns - begin) * (3 * block_w), plane.block_px)
        done = reader.read_into(plane, cells, room).done
    rest = [(int(column), row) for column in columns[~done]]
    for cell, data in zip(rest, slide.fetch(plane, rest) if rest else [], strict=True):
        place = pixels[0][:, (cell[0] - begin) * block_w : (cell[0] - begin + 1) * block_w]
        place[:] = WHITE
        if data is None:
            slide.stats.add(missing=1)
        else:
            paste(place, slide.decode(plane, cell, data), 0, 0)
    stretch: RGBArray = pixels[0]
    return stretch


def _means(pixels: RGBArray, side: int) -> RGBArray:
    """Means of boxes of ``side`` pixels, a power of two, halves rounded up; the last are filled up with white."""
    import cv2

    if side == 1:
        return pixels
    height, width = -(-pixels.shape[0] // side), -(-pixels.shape[1] // side)
    whole = pixels
    if pixels.shape[:2] != (height * side, width * side):
        whole = np.full((height * side, width * side, 3), WHITE, np.uint8)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    if side == 2:
        # (a + b + c + d + 2) >> 2
        return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    # Sums of bytes over a power of two are exact in float32.
    means = cv2.resize(whole.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(np.floor(means.reshape(height, width, 3) + np.float32(0.5)), np.uint8)


def _product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """``left @ right`` in pieces of MAX_PRODUCT multiplications."""
    step = max(MAX_PRODUCT // left.size, 1)
    out = np.empty((len(left), right.shape[1]), np.float32)
    for start in range(0, right.shape[1], step):
        np.matmul(left, right[:, start : start + step], out=out[:, start : start + step])
    return out


def _axis_weights(start: int, block: int, plane_px: int, factor: float, out_px: int) -> tuple[int, NDArray[np.float32]]:
    """First picture pixel that a block touches along one axis, and float32 (picture pixels, block pixels) shares.

    start: the block's first plane pixel, below 0 where it begins before the plane; such pixels have no share.

    Each share is the part of the picture pixel that the block's pixel covers, so a picture pixel's shares sum to 1
    over all blocks that lie wholly on the slide.
    """
    stop = min(start + block, plane_px)
    first = min(max(math.floor(start / factor + SCALE_EPSILON), 0), out_px - 1)
    last = min(max(math.ceil(stop / factor - SCALE_EPSILON), first + 1), out_px)
    lower = np.maximum(np.arange(first, last)[:, None] * factor, np.arange(start, stop)[None, :])
    upper = np.minimum(np.arange(first + 1, last + 1)[:, None] * factor, np.arange(start + 1, stop + 1)[None, :])
    return first, (np.maximum(upper - lower, 0.0) / factor).astype(np.float32)


def _mapped_blocks(
    slide: Slide, plane: Plane, work: Callable[[IntPair, RGBArray], NDArray[np.float32]], threads: int
) -> Iterator[tuple[IntPair, NDArray[np.float32]]]:
    """``work`` on each block of a plane, row by row, in threads, a few jobs ahead; missing blocks are left out."""
    per_job = max(min(BLOCKS_PER_JOB, PIXELS_PER_JOB // (plane.block_px[0] * plane.block_px[1])), 1)
    cells = ((c, r) for r in range(plane.blocks[1]) for c in range(plane.blocks[0]))

    def job(chunk: list[IntPair]) -> list[tuple[IntPair, NDArray[np.float32]]]:
        done = []
        for cell, data in zip(chunk, slide.fetch(plane, chunk), strict=True):
            if data is None:
                slide.stats.add(missing=1)
            else:
                done.append((cell, work(cell, slide.decode(plane, cell, data))))
        return done

    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="overview") as pool:
        try:
            while True:
                while len(pending) < 2 * threads and (chunk := list(islice(cells, per_job))):
                    pending.append(pool.submit(job, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
