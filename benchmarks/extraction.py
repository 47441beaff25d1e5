#!/usr/bin/env python3
"""How long an encoder waits: feature extraction against the usual way and against the model alone.

  a   the usual way: OpenSlide and PIL in a torch DataLoader with torchvision's transforms, one worker a core; float32
      images cross to the device; the same network under plain autocast
  b   wsi_pipe: extract_features, from the open slide to the features of every tile
  c   the model alone, on batches that already lie on the device, normalised

All in one process, on the same tiles, repeats interleaved in turning order. Ratios are medians of the ratios within
each repeat, tiles a second are medians over the repeats. Where the usual way gets fewer tiles, so as to end in time,
its seconds are compared tile by tile. With --precisions bfloat16,float32 the model is also run
alone in each, interleaved, and the ratio of the first to the last is shown. Weights are random: speed does not depend
on them.

    python benchmarks/extraction.py                                   # makes a slide of its own first
    python benchmarks/extraction.py --slide S.svs --slide-mpp 0.2527 --json figures.json
    python benchmarks/extraction.py --tiles 64 --repeats 3            # a short look
    python benchmarks/extraction.py --device cuda:0 --tiles 20000 --usual-tiles 5000 --read-threads 8 --json gpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tile_reading import make_slide, openslide_tile

from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.pixels import normalise
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.extract import ExtractItem, SlideFeatures, extract_features
from wsi_pipe.geometry import TileGrid, parse_resolution
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

MODELS = "vit_small_patch16_224,vit_base_patch16_224"


def lay_grid(path: Path, slide_mpp: float | None, mpp: float) -> TileGrid:
    """All tissue tiles of the slide at one resolution."""
    with contextlib.closing(open_slide(path, mpp=slide_mpp)) as slide:
        overview = read_overview(slide)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, SegmentSettings())
        return plan_grids(slide.pyramid, mask, TileSettings(resolutions=(mpp,)))[0]


def shares(grid: TileGrid, total: int) -> list[TileGrid]:
    """The grid as often as it takes to come to ``total`` tiles, the last one cut."""
    whole, rest = divmod(total, len(grid))
    return [grid] * whole + ([grid.take(slice(rest))] if rest else [])


class UsualTiles(torch.utils.data.Dataset[torch.Tensor]):
    """What peers hand to a DataLoader: a slide opened in each worker, PIL, torchvision's transforms."""

    def __init__(self, path: Path, grids: list[TileGrid], encoder: TorchEncoder) -> None:
        from torchvision import transforms

        pre = encoder.recipe.preprocessing
        self.path, self.slide = path, None
        self.rows = [(grid, row) for grid in grids for row in range(len(grid))]
        self.transform = transforms.Compose(
            [
                transforms.Resize(pre.input_px, transforms.InterpolationMode(pre.interpolation)),
                transforms.ToTensor(),
                transforms.Normalize(pre.mean, pre.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.slide is None:
            import openslide

            self.slide = openslide.OpenSlide(str(self.path))
        return self.transform(openslide_tile(self.slide, *self.rows[index]))


Times = dict[str, list[float]]
RUNNER = ThreadPoolExecutor(1)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def usual(path: Path, grids: list[TileGrid], encoder: TorchEncoder, batch: int, workers: int) -> None:
    """a: a loader for the slide, float32 images across, one batch after the other."""
    tiles = UsualTiles(path, grids, encoder)
    pinned = encoder.device.type == "cuda"
    loader = torch.utils.data.DataLoader(tiles, batch_size=batch, num_workers=workers, pin_memory=pinned)
    features = [encoder.forward(images.to(encoder.device, non_blocking=True)).float().cpu() for images in loader]
    assert sum(map(len, features)) == sum(map(len, grids))


def engine(
    path: Path, mpp: float | None, grids: list[TileGrid], encoder: TorchEncoder, options: dict[str, Any]
) -> None:
    """b: extract_features over the slides."""
    items = (
        ExtractItem(str(k), partial(open_slide, path, mpp=mpp), [grid], {grid.label: ["model"]})
        for k, grid in enumerate(grids)
    )
    for result in extract_features(items, {"model": encoder}, **options):
        if not isinstance(result, SlideFeatures):
            raise result.error


def alone(encoder: TorchEncoder, batches: list[torch.Tensor]) -> None:
    """c: the model on batches that lie on the device."""
    for images in batches:
        encoder.forward(images)
    synchronise(encoder.device)


def seconds(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """How long it takes on the clock, and in processor time of this process and its children."""
    synchronise(device)
    started, spent = time.perf_counter(), os.times()
    # Not in the main thread: OpenMP gives that one a team that waits by spinning, which on a machine with other work
    # costs several times the processor time. The engine's network runs in a thread of its own too.
    RUNNER.submit(work).result()
    elapsed, now = time.perf_counter() - started, os.times()
    return elapsed, sum(now[:4]) - sum(spent[:4])


def interleaved(ways: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> tuple[Times, Times]:
    """Seconds, and processor seconds, of every way in every repeat; each repeat begins with another way."""
    names = list(ways)
    times: Times = {name: [] for name in names}
    processor: Times = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            clock, spent = seconds(ways[name], device)
            times[name].append(clock)
            processor[name].append(spent)
    return times, processor


def ratio(times: Times, faster: str, slower: str, counts: dict[str, int] | None = None) -> float:
    """Median over the repeats of how much faster one way is than the other; counts: tiles of each, if they differ."""
    share = counts[faster] / counts[slower] if counts else 1.0
    return statistics.median(share * s / f for s, f in zip(times[slower], times[faster], strict=True))


def on_device(
    path: Path, mpp: float | None, grid: TileGrid, encoder: TorchEncoder, batch: int
) -> Iterator[torch.Tensor]:
    """Normalised batches of real tiles on the device."""
    with contextlib.closing(open_slide(path, mpp=mpp)) as slide:
        for tiles in stream_tiles(slide, grid, batch_size=batch):
            yield normalise(torch.from_numpy(tiles.pixels).to(encoder.device), encoder.recipe.preprocessing)


def measure(name: str, path: Path, args: argparse.Namespace, grid: TileGrid) -> dict[str, Any]:
    """All figures of one model."""
    chosen: Any = load_encoder(
        f"timm:{name}", device=args.device, precision=args.precision, random_weights=True, compile=args.compile
    )
    if not isinstance(chosen, TorchEncoder):
        raise SystemExit("several devices: choose one with --device")
    batch = args.batch_size or chosen.suggest_batch(grid.spec.size_px)
    total = max(batch, args.tiles - args.tiles % batch)
    grids = shares(grid, total)
    kept = list(on_device(path, args.slide_mpp, grid.take(slice(4 * batch)), chosen, batch))
    kept = [images for images in kept if len(images) == batch] or kept
    batches = [kept[k % len(kept)] for k in range(total // batch)]
    options = {"batch_size": batch, "read_threads": args.read_threads}
    ways: dict[str, Callable[[], None]] = {
        "b": lambda: engine(path, args.slide_mpp, grids, chosen, options),
        "c": lambda: alone(chosen, batches),
    }
    few_grids = shares(grid, min(args.usual_tiles or total, total))
    if not args.without_usual:
        ways["a"] = lambda: usual(path, few_grids, chosen, batch, args.workers)
    for way in ("c", "b"):  # kernels, memory and files are warm for all
        RUNNER.submit(ways[way]).result()
    times, processor = interleaved(ways, args.repeats, chosen.device)
    done = len(batches) * batch
    counts = dict.fromkeys(ways, done) | ({"a": sum(map(len, few_grids))} if "a" in ways else {})
    found: dict[str, Any] = {
        "model": name,
        "device": str(chosen.device),
        "precision": chosen.precision,
        "batch": batch,
        "tiles": counts,
        "slides": len(grids),
        "seconds": times,
        "tiles_per_s": {way: counts[way] / statistics.median(spent) for way, spent in times.items()},
        "b/c": ratio(times, "b", "c"),
        "processor_seconds": processor,
    }
    if "a" in times:
        found["b/a"] = ratio(times, "b", "a", counts)
    if chosen.device.type == "cpu":  # on a busy machine the clock says little, processor time still does
        found["b/c in processor time"] = ratio(processor, "b", "c")
    precisions = [word for word in args.precisions.split(",") if word]
    if len(precisions) > 1:
        few = batches[: max(1, args.precision_tiles // batch)]
        encoders = {
            word: load_encoder(f"timm:{name}", device=args.device, precision=word, random_weights=True)
            for word in precisions
        }
        runs = {word: partial(alone, encoder, few) for word, encoder in encoders.items()}
        for run in runs.values():
            RUNNER.submit(run).result()
        spent, _ = interleaved(runs, args.repeats, chosen.device)
        found["precision_seconds"] = spent
        found[f"{precisions[0]}/{precisions[-1]}"] = ratio(spent, precisions[0], precisions[-1])
    return found


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and not device.startswith("cpu") else None
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a slide; without it one is made")
    parser.add_argument("--slide-mpp", type=float, help="um/px of level 0, where the file does not say")
    parser.add_argument("--slide-px", type=int, default=16384, help="side of the slide that is made")
    parser.add_argument("-r", "--resolution", default="20x")
    parser.add_argument("--models", default=MODELS, help="timm models, separated by commas")
    parser.add_argument("--tiles", type=int, default=192, help="tiles of a repeat; slides are repeated to reach them")
    parser.add_argument("--usual-tiles", type=int, help="of the usual way, where that would take too long  [--tiles]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--precisions", default="bfloat16,float32", help="to compare, model alone; empty for none")
    parser.add_argument("--precision-tiles", type=int, default=32)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--read-threads", type=int)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the usual way's loader")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--without-usual", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.slide
        if path is None:
            path = Path(folder) / "made.tif"
            make_slide(path, args.slide_px, "jpeg")
        grid = lay_grid(path, args.slide_mpp, parse_resolution(args.resolution))
        if not len(grid):
            raise SystemExit(f"{path}: no tissue at {args.resolution}")
        about = machine(args.device)
        print(f"{about}\n{path.name}: {len(grid)} tiles at {args.resolution}, {args.repeats} repeats\n")
        models = []
        for name in args.models.split(","):
            found = measure(name, path, args, grid)
            models.append(found)
            speeds = ", ".join(f"{way} {speed:.1f}" for way, speed in sorted(found["tiles_per_s"].items()))
            shown = {key: round(value, 3) for key, value in found.items() if "/" in key}
            print(
                f"{name} on {found['device']} in {found['precision']}, batches of {found['batch']}, "
                f"{found['tiles']['b']} tiles of {found['slides']} slides\n  tiles/s: {speeds}\n  {shown}\n",
                flush=True,
            )
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        text = json.dumps({"machine": about, "settings": settings, "models": models}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
