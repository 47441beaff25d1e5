"""TIFFs that neither the fast reader nor OpenSlide takes, through tifffile: by tile, by strip, or decoded whole.

tifffile finds the segments and undoes compression, prediction and byte order; the file is read here, by position, so
that threads share it. Sixteen-bit pictures are refused: what microscopes call white in them is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.metadata import resolution_tags_mpp
from wsi_pipe.slides.native import NativeImage
from wsi_pipe.slides.plain.image import ImageSlide, Unpadded, WholeImage, check_whole, colours
from wsi_pipe.slides.storage.source import FileSource, slide_fingerprint
from wsi_pipe.slides.tiff.ifd import Directory, read_directories
from wsi_pipe.slides.tiff.levels import with_levels
from wsi_pipe.slides.tiff.likeness import bright_planes, is_alike
from wsi_pipe.slides.tiff.meaning import meaning_of_tiff
from wsi_pipe.slides.tiff.picture import Chosen, Frame
from wsi_pipe.slides.tiff.planes import ColourPlanes
from wsi_pipe.slides.tiff.samples import check_samples, colour_samples

__all__ = ["open_image_tiff"]

# tifffile logs what it makes do with; what it cannot make do with it raises.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MAX_SEGMENT_BYTES = 1 << 24
"""A strip or tile that unpacks to more is not read in parts."""

BLOCK_BYTES = 1 << 20
"""Strips are joined to blocks of about this size."""

MAX_LOOK_PX = 1 << 26
"""Pixels up to which an image that has to be unpacked whole is looked at when levels are told from other pictures."""

_UNCOMPRESSED, _JPEG = 1, 7
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_IMAGEJ_UM = {"micron": 1.0, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


def open_image_tiff(
    source: FileSource, mpp: FloatPair | None, scene: int | None = None, z: int | None = None
) -> ImageSlide:
    """Open a TIFF; ``source`` is closed with the slide. Raises as ``open_image`` does."""
    import tifffile

    meaning = meaning_of_tiff(source, read_directories(source), scene, z)
    chosen = meaning.chosen
    if chosen is None:
        raise UnsupportedSlideError(f"{source.name}: a {meaning.kind} slide is no plain TIFF")
    try:
        with tifffile.TiffFile(source.name) as tiff:
            images, notes = _images(source, tiff, chosen)
            page = _page(tiff, chosen.main.first)
            stated, mpp_source = _stated_mpp(tiff, page, chosen)
            vendor, words = ("ome", "OME-TIFF") if chosen.ome else ("generic-tiff", "TIFF")
            compression = tifffile.COMPRESSION(page.compression).name.replace("_", " ")
            profile = page.tags.get(34675)
    except (UnsupportedSlideError, SlideOpenError, SlideReadError):
        raise
    except Exception as error:  # tifffile meets damaged files with errors of every kind
        raise SlideOpenError(
            f"{source.name}: the TIFF structure is damaged: {type(error).__name__}: {error}",
            remedy="the file is truncated or damaged: copy it again",
        ) from error
    info = SlideInfo(
        path=source.name,
        vendor=vendor,
        reader="image",
        reader_reason=f"{words} with compression {compression}, in {_form(images[0])}",
        fingerprint=slide_fingerprint([source], [image.size_px for image in images]),
        mpp_source="user" if mpp is not None else mpp_source,
        icc=bytes(profile.value) if profile is not None and isinstance(profile.value, bytes) else None,
        notes=(*meaning.notes, *notes),
    )
    return ImageSlide(info, images, stated if mpp is None else mpp, source.close)


def _form(image: NativeImage) -> str:
    if isinstance(image, WholeImage):
        return "one piece"
    if isinstance(image, Unpadded):
        return _form(image.image)
    if isinstance(image, ColourPlanes):
        return "separate planes"
    assert isinstance(image, SegmentImage)
    return "tiles" if image.is_tiled else "strips"


def _page(tiff: Any, directory: Directory) -> Any:
    """tifffile's page of a directory; "3.1" is the second sub-image of the fourth."""
    first, _, sub = directory.index.partition(".")
    page = tiff.pages[int(first)]
    return page.aspage().pages[int(sub)].aspage() if sub else page.aspage()


