"""Decoding one native tile: JPEG at full, half, quarter or eighth size, and the plain compressions of TIFF.

A tile comes from an untrusted file, so its own header is read first: it must state the size and the components that
the container states, before a decoder allocates anything by it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.codecs.fastjpeg import ReadTiles, decode_tiles, read_tiles
from wsi_pipe.slides.room import Room

__all__ = [
    "CodecError",
    "Decoder",
    "JpegDecoder",
    "JpegHead",
    "PlainDecoder",
    "decode_jpeg_stream",
    "jpeg_prefix",
    "read_jpeg_head",
    "reduce_by_mean",
    "with_frame_size",
]

RGBArray = NDArray[np.uint8]
Buffer: TypeAlias = bytes | memoryview

JPEG_REDUCES = (1, 2, 4, 8)
MAX_JPEG_SCANS = 64
"""A progressive JPEG may repeat scans without end at a few bytes each; encoders write about ten."""

MAX_STRAY_BYTES = 8
_STRAY = re.compile(r"(\d+) extraneous bytes before marker")

_SOI, _EOI, _SOS, _DRI, _COM = 0xD8, 0xD9, 0xDA, 0xDD, 0xFE
_FRAMES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


class CodecError(ValueError):
    """A tile's data cannot be decoded, or is not what the container says; the reader adds file and place."""


class Decoder(Protocol):
    """Decodes the tiles of one image."""

    def decode(self, data: Buffer, reduce: int = 1) -> NDArray[np.uint8]:
        """Pixels, uint8 (ceil(h / reduce), ceil(w / reduce), components). Raises CodecError on bad data."""


@dataclass(frozen=True, slots=True)
class JpegHead:
    """What a JPEG stream states before its first scan.

    size_px: (width, height). components: 1 for grey, 3 for colour. sampling: (horizontal, vertical) factors of each.
    kept: the segments that decoding needs (tables, frame, scan), without application data and comments.
    scan_start: byte at which the entropy-coded data begins. restart_interval: MCUs between restart markers, 0 for none.
    jfif, adobe_transform: what the application segments say of colour; None for no Adobe segment.
    """

    size_px: IntPair
    components: int
    sampling: tuple[IntPair, ...]
    progressive: bool
    kept: bytes
    scan_start: int
    restart_interval: int
    jfif: bool
    adobe_transform: int | None


def read_jpeg_head(data: Buffer) -> JpegHead:
    """The header of a JPEG stream, up to its first scan. Raises CodecError where it is damaged or not 8-bit Huffman."""
    segments, end, scan = _segments(data)
    if not scan:
        raise CodecError("the JPEG stream has no scan")
    frame: bytes | None = None
    restart, jfif, adobe = 0, False, None
    kept: list[bytes] = []
    progressive = False
    for marker, body in segments:
        if marker in _OTHER_FRAMES:
            raise CodecError(f"JPEG process {marker:#x} (lossless, hierarchical or arithmetic) is not supported")
        if marker in _FRAMES:
            if frame is not None:
                raise CodecError("the JPEG stream has two frames")
            frame, progressive = body, _FRAMES[marker] == "progressive"
        elif marker == _DRI and len(body) == 2:
            restart = int.from_bytes(body, "big")
        elif marker == 0xE0 and body.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        if not (0xE0 <= marker <= 0xEF or marker == _COM):
            kept.append(_segment(marker, body))
    if frame is None or len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
        raise CodecError("the JPEG stream has no valid frame header")
    if frame[0] != 8:
        raise CodecError(f"JPEG with {frame[0]} bits a sample is not supported")
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    sampling = tuple((frame[7 + 3 * i] >> 4, frame[7 + 3 * i] & 15) for i in range(frame[5]))
    if any(not (1 <= h <= 4 and 1 <= v <= 4) for h, v in sampling):
        raise CodecError("the JPEG frame has impossible sampling factors")
    return JpegHead((width, height), frame[5], sampling, progressive, b"".join(kept), end, restart, jfif, adobe)


def _segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body


def _segments(data: Buffer) -> tuple[list[tuple[int, bytes]], int, bool]:
    """Marker segments (marker, body) from SOI through the first SOS or EOI, the byte after, and whether SOS came."""
    size = len(data)
    if size < 4 or data[0] != 0xFF or data[1] != _SOI:
        raise CodecError("the tile is not a JPEG stream")
    found: list[tuple[int, bytes]] = []
    at = 2
    while at + 2 <= size:
        if data[at] != 0xFF:
            raise CodecError("the JPEG header is damaged")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == _EOI:
            return found, at + 2, False
        if marker < 0xC0 or 0xD0 <= marker <= _SOI or at + 4 > size:
            raise CodecError("the JPEG header is damaged")
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if end < at + 4 or end > size:
            raise CodecError("the JPEG header is cut short")
        found.append((marker, bytes(data[at + 4 : end])))
        at = end
        if marker == _SOS:
            return found, at, True
    raise CodecError("the JPEG header is cut short")


