#!/usr/bin/env python3
"""Other programs on the same tiles of the same slide, each in an environment of its own: processor seconds and ratios.

All tissue tiles of a synthetic 40x slide (``real_size.py``) are read at 20x and at 5x on one core, and resized to 256
px where the program does not do that itself. Programs that lay grids of their own, and those that go from the slide to
features, are installed and imported to see whether they can be had, and are no figure here.

    python benchmarks/peers.py                                     # all peers
    python benchmarks/peers.py --peers tiffslide,fastslide --repeats 3 --json figures.json
    python benchmarks/peers.py --slide S.svs

An environment is made with ``python -m venv`` below TMPDIR and filled from the package index, one peer after another,
and removed at the end. What cannot be installed, imported or run is named with the reason. Peers take turns with this
program, a process each, so that a drift of the machine hits all alike; processor seconds count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

TILES: dict[str, tuple[tuple[str, ...], str]] = {
    "tiffslide": (
        ("tiffslide", "opencv-python-headless", "imagecodecs"),
        """
import tiffslide
slide = tiffslide.TiffSlide(path)
level = max(i for i, d in enumerate(slide.level_downsamples) if d <= scale * 1.0001)
side = round(tile_l0 / slide.level_downsamples[level])
def read(x, y):
    return fitted(slide.read_region((x, y), level, (side, side), as_array=True))
""",
    ),
    "openslide": (
        ("openslide-python", "openslide-bin", "opencv-python-headless"),
        """
import openslide
slide = openslide.OpenSlide(path)
level = slide.get_best_level_for_downsample(scale * 1.0001)
side = round(tile_l0 / slide.level_downsamples[level])
def read(x, y):
    return fitted(np.asarray(slide.read_region((x, y), level, (side, side)).convert("RGB")))
""",
    ),
    "fastslide": (
        ("fastslide", "opencv-python-headless"),
        """
import fastslide
slide = fastslide.FastSlide.from_file_path(path)
downsamples = list(slide.level_downsamples)
level = max(i for i, d in enumerate(downsamples) if d <= scale * 1.0001)
side = round(tile_l0 / downsamples[level])
native = hasattr(slide, "convert_level0_to_level_native")
def read(x, y):
    at = slide.convert_level0_to_level_native(x, y, level) if native else (x, y)
    return fitted(slide.read_region(tuple(at), level, (side, side)).numpy()[..., :3])
""",
    ),
    "cucim": (
        ("cucim-cu12", "opencv-python-headless"),
        """
from cucim import CuImage
slide = CuImage(path)
downsamples = slide.resolutions["level_downsamples"]
level = max(i for i, d in enumerate(downsamples) if d <= scale * 1.0001)
side = round(tile_l0 / downsamples[level])
def read(x, y):
    return fitted(np.asarray(slide.read_region((x, y), (side, side), level)))
""",
    ),
}
"""Peer -> packages, and the code that defines ``read(x, y)``: the tile at a level-0 corner, uint8 (256, 256, 3)."""

NOT_DRIVEN = ("microtome-wsi", "wsi-patching", "slide2vec", "lazyslide", "atlas-patch")
"""Peers that are installed and imported to see whether they can be had; they lay grids of their own, so that "the same
tiles" is no call of theirs. What came of it is printed, without a figure."""
MODULES = {"microtome-wsi": "microtome", "wsi-patching": "wsi_patching", "atlas-patch": "atlas_patch"}

PROGRAM = """
import json, sys, time
import cv2, numpy as np
cv2.setNumThreads(1)
path, where, scale, tile_l0 = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
corners = json.load(open(where))
def fitted(tile):
    tile = tile[..., :3]
    return tile if tile.shape[0] == 256 else cv2.resize(tile, (256, 256), interpolation=cv2.INTER_AREA)
{code}
total = 0
read(*corners[0])
begin = time.process_time()
for x, y in corners:
    tile = read(x, y)
    assert tile.shape == (256, 256, 3), tile.shape
    total += int(tile[128, 128].sum())
print(json.dumps({{"cpu_s": time.process_time() - begin, "tiles": len(corners), "sum": total}}))
"""

OURS = """
import json, sys, time
import numpy as np
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles
path, where, scale, tile_l0 = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
corners = np.array(json.load(open(where)), float)
cells = np.rint(corners / tile_l0).astype(np.int32)
def grid(rows):
    own = cells[rows]
    return TileGrid(TileSpec(0.25 * scale, 256), (0.25 * scale,) * 2, (0.0, 0.0), (tile_l0,) * 2, (tile_l0,) * 2, own,
                    np.ones(len(own), np.float32), None, False, 0.0)
def run(rows):
    total = 0
    slide = open_slide(path)
    for batch in stream_tiles(slide, grid(rows), batch_size=64, threads=1):
        total += int(batch.pixels[:, 128, 128].sum())
    slide.close()
    return total
run(slice(0, 1))
begin = time.process_time()
total = run(slice(None))
print(json.dumps({"cpu_s": time.process_time() - begin, "tiles": len(corners), "sum": total}))
"""


