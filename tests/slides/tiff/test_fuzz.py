"""Damaged slides: an error of ours or pixels, never a crash, a hang, or memory without bound.

The mutations run in a process of their own whose address space is limited, since a C library that a damaged tile kills
takes its process along. ``python tests/slides/tiff/test_fuzz.py FOLDER SEED COUNT`` runs more of them by hand.
"""

from __future__ import annotations

import faulthandler
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.codecs.decode import CodecError, JpegDecoder, read_jpeg_head
from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder
from wsi_pipe.slides.dicom.reader import open_dicom
from wsi_pipe.slides.native import NativeSlide
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.slides.writing.write import write_pyramid

Picture = NDArray[np.uint8]

EXTRA_BYTES = 1 << 30
"""What reading one damaged slide of a few hundred kilobytes may take, at most."""

SECONDS = 20.0
EXPECTED = (SlideOpenError, SlideReadError, UnsupportedSlideError)


def picture_of(width: int, height: int) -> Picture:
    rng = np.random.default_rng(1)
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), 2.0)
    return np.clip(190 + 150 * noise, 0, 255).astype(np.uint8)


FORMATS: dict[str, dict[str, Any]] = {
    "jpeg.svs": {"jpeg_tables": True, "subsampling": "420"},
    "rgb.svs": {"jpeg_colour": "rgb", "subsampling": "444"},
    "jpeg2000.svs": {"compression": "jpeg2000", "quality": 40},
    "ycbcr2000.svs": {"compression": "jpeg2000", "quality": 40, "jpeg_colour": "ycbcr"},
    "deflate.tif": {"compression": "deflate", "style": "generic", "bigtiff": True},
    "none.tif": {"compression": "none", "style": "generic"},
    "slide.ome.tif": {"style": "ome"},
}


def write_samples(folder: Path) -> None:
    full = picture_of(300, 260)
    half = cv2.resize(full, (150, 130), interpolation=cv2.INTER_AREA).astype(np.uint8)
    for name, options in FORMATS.items():
        write_pyramid(folder / name, [full, half], mpp=0.25, tile_px=128, **options)


def opener(path: Path) -> Callable[..., NativeSlide]:
    return open_dicom if path.suffix == ".dcm" else open_tiff


def read_all(path: Path) -> list[Picture]:
    """Every level, and a block of every plane."""
    with opener(path)(path) as slide:
        pixels = []
        for level, found in enumerate(slide.pyramid.levels):
            # A damaged header may declare a level of any size in order; the corners tell.
            width, height = (min(n, 1024) for n in found.size_px)
            pixels.append(slide.read_region(level, 0, 0, width, height))
            x, y = found.size_px[0] - width, found.size_px[1] - height
            pixels.append(slide.read_region(level, x, y, width, height))
        for plane in slide.planes:
            cell = (plane.blocks[0] - 1, plane.blocks[1] - 1)
            for c, data in zip([(0, 0), cell], slide.fetch(plane, [(0, 0), cell]), strict=True):
                if data is not None:
                    pixels.append(slide.decode(plane, c, data))
        slide.associated_images()
        return pixels