def _adobe_segment(ycbcr: bool) -> bytes:
    # libjpeg goes by component numbers or assumes YCbCr unless an Adobe segment says what was stored.
    return _segment(0xEE, b"Adobe" + bytes((0, 100, 0, 0, 0, 0, 1 if ycbcr else 0)))


def jpeg_prefix(components: int, *, ycbcr: bool) -> bytes:
    """The start of a stream of three components stored as YCbCr or RGB, or of one of grey."""
    return b"\xff\xd8" + (_adobe_segment(ycbcr) if components == 3 else b"")


def with_frame_size(segments: bytes, size_px: IntPair) -> bytes:
    """The header segments of a stream with another size (width, height) in the frame header."""
    at = 0
    while at + 9 <= len(segments):
        if segments[at + 1] in _FRAMES:
            size = size_px[1].to_bytes(2, "big") + size_px[0].to_bytes(2, "big")
            return segments[: at + 5] + size + segments[at + 9 :]
        at += 2 + int.from_bytes(segments[at + 2 : at + 4], "big")
    raise CodecError("the JPEG stream has no frame header")


class JpegDecoder:
    """Decodes the JPEG tiles of one image.

    size_px: (width, height) that each tile must have. components: 1 or 3. ycbcr: whether the container says that three
    components are stored as YCbCr, else as RGB; a stream that states YCbCr itself (JFIF, Adobe) is believed, since
    Bio-Formats writes such under an RGB tag, but one that states nothing is not taken for YCbCr, as libjpeg would.
    tables: the abbreviated stream of quantisation and Huffman tables that TIFF keeps in the JPEGTables tag. Raises
    CodecError when ``tables`` are damaged.
    """

    def __init__(self, size_px: IntPair, components: int, *, ycbcr: bool, tables: bytes = b"") -> None:
        self.size_px = size_px
        self.components = components
        shared = b""
        if tables:
            segments, _, _ = _segments(tables)
            shared = b"".join(_segment(m, b) for m, b in segments if m in (0xC4, 0xDB, _DRI))
        self._ycbcr = ycbcr
        self._tables = shared
        # Tiles of an image mostly begin with the same bytes: (as stored, as given to the decoder) of the last one.
        self._last: tuple[bytes, bytes] | None = None

    def stream(self, data: Buffer) -> bytes:
        """A complete JPEG stream: tables merged, colour stated, other application data dropped."""
        # Without an end marker libjpeg would warn of a truncated file, where the last block may well be complete; where
        # it is not, that is another warning.
        end = b"" if data[-2:] == b"\xff\xd9" else b"\xff\xd9"
        last = self._last
        if last is not None and bytes(data[: len(last[0])]) == last[0]:
            return b"".join((last[1], memoryview(data)[len(last[0]) :], end))
        head = read_jpeg_head(data)
        if head.size_px != self.size_px or head.components != self.components:
            raise CodecError(
                f"the JPEG stream is {head.size_px[0]} x {head.size_px[1]} px with {head.components} components, "
                f"{self.size_px[0]} x {self.size_px[1]} with {self.components} are expected"
            )
        if head.progressive and bytes(data).count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise CodecError(f"the JPEG stream has more than {MAX_JPEG_SCANS} scans")
        ycbcr = self._ycbcr or head.jfif or head.adobe_transform == 1
        if not ycbcr and len(set(head.sampling)) > 1:
            raise CodecError("the JPEG stream subsamples what the file calls RGB")
        rewritten = jpeg_prefix(self.components, ycbcr=ycbcr) + self._tables + head.kept
        if head.progressive:
            # Not kept as the usual start: the check above must see every stream.
            return b"".join((rewritten, memoryview(data)[head.scan_start :], end))
        start = bytes(data[: head.scan_start])
        self._last = (start, rewritten)
        return b"".join((rewritten, memoryview(data)[head.scan_start :], end))

    def decode_into(self, datas: Sequence[Buffer], outs: Sequence[RGBArray], reduce: int) -> list[bool]:
        """Decode many tiles, in one call without Python's lock, and say which were done; ``decode`` has the others.

        outs: uint8 (ceil(h / reduce), ceil(w / reduce), 3) each, rows anywhere; grey is repeated.
        """
        return decode_tiles(
            datas, outs, self.size_px, self.components, ycbcr=self._ycbcr, reduce=reduce, tables=self._tables
        )

    def read_into(
        self, descriptor: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64], room: Room, reduce: int
    ) -> ReadTiles:
        """Read tiles out of a file and decode them, as ``decode_into`` does; see ``fastjpeg.read_tiles``."""
        return read_tiles(
            descriptor, offsets, sizes, room, self.size_px, self.components,
            ycbcr=self._ycbcr, reduce=reduce, tables=self._tables,
        )  # fmt: skip

    def decode(self, data: Buffer, reduce: int = 1) -> NDArray[np.uint8]:
        """Pixels, uint8 (ceil(h / reduce), ceil(w / reduce), 3), or (..., 1) for grey; ``reduce`` is 1, 2, 4 or 8.

        Raises CodecError when the stream is damaged or of another size.
        """
        return decode_jpeg_stream(self.stream(data), self.size_px, self.components, reduce)