def _images(source: FileSource, tiff: Any, chosen: Chosen) -> tuple[list[NativeImage], list[str]]:
    """The levels, finest first, and what is said of images that are none."""

    def load(frame: Frame, size_px: IntPair | None = None) -> NativeImage:
        for directory in frame.directories:
            check_samples(source.name, directory)
        images = [_image(source, _page(tiff, directory)) for directory in frame.directories]
        image: NativeImage = images[0] if len(images) == 1 else ColourPlanes(source.name, images)
        return image if size_px in (None, image.size_px) else Unpadded(image, size_px)

    candidates = [
        (level.candidate, partial(load, level.frame))
        for level in chosen.candidates
        if len(level.frame.directories) == len(chosen.main.directories)
        and colour_samples(level.frame.first) == colour_samples(chosen.main.first)
    ]
    images, notes = with_levels(source.name, load(chosen.main), candidates, look=_look)
    if chosen.may_be_colours:
        notes.append(bright_planes(source.name, images[-1]))
    return images, notes


def _look(finer: NativeImage, coarser: NativeImage, factor: FloatPair) -> bool:
    if any(isinstance(i, WholeImage) and i.size_px[0] * i.size_px[1] > MAX_LOOK_PX for i in (finer, coarser)):
        # It would be unpacked whole on opening: then sizes and marks have to do.
        return True
    return is_alike(finer, coarser, factor)


def _stated_mpp(tiff: Any, page: Any, chosen: Chosen) -> tuple[FloatPair | None, str]:
    if tiff.is_imagej:
        x, y = (_rational(page.tags.get(code)) for code in (282, 283))
        # ImageJ writes pixels per its own unit, and no unit into the tag.
        um = _IMAGEJ_UM.get(str((tiff.imagej_metadata or {}).get("unit", "")))
        if x is not None and y is not None and um is not None:
            stated = resolution_tags_mpp(x * 1e4 / um, y * 1e4 / um, 3)
            return stated, "none" if stated is None else "imagej.unit"
    return chosen.mpp, chosen.mpp_source


def _rational(tag: Any) -> float | None:
    if tag is None:
        return None
    value = tag.value
    if isinstance(value, tuple):
        return float(value[0]) / float(value[1]) if len(value) == 2 and value[1] else None
    return float(value)


def _image(source: FileSource, page: Any) -> NativeImage:
    name = f"{source.name}: TIFF image {page.index}"
    segment = SegmentImage(source, page)
    if segment.segment_bytes <= MAX_SEGMENT_BYTES:
        return segment
    size_px = (int(page.imagewidth), int(page.imagelength))
    check_whole(name, size_px, segment.samples)

    def load() -> RGBArray:
        parts = segment.fetch_all()
        return segment.assemble(parts, (0, 0))

    return WholeImage(size_px, load)


