"""Encoding one tile of a TIFF slide, and the tags that go with it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray

__all__ = ["TileEncoder"]

_JPEG, _DEFLATE, _APERIO_YCBCR, _APERIO_RGB, _JPEG2000 = 7, 8, 33003, 33005, 34712
_JPEG_TABLES = 347
_SUBSAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


class TileEncoder:
    """Encodes tiles, all in one way; see ``write_pyramid`` for the options.

    passes: the channels in the order in which tiles are written, (None,) where a tile holds all three. Raises
    ValueError for options that do not go together.
    """

    def __init__(
        self,
        compression: str,
        quality: int,
        tile_px: int,
        jpeg_colour: str,
        subsampling: str,
        jpeg_tables: bool,
        planar: bool,
        style: str,
    ) -> None:
        if compression not in ("jpeg", "jpeg2000", "deflate", "none"):
            raise ValueError(f"unknown compression {compression!r}: jpeg, jpeg2000, deflate or none")
        if style not in ("aperio", "generic", "ome"):
            raise ValueError(f"unknown style {style!r}: aperio, generic or ome")
        if jpeg_colour not in ("ycbcr", "rgb") or subsampling not in _SUBSAMPLING:
            raise ValueError(f"unknown colour {jpeg_colour!r} or subsampling {subsampling!r}")
        if jpeg_tables and compression != "jpeg":
            raise ValueError(f"there are no JPEG tables with compression {compression}")
        if planar and style == "aperio":
            raise ValueError("Aperio files are not planar")
        self.compression, self.quality, self.tile_px, self.planar = compression, quality, tile_px, planar
        self.passes: tuple[int | None, ...] = (0, 1, 2) if planar else (None,)
        # A plane is grey to its codec, and only Aperio says of JPEG 2000 tiles that they are YCbCr.
        self.ycbcr = jpeg_colour == "ycbcr" and not planar
        self.ycbcr &= compression == "jpeg" or (compression == "jpeg2000" and style == "aperio")
        self.subsampling = subsampling if self.ycbcr and compression == "jpeg" else "444"
        self.style = style
        self._apart = jpeg_tables

    @property
    def aperio_note(self) -> str:
        """How an Aperio description names tiles and codec."""
        size = f"({self.tile_px}x{self.tile_px})"
        if self.compression == "jpeg":
            return f"{size} JPEG/{'YCC' if self.ycbcr else 'RGB'} Q={self.quality}"
        if self.compression == "jpeg2000":
            return f"{size} J2K/{'YUV16' if self.ycbcr else 'KDU'} Q={self.quality}"
        return f"{size} {'LZW' if self.compression == 'deflate' else 'RAW'}"

    def tiff_options(self, size_px: IntPair) -> dict[str, Any]:
        """Arguments of tifffile's ``write`` for an image of ``size_px``."""
        options: dict[str, Any] = {
            "shape": (3, size_px[1], size_px[0]) if self.planar else (size_px[1], size_px[0], 3),
            "dtype": np.uint8,
            "tile": (self.tile_px, self.tile_px),
            "photometric": "rgb",
            "planarconfig": "separate" if self.planar else "contig",
            "compression": self._tag(),
            "maxworkers": 1,
        }
        if self.compression == "jpeg" and not self.planar:
            options["subsampling"] = _SUBSAMPLING[self.subsampling]
            options["compressionargs"] = {"outcolorspace": "ycbcr" if self.ycbcr else "rgb"}
        if self._apart:
            tables, _ = split_tables(self._jpeg(np.zeros((self.tile_px, self.tile_px, 3), np.uint8), self.passes[0]))
            options["extratags"] = [(_JPEG_TABLES, 7, len(tables), tables, True)]
        return options

    def _tag(self) -> int | None:
        if self.compression == "jpeg":
            return _JPEG
        if self.compression == "jpeg2000":
            if self.style != "aperio":
                return _JPEG2000
            return _APERIO_YCBCR if self.ycbcr else _APERIO_RGB
        return _DEFLATE if self.compression == "deflate" else None

    def encode(self, tile: RGBArray, channel: int | None) -> bytes:
        """The stored form of a tile, uint8 (h, w, 3) of at most the full size."""
        pad = ((0, self.tile_px - tile.shape[0]), (0, self.tile_px - tile.shape[1]), (0, 0))
        # Scanners repeat the last pixels beyond the edge, which keeps the codec's ringing out of the picture.
        full = np.pad(tile, pad, mode="edge") if pad[0][1] or pad[1][1] else tile
        if self.compression == "jpeg":
            data = self._jpeg(full, channel)
            return split_tables(data)[1] if self._apart else data
        if self.compression == "jpeg2000":
            return self._jpeg2000(full, channel)
        raw = (full if channel is None else full[..., channel]).tobytes()
        return zlib.compress(raw, 6) if self.compression == "deflate" else raw

    def _jpeg(self, tile: RGBArray, channel: int | None) -> bytes:
        import simplejpeg

        if channel is not None:
            grey = np.ascontiguousarray(tile[..., channel : channel + 1])
            data: bytes = simplejpeg.encode_jpeg(grey, self.quality, "GRAY", "Gray")
        elif self.ycbcr:
            rgb = np.ascontiguousarray(tile)
            data = simplejpeg.encode_jpeg(rgb, self.quality, "RGB", self.subsampling, fastdct=False)
        else:
            # Given red, green and blue as the planes of a YCbCr picture, the encoder converts nothing.
            planes = (np.ascontiguousarray(tile[..., i]) for i in range(3))
            data = simplejpeg.encode_jpeg_yuv_planes(*planes, self.quality)
        return without_application_data(data)

    def _jpeg2000(self, tile: RGBArray, channel: int | None) -> bytes:
        import imagecodecs

        if channel is not None:
            tile = tile[..., channel]
        elif self.ycbcr:
            import cv2

            tile = np.asarray(cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb), np.uint8)[..., [0, 2, 1]]
        spaces = imagecodecs.JPEG2K.CLRSPC
        data = imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(tile),
            level=self.quality,
            codecformat="j2k",
            colorspace=spaces.SYCC if self.ycbcr else spaces.GRAY if channel is not None else spaces.SRGB,
            mct=not self.ycbcr and channel is None,
            reversible=self.quality == 0,
            numthreads=1,
        )
        return bytes(data)


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, whole segment) of a JPEG stream from after SOI; the last is SOS with all that follows."""
    found: list[tuple[int, bytes]] = []
    at = 2
    while True:
        marker = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            return [*found, (marker, data[at:])]
        found.append((marker, data[at:end]))
        at = end


def without_application_data(data: bytes) -> bytes:
    """A JPEG stream without JFIF and Adobe segments and comments: in a TIFF, the tags say what the colours are."""
    kept = (body for marker, body in _segments(data) if not (0xE0 <= marker <= 0xEF or marker == 0xFE))
    return b"\xff\xd8" + b"".join(kept)


def split_tables(data: bytes) -> tuple[bytes, bytes]:
    """The tables of a JPEG stream as a stream of their own, and the stream without them."""
    segments = _segments(data)
    tables = b"".join(body for marker, body in segments if marker in (0xDB, 0xC4))
    rest = b"".join(body for marker, body in segments if marker not in (0xDB, 0xC4))
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest
