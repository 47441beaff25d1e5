#!/usr/bin/env python3
"""What reading does under Python's lock, which all reading threads share with the one that feeds the device.

However many threads read, no more tiles a second come out than that time allows. It is taken for the processor time of
a stream less what passes inside the calls to C, which let go of the lock: an upper limit, since numpy lets go of it too
for longer copies. Ways, of which --ways names some:

  one      a job's blocks are read and decoded in one call, and put together in one
  python   read and decoded in one call, put together by numpy, a block at a time
  blocks   read by Python, decoded in one call

The same tiles, repeats interleaved in turning order, medians. "aligned" tiles consist of whole blocks of the slide,
"across" tiles are smaller than that and lie anywhere over about nine of them.

    python benchmarks/reading_lock.py                                  # makes a slide of its own first
    python benchmarks/reading_lock.py --slide S.svs --slide-mpp 0.2527 --json figures.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tile_reading import make_slide

from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.geometry import TileGrid, parse_resolution
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.codecs import fastjpeg
from wsi_pipe.slides.tiff import image as tiff_image
from wsi_pipe.tiles import paste, resample, stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

WAYS = ("one", "python", "blocks")


def lay_grid(path: Path, slide_mpp: float | None, mpp: float, tile_px: int, most: int) -> TileGrid:
    """Tissue tiles of one resolution and size."""
    with contextlib.closing(open_slide(path, mpp=slide_mpp)) as slide:
        overview = read_overview(slide)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, SegmentSettings())
        grid = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(mpp,), tile_px=tile_px))[0]
        return grid.take(slice(most))


class InC:
    """Functions of the C libraries, with the processor time that passes inside them."""

    def __init__(self) -> None:
        self._calls: list[float] = []

    @property
    def seconds(self) -> float:
        """The sum of all calls."""
        return sum(self._calls)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def call(*values: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*values)
            finally:
                self._calls.append(time.thread_time() - began)

        return call


@contextlib.contextmanager
def counted(way: str) -> Iterator[InC]:
    """Count what passes in C inside, and read that way."""
    count = InC()
    functions, name = fastjpeg._library()
    pasting, resampling = paste._function(), resample._function()
    if functions is None or functions.read is None or pasting is None or resampling is None:
        raise SystemExit("the libraries in C were not built")
    wrapped = fastjpeg._Functions(count.timed(functions.decode), count.timed(functions.read))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(fastjpeg, "_library", return_value=(wrapped, name)))
        ours = None if way == "python" else count.timed(pasting)
        patches.enter_context(mock.patch.object(paste, "_function", return_value=ours))
        patches.enter_context(mock.patch.object(resample, "_function", return_value=count.timed(resampling)))
        if way == "blocks":
            patches.enter_context(mock.patch.object(tiff_image, "reads_tiles", return_value=False))
        yield count


def one_pass(path: Path, mpp: float | None, grid: TileGrid, way: str, threads: int) -> tuple[float, float]:
    """Processor seconds of a stream outside C, and in all; opening the slide is in neither."""
    with contextlib.closing(open_slide(path, mpp=mpp)) as slide, counted(way) as count:
        began = time.process_time()
        for _ in stream_tiles(slide, grid, batch_size=128, threads=threads):
            pass
        spent = time.process_time() - began
    return spent - count.seconds, spent


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a tiled JPEG slide; without it one is made")
    parser.add_argument("--slide-mpp", type=float, help="um/px of level 0, where the file does not say")
    parser.add_argument("-r", "--resolution", default="20x")
    parser.add_argument("--tiles", type=int, default=2048, help="at most this many")
    parser.add_argument("--sizes", default="256,224", help="sides of tiles in pixels, separated by commas")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=8, help="among which tiles are divided, however many cores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.slide
        if path is None:
            path = Path(folder) / "made.tif"
            make_slide(path, 16384, "jpeg")
        for tile_px in map(int, args.sizes.split(",")):
            grid = lay_grid(path, args.slide_mpp, parse_resolution(args.resolution), tile_px, args.tiles)
            if not len(grid):
                raise SystemExit(f"{path}: no tissue at {args.resolution}")
            ways = args.ways.split(",")
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            one_pass(path, args.slide_mpp, grid, ways[0], args.threads)
            for repeat in range(args.repeats):
                turn = repeat % len(ways)
                for way in ways[turn:] + ways[:turn]:
                    found[way].append(one_pass(path, args.slide_mpp, grid, way, args.threads))
            print(f"{path.name}, {args.resolution}, {len(grid)} tiles of {tile_px} px")
            for way in ways:
                outside, whole = (1e6 * statistics.median(v) / len(grid) for v in zip(*found[way], strict=True))
                rows.append({"tile_px": tile_px, "way": way, "tiles": len(grid), "outside_c_us": outside, "us": whole})
                print(
                    f"  {way:7} {outside:6.1f} us a tile outside C, of {whole:6.1f}: "
                    f"at most {1e6 / outside:7,.0f} tiles/s, whatever the threads",
                    flush=True,
                )
    if args.json:
        figures = {"threads": args.threads, "repeats": args.repeats, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
