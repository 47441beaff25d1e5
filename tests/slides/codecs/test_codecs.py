"""JPEG, JPEG 2000 and plain tiles: colour, scale, registration, and headers that lie."""

from __future__ import annotations

import struct
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from wsi_pipe.slides.codecs import openjpeg
from wsi_pipe.slides.codecs.decode import (
    CodecError,
    JpegDecoder,
    PlainDecoder,
    read_jpeg_head,
    reduce_by_mean,
    with_frame_size,
)
from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder, codestream_of, read_jpeg2000_head

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def tissue() -> Picture:
    """256 x 256 px of blobs and grain, with the spectrum of tissue: most energy at low frequencies, some at all."""
    rng = np.random.default_rng(5)
    picture = np.full((256, 256, 3), (225.0, 160.0, 195.0))
    for sigma, gain in ((1.2, 18), (3, 60), (8, 120)):
        noise = cv2.GaussianBlur(rng.normal(size=(256, 256)), (0, 0), sigma)
        picture += (gain * noise)[..., None] * (0.6, 1.0, 0.5)
    return np.clip(picture, 0, 255).astype(np.uint8)


def box(pixels: Picture, k: int) -> NDArray[np.float64]:
    h, w = pixels.shape[0] // k, pixels.shape[1] // k
    return pixels[: h * k, : w * k].reshape(h, k, w, k, 3).mean((1, 3))


def segments(stream: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of the header's segments, read by a loop of its own."""
    found, at = [], 2
    while True:
        end = at + 2 + struct.unpack_from(">H", stream, at + 2)[0]
        found.append((stream[at + 1], at, end))
        at = end
        if found[-1][0] == 0xDA:
            return found


def without(stream: bytes, *markers: int) -> bytes:
    """The stream without the header segments of these kinds."""
    parts = [b"\xff\xd8"]
    last = 2
    for marker, start, end in segments(stream):
        if marker not in markers:
            parts.append(stream[start:end])
        last = end
    return b"".join(parts) + stream[last:]


def stored_as_rgb(pixels: Picture, quality: int = 95) -> bytes:
    """A JPEG of RGB planes without any marker that says so, components 1, 2 and 3, not subsampled: Aperio's way."""
    # Encoding the RGB planes as if they were YCbCr stores them untouched.
    stream = simplejpeg.encode_jpeg_yuv_planes(*(np.ascontiguousarray(pixels[..., i]) for i in range(3)), quality)
    return without(stream, 0xE0)


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_ycbcr_tiles_decode_as_the_encoder_meant(tissue: Picture, subsampling: str) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 95, colorsubsampling=subsampling)
    decoded = JpegDecoder((256, 256), 3, ycbcr=True).decode(stream)
    assert np.array_equal(decoded, simplejpeg.decode_jpeg(stream))
    assert np.abs(decoded.astype(int) - tissue).mean() < 4


def test_rgb_tiles_without_a_marker_are_not_taken_for_ycbcr(tissue: Picture) -> None:
    stream = stored_as_rgb(tissue)
    assert read_jpeg_head(stream).adobe_transform is None
    assert not read_jpeg_head(stream).jfif
    decoded = JpegDecoder((256, 256), 3, ycbcr=False).decode(stream)
    assert np.abs(decoded.astype(int) - tissue).max() <= 12
    # The trap: what libjpeg makes of the same bytes by itself.
    assert np.abs(simplejpeg.decode_jpeg(stream).astype(int) - tissue).mean() > 25


def test_a_stream_that_states_ycbcr_is_believed_under_an_rgb_tag(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 95, colorsubsampling="420")
    assert read_jpeg_head(stream).jfif
    decoded = JpegDecoder((256, 256), 3, ycbcr=False).decode(stream)
    assert np.array_equal(decoded, simplejpeg.decode_jpeg(stream))


def test_a_jfif_marker_does_not_change_what_a_ycbcr_tag_says(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 95)
    bare = without(stream, 0xE0)
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    assert np.array_equal(decoder.decode(bare), decoder.decode(stream))


def test_subsampled_rgb_is_refused(tissue: Picture) -> None:
    stream = without(simplejpeg.encode_jpeg(tissue, 95, colorsubsampling="420"), 0xE0)
    with pytest.raises(CodecError, match="subsamples"):
        JpegDecoder((256, 256), 3, ycbcr=False).decode(stream)