def decode_jpeg_stream(stream: bytes, size_px: IntPair, components: int, reduce: int) -> NDArray[np.uint8]:
    """Decode a complete stream that states its colour and was checked to be of ``size_px``; see JpegDecoder.decode."""
    import simplejpeg

    width, height = -(-size_px[0] // reduce), -(-size_px[1] // reduce)
    out: NDArray[np.uint8] = np.empty((height, width, components), np.uint8)
    if decode_tiles([stream], [out], size_px, components, ycbcr=False, reduce=reduce)[0]:
        return out
    colorspace = "RGB" if components == 3 else "GRAY"
    options: dict[str, int] = {}
    if reduce > 1:
        options = {"min_height": height, "min_width": width, "min_factor": reduce}
    try:
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(stream, colorspace, **options)
        except ValueError as error:
            # Some scanners pad tiles with a few stray bytes, or state scan parameters that have no meaning in this
            # process: that costs no pixel. Many stray bytes mean that decoding came off the track.
            stray = _STRAY.search(str(error))
            if not (stray and int(stray[1]) <= MAX_STRAY_BYTES) and "Invalid SOS parameters" not in str(error):
                raise
            pixels = simplejpeg.decode_jpeg(stream, colorspace, strict=False, **options)
    except (ValueError, RuntimeError) as error:
        raise CodecError(f"the JPEG stream is damaged: {str(error).strip() or type(error).__name__}") from error
    if pixels.shape != (height, width, components):
        raise CodecError(f"the JPEG decoder gave {pixels.shape[1]} x {pixels.shape[0]} px for {width} x {height}")
    return pixels


class PlainDecoder:
    """Decodes the tiles of one image that are stored plainly, or compressed without loss by LZW or deflate.

    compression: "none", "LZW" or "deflate". difference: whether each sample is stored as its difference from the one to
    its left (TIFF's predictor 2).
    """

    def __init__(self, size_px: IntPair, components: int, compression: str, *, difference: bool) -> None:
        self.shape = (size_px[1], size_px[0], components)
        self.compression = compression
        self.difference = difference

    def decode(self, data: Buffer, reduce: int = 1) -> NDArray[np.uint8]:
        """See Decoder.decode."""
        wanted = self.shape[0] * self.shape[1] * self.shape[2]
        plain = self._unpacked(data, wanted)
        if len(plain) < wanted:
            raise CodecError(f"the tile holds {len(plain)} bytes of {wanted}")
        pixels: NDArray[np.uint8] = np.frombuffer(plain, np.uint8, wanted).reshape(self.shape)
        if self.difference:
            pixels = np.add.accumulate(pixels, axis=1, dtype=np.uint8)
        return pixels if reduce == 1 else reduce_by_mean(pixels, reduce)

    def _unpacked(self, data: Buffer, wanted: int) -> Buffer:
        if self.compression == "none":
            return data
        if self.compression == "deflate":
            try:
                # The bound keeps a small tile from unpacking into gigabytes.
                return zlib.decompressobj().decompress(data, wanted)
            except zlib.error as error:
                raise CodecError(f"the deflate stream is damaged: {error}") from error
        import imagecodecs

        try:
            return bytes(imagecodecs.lzw_decode(bytes(data), out=wanted))
        except Exception as error:  # imagecodecs' own kinds of error have no public name in all of its versions
            raise CodecError(f"the LZW stream is damaged: {error}") from error


def reduce_by_mean(pixels: RGBArray, reduce: int, fill: int = 255) -> RGBArray:
    """Means of ``reduce`` x ``reduce`` boxes, rounded, uint8 (ceil(h / reduce), ceil(w / reduce), 3).

    Boxes that hang over the right and bottom edges are completed with ``fill``.
    """
    import cv2

    height, width = -(-pixels.shape[0] // reduce), -(-pixels.shape[1] // reduce)
    if pixels.shape[:2] != (height * reduce, width * reduce):
        whole = np.full((height * reduce, width * reduce, 3), fill, np.uint8)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
        pixels = whole
    # INTER_AREA at a whole factor is the exact box mean.
    means: RGBArray = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return means
