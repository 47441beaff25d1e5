"""Writes CZI files for tests: segments, directory, metadata, tiles in any compression, pyramids, scenes, attachments.

Reference: ZISRAW (CZI) file format, version 1.2. pylibCZIrw, Zeiss's own reader, reads these files in the tests.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
BGR24 = 3
RGB_FORMAT = bytes.fromhex("24c3dd6f034efe4bb1853d77768dc90d")
CODES = {"none": 0, "jpeg": 1, "lzw": 2, "jpegxr": 4, "zstd0": 5, "zstd1": 6}


def encoded(pixels: Picture, compression: str) -> bytes:
    """An RGB tile as it is stored."""
    bgr = np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels
    if compression == "none":
        return bgr.tobytes()
    if compression == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, colorsubsampling="444"))
    if compression == "jpegxr":
        # Zeiss marks the stream as 24bppBGR; the samples in it are in the same order as those of 24bppRGB.
        stream = bytes(imagecodecs.jpegxr_encode(np.ascontiguousarray(pixels), level=100))
        return stream.replace(RGB_FORMAT, RGB_FORMAT[:-1] + b"\x0c")
    packed = bytes(imagecodecs.zstd_encode(bgr.tobytes()))
    return packed if compression == "zstd0" else b"\x01" + packed


@dataclass
class Tile:
    """A sub-block. at, size_px: (x, y) and (width, height) in pixels of level 0; pixels: as stored, maybe smaller."""

    pixels: Picture
    at: tuple[int, int]
    size_px: tuple[int, int] | None = None
    compression: str = "none"
    pyramid: int = 0
    dimensions: dict[str, int] = field(default_factory=dict)
    pixel_type: int = BGR24
    data: bytes | None = None

    def entry(self, position: int) -> bytes:
        """The directory entry."""
        height, width = self.pixels.shape[:2]
        size = self.size_px or (width, height)
        dims = [("X", self.at[0], size[0], width), ("Y", self.at[1], size[1], height)]
        dims += [(name, start, 1, 1) for name, start in ({"C": 0} | self.dimensions).items()]
        code = CODES[self.compression]
        head = struct.pack("<2siqiiB5xi", b"DV", self.pixel_type, position, 0, code, self.pyramid, len(dims))
        return head + b"".join(
            struct.pack("<4siifi", n.encode(), start, size, 0.0, stored) for n, start, size, stored in dims
        )


def segment(kind: bytes, body: bytes) -> bytes:
    """A segment, filled up to whole 32 bytes."""
    body += bytes(-len(body) % 32)
    return struct.pack("<16sqq", kind, len(body), len(body)) + body


def xml(um: tuple[float, float] | None, extra: str = "", channel: str = "") -> str:
    """Metadata with the pixel size and one channel."""
    sizes = (
        ""
        if um is None
        else "".join(
            f'<Distance Id="{axis}"><Value>{value / 1e6!r}</Value></Distance>'
            for axis, value in zip("XY", um, strict=True)
        )
    )
    return (
        f"<ImageDocument><Metadata><Scaling><Items>{sizes}</Items></Scaling><Information><Image><Dimensions><Channels>"
        f'<Channel Id="Channel:0" Name="a">{channel}</Channel></Channels></Dimensions></Image><Instrument><Objectives>'
        "<Objective><NominalMagnification>20</NominalMagnification></Objective></Objectives></Instrument>"
        f"</Information>{extra}</Metadata></ImageDocument>"
    )


def write_czi(
    path: Path,
    tiles: list[Tile],
    *,
    um: tuple[float, float] | None = (0.25, 0.25),
    metadata: str | None = None,
    attachments: dict[str, tuple[str, bytes]] | None = None,
) -> Path:
    """A CZI file; attachments: name -> (type, data)."""
    out = bytearray(segment(b"ZISRAWFILE", bytes(512)))
    positions = []
    for tile in tiles:
        positions.append(len(out))
        data = encoded(tile.pixels, tile.compression) if tile.data is None else tile.data
        note = b"<METADATA />"
        head = struct.pack("<iiq", len(note), 0, len(data)) + tile.entry(positions[-1])
        out += segment(b"ZISRAWSUBBLOCK", head + bytes(max(256 - len(head), 0)) + note + data)
    entries = b"".join(tile.entry(at) for tile, at in zip(tiles, positions, strict=True))
    directory = len(out)
    out += segment(b"ZISRAWDIRECTORY", struct.pack("<i124x", len(tiles)) + entries)
    text = (xml(um) if metadata is None else metadata).encode()
    described = len(out)
    out += segment(b"ZISRAWMETADATA", struct.pack("<ii248x", len(text), 0) + text)
    attached = 0
    if attachments:
        listed = b""
        for name, (kind, data) in attachments.items():
            entry = struct.pack("<2s10xqi16s8s80s", b"A1", len(out), 0, bytes(16), kind.encode(), name.encode())
            listed += entry
            out += segment(b"ZISRAWATTACH", struct.pack("<i12x", len(data)) + entry + bytes(112) + data)
        attached = len(out)
        out += segment(b"ZISRAWATTDIR", struct.pack("<i252x", len(attachments)) + listed)
    out[32:112] = struct.pack(
        "<ii8x16s16siqqiq", 1, 0, bytes(range(16)), bytes(range(16)), 0, directory, described, 0, attached
    )
    path.write_bytes(out)
    return path
