"""Decoding one JPEG 2000 tile in full, or at a half, quarter or eighth from fewer wavelet levels.

The low-pass samples of a wavelet level sit on every second pixel, not between two: at a half they lie a quarter of a
pixel up and left of where the mean of 2 x 2 pixels lies, at a quarter three eighths. On tissue that costs 4 to 9 grey
levels, so a short filter moves them. Its coefficients were fitted, for the irreversible 9/7 transform, to the box means
of real tissue (H&E, two scanners) under the condition that the energy of detail stays as it is; they are not
symmetrical because the shift is in them. The reversible 5/3 transform aliases too much for that and is decoded in full.
References: ITU-T T.800 (markers in annex A, transforms in annex F).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.codecs import openjpeg
from wsi_pipe.slides.codecs.decode import Buffer, CodecError, reduce_by_mean

__all__ = ["Jpeg2000Decoder", "Jpeg2000Head", "read_jpeg2000_head"]

SHIFT_FILTERS = {1: (-0.0900, 0.8694, 0.2770, -0.0564), 2: (-0.1237, 0.7704, 0.4505, -0.0972)}
"""By discarded wavelet levels: weights of the samples at -1, 0, 1 and 2."""

MAX_TILES, MAX_PRECINCTS, MAX_LAYERS = 1024, 1 << 14, 64
"""Each tile, precinct and layer costs the decoder memory and time before a single sample is read."""

_SOC, _SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0x4F, 0x51, 0x52, 0x53, 0x90, 0x93, 0xD9
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"


@dataclass(frozen=True, slots=True)
class Jpeg2000Head:
    """What a codestream states before its data.

    size_px: (width, height). sampling: (x, y) subsampling of each component. levels: wavelet levels. irreversible: 9/7.
    """

    size_px: IntPair
    sampling: tuple[IntPair, ...]
    levels: int
    irreversible: bool


def codestream_of(data: Buffer) -> bytes:
    """The codestream in ``data``: itself, or the contents of the first jp2c box of a JP2 file. Raises CodecError."""
    stream = bytes(data)
    if not stream.startswith(_JP2):
        return stream
    at = 0
    while at + 8 <= len(stream):
        length, kind, head = int.from_bytes(stream[at : at + 4], "big"), stream[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(stream[at + 8 : at + 16], "big"), 16
        end = len(stream) if length == 0 else at + length
        if kind == b"jp2c":
            return stream[at + head : end]
        if end < at + head:
            break
        at = end
    raise CodecError("the JP2 file holds no codestream")


def read_jpeg2000_head(stream: bytes) -> Jpeg2000Head:
    """The headers of a codestream, main and tile parts. Raises CodecError where they are damaged or out of bounds."""
    if len(stream) < 4 or stream[:4] != b"\xff\x4f\xff\x51":
        raise CodecError("the tile is not a JPEG 2000 codestream")
    siz: bytes | None = None
    cod: bytes | None = None
    others: list[bytes] = []
    at = 2
    while True:
        marker, body, at = _marker(stream, at)
        if marker == _SIZ:
            siz = body
        elif marker == _COD:
            cod = body
        elif marker == _COC:
            others.append(body)
        elif marker == _SOT:
            break
    if siz is None or cod is None or len(cod) < 10:
        raise CodecError("the JPEG 2000 header is incomplete")
    size, tile, sampling = _sizes(siz)
    levels = _check_coding(cod[5:], bool(cod[0] & 1), tile)
    if not 1 <= int.from_bytes(cod[2:4], "big") <= MAX_LAYERS:
        raise CodecError("the JPEG 2000 stream declares too many layers")
    for other in others:
        if len(sampling) > 256 or len(other) < 7:
            raise CodecError("the JPEG 2000 header is damaged")
        if _check_coding(other[2:], bool(other[1] & 1), tile) != levels or other[6] != cod[9]:
            raise CodecError("JPEG 2000 components with different transforms are not supported")
    _check_tile_parts(stream, at - 12)
    return Jpeg2000Head(size, sampling, levels, cod[9] == 0)


def _marker(stream: bytes, at: int) -> tuple[int, bytes, int]:
    if at + 4 > len(stream) or stream[at] != 0xFF:
        raise CodecError("the JPEG 2000 header is damaged")
    marker = stream[at + 1]
    if marker in (_SOC, _SOD, _EOC):
        return marker, b"", at + 2
    end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    if end < at + 4 or end > len(stream):
        raise CodecError("the JPEG 2000 header is cut short")
    return marker, stream[at + 4 : end], end


def _sizes(siz: bytes) -> tuple[IntPair, IntPair, tuple[IntPair, ...]]:
    if len(siz) < 36:
        raise CodecError("the JPEG 2000 size is damaged")
    values = [int.from_bytes(siz[i : i + 4], "big") for i in range(2, 34, 4)]
    (width, height, x0, y0, tile_w, tile_h, tile_x0, tile_y0) = values
    count = int.from_bytes(siz[34:36], "big")
    if not 1 <= count <= 4 or len(siz) != 36 + 3 * count:
        raise CodecError(f"JPEG 2000 with {count} components is not supported")
    if x0 or y0 or tile_x0 or tile_y0 or not (width and height and tile_w and tile_h):
        raise CodecError("JPEG 2000 with an offset reference grid is not supported")
    if -(-width // tile_w) * -(-height // tile_h) > MAX_TILES:
        raise CodecError("the JPEG 2000 stream declares too many tiles")
    depths = {siz[36 + 3 * i] for i in range(count)}
    if depths != {7}:
        raise CodecError("JPEG 2000 with other than 8-bit unsigned samples is not supported")
    sampling = tuple((siz[37 + 3 * i], siz[38 + 3 * i]) for i in range(count))
    if sampling[0] != (1, 1) or any(x not in (1, 2) or y not in (1, 2) for x, y in sampling):
        raise CodecError("the JPEG 2000 subsampling is not supported")
    return (width, height), (min(tile_w, width), min(tile_h, height)), sampling


def _check_coding(body: bytes, with_precincts: bool, tile: IntPair) -> int:
    levels = body[0]
    if levels > 32 or body[1] > 8 or body[2] > 8 or body[1] + body[2] > 8 or body[4] > 1:
        raise CodecError("the JPEG 2000 coding style is not supported")
    if with_precincts:
        if len(body) < 6 + levels:
            raise CodecError("the JPEG 2000 header is cut short")
        total = 0
        for resolution in range(levels + 1):
            shift = levels - resolution
            exponents = body[5 + resolution]
            total += -(-tile[0] // (1 << shift + (exponents & 15))) * -(-tile[1] // (1 << shift + (exponents >> 4)))
        if total > MAX_PRECINCTS:
            raise CodecError("the JPEG 2000 stream declares too many precincts")
    return levels


def _check_tile_parts(stream: bytes, at: int) -> None:
    """Refuse tile parts that override the coding style, which the bounds above would not hold for."""
    size = len(stream)
    while at + 12 <= size and stream[at] == 0xFF and stream[at + 1] == _SOT:
        length = int.from_bytes(stream[at + 6 : at + 10], "big")
        part, at_part = 0, at + 12
        while part != _SOD:
            part, _, at_part = _marker(stream, at_part)
            if part in (_COD, _COC):
                raise CodecError("JPEG 2000 tiles with a coding style of their own are not supported")
        if length == 0:
            return
        if length < 14:
            raise CodecError("the JPEG 2000 tile parts are damaged")
        at += length


class Jpeg2000Decoder:
    """Decodes the JPEG 2000 tiles of one image.

    size_px: (width, height) that each tile must have. components: 1 or 3. ycbcr: whether three components are YCbCr
    that the codestream's own colour transform does not undo (Aperio's compression 33003).
    """

    def __init__(self, size_px: IntPair, components: int, *, ycbcr: bool) -> None:
        self.size_px = size_px
        self.components = components
        self.ycbcr = ycbcr

    def decode(self, data: Buffer, reduce: int = 1) -> NDArray[np.uint8]:
        """Pixels, uint8 (ceil(h / reduce), ceil(w / reduce), components); ``reduce`` is 1, 2, 4 or 8.

        Raises CodecError when the stream is damaged, of another size, or out of bounds.
        """
        stream = codestream_of(data)
        head = read_jpeg2000_head(stream)
        if head.size_px != self.size_px or len(head.sampling) != self.components:
            raise CodecError(
                f"the JPEG 2000 stream is {head.size_px[0]} x {head.size_px[1]} px with {len(head.sampling)} components"
                f", {self.size_px[0]} x {self.size_px[1]} with {self.components} are expected"
            )
        discard = 0
        if head.irreversible and openjpeg.available():
            discard = min(reduce.bit_length() - 1, head.levels, max(SHIFT_FILTERS))
        pixels = self._components(stream, head, discard)
        if self.ycbcr and self.components == 3:
            pixels = _ycbcr_to_rgb(pixels)
        if discard:
            pixels = _shifted(pixels, SHIFT_FILTERS[discard])
        rest = reduce >> discard
        return pixels if rest == 1 else reduce_by_mean(pixels, rest)

    def _components(self, stream: bytes, head: Jpeg2000Head, discard: int) -> NDArray[np.uint8]:
        if not openjpeg.available():
            return self._in_full(stream)
        planes = openjpeg.decode_components(stream, discard)
        if planes is None or len(planes) != self.components:
            raise CodecError("the JPEG 2000 stream is damaged")
        height, width = -(-self.size_px[1] >> discard), -(-self.size_px[0] >> discard)
        whole = []
        for plane, (x, y) in zip(planes, head.sampling, strict=True):
            if (x, y) != (1, 1):
                plane = plane.repeat(y, axis=0).repeat(x, axis=1)[:height, :width]
            if plane.shape != (height, width):
                raise CodecError("the JPEG 2000 components have unequal sizes")
            whole.append(plane)
        if len(whole) == 1:
            return whole[0][:, :, None]
        import cv2

        return np.asarray(cv2.merge(whole), np.uint8)

    def _in_full(self, stream: bytes) -> NDArray[np.uint8]:
        import imagecodecs

        try:
            pixels = np.asarray(imagecodecs.jpeg2k_decode(stream, numthreads=1))
        except (imagecodecs.Jpeg2kError, ValueError, RuntimeError) as error:
            raise CodecError(f"the JPEG 2000 stream is damaged: {error}") from error
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.shape != (self.size_px[1], self.size_px[0], self.components) or pixels.dtype != np.uint8:
            raise CodecError(f"the JPEG 2000 decoder gave {pixels.dtype} {pixels.shape}")
        return pixels


def _shifted(pixels: NDArray[np.uint8], weights: tuple[float, ...]) -> NDArray[np.uint8]:
    import cv2

    kernel = np.asarray(weights, np.float32)
    moved = cv2.sepFilter2D(pixels, -1, kernel, kernel, anchor=(1, 1), borderType=cv2.BORDER_REFLECT)
    return np.asarray(moved, np.uint8).reshape(pixels.shape)


def _ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    # OpenCV wants Y, Cr, Cb.
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels[:, :, [0, 2, 1]]), cv2.COLOR_YCrCb2RGB), np.uint8)
