"""Damaged images and TIFFs through the image reader, and slides through OpenSlide: an error of ours, or pixels.

They run in a process of their own, whose address space is limited for the image reader: a C library that a damaged
file kills takes its process along. (OpenSlide asks GLib for memory, and GLib ends the process when it gets none.)
``python tests/slides/plain/test_fuzz_images.py READER FOLDER SEED COUNT`` runs more of them by hand.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile

from wsi_pipe.errors import SlideError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.writing.write import write_pyramid

EXTRA_BYTES = 3 << 30
SECONDS = 30.0
PICTURE = np.asarray(
    cv2.resize(np.random.default_rng(1).integers(90, 256, (26, 30, 3), np.uint8), (300, 260)), np.uint8
)
TIFFS: dict[str, dict[str, Any]] = {
    "lzw.tif": {"compression": "lzw", "predictor": True, "rowsperstrip": 32},
    "deflate.tif": {"compression": "zlib", "tile": (64, 64)},
    "zstd.tif": {"compression": "zstd", "tile": (64, 64)},
    "jpeg.tif": {"compression": "jpeg", "rowsperstrip": 64},
    "webp.tif": {"compression": "webp", "tile": (64, 64)},
    "jpeg2000.tif": {"compression": "jpeg2000", "tile": (64, 64)},
    "raw.tif": {},
}
SLIDES: dict[str, dict[str, Any]] = {
    "jpeg.svs": {"jpeg_tables": True, "subsampling": "420"},
    "jpeg2000.svs": {"compression": "jpeg2000", "quality": 40, "jpeg_colour": "rgb"},
    "deflate.tif": {"compression": "deflate", "style": "generic"},
}


def samples(reader: str, folder: Path) -> dict[str, bytes]:
    if reader == "openslide":
        for name, options in SLIDES.items():
            write_pyramid(folder / name, [PICTURE, PICTURE[::2, ::2]], mpp=0.25, tile_px=128, **options)
        return {name: (folder / name).read_bytes() for name in SLIDES}
    for name, options in TIFFS.items():
        tifffile.imwrite(folder / name, PICTURE, photometric="rgb", metadata=None, **options)
    planes = np.moveaxis(PICTURE, 2, 0)
    options = {"planarconfig": "separate", "compression": "jpeg", "tile": (64, 64)}
    tifffile.imwrite(folder / "planes.tif", planes, photometric="rgb", metadata=None, **options)
    found = {name: (folder / name).read_bytes() for name in [*TIFFS, "planes.tif"]}
    found |= {f"a.{form}": bytes(cv2.imencode(f".{form}", PICTURE)[1]) for form in ("png", "jpg", "webp")}
    return found | {"a.jp2": bytes(imagecodecs.jpeg2k_encode(PICTURE, level=40))}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut short, or with bytes changed; headers, at either end, are hit more often than the rest."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 4, 16, 64])):
        near = min(int(rng.expovariate(1 / 200)), len(data) - 1)
        at = rng.choice([rng.randrange(len(data)), near, len(data) - 1 - near])
        changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1 << rng.randrange(8), 0, 255])
    return bytes(changed)


def read_all(path: Path, reader: str) -> None:
    """Two corners of every level; a damaged header may declare a level of any size."""
    with closing(open_slide(path, reader=reader)) as slide:
        for level, found in enumerate(slide.pyramid.levels):
            width, height = (min(side, 1024) for side in found.size_px)
            for x, y in ((0, 0), (found.size_px[0] - width, found.size_px[1] - height)):
                assert slide.read_region(level, x, y, width, height).shape == (height, width, 3)


def main(reader: str, folder: Path, seed: int, count: int) -> None:
    faulthandler.enable()
    rng = random.Random(seed)
    originals = samples(reader, folder)
    for name in originals:
        path = folder / name
        path.write_bytes(originals[name])
        read_all(path, reader)
    if reader == "image":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, used + EXTRA_BYTES))
    errors = 0
    for index in range(count):
        name = rng.choice(sorted(originals))
        path = folder / f"damaged-{index}-{name}"
        path.write_bytes(damaged(originals[name], rng))
        print(path, flush=True)
        start = time.monotonic()
        said = ""
        try:
            read_all(path, reader)
        except SlideError as error:
            said = str(error)
        assert said.startswith(str(path)) or not said
        errors += bool(said)
        assert time.monotonic() - start < SECONDS
        path.unlink()
    print(f"{errors} errors")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by Linux's means")
@pytest.mark.parametrize("reader", ["image", "openslide"])
def test_damaged_files(tmp_path: Path, reader: str) -> None:
    command = [sys.executable, __file__, reader, str(tmp_path), "11", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    assert done.stderr == ""
    # Most damage shows; some falls into pixels, or where nobody looks.
    assert 50 < int(done.stdout.split()[-2]) < 150


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
