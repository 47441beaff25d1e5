"""Decoding a CZI tile: uncompressed, JPEG, JPEG XR and Zstandard, with what it says of its size checked before."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from wsi_pipe.errors import SlideReadError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.codecs.decode import Buffer, CodecError, JpegDecoder
from wsi_pipe.slides.czi.segments import SEGMENT_BYTES, SubBlock
from wsi_pipe.slides.storage.source import Source

__all__ = ["BGR24", "COMPRESSIONS", "PIXEL_TYPES", "decode_tile", "fetch_tiles"]

BGR24 = 3
PIXEL_TYPES = {
    0: "8-bit grey", 1: "16-bit grey", 2: "32-bit float grey", 3: "8-bit colour", 4: "16-bit colour", 8: "float colour",
    9: "8-bit colour with alpha", 10: "complex", 11: "complex colour", 12: "32-bit grey", 13: "64-bit float grey",
}  # fmt: skip
COMPRESSIONS = {0: "uncompressed", 1: "JPEG", 4: "JPEG XR", 5: "Zstandard", 6: "Zstandard"}


def fetch_tiles(source: Source, tiles: Sequence[SubBlock]) -> list[Buffer]:
    """The stored bytes of tiles. Raises SlideReadError where they are not where the directory says."""
    heads = source.read_many([(tile.position, SEGMENT_BYTES + 16) for tile in tiles])
    ranges = []
    for tile, head in zip(tiles, heads, strict=True):
        kind, note, length = struct.unpack("<16s16xi4xq", head)
        # Incompressible data grow a little.
        most = 2 * tile.stored_px[0] * tile.stored_px[1] * 3 + (1 << 16)
        start = tile.position + SEGMENT_BYTES + tile.head_bytes + note
        if not kind.startswith(b"ZISRAWSUBBLOCK") or note < 0 or not 0 < length <= most or start + length > source.size:
            raise SlideReadError(
                f"{source.name}: the tile at byte {tile.position} is damaged, or lies outside the file",
                remedy="the file is truncated or damaged: copy it again",
            )
        ranges.append((start, length))
    return source.read_many(ranges)


def decode_tile(tile: SubBlock, data: Buffer) -> RGBArray:
    """Pixels of a tile, uint8 (h, w, 3) in red, green, blue. Raises CodecError where the data are damaged."""
    width, height = tile.stored_px
    wanted = width * height * 3
    if tile.compression == 1:
        return JpegDecoder((width, height), 3, ycbcr=True).decode(data)
    if tile.compression == 4:
        return _jpeg_xr(bytes(data), (width, height))
    if tile.compression == 6:
        data = _without_header(data)
    if tile.compression in (5, 6):
        import imagecodecs

        try:
            data = bytes(imagecodecs.zstd_decode(bytes(data), out=wanted))
        except (ValueError, RuntimeError) as error:
            raise CodecError(f"the Zstandard stream is damaged: {error}") from error
    if len(data) < wanted:
        raise CodecError(f"the tile holds {len(data)} bytes of {wanted}")
    pixels: RGBArray = np.frombuffer(data, np.uint8, wanted).reshape(height, width, 3)
    return pixels[..., ::-1]


def _without_header(data: Buffer) -> Buffer:
    """The Zstandard stream after the header of "Zstd1", which has a chunk only for 16-bit samples."""
    if len(data) < 2:
        raise CodecError("the Zstandard stream is damaged")
    size = data[0]
    if size == 3 and data[1] == 1:
        if data[2] & 1:
            raise CodecError("bytes of 16-bit samples are packed in a tile of 8 bits")
    elif size != 1:
        raise CodecError(f"a header of {size} bytes before the Zstandard stream is not understood")
    return memoryview(data)[size:]


def _jpeg_xr(data: bytes, size_px: IntPair) -> RGBArray:
    import imagecodecs

    stated = _jpeg_xr_size(data)
    if stated != size_px:
        raise CodecError(
            f"the JPEG XR stream is {stated[0]} x {stated[1]} px, {size_px[0]} x {size_px[1]} are expected"
        )
    try:
        pixels = np.asarray(imagecodecs.jpegxr_decode(data))
    except (ValueError, RuntimeError) as error:
        raise CodecError(f"the JPEG XR stream is damaged: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (size_px[1], size_px[0], 3):
        raise CodecError(f"the JPEG XR stream holds {pixels.dtype} {pixels.shape}, not 8-bit colour")
    return pixels


def _jpeg_xr_size(data: bytes) -> IntPair:
    """(width, height) by the container's tags 0xBC80 and 0xBC81 and by the codestream's own header.

    Reference: ITU-T T.832, annex A (container) and 8.3 (image header). The decoder allocates by both.
    """
    try:
        if data[:3] != b"II\xbc":
            raise CodecError("the tile is not a JPEG XR stream")
        (directory,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, directory)
        tags = {}
        for i in range(min(count, 64)):
            tag, kind, _, value = struct.unpack_from("<HHII", data, directory + 2 + 12 * i)
            tags[tag] = value & (0xFF if kind == 1 else 0xFFFF if kind == 3 else 0xFFFFFFFF)
        size = (tags[0xBC80], tags[0xBC81])
        start = tags[0xBCC0]
        # The decoder takes what is missing for zeros.
        if start + tags.get(0xBCC1, 0) > len(data):
            raise CodecError("the JPEG XR stream is cut short")
        if data[start : start + 8] != b"WMPHOTO\0":
            raise CodecError("the JPEG XR stream has no codestream")
        # Short sizes are of 16 bits each; the first bit of the fourth byte after the mark says so.
        if data[start + 10] & 0x80:
            width, height = struct.unpack_from(">HH", data, start + 12)
        else:
            width, height = struct.unpack_from(">II", data, start + 12)
    except (struct.error, KeyError, IndexError) as error:
        raise CodecError("the JPEG XR stream is cut short") from error
    if (width + 1, height + 1) != size:
        raise CodecError("the JPEG XR stream states two sizes")
    return size