def mutate(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    kind = rng.choice(["bits", "bytes", "cut", "zeros", "ones", "header", "numbers"])
    out = np.frombuffer(data, np.uint8).copy()
    if kind == "bits":
        for at in rng.integers(0, len(out), rng.integers(1, 30)):
            out[at] ^= 1 << rng.integers(0, 8)
    elif kind == "bytes":
        places = rng.integers(0, len(out), rng.integers(1, 60))
        out[places] = rng.integers(0, 256, len(places))
    elif kind == "cut":
        out = out[: rng.integers(0, len(out))]
    elif kind in ("zeros", "ones"):
        start = rng.integers(0, len(out))
        out[start : start + rng.integers(1, 4000)] = 0 if kind == "zeros" else 255
    elif kind == "header":
        places = rng.integers(0, min(len(out), 600), rng.integers(1, 6))
        out[places] = rng.choice([0, 1, 2, 127, 128, 255], len(places))
    else:
        # Numbers where numbers are: the directories stand at the ends of the file.
        for _ in range(rng.integers(1, 5)):
            near_end = rng.integers(0, 2)
            at = rng.integers(0, min(len(out) - 8, 3000)) + near_end * max(len(out) - 3008, 0)
            value = int(rng.choice([0, 1, 255, 65535, 65536, (1 << 31) - 1, (1 << 32) - 1]))
            out[at : at + 4] = np.frombuffer(value.to_bytes(4, "little"), np.uint8)
    return str(kind), out.tobytes()


def attack(folder: Path, seed: int, count: int) -> None:
    """Mutate every sample in ``folder`` ``count`` times; raises or dies when a slide does what it must not."""
    samples = sorted(p for p in folder.iterdir() if p.is_file())
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    originals = {path: read_all(path) for path in samples}
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + EXTRA_BYTES, hard))
    tally: dict[str, int] = {}
    for path in samples:
        data = path.read_bytes()
        rng = np.random.default_rng([seed, len(data)])
        for i in range(count):
            kind, damaged = mutate(data, rng)
            target = scratch / path.name
            target.write_bytes(damaged)
            print(f"{path.name} {seed} {i} {kind}", flush=True)
            start = time.monotonic()
            try:
                pixels = read_all(target)
            except EXPECTED as error:
                result, message = type(error).__name__, str(error)
                if path.name not in message:
                    raise RuntimeError(f"the error does not name the file: {message}") from error
            else:
                result = "read"
                assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in pixels)
                if kind == "cut":
                    # What is missing is an error: nothing may be made up for it.
                    assert all(np.array_equal(a, b) for a, b in zip(pixels, originals[path], strict=True))
            assert time.monotonic() - start < SECONDS
            tally[result] = tally.get(result, 0) + 1
    print(tally)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 1 << 22
    return pages * resource.getpagesize()


def run_attack(folder: Path, seed: int, count: int) -> str:
    command = [sys.executable, __file__, str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_damaged_slides_are_errors_or_pixels(tmp_path: Path) -> None:
    write_samples(tmp_path)
    out = run_attack(tmp_path, seed=1, count=40)
    assert "SlideReadError" in out
    assert "'read'" in out


@pytest.mark.slow
def test_damaged_real_slides_are_errors_or_pixels(tmp_path: Path, shared_slides: Path) -> None:
    names = ("OS-1-detail.ome.tif", "CMU-1-Small-Region-dicom/level-3-frames-0-1.dcm", "test3-DAPI-2-387.ndpi")
    for name in names:
        (tmp_path / Path(name).name).write_bytes((shared_slides / name).read_bytes())
    run_attack(tmp_path, seed=2, count=20)


@pytest.mark.parametrize("name", ["jpeg.svs", "jpeg2000.svs", "slide.ome.tif"])
def test_every_truncation_is_an_error_or_the_right_pixels(tmp_path: Path, name: str) -> None:
    pixels = picture_of(150, 130)
    whole, cut = tmp_path / name, tmp_path / f"cut-{name}"
    write_pyramid(whole, [pixels], mpp=0.25, tile_px=64, **FORMATS[name])
    data, expected = whole.read_bytes(), read_all(whole)
    errors = 0
    for length in range(0, len(data), max(len(data) // 60, 1)):
        cut.write_bytes(data[:length])
        try:
            found = read_all(cut)
        except EXPECTED:
            errors += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert errors > 30


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00\x11\x08", b"\xff\x4f\xff\x51"])
)
def test_any_bytes_are_a_codec_error(data: bytes, start: bytes) -> None:
    for decoder in (JpegDecoder((64, 64), 3, ycbcr=True), Jpeg2000Decoder((64, 64), 3, ycbcr=False)):
        with pytest.raises(CodecError):
            decoder.decode(start + data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_header_is_read_or_refused(data: bytes) -> None:
    try:
        head = read_jpeg_head(b"\xff\xd8" + data)
    except CodecError:
        return
    assert head.scan_start <= len(data) + 2


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=600), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0"]))
def test_any_file_is_declined_or_damaged(tmp_path: Path, data: bytes, start: bytes) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(start + data)
    with pytest.raises(EXPECTED):
        open_tiff(path)


if __name__ == "__main__":
    faulthandler.enable()
    attack(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
