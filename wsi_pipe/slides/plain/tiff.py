"""TIFFs that neither the fast reader nor OpenSlide takes, through tifffile: by tile, by strip, or decoded whole.

tifffile finds the segments and undoes compression, prediction and byte order; the file is read here, by position, so
that threads share it. Sixteen-bit pictures are refused: what microscopes call white in them is not known.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.metadata import ome_mpp, plausible_mpp, resolution_tags_mpp
from wsi_pipe.slides.native import MAX_ANISOTROPY, NativeImage
from wsi_pipe.slides.plain.image import ImageSlide, WholeImage, check_whole, colours
from wsi_pipe.slides.storage.source import FileSource, slide_fingerprint

__all__ = ["open_image_tiff"]

# tifffile logs what it makes do with; what it cannot make do with it raises.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MAX_SEGMENT_BYTES = 1 << 24
"""A strip or tile that unpacks to more is not read in parts."""

BLOCK_BYTES = 1 << 20
"""Strips are joined to blocks of about this size."""

MAX_PAGES = 4096

_UNCOMPRESSED, _JPEG = 1, 7
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_COLOUR_NAMES = {4: "a transparency mask", 5: "CMYK", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 32803: "a raw sensor image"}
_IMAGEJ_UM = {"micron": 1.0, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


def open_image_tiff(source: FileSource, mpp: FloatPair | None) -> ImageSlide:
    """Open a TIFF; ``source`` is closed with the slide. Raises as ``open_image`` does."""
    import tifffile

    try:
        with tifffile.TiffFile(source.name) as tiff:
            pages = _levels(source.name, tiff)
            images: list[NativeImage] = [_image(source, page) for page in pages]
            stated, mpp_source = _stated_mpp(tiff, pages[0])
            vendor, words = ("ome", "OME-TIFF") if tiff.is_ome else ("generic-tiff", "TIFF")
            compression = tifffile.COMPRESSION(pages[0].compression).name.replace("_", " ")
            profile = pages[0].tags.get(34675)
    except (UnsupportedSlideError, SlideOpenError):
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
    )
    return ImageSlide(info, images, stated if mpp is None else mpp, source.close)


def _form(image: NativeImage) -> str:
    if isinstance(image, WholeImage):
        return "one piece"
    assert isinstance(image, SegmentImage)
    return "tiles" if image.is_tiled else "strips"


def _levels(name: str, tiff: Any) -> list[Any]:
    """The pages that are the levels, finest first.

    Level 0 is the largest page that is not marked as reduced. Its levels are its own sub-images, else those later pages
    marked as reduced, else pages at a falling whole fraction of it; all of its shape and colours. Several pages of its
    size are a stack, in which nothing says which one is meant.
    """
    pages = [page.aspage() for page in tiff.pages[:MAX_PAGES]]
    full = [page for page in pages if not page.subfiletype & 1 and page.imagewidth and page.imagelength] or pages
    if not full:
        raise UnsupportedSlideError(f"{name}: the TIFF file holds no image")
    main = max(full, key=lambda page: page.imagewidth * page.imagelength)
    same = [page for page in full if (page.imagewidth, page.imagelength) == (main.imagewidth, main.imagelength)]
    if len(same) > 1:
        what = "channels, focal planes or times" if tiff.is_ome or tiff.is_imagej else "pages"
        raise UnsupportedSlideError(
            f"{name}: {len(same)} images of {main.imagewidth} x {main.imagelength} px ({what}), not one RGB picture",
            remedy="export the one that is meant as RGB",
        )
    if main.pages is not None:
        others = [page.aspage() for page in main.pages]
    else:
        others = [page for page in pages if page is not main and page.subfiletype & 1]
        others = others or [page for page in pages if page is not main and _is_whole_fraction(main, page)]
    levels = [main]
    for page in sorted(others, key=lambda page: -page.imagewidth):
        finer = levels[-1]
        if _is_level(main, page) and page.imagewidth < finer.imagewidth and page.imagelength <= finer.imagelength:
            levels.append(page)
    return levels


def _is_level(main: Any, page: Any) -> bool:
    x, y = main.imagewidth / max(page.imagewidth, 1), main.imagelength / max(page.imagelength, 1)
    slack = MAX_ANISOTROPY + 1 / max(page.imagewidth, 1) + 1 / max(page.imagelength, 1)
    alike = ("photometric", "samplesperpixel", "bitspersample")
    return abs(x - y) <= slack * max(x, y) and all(getattr(main, key) == getattr(page, key) for key in alike)


def _is_whole_fraction(main: Any, page: Any) -> bool:
    factor = round(main.imagewidth / max(page.imagewidth, 1))
    sizes = ((main.imagewidth, page.imagewidth), (main.imagelength, page.imagelength))
    return factor > 1 and all(part in (whole // factor, -(-whole // factor)) for whole, part in sizes)


def _stated_mpp(tiff: Any, page: Any) -> tuple[FloatPair | None, str]:
    if tiff.is_ome:
        stated = ome_mpp(tiff.ome_metadata or "", (page.imagewidth, page.imagelength))
        return stated, "none" if stated is None else "ome.PhysicalSize"
    if tiff.is_svs:
        value = re.search(r"\|\s*MPP\s*=\s*([0-9]*\.?[0-9]+)\s*(\||$)", page.description)
        stated = None if value is None else plausible_mpp(float(value[1]), float(value[1]))
        return stated, "none" if stated is None else "aperio.MPP"
    x, y = (_rational(page.tags.get(code)) for code in (282, 283))
    if x is None or y is None:
        return None, "none"
    if tiff.is_imagej:
        # ImageJ writes pixels per its own unit, and no unit into the tag.
        um = _IMAGEJ_UM.get(str((tiff.imagej_metadata or {}).get("unit", "")))
        stated = None if um is None else resolution_tags_mpp(x * 1e4 / um, y * 1e4 / um, 3)
        return stated, "none" if stated is None else "imagej.unit"
    unit_tag = page.tags.get(296)
    unit = 2 if unit_tag is None else int(unit_tag.value)
    stated = resolution_tags_mpp(x, y, unit)
    return stated, "none" if stated is None else f"tiff.XResolution ({'cm' if unit == 3 else 'inch'})"


def _rational(tag: Any) -> float | None:
    if tag is None:
        return None
    value = tag.value
    if isinstance(value, tuple):
        return float(value[0]) / float(value[1]) if len(value) == 2 and value[1] else None
    return float(value)


def _image(source: FileSource, page: Any) -> NativeImage:
    name = f"{source.name}: TIFF image {page.index}"
    _check_colours(name, page)
    segment = SegmentImage(source, page)
    if segment.segment_bytes <= MAX_SEGMENT_BYTES:
        return segment
    size_px = (int(page.imagewidth), int(page.imagelength))
    check_whole(name, size_px, segment.samples)

    def load() -> RGBArray:
        parts = segment.fetch_all()
        return segment.assemble(parts, (0, 0))

    return WholeImage(size_px, load)


def _check_colours(name: str, page: Any) -> None:
    photometric, bits = int(page.photometric), page.bitspersample
    if page.dtype is None or page.dtype.kind != "u" or bits != 8:
        kind = "unknown" if page.dtype is None else f"{bits}-bit {page.dtype.name}"
        raise UnsupportedSlideError(
            f"{name}: {kind} samples; only 8-bit ones are read, since how others map to a picture is not stated",
            remedy="export it as 8-bit RGB with the contrast that is meant",
        )
    colour_samples = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _PALETTE: 1, _RGB: 3, _YCBCR: 3}.get(photometric)
    if colour_samples is None:
        kind = _COLOUR_NAMES.get(photometric, f"photometric {photometric}")
        raise UnsupportedSlideError(f"{name}: {kind} is not grey or RGB", remedy="export it as RGB")
    # One channel more is alpha, or of no stated meaning beside RGB; beside grey it is another stain.
    extra = tuple(int(kind) for kind in page.extrasamples)
    known = extra in ((), (1,), (2,)) or (extra == (0,) and colour_samples == 3)
    if not known or page.samplesperpixel - len(extra) != colour_samples or page.imagedepth != 1:
        raise UnsupportedSlideError(
            f"{name}: {page.samplesperpixel} samples a pixel are not grey or RGB", remedy="export it as RGB"
        )


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