def made(folder: Path, name: str, packages: tuple[str, ...], limit_s: float) -> tuple[Path | None, str]:
    """An environment with packages: its Python, or None and why not."""
    place = folder / name
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    try:
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages],
            capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"installing took longer than {limit_s:.0f} s"
    if done.returncode:
        return None, "cannot be installed: " + (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return python, ""


def call(python: Path | str, code: str, arguments: list[str], limit_s: float) -> dict[str, Any] | str:
    """What a program prints, pinned to one core; or why it failed."""
    pin = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [*pin, str(python), "-c", code, *arguments],
            capture_output=True, text=True, timeout=limit_s, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def grids(slide: Path, most: int) -> dict[str, tuple[list[list[int]], float, float]]:
    """By resolution: corners of at most so many tiles, scale to level 0, and a tile's side there."""
    from wsi_pipe.config import TileSettings
    from wsi_pipe.overview import read_overview
    from wsi_pipe.slides import open_slide
    from wsi_pipe.tiling import plan_grids
    from wsi_pipe.tissue import find_tissue

    with open_slide(slide) as opened:  # type: ignore[attr-defined]
        overview = read_overview(opened)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0)
        laid = plan_grids(opened.pyramid, mask, TileSettings(resolutions=(2.0, 0.5)))
        mpp = opened.pyramid.mpp[0]
        edge = opened.pyramid.size_l0
    found = {}
    for grid in laid:
        inside = (grid.coords + grid.tile_size_l0[0] <= edge).all(axis=1)
        corners = grid.coords[inside][:most].tolist()
        found[grid.label] = (corners, grid.mpp_effective[0] / mpp, grid.tile_size_l0[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a 40x slide, in place of one that is made")
    parser.add_argument("--peers", default=",".join((*TILES, *NOT_DRIVEN)), help="which, separated by commas")
    parser.add_argument("--tiles", type=int, default=2000, help="most tiles at each resolution")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--install-s", type=float, default=900.0, help="what installing one may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    problems: dict[str, str] = {}
    pythons: dict[str, Path] = {}
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        folder = Path(scratch)
        for name in args.peers.split(","):
            if name not in TILES and name not in NOT_DRIVEN:
                raise SystemExit(f"{name} is none of {', '.join((*TILES, *NOT_DRIVEN))}")
            python, problem = made(folder, name, TILES[name][0] if name in TILES else (name,), args.install_s)
            if python is not None and name in NOT_DRIVEN:
                seen = call(python, f"import {MODULES.get(name, name)}; print('{{}}')", [], 300)
                problem = f"cannot be imported: {seen}" if isinstance(seen, str) else (
                    "can be had; it lays a grid of its own, so it was not given these tiles"
                )  # fmt: skip
            if problem or python is None:
                problems[name] = problem
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                pythons[name] = python
            print(f"{name}: {problem or 'installed'}", flush=True)
        slide = args.slide
        if pythons and slide is None:
            from real_size import make_real_slide

            slide = folder / "slide.svs"
            make_real_slide(slide, 12 * 4096)
        for label, (corners, scale, side) in grids(slide, args.tiles).items() if pythons else []:
            where = folder / f"{label}.json"
            where.write_text(json.dumps(corners))
            arguments = [str(slide), str(where), repr(scale), repr(side)]
            ways = {"wsi-pipe": (Path(sys.executable), OURS)}
            ways |= {name: (python, PROGRAM.format(code=TILES[name][1])) for name, python in pythons.items()}
            own = rows.setdefault(label, {})
            for turn in range(args.repeats):
                for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                    if name in problems:
                        continue
                    found = call(*ways[name], arguments, 1800)
                    if isinstance(found, str):
                        problems[name] = f"at {label}: {found}"
                    else:
                        own.setdefault(name, []).append(found["tiles"] / found["cpu_s"])
    report(rows, problems, args.json)


def report(rows: dict[str, dict[str, list[float]]], problems: dict[str, str], path: Path | None) -> None:
    """Print the table: tiles a processor second, medians, and how many times as many this program reads."""
    for label, found in rows.items():
        if "wsi-pipe" not in found:
            continue
        ours = statistics.median(found["wsi-pipe"])
        print(f"\ntiles a CPU second at {label}, one core (load {os.getloadavg()[0]:.1f})")
        for name, rates in sorted(found.items(), key=lambda item: -statistics.median(item[1])):
            rate = statistics.median(rates)
            print(
                f"  {name:16} {rate:8.0f}   1/{ours / rate:.2f} of wsi-pipe"
                if name != "wsi-pipe"
                else f"  {name:16} {rate:8.0f}"
            )
    for name, problem in problems.items():
        print(f"without a figure: {name}: {problem}")
    if path:
        path.write_text(json.dumps({"tiles_per_cpu_s": rows, "without": problems}, indent=1))


if __name__ == "__main__":
    main()
