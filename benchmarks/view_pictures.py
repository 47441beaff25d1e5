#!/usr/bin/env python3
"""How fast the viewer makes the pictures that a browser asks for, against OpenSlide's Deep Zoom, in one run.

    python benchmarks/view_pictures.py SLIDE.svs [--count 120]

Pictures of 512 x 512 px at the three finest levels of the slide's pyramid, spread over the slide, are read, scaled and
encoded as JPEG by one thread; the two ways take turns. Printed are pictures a processor second, and their ratio. A
slide that OpenSlide does not read is measured alone.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from wsi_pipe.slides import open_slide
from wsi_pipe.view.pixels import QUALITY, VIEW_PX, DeepZoom, jpeg

LEVELS = 3


def places(zoom: DeepZoom, count: int) -> list[tuple[int, int, int]]:
    """Level, column and row of ``count`` whole pictures, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        level = zoom.max_level - n % LEVELS
        width, height = zoom.size_px(level)
        found.append((level, *(int(rng.integers(max(side // VIEW_PX, 1))) for side in (width, height))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with open_slide(options.slide) as slide:
        zoom = DeepZoom(slide.pyramid.size_l0)
        wanted = places(zoom, options.count)

        def ours() -> None:
            for level, column, row in wanted:
                jpeg(zoom.read(slide, level, column, row))

        ways: dict[str, Callable[[], None]] = {"wsi-pipe view": ours}
        try:
            import openslide
            from openslide.deepzoom import DeepZoomGenerator

            other = DeepZoomGenerator(openslide.OpenSlide(str(options.slide)), VIEW_PX, 0)
        except openslide.OpenSlideError as error:
            print(f"OpenSlide does not read it: {error}")
        else:

            def theirs() -> None:
                for level, column, row in wanted:
                    picture = other.get_tile(level, (column, row))
                    picture.save(io.BytesIO(), "JPEG", quality=QUALITY)

            ways["OpenSlide Deep Zoom"] = theirs
        spent = dict.fromkeys(ways, 0.0)
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.process_time()
                way()
                spent[name] += time.process_time() - start
    rates = {name: options.rounds * len(wanted) / seconds for name, seconds in spent.items()}
    for name, rate in rates.items():
        print(f"{name:20s} {rate:7.1f} pictures a processor second")
    if len(rates) == 2:
        one, other_rate = rates.values()
        print(f"ratio {one / other_rate:.2f}")


if __name__ == "__main__":
    main()
