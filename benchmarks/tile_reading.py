#!/usr/bin/env python3
"""How fast tiles come off a slide, against the usual way and against the codec's own limit.

One core is pinned, all ways read the same tiles, repeats are interleaved, and medians are shown:

  a    OpenSlide read_region and PIL resize, one tile at a time
  b    wsi_pipe.tiles.stream_tiles on one thread
  c    libjpeg-turbo decoding just the native tiles needed, at the scale b uses, from memory: what used to be the limit
  d    this package's own JPEG decoder doing the same, where it was built: the limit now
  cu   cuCIM read_region and area resize, where it is installed

and on all cores that the process may use:

  a'   as a, in a torch DataLoader with one worker a core and torchvision's transforms
  b', c', d'   as b, c and d, one thread a core

    python benchmarks/tile_reading.py                          # makes a slide of its own first
    python benchmarks/tile_reading.py --codec jpeg2000         # the same, JPEG 2000, at half and quarter scale
    python benchmarks/tile_reading.py --slide S.svs --slide-mpp 0.2527 --json figures.json
    python benchmarks/tile_reading.py --memory                 # a pass over 100,000 x 100,000 px within the budget

Ratios are medians of the ratios within each repeat, tiles a second are medians over the repeats. "cpu" ratios count
processor time instead of time on the clock: on a busy machine they are the ones to trust.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.geometry import IntPair, TileGrid, TissueMask
from wsi_pipe.overview import read_overview
from wsi_pipe.slides.base import Plane
from wsi_pipe.slides.codecs.fastjpeg import decode_tiles
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.tiles import StreamStats, stream_tiles
from wsi_pipe.tiles.plan import choose_cut
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

TILE_PX = 256
BATCH = 64


# A slide ---------------------------------------------------------------------------------------------------------


class Mosaic:
    """A level of a drawn slide: a seamless patch of stained texture inside ellipses on a pale background.

    The grain is such that JPEG tiles have the size that they have on real 40x slides, about 20 kB at quality 85.
    """

    def __init__(self, size_px: int, downsample: int, seed: int = 0) -> None:
        self.downsample, self.full = downsample, size_px
        self.size_px = (size_px // downsample, size_px // downsample)
        rng = np.random.default_rng(seed)
        side = 2048
        # White noise filtered on a torus is seamless.
        height = np.zeros((side, side), np.float32)
        frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
        for sigma, amplitude in ((30, 14), (9, 16), (3.5, 14), (1.5, 9)):
            spectrum = np.fft.rfft2(rng.normal(size=(side, side))) * np.exp(-2 * (np.pi * sigma * frequency) ** 2)
            layer = np.fft.irfft2(spectrum, (side, side))
            height += (layer / layer.std() * amplitude).astype(np.float32)
        nuclei = np.zeros((side, side), np.float32)
        for x, y, r in zip(
            rng.integers(0, side, 2600), rng.integers(0, side, 2600), rng.integers(7, 15, 2600), strict=True
        ):
            cv2.circle(nuclei, (int(x), int(y)), int(r), 1.0, -1, cv2.LINE_AA)
        nuclei = cv2.GaussianBlur(nuclei, (0, 0), 1.0)[..., None]
        eosin = np.float32([215, 150, 195]) + height[..., None] * np.float32([0.6, 1.0, 0.7])
        blue = np.float32([110, 70, 150]) + height[..., None] * np.float32([0.8, 0.8, 0.6])
        picture = eosin * (1 - nuclei) + blue * nuclei
        if downsample > 1:
            picture = cv2.resize(picture, None, fx=1 / downsample, fy=1 / downsample, interpolation=cv2.INTER_AREA)
        self.picture = picture + rng.normal(0, 6, (*picture.shape[:2], 1)).astype(np.float32)

    def tile(self, column: int, row: int) -> np.ndarray:
        """Pixels of one tile, cut at the edge."""
        x = np.arange(column * TILE_PX, min((column + 1) * TILE_PX, self.size_px[0]))
        y = np.arange(row * TILE_PX, min((row + 1) * TILE_PX, self.size_px[1]))
        u, v = (x[None] * self.downsample / self.full), (y[:, None] * self.downsample / self.full)
        ellipses = ((0.36, 0.42, 0.27, 0.33), (0.74, 0.70, 0.19, 0.22), (0.80, 0.22, 0.11, 0.13))
        inside = np.zeros((len(y), len(x)), bool)
        for cx, cy, rx, ry in ellipses:
            inside |= ((u - cx) / rx) ** 2 + ((v - cy) / ry) ** 2 < 1
        tile = np.full((len(y), len(x), 3), (243, 242, 244), np.uint8)
        h, w = self.picture.shape[:2]
        patch = self.picture[(y % h)[:, None], (x % w)[None]]
        tile[inside] = np.clip(patch, 0, 255).astype(np.uint8)[inside]
        return tile


def make_slide(path: Path, size_px: int, codec: str) -> None:
    """A slide of its own: levels 1, 4, 16, 64 in JPEG; JPEG 2000 has one level, whose codec has the others."""
    downsamples = (1, 4, 16, 64) if codec == "jpeg" else (1,)
    size_px -= size_px % downsamples[-1]
    levels = [Mosaic(size_px, d) for d in downsamples]
    if codec == "jpeg":
        write_pyramid(path, levels, mpp=0.25, quality=85, subsampling="420", tile_px=TILE_PX)
    else:
        write_pyramid(path, levels, mpp=0.25, compression="jpeg2000", quality=38, tile_px=TILE_PX)


# The ways --------------------------------------------------------------------------------------------------------


def openslide_tile(slide: Any, grid: TileGrid, row: int) -> Any:
    """One tile the usual way, as a PIL image."""
    x, y = (int(v) for v in grid.coords[row])
    level = slide.get_best_level_for_downsample(grid.scale_l0[0] * 1.0001)
    side = round(grid.tile_size_l0[0] / slide.level_downsamples[level])
    image = slide.read_region((x, y), level, (side, side)).convert("RGB")
    return image if side == TILE_PX else image.resize((TILE_PX, TILE_PX))


def way_a(path: Path, grid: TileGrid) -> None:
    """OpenSlide and PIL, in a loop."""
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        for row in range(len(grid)):
            np.asarray(openslide_tile(slide, grid, row))


class LoaderTiles:
    """What peers hand to a DataLoader: a slide opened in each worker, torchvision's transforms on each tile."""

    def __init__(self, path: Path, grid: TileGrid) -> None:
        from torchvision import transforms

        self.path, self.grid, self.slide = path, grid, None
        self.transform = transforms.Compose(
            [
                transforms.Resize(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, row: int) -> Any:
        import openslide

        if self.slide is None:
            self.slide = openslide.OpenSlide(str(self.path))
        return self.transform(openslide_tile(self.slide, self.grid, row))


def way_a_loader(path: Path, grid: TileGrid, workers: int) -> float:
    """Seconds for all tiles after the first batch, so that the workers' start does not count."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(LoaderTiles(path, grid), batch_size=16, num_workers=workers)  # type: ignore[arg-type]
    batches = iter(loader)
    first = len(next(batches))
    begin = time.perf_counter()
    rest = sum(len(batch) for batch in batches)
    return (time.perf_counter() - begin) * (first + rest) / max(rest, 1)


def way_b(path: Path, mpp: float, grid: TileGrid, threads: int, stats: StreamStats | None = None) -> Any:
    """This reader, from opening the file on."""
    with open_tiff(path, mpp=mpp) as slide:
        for _ in stream_tiles(slide, grid, batch_size=BATCH, threads=threads, stats=stats):
            pass
        return slide.stats


def decoded_blocks(path: Path, mpp: float, grid: TileGrid) -> Counter[tuple[Plane, IntPair]]:
    """Which blocks this reader decodes for a grid, and how often each."""
    counts: Counter[tuple[Plane, IntPair]] = Counter()
    with open_tiff(path, mpp=mpp) as slide:
        plain = slide.decode

        def counting(plane: Plane, cell: IntPair, data: Any) -> Any:
            counts[plane, cell] += 1
            return plain(plane, cell, data)

        at_once = slide.decode_into

        def counting_at_once(plane: Plane, cells: Any, datas: Any, outs: Any) -> list[bool]:
            done = at_once(plane, cells, datas, outs)
            counts.update((plane, cell) for cell, good in zip(cells, done, strict=True) if good)
            return done

        in_one_call = slide.read_into

        def counting_in_one_call(plane: Plane, cells: Any, room: Any) -> Any:
            found = in_one_call(plane, cells, room)
            counts.update((plane, (column, row)) for column, row in cells[found.done].tolist())
            return found

        slide.read_into = counting_in_one_call  # type: ignore[method-assign]
        slide.decode = counting  # type: ignore[method-assign]
        slide.decode_into = counting_at_once  # type: ignore[method-assign]
        for _ in stream_tiles(slide, grid, batch_size=BATCH, threads=1):
            pass
    return counts


def native_streams(path: Path, mpp: float, blocks: Iterable[tuple[Plane, IntPair]]) -> list[bytes]:
    """The JPEG streams of native tiles, complete in themselves."""
    streams = []
    with open_tiff(path, mpp=mpp) as slide:
        for plane, cell in blocks:
            image: Any = slide.images[plane.level]
            image = getattr(image, "_image", image)  # of a level whose gaps are filled from the finer one
            (data,) = slide.fetch(plane, [cell])
            streams.append(image._decoder.stream(data[0]))
    return streams


def way_c(streams: list[bytes], reduce: int, threads: int) -> None:
    """libjpeg-turbo and nothing else."""
    import simplejpeg

    options = {"min_height": 1, "min_width": 1, "min_factor": reduce} if reduce > 1 else {}
    if reduce > 1:
        height, width = simplejpeg.decode_jpeg_header(streams[0])[:2]
        options |= {"min_height": height // reduce, "min_width": width // reduce}

    def decode(part: list[bytes]) -> None:
        for stream in part:
            simplejpeg.decode_jpeg(stream, "RGB", **options)

    if threads == 1:
        decode(streams)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [streams[i : i + 64] for i in range(0, len(streams), 64)]))


def way_d(streams: list[bytes], reduce: int, threads: int) -> None:
    """This package's decoder and nothing else, in batches as the reader's jobs have them."""
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(streams[0])[:2]

    def decode(part: list[bytes]) -> None:
        outs = [np.empty((-(-height // reduce), -(-width // reduce), 3), np.uint8) for _ in part]
        assert all(decode_tiles(part, outs, (width, height), 3, ycbcr=True, reduce=reduce))

    parts = [streams[i : i + 64] for i in range(0, len(streams), 64)]
    if threads == 1:
        for part in parts:
            decode(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, parts))


def way_cucim(path: Path, grid: TileGrid) -> None:
    """cuCIM on the CPU and OpenCV's area resize."""
    from cucim import CuImage

    slide = CuImage(str(path))
    downsamples = slide.resolutions["level_downsamples"]
    level = max(i for i, d in enumerate(downsamples) if d <= grid.scale_l0[0] * 1.0001)
    side = round(grid.tile_size_l0[0] / downsamples[level])
    for x, y in grid.coords.tolist():
        region = np.asarray(slide.read_region((x, y), (side, side), level))
        if side != TILE_PX:
            cv2.resize(region, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)


def has_cucim() -> bool:
    """Whether cuCIM can be imported."""
    try:
        import cucim  # noqa: F401
    except Exception:
        return False
    return True


# Measuring -------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Time of one call: on the clock, and of the processor in this process."""
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - cpu


def measure(path: Path, mpp: float, grid: TileGrid, args: argparse.Namespace, cores: list[int]) -> dict[str, Any]:
    """All ways on one grid: tiles a second (medians over repeats), and their ratios (medians of ratios)."""
    is_jpeg = args.codec == "jpeg"
    counts = decoded_blocks(path, mpp, grid)
    reduce = next(iter(counts))[0].reduce
    streams = native_streams(path, mpp, sorted(counts, key=lambda key: key[1][::-1])) if is_jpeg else []
    single: dict[str, Callable[[], object]] = {
        "a": lambda: way_a(path, grid),
        "b": lambda: way_b(path, mpp, grid, 1),
    }
    several: dict[str, Callable[[], object]] = {"b'": lambda: way_b(path, mpp, grid, len(cores))}
    if is_jpeg:
        single["c"] = lambda: way_c(streams, reduce, 1)
        several["c'"] = lambda: way_c(streams, reduce, len(cores))
        out = np.empty((TILE_PX // reduce, TILE_PX // reduce, 3), np.uint8)
        if decode_tiles(streams[:1], [out], (TILE_PX, TILE_PX), 3, ycbcr=True, reduce=reduce)[0]:
            single["d"] = lambda: way_d(streams, reduce, 1)
            several["d'"] = lambda: way_d(streams, reduce, len(cores))
    if has_cucim():
        single["cu"] = lambda: way_cucim(path, grid)
    times: dict[str, list[float]] = {}
    cpu_times: dict[str, list[float]] = {}

    def take(ways: dict[str, Callable[[], object]]) -> None:
        for name, work in ways.items():
            clock, cpu = seconds(work)
            times.setdefault(name, []).append(clock)
            cpu_times.setdefault(name, []).append(cpu)

    for _ in range(args.repeats):
        os.sched_setaffinity(0, cores[-1:])
        take(single)
        os.sched_setaffinity(0, cores)
        if len(cores) > 1:
            take(several)
            if not args.no_loader:
                times.setdefault("a'", []).append(way_a_loader(path, grid, len(cores)))

    os.sched_setaffinity(0, cores[-1:])
    stats = StreamStats()
    read = way_b(path, mpp, grid, 1, stats)
    os.sched_setaffinity(0, cores)
    with open_tiff(path, mpp=mpp) as slide:
        cut = choose_cut(slide.planes, grid.scale_l0, grid.corners_l0)

    def ratio(upper: str, lower: str, taken: dict[str, list[float]] = times) -> float | None:
        """How many times faster ``upper`` is than ``lower``, within each repeat."""
        if upper not in taken or lower not in taken:
            return None
        return statistics.median(low / up for up, low in zip(taken[upper], taken[lower], strict=True))

    gain_b, gain_c = ratio("b'", "b"), ratio("c'", "c")
    return {
        "tiles": len(grid),
        "mpp": mpp,
        "mpp_effective": grid.mpp_effective[0],
        "plane": {"level": cut.plane.level, "reduce": cut.plane.reduce, "ratio": cut.ratio[0], "shrink": cut.shrink},
        "tiles_per_s": {name: len(grid) / statistics.median(t) for name, t in sorted(times.items())},
        "tiles_per_cpu_s": {name: len(grid) / statistics.median(t) for name, t in sorted(cpu_times.items())},
        "b/a": ratio("b", "a"),
        "b/c": ratio("b", "c"),
        "b/d": ratio("b", "d"),
        "b/a cpu": ratio("b", "a", cpu_times),
        "b/c cpu": ratio("b", "c", cpu_times),
        "b/d cpu": ratio("b", "d", cpu_times),
        "b/cu cpu": ratio("b", "cu", cpu_times),
        "b'/a'": ratio("b'", "a'"),
        "b/cu": ratio("b", "cu"),
        "threads_gain_b": gain_b,
        "threads_gain_c": gain_c,
        "threads_b_over_c": gain_b / gain_c if gain_b and gain_c else None,
        "native_tiles_per_tile": len(counts) / len(grid),
        "decoded_more_than_once": sum(n > 1 for n in counts.values()),
        "bytes_read": read.bytes_fetched,
        "bytes_of_file": path.stat().st_size,
        "peak_pixels_bytes": stats.peak_bytes,
        "stages_cpu_s": {s: getattr(stats, f"{s}_cpu_s") for s in ("fetch", "decode", "copy", "resample")},
        "stages_s": {s: getattr(stats, f"{s}_s") for s in ("fetch", "decode", "copy", "resample")},
    }


def show(title: str, figures: dict[str, Any]) -> None:
    """One grid's figures, for reading."""
    speed = "  ".join(f"{name} {value:.0f}" for name, value in figures["tiles_per_s"].items())
    print(f"\n{title}: {figures['tiles']} tiles at {figures['mpp_effective']:g} um/px, {figures['plane']}")
    print(f"  tiles/s   {speed}")
    names = (
        "b/a",
        "b/c",
        "b/d",
        "b/a cpu",
        "b/c cpu",
        "b/d cpu",
        "b'/a'",
        "b/cu",
        "b/cu cpu",
        "threads_gain_b",
        "threads_gain_c",
        "threads_b_over_c",
    )
    print("  ratios    " + "  ".join(f"{n} {figures[n]:.2f}" for n in names if figures[n] is not None))
    print(
        f"  blocks    {figures['native_tiles_per_tile']:.2f} a tile, "
        f"{figures['decoded_more_than_once']} decoded more than once, "
        f"{figures['bytes_read'] / 1e6:.1f} of {figures['bytes_of_file'] / 1e6:.1f} MB read, "
        f"peak {figures['peak_pixels_bytes'] / 2**20:.0f} MiB of pixels"
    )
    cpu = figures["stages_cpu_s"]
    total = sum(cpu.values()) or 1.0
    print("  b's time  " + "  ".join(f"{stage} {value / total:.0%}" for stage, value in cpu.items()))


# Memory ----------------------------------------------------------------------------------------------------------


def write_repeated(path: Path, side: int) -> None:
    """A TIFF of ``side`` x ``side`` px at one level, full of tissue, whose tiles are four in the file, again and again.

    So it takes a second to write and little room, and reads as any other.
    """
    import simplejpeg

    source = Mosaic(8192, 1)
    tiles = [simplejpeg.encode_jpeg(source.tile(10 + i, 12), quality=85, colorsubsampling="420") for i in range(4)]
    across = -(-side // TILE_PX)
    order = (np.arange(across)[:, None] + np.arange(across)[None]).ravel() % len(tiles)
    sizes = np.array([len(tile) for tile in tiles], np.uint32)
    starts = (8 + np.cumsum(sizes) - sizes).astype(np.uint32)
    offsets, counts = starts[order].tobytes(), sizes[order].tobytes()
    short, long = 3, 4
    bits_at = 8 + int(sizes.sum()) + int(sizes.sum()) % 2
    offsets_at = bits_at + 6 + 2
    counts_at = offsets_at + len(offsets)
    tags = [
        *((256, long, 1, side), (257, long, 1, side), (258, short, 3, bits_at), (259, short, 1, 7)),
        *(
            (262, short, 1, 6),
            (277, short, 1, 3),
            (284, short, 1, 1),
            (322, short, 1, TILE_PX),
            (323, short, 1, TILE_PX),
        ),
        *((324, long, len(order), offsets_at), (325, long, len(order), counts_at), (530, short, 2, 2 | 2 << 16)),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    body = b"".join(tiles).ljust(bits_at - 8, b"\0") + struct.pack("<HHHH", 8, 8, 8, 0) + offsets + counts
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + directory)


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A full pass over a slide of 100,000 x 100,000 px full of tissue: memory of the process, against the budget."""
    side = 100_000
    path = folder / "large.tif"
    if not path.exists():
        print(f"writing {path}: {side} x {side} px", flush=True)
        write_repeated(path, side)
    figures = {}
    for mpp in (0.2527, 0.2312):
        pid_file = folder / "memory.json"
        # A process of its own, so that the peak is that of the pass alone.
        pid = os.fork()
        if pid == 0:
            try:
                pid_file.write_text(json.dumps(_memory_pass(path, mpp, args.memory_mib << 20)))
                os._exit(0)
            except BaseException as error:
                print(f"failed: {error}", file=sys.stderr)
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit("the pass over the large slide failed")
        figures[str(mpp)] = result = json.loads(pid_file.read_text())
        print(
            f"mpp {mpp}: {result['tiles']} tiles, {result['tiles_per_s']:.0f}/s, budget {args.memory_mib} MiB, "
            f"process grew by {result['grown_bytes'] / 2**20:.0f} MiB, "
            f"pixels took {result['peak_pixels_bytes'] / 2**20:.0f} MiB"
        )
    return figures


def _memory_pass(path: Path, mpp: float, budget: int) -> dict[str, Any]:
    import psutil

    stats = StreamStats()
    with open_tiff(path, mpp=mpp) as slide:
        size = slide.pyramid.size_l0
        mask = TissueMask(np.ones((size[1] // 64, size[0] // 64), bool), (size[0] / (size[0] // 64),) * 2)
        grid = plan_grids(slide.pyramid, mask, TileSettings())[-1]
        before = psutil.Process().memory_info().rss
        begin = time.perf_counter()
        for _ in stream_tiles(slide, grid, batch_size=BATCH, memory_bytes=budget, stats=stats):
            pass
        spent = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tiles": len(grid),
        "tiles_per_s": len(grid) / spent,
        "budget_bytes": budget,
        "grown_bytes": max(peak - before, 0),
        "peak_pixels_bytes": stats.peak_bytes,
        "decodes": slide.stats.blocks_decoded / stats.blocks,
    }


# The command -----------------------------------------------------------------------------------------------------


def grids_of(path: Path, mpp: float, resolutions: tuple[float, ...], most: int) -> Iterator[TileGrid]:
    """Grids on the slide's tissue, finest first, cut to ``most`` tiles."""
    settings = SegmentSettings()
    with open_tiff(path, mpp=mpp) as slide:
        view = read_overview(slide, settings.mpp)
        mask = find_tissue(view.rgb, view.um_per_px, view.scale_l0, settings)
        for grid in reversed(plan_grids(slide.pyramid, mask, TileSettings(resolutions=resolutions))):
            yield grid.take(slice(most))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a tiled TIFF slide (default: one is made)")
    parser.add_argument("--slide-mpp", type=float, action="append", help="um per level-0 pixel; may be repeated")
    parser.add_argument("--size", type=int, default=32768, help="side of the slide that is made (default 32768)")
    parser.add_argument("--codec", choices=("jpeg", "jpeg2000"), default="jpeg", help="of the slide")
    parser.add_argument("--tiles", type=int, default=1024, help="at most this many tiles of a grid (default 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default 5)")
    parser.add_argument("--no-loader", action="store_true", help="leave out the DataLoader")
    parser.add_argument("--memory", action="store_true", help="measure memory on a slide of 100,000 px instead")
    parser.add_argument("--memory-mib", type=int, default=512, help="budget for --memory (default 512)")
    parser.add_argument("--folder", type=Path, help="where slides that are made are kept for another run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))
    report: dict[str, Any] = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(cores),
            "python": platform.python_version(),
        },
        "repeats": args.repeats,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.memory:
            report["memory"] = measure_memory(args, folder)
        else:
            path = args.slide
            if path is None:
                # JPEG 2000 takes long to write, and as long a tile to read.
                size = args.size if args.codec == "jpeg" else min(args.size, 4096)
                path = folder / f"mosaic-{args.codec}-{size}.svs"
                if not path.exists():
                    print(f"writing {path}", flush=True)
                    make_slide(path, size, args.codec)
            report["slide"] = path.name
            report["figures"] = []
            mpps = args.slide_mpp or ([0.2527, 0.2312] if args.codec == "jpeg" else [0.25])
            resolutions = (0.5, 2.0) if args.codec == "jpeg" else (0.5, 1.0)
            for mpp in mpps:
                for grid in grids_of(path, mpp, resolutions, args.tiles):
                    figures = measure(path, mpp, grid, args, cores)
                    show(f"{path.name}, slide mpp {mpp:g}, {grid.label}", figures)
                    report["figures"].append({"grid": grid.label, **figures})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
