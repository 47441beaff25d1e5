"""Tiles per second and core of the ``texture`` encoder, beside plain scikit-image calls for a part of its work.

Run: ``python benchmarks/texture_speed.py [--seconds 3]``. CPU seconds are counted, not wall seconds, so that other
programs disturb little; what is compared is interleaved, and medians are shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from wsi_pipe.encoders.texture import TextureEncoder

UInt8 = NDArray[np.uint8]


def tiles_of(size_px: int, count: int) -> UInt8:
    """Cuts of a stained section at random places, uint8 (count, size_px, size_px, 3)."""
    image = np.asarray(data.immunohistochemistry(), np.uint8)
    if size_px > 512:
        image = cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, image.shape[0] - size_px + 1, (count, 2))
    return np.stack([image[y : y + size_px, x : x + size_px] for y, x in corners])


def scikit_image(tiles: UInt8) -> None:
    """One LBP and one set of co-occurrence statistics a tile, as scikit-image's documentation shows them."""
    for tile in tiles:
        grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
        np.bincount(local_binary_pattern(grey, 8, 1, method="uniform").astype(int).ravel(), minlength=10)
        matrix = graycomatrix(grey // 16, [1], [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4], levels=16, symmetric=True)
        for name in ("contrast", "homogeneity", "energy", "correlation"):
            graycoprops(matrix, name)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the process, all threads, that one call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long to measure each size")
    seconds = parser.parse_args().seconds
    cv2.setNumThreads(1)
    encoder = TextureEncoder(threads=1)
    print(f"{encoder.info.dim} features; OpenCV {cv2.__version__}")
    for size_px in (64, 128, 224, 256, 512):
        tiles = tiles_of(size_px, max(8, 64 * 64 * 64 // size_px**2))
        few = tiles[:4]
        encoder.encode(tiles)
        ours: list[float] = []
        plain: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(ours) < 3:
            ours.append(cpu_seconds(partial(encoder.encode, tiles)) / len(tiles))
            plain.append(cpu_seconds(partial(scikit_image, few)) / len(few))
        rate, other = 1 / float(np.median(ours)), 1 / float(np.median(plain))
        print(f"{size_px:4d} px: {rate:7.0f} tiles/s a core; LBP and GLCM at one scale by scikit-image: {other:6.0f}")


if __name__ == "__main__":
    main()