def test_tables_kept_apart_are_merged(tissue: Picture) -> None:
    stream = without(simplejpeg.encode_jpeg(tissue, 90), 0xE0)
    tables = b"\xff\xd8" + b"".join(stream[a:b] for m, a, b in segments(stream) if m in (0xC4, 0xDB)) + b"\xff\xd9"
    abbreviated = without(stream, 0xC4, 0xDB)
    decoded = JpegDecoder((256, 256), 3, ycbcr=True, tables=tables).decode(abbreviated)
    assert np.array_equal(decoded, simplejpeg.decode_jpeg(stream))
    with pytest.raises(CodecError):
        JpegDecoder((256, 256), 3, ycbcr=True).decode(abbreviated)
    with pytest.raises(CodecError):
        JpegDecoder((256, 256), 3, ycbcr=True, tables=tables[: len(tables) // 2])


def test_tiles_with_tables_of_their_own_do_not_borrow_the_last_ones(tissue: Picture) -> None:
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    streams = [simplejpeg.encode_jpeg(tissue, q) for q in (90, 40, 40, 90, 75)]
    for stream in streams:
        assert np.array_equal(decoder.decode(memoryview(stream)), simplejpeg.decode_jpeg(stream))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_scaled_jpeg_is_near_the_mean_of_boxes(tissue: Picture, subsampling: str, reduce: int) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 85, colorsubsampling=subsampling)
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    scaled = decoder.decode(stream, reduce)
    assert scaled.shape == (256 // reduce, 256 // reduce, 3)
    assert np.abs(scaled - box(decoder.decode(stream), reduce)).mean() <= 1.5


def test_scaled_sizes_round_up() -> None:
    pixels = np.full((37, 53, 3), 128, np.uint8)
    decoder = JpegDecoder((53, 37), 3, ycbcr=True)
    stream = simplejpeg.encode_jpeg(pixels, 90)
    assert [decoder.decode(stream, r).shape for r in (1, 2, 4, 8)] == [
        (37, 53, 3),
        (19, 27, 3),
        (10, 14, 3),
        (5, 7, 3),
    ]


def test_grey_tiles() -> None:
    pixels = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))[..., None]
    stream = simplejpeg.encode_jpeg(pixels, 95, colorspace="GRAY")
    decoded = JpegDecoder((64, 64), 1, ycbcr=False).decode(stream)
    assert decoded.shape == (64, 64, 1)
    assert np.abs(decoded.astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("size_px", [(255, 256), (256, 255), (512, 512)])
def test_a_stream_of_another_size_is_refused_before_it_is_decoded(tissue: Picture, size_px: tuple[int, int]) -> None:
    with pytest.raises(CodecError, match="expected"):
        JpegDecoder(size_px, 3, ycbcr=True).decode(simplejpeg.encode_jpeg(tissue, 80))


def test_a_small_stream_that_declares_a_huge_picture_is_refused(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 80)
    _, start, end = next(s for s in segments(stream) if s[0] == 0xC0)
    huge = stream[:start] + with_frame_size(stream[start:end], (65000, 65000)) + stream[end:]
    assert read_jpeg_head(huge).size_px == (65000, 65000)
    with pytest.raises(CodecError, match="65000"):
        JpegDecoder((256, 256), 3, ycbcr=True).decode(huge)


def test_damaged_streams_are_errors_and_not_grey_pixels(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 80)
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    for cut in (0, 1, 3, 30, 300, len(stream) // 2, len(stream) - 40):
        with pytest.raises(CodecError):
            decoder.decode(stream[:cut])


def test_stray_bytes_before_the_end_marker_cost_no_pixel(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 80)
    padded = stream[:-2] + b"\x00\x00\x00" + stream[-2:]
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    assert np.array_equal(decoder.decode(padded), simplejpeg.decode_jpeg(stream))
    assert np.array_equal(decoder.decode(stream[:-2]), simplejpeg.decode_jpeg(stream))
    with pytest.raises(CodecError, match="extraneous"):
        decoder.decode(stream[:-2] + bytes(100) + stream[-2:])


def test_some_flipped_bits_throw_the_decoder_off_and_are_errors(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 80)
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    rng = np.random.default_rng(8)
    errors = 0
    for at in rng.integers(700, len(stream) - 2, 60).tolist():
        try:
            decoder.decode(stream[:at] + bytes((stream[at] ^ 1 << rng.integers(0, 8),)) + stream[at + 1 :])
        except CodecError:
            errors += 1
    # The entropy code has no checksum, so most flips only change some coefficients, and cannot be told.
    assert errors >= 4


def test_progressive_streams_decode_unless_they_scan_without_end(tissue: Picture) -> None:
    encoded, stream = cv2.imencode(".jpg", tissue[..., ::-1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert encoded
    data = stream.tobytes()
    decoder = JpegDecoder((256, 256), 3, ycbcr=True)
    assert np.array_equal(decoder.decode(data), simplejpeg.decode_jpeg(data))
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(CodecError, match="scans"):
        decoder.decode(data[:-2] + scan * 100 + data[-2:])


def test_unusual_processes_are_refused(tissue: Picture) -> None:
    stream = simplejpeg.encode_jpeg(tissue, 80)
    _, start, _ = next(s for s in segments(stream) if s[0] == 0xC0)
    for marker, match in ((0xC9, "arithmetic"), (0xC3, "lossless")):
        with pytest.raises(CodecError, match=match):
            read_jpeg_head(stream[: start + 1] + bytes((marker,)) + stream[start + 2 :])
    with pytest.raises(CodecError, match="12 bits"):
        read_jpeg_head(stream[: start + 4] + b"\x0c" + stream[start + 5 :])


def test_means_of_boxes_round_and_complete_with_white() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 10, 3), dtype=np.uint8)
    whole = np.full((16, 12, 3), 255.0)
    whole[:13, :10] = pixels
    expected = whole.reshape(4, 4, 3, 4, 3).mean((1, 3))
    assert np.abs(reduce_by_mean(pixels, 4) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("compression", ["none", "LZW", "deflate"])
def test_plain_tiles(tissue: Picture, compression: str, difference: bool) -> None:
    stored = tissue.copy()
    if difference:
        stored[:, 1:] = tissue[:, 1:] - tissue[:, :-1]
    packers = {"none": bytes, "LZW": imagecodecs.lzw_encode, "deflate": zlib.compress}
    data = packers[compression](stored.tobytes())
    decoder = PlainDecoder((256, 256), 3, compression, difference=difference)
    assert np.array_equal(decoder.decode(data), tissue)
    assert np.array_equal(decoder.decode(memoryview(data), 2), reduce_by_mean(tissue, 2))
    with pytest.raises(CodecError):
        decoder.decode(data[: len(data) // 2])


def test_a_deflate_bomb_is_unpacked_no_further_than_the_tile() -> None:
    bomb = zlib.compress(bytes(1 << 26))
    decoded = PlainDecoder((16, 16), 3, "deflate", difference=False).decode(bomb)
    assert decoded.shape == (16, 16, 3)
    assert not decoded.any()


def encode_j2k(pixels: Picture, *, reversible: bool = False, level: int = 45, mct: bool = True) -> bytes:
    level = 0 if reversible else level
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=level, codecformat="j2k", reversible=reversible, mct=mct))


def test_jpeg_2000_in_full_is_what_another_decoder_gives(tissue: Picture) -> None:
    for reversible in (False, True):
        stream = encode_j2k(tissue, reversible=reversible)
        decoded = Jpeg2000Decoder((256, 256), 3, ycbcr=False).decode(stream)
        assert np.abs(decoded.astype(int) - imagecodecs.jpeg2k_decode(stream)).max() <= 1
    assert np.array_equal(decoded, tissue)


@pytest.mark.skipif(not openjpeg.available(), reason="no OpenJPEG library: reduced decoding averages boxes instead")
@pytest.mark.parametrize(("reduce", "psnr_db"), [(2, 36.0), (4, 31.0), (8, 34.0)])
def test_reduced_jpeg_2000_lies_where_the_boxes_lie(tissue: Picture, reduce: int, psnr_db: float) -> None:
    stream = encode_j2k(tissue)
    decoder = Jpeg2000Decoder((256, 256), 3, ycbcr=False)
    target = box(decoder.decode(stream), reduce)
    reduced = decoder.decode(stream, reduce).astype(np.float64)
    inner = (slice(2, -2), slice(2, -2))
    assert reduced.shape == target.shape
    assert 10 * np.log10(255**2 / np.mean((reduced - target)[inner] ** 2)) > psnr_db

    def error(dx: float, dy: float) -> float:
        matrix = np.array([[1, 0, -dx], [0, 1, -dy]], np.float64)
        size = (target.shape[1], target.shape[0])
        moved = cv2.warpAffine(reduced, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        return float(np.mean((moved - target)[inner] ** 2))

    # Moved by a fifth of a pixel any way, it fits less well: the registration is better than that.
    here = error(0, 0)
    assert all(here < error(dx, dy) for dx, dy in ((0.2, 0), (-0.2, 0), (0, 0.2), (0, -0.2), (0.2, 0.2), (-0.2, -0.2)))


def test_reduced_reversible_jpeg_2000_is_the_mean_of_boxes(tissue: Picture) -> None:
    decoder = Jpeg2000Decoder((256, 256), 3, ycbcr=False)
    stream = encode_j2k(tissue, reversible=True)
    assert np.array_equal(decoder.decode(stream, 2), reduce_by_mean(tissue, 2))


def test_jpeg_2000_of_ycbcr_without_a_transform(tissue: Picture) -> None:
    y_cr_cb = cv2.cvtColor(tissue, cv2.COLOR_RGB2YCrCb)
    stream = encode_j2k(np.ascontiguousarray(y_cr_cb[..., [0, 2, 1]]), reversible=True, mct=False)
    decoded = Jpeg2000Decoder((256, 256), 3, ycbcr=True).decode(stream)
    assert np.abs(decoded.astype(int) - tissue).max() <= 3


def test_without_the_library_jpeg_2000_is_decoded_in_full(tissue: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = encode_j2k(tissue)
    decoder = Jpeg2000Decoder((256, 256), 3, ycbcr=False)
    full = decoder.decode(stream)
    monkeypatch.setattr(openjpeg, "available", lambda: False)
    assert np.abs(decoder.decode(stream).astype(int) - full).max() <= 1
    assert np.abs(decoder.decode(stream, 4) - box(full, 4)).max() <= 1.6
    with pytest.raises(CodecError):
        decoder.decode(stream[: len(stream) // 3])


def test_jp2_files_are_unwrapped(tissue: Picture) -> None:
    wrapped = bytes(imagecodecs.jpeg2k_encode(tissue, level=45, codecformat="jp2"))
    assert not wrapped.startswith(b"\xff\x4f")
    assert codestream_of(wrapped).startswith(b"\xff\x4f\xff\x51")
    decoded = Jpeg2000Decoder((256, 256), 3, ycbcr=False).decode(wrapped)
    assert np.abs(decoded.astype(int) - imagecodecs.jpeg2k_decode(wrapped)).max() <= 1


def test_jpeg_2000_headers_that_lie_are_refused(tissue: Picture) -> None:
    stream = encode_j2k(tissue)
    decoder = Jpeg2000Decoder((256, 256), 3, ycbcr=False)
    assert read_jpeg2000_head(stream).size_px == (256, 256)
    siz, cod = stream.index(b"\xff\x51"), stream.index(b"\xff\x52")

    def patched(at: int, value: bytes) -> bytes:
        return stream[:at] + value + stream[at + len(value) :]

    wide = patched(siz + 6, struct.pack(">II", 1 << 30, 1 << 30))
    with pytest.raises(CodecError):
        decoder.decode(wide)
    with pytest.raises(CodecError, match="tiles"):
        decoder.decode(patched(siz + 22, struct.pack(">II", 1, 1)))
    with pytest.raises(CodecError, match="layers"):
        decoder.decode(patched(cod + 6, struct.pack(">H", 60000)))
    with pytest.raises(CodecError, match="coding style"):
        decoder.decode(patched(cod + 9, b"\x80"))
    with pytest.raises(CodecError, match="8-bit"):
        decoder.decode(patched(siz + 40, b"\x0f"))
    for cut in (0, 2, 40, 90, len(stream) // 2):
        with pytest.raises(CodecError):
            decoder.decode(stream[:cut])