class SegmentImage:
    """An image in tiles, or in strips joined to blocks; see NativeImage.

    segment_bytes: what one tile or strip unpacks to.
    """

    reduces: tuple[int, ...] = (1,)
    origin_px: IntPair = (0, 0)

    def __init__(self, source: FileSource, page: Any) -> None:
        self._source = source
        # Prepared now: tifffile makes the decoder on first use, which is not safe from several threads.
        self._decode = page.decode
        self._tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        self.size_px: IntPair = (int(page.imagewidth), int(page.imagelength))
        self.is_tiled = bool(page.is_tiled)
        self.samples = int(page.samplesperpixel)
        self.planes = self.samples if int(page.planarconfig) == 2 else 1
        if self.is_tiled:
            self._segment_px = (int(page.tilewidth), int(page.tilelength))
        else:
            self._segment_px = (self.size_px[0], min(int(page.rowsperstrip), self.size_px[1]))
        self._grid = (-(-self.size_px[0] // self._segment_px[0]), -(-self.size_px[1] // self._segment_px[1]))
        self.segment_bytes = self._segment_px[0] * self._segment_px[1] * (1 if self.planes > 1 else self.samples)
        expected = self._grid[0] * self._grid[1] * self.planes
        if min(self._segment_px) < 1 or len(page.dataoffsets) != expected or len(page.databytecounts) != expected:
            raise UnsupportedSlideError(
                f"{source.name}: TIFF image {page.index} needs {expected} tiles or strips, {len(page.dataoffsets)} are "
                "listed"
            )
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        # Taken now: tifffile reads such tags when asked for, and its file will be closed by then.
        self._photometric = int(page.photometric)
        self._extra = tuple(int(kind) for kind in page.extrasamples)
        self._palette: NDArray[np.uint8] | None = None
        if self._photometric == _PALETTE:
            # (3, 256) of 16 bits, red first.
            self._palette = (np.asarray(page.colormap) >> 8).astype(np.uint8)
        self._planar_jpeg = int(page.compression) == _JPEG and self.planes > 1
        self._raw = int(page.compression) == _UNCOMPRESSED and int(page.predictor) == 1 and int(page.fillorder) == 1
        if self._raw and not self.is_tiled and self.planes == 1 and self.segment_bytes > BLOCK_BYTES:
            self._cut_strips()
        joined = 1 if self.is_tiled else max(1, BLOCK_BYTES // (self._segment_px[0] * self._segment_px[1] * 3))
        self._joined = min(joined, self._grid[1])
        self.block_px: IntPair = (self._segment_px[0], self._segment_px[1] * self._joined)

    def _cut_strips(self) -> None:
        """Take long uncompressed strips for many short ones: nothing has to be unpacked to find a row."""
        width, rows = self._segment_px
        row_bytes = width * self.samples
        limit = max(1, BLOCK_BYTES // row_bytes)
        # Short strips must end where long ones do, unless there is only one.
        short = limit if self._grid[1] == 1 else next(d for d in range(min(limit, rows), 0, -1) if rows % d == 0)
        offsets, counts = [], []
        for strip, (offset, count) in enumerate(zip(self._offsets, self._counts, strict=True)):
            height = min(rows, self.size_px[1] - strip * rows)
            stored = bool(offset and count)
            if stored and count < height * row_bytes:
                raise UnsupportedSlideError(f"{self._source.name}: a strip has {count} bytes of {height * row_bytes}")
            for top in range(0, height, short):
                offsets.append(offset + top * row_bytes if stored else 0)
                counts.append(min(short, height - top) * row_bytes if stored else 0)
        self._offsets, self._counts = tuple(offsets), tuple(counts)
        self._segment_px, self._grid = (width, short), (1, len(offsets))
        self.segment_bytes = short * row_bytes

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch: a list of (segment, bytes or None) a block."""
        blocks = []
        for column, row in cells:
            rows = range(row * self._joined, min((row + 1) * self._joined, self._grid[1]))
            blocks.append(self._read([r * self._grid[0] + column for r in rows]))
        return blocks

    def fetch_all(self) -> list[tuple[int, bytes | None]]:
        """All segments."""
        return self._read(list(range(self._grid[0] * self._grid[1]))) or []

    def _read(self, positions: list[int]) -> list[tuple[int, bytes | None]] | None:
        stride = self._grid[0] * self._grid[1]
        segments = [at + plane * stride for at in positions for plane in range(self.planes)]
        parts: list[tuple[int, bytes | None]] = []
        for at in segments:
            offset, count = int(self._offsets[at]), int(self._counts[at])
            # Writers leave background out with a byte count or an offset of 0.
            parts.append((at, self._source.read(offset, count) if offset and count else None))
        return parts if any(data is not None for _, data in parts) else None

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        corner = (cell[0] * self.block_px[0], cell[1] * self.block_px[1])
        return colours(self.assemble(data, corner))

    def assemble(self, parts: list[tuple[int, bytes | None]], corner: IntPair) -> RGBArray:
        """Segments put in place, uint8 (h, w, 1 to 4), from ``corner`` (image pixels) to where they end."""
        stride = self._grid[0] * self._grid[1]
        places = [(at % stride % self._grid[0], at % stride // self._grid[0]) for at, _ in parts]
        right = min((max(c for c, _ in places) + 1) * self._segment_px[0], self.size_px[0])
        bottom = min((max(r for _, r in places) + 1) * self._segment_px[1], self.size_px[1])
        out = np.zeros((bottom - corner[1], right - corner[0], self.samples), np.uint8)
        blank = []
        for (at, data), (column, row) in zip(parts, places, strict=True):
            x, y = column * self._segment_px[0] - corner[0], row * self._segment_px[1] - corner[1]
            place = (slice(y, y + self._segment_px[1]), slice(x, x + self._segment_px[0]))
            if data is None:
                blank.append(place)
                continue
            pixels, target = self._unpack(at, data), out[place]
            plane = slice(at // stride, at // stride + 1) if self.planes > 1 else slice(None)
            if pixels.shape[0] < target.shape[0] or pixels.shape[1] < target.shape[1]:
                raise CodecError(f"segment {at} holds {pixels.shape[1]} x {pixels.shape[0]} px, more are needed")
            target[..., plane] = pixels[: target.shape[0], : target.shape[1]]
        shown = self._shown(out)
        for place in blank:
            shown[place] = WHITE
        return shown

    def _unpack(self, at: int, data: bytes) -> NDArray[np.uint8]:
        if self._raw and not self.is_tiled and self.planes == 1:
            row_bytes = self._segment_px[0] * self.samples
            return np.frombuffer(data, np.uint8)[: len(data) // row_bytes * row_bytes].reshape(
                -1, self._segment_px[0], self.samples
            )
        try:
            if self._planar_jpeg:
                # tifffile tells the decoder RGB, of which a plane is one third.
                import imagecodecs

                grey = imagecodecs.jpeg_decode(data, tables=self._tables["jpegtables"], outcolorspace="minisblack")
                return np.asarray(grey, np.uint8).reshape(*grey.shape[:2], -1)[..., :1]
            pixels, _, _ = self._decode(data, at, **self._tables)
        except Exception as error:  # every codec has errors of its own
            raise CodecError(f"segment {at}: {type(error).__name__}: {error}") from error
        if pixels is None or pixels.ndim != 4 or pixels.shape[0] != 1 or pixels.dtype != np.uint8:
            raise CodecError(f"segment {at} does not decode to 8-bit pixels")
        decoded: NDArray[np.uint8] = pixels[0]
        return decoded

    def _shown(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Stored samples as grey or RGB, with straight alpha where there is any."""
        colour_samples = 3 if self._photometric in (_RGB, _YCBCR) else 1
        colour, alpha = pixels[..., :colour_samples], pixels[..., colour_samples : colour_samples + 1]
        if self._photometric == _WHITE_IS_ZERO:
            colour = 255 - colour
        elif self._palette is not None:
            colour = np.moveaxis(self._palette[:, colour[..., 0]], 0, 2)
        if not self._extra or self._extra[0] == 0:
            return np.ascontiguousarray(colour)
        if self._extra[0] == 1:
            # Associated alpha: colours are premultiplied, so white shows through as 255 - alpha.
            mixed = colour.astype(np.uint16) + (255 - alpha.astype(np.uint16))
            on_white: NDArray[np.uint8] = np.minimum(mixed, 255).astype(np.uint8)
            return on_white
        return np.concatenate([colour, alpha], axis=2)
