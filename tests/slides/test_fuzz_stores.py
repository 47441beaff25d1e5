"""Damaged OME-Zarr stores and CZI files: an error of ours or pixels, never a crash, a hang, or memory without bound.

As tests/slides/tiff/test_fuzz.py: in a process of its own with limited address space.
``python tests/slides/test_fuzz_stores.py FOLDER SEED COUNT`` runs more of them by hand.
"""

from __future__ import annotations

import faulthandler
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.slides.czi.build import Tile, write_czi
from tests.slides.tiff.test_fuzz import EXPECTED, EXTRA_BYTES, SECONDS, Picture, mutate, picture_of
from tests.slides.zarr.test_zarr import halves
from tests.slides.zarr.test_zarr import store as write_store
from wsi_pipe.slides.czi.reader import open_czi
from wsi_pipe.slides.native import NativeSlide
from wsi_pipe.slides.zarr.reader import open_zarr

STORES: dict[str, dict[str, Any]] = {
    "v2.zarr": {"version": 2, "chunk": 128},
    "v3.zarr": {"chunk": 128, "one_chunk_per_channel": False},
    "shards.zarr": {"chunk": 64, "shard": 2, "one_chunk_per_channel": False},
}
COMPRESSIONS = ("none", "jpeg", "jpegxr", "zstd1")


def write_samples(folder: Path) -> None:
    full = picture_of(300, 260)
    for name, options in STORES.items():
        write_store(folder / name, halves(full, 2), **options)
    for compression in COMPRESSIONS:
        tiles = [
            Tile(full[y : y + 128, x : x + 128], (x, y), None, compression, 0, {"M": x + y, "S": 0})
            for y in range(0, 260, 110)
            for x in range(0, 300, 110)
        ]
        tiles.append(Tile(halves(full, 2)[1], (0, 0), (300, 260), compression, 2, {"S": 0}))
        write_czi(folder / f"{compression}.czi", tiles)


def read_all(path: Path) -> list[Picture]:
    opened: NativeSlide = open_czi(path) if path.suffix == ".czi" else open_zarr(path)
    with opened as slide:
        pixels = []
        for level, found in enumerate(slide.pyramid.levels):
            # Damaged metadata may declare a level of any size in order; the corners tell.
            width, height = (min(n, 512) for n in found.size_px)
            pixels.append(slide.read_region(level, 0, 0, width, height))
            pixels.append(slide.read_region(level, found.size_px[0] - width, found.size_px[1] - height, width, height))
        slide.associated_images()
        return pixels


def damage(original: Path, target: Path, rng: np.random.Generator) -> tuple[str, str]:
    """A copy of a sample with one of its files damaged: (kind, file)."""
    if original.is_file():
        kind, data = mutate(original.read_bytes(), rng)
        target.write_bytes(data)
        return kind, original.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    documents = [path for path in files if path.name in ("zarr.json", ".zarray", ".zattrs", ".zgroup")]
    victim = documents[rng.integers(len(documents))] if rng.integers(2) else files[rng.integers(len(files))]
    if victim in documents and rng.integers(2):
        # Numbers and words where JSON has them: it stays JSON, and states something else.
        text = victim.read_text()
        old = str(rng.choice(["300", "260", "150", "128", "64", "3", "uint8", "scale", "x", "zstd", "blosc", "null"]))
        new = str(
            rng.choice(["0", "-1", "1", "99999999", "4611686018427387904", "1e400", "[]", "null", "true", "int64"])
        )
        victim.write_text(text.replace(old, new, int(rng.integers(1, 4))))
        return "words", str(victim.relative_to(target))
    kind, data = mutate(victim.read_bytes().ljust(16, b" "), rng)
    victim.write_bytes(data)
    return kind, str(victim.relative_to(target))


def attack(folder: Path, seed: int, count: int) -> None:
    """Damage every sample ``count`` times; raises or dies when a slide does what it must not."""
    samples = sorted(path for path in folder.iterdir() if path.suffix in (".zarr", ".czi"))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    for path in samples:
        read_all(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 1 << 22
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    tally: dict[str, int] = {}
    for path in samples:
        rng = np.random.default_rng([seed, len(path.name), path.name.encode()[0]])
        for i in range(count):
            target = scratch / path.name
            kind, where = damage(path, target, rng)
            print(f"{path.name} {seed} {i} {kind} {where}", flush=True)
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
            assert time.monotonic() - start < SECONDS
            tally[result] = tally.get(result, 0) + 1
    print(tally)


@pytest.mark.slow
def test_damaged_stores_and_files_are_errors_or_pixels(tmp_path: Path) -> None:
    write_samples(tmp_path)
    command = [sys.executable, __file__, str(tmp_path), "1", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    assert "SlideOpenError" in done.stdout
    assert "'read'" in done.stdout


if __name__ == "__main__":
    faulthandler.enable()
    if not any(Path(sys.argv[1]).iterdir()):
        write_samples(Path(sys.argv[1]))
    attack(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
