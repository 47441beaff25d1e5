"""What reading, augmenting and gathering cost beside the student: a training step over the bare step on a ready batch.

    python benchmarks/distill_loader.py --student timm:test_resnet --tile-px 64
    python benchmarks/distill_loader.py --student timm:vit_tiny_patch16_224 --tile-px 224 --steps 12

Steps on one batch that lies ready, and steps with the loader at work, take turns in one process, so that what else the
machine does falls on both. The share is that of the time (on the clock, and of the processor, all threads) of the bare
step in that of the step with the loader: 1 where loading costs nothing. Tiles are kept decoded, and read anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lrmil.distill import DistillSettings
from lrmil.distill.children import child_map
from lrmil.distill.feed import Feed, ReadyBatch
from lrmil.distill.pixels import PixelSource
from lrmil.distill.student import Student
from lrmil.distill.targets import DistillSlide, target_stats, uniform_weights
from lrmil.distill.train import Runner, make_optimizer, train_step, variances_of
from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.devices import resolve_devices
from wsi_pipe.encoders.recipe import Preprocessing
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError
from wsi_pipe.manifest import read_manifest
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.synthetic import make_cohort
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

CHUNK = 4
"""Steps of one kind before the other kind has its turn."""


def slides_of(folder: Path, count: int, size_px: int, tile_px: int, dim: int) -> list[DistillSlide]:
    """Synthetic slides with random targets: reading and gathering do not look at them."""
    make_cohort(folder, count, seed=1, size_px=(size_px, size_px), mpp=0.5, max_slides_per_case=1)
    found = []
    for entry in read_manifest(folder / "slides.csv"):
        slide = open_slide(entry.path)
        view = read_overview(slide, SegmentSettings().mpp)
        mask = find_tissue(view.rgb, view.um_per_px, view.scale_l0, SegmentSettings())
        lr, hr = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(0.5, 2.0), tile_px=tile_px))
        children = child_map(lr, hr, entry.slide_id)
        final = np.random.default_rng(0).normal(size=(len(hr), dim)).astype(np.float16)
        found.append(
            DistillSlide(
                entry.slide_id, entry.case_id, entry.path, slide.pyramid.mpp or (0.5, 0.5), lr.take(children.rows),
                children, (final,), final, uniform_weights(children),
            )
        )  # fmt: skip
        slide.close()
    return found


def fresh(name: str, side_px: int) -> tuple[PooledNetwork, Preprocessing]:
    """A student of random weights, and how tiles of its side go in."""
    options = {"device": "cpu", "precision": "float32", "random_weights": True}
    try:
        encoder = load_encoder(name, **options, input_px=side_px)  # type: ignore[arg-type]
    except ConfigError:  # a ConvNet takes any side as it is
        encoder = load_encoder(name, **options)  # type: ignore[arg-type]
    assert isinstance(encoder, TorchEncoder)
    return encoder.network, dataclasses.replace(encoder.recipe.preprocessing, input_px=side_px, resize_px=None)


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--student", default="timm:test_resnet")
    parser.add_argument("--tile-px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="of each kind")
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--size-px", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512, help="of the teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = resolve_devices(given.device)[0]
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        slides = slides_of(Path(name), given.slides, given.size_px, given.tile_px, given.dim)
        stats = target_stats(slides, standardise=True)
        print(f"{sum(map(len, slides))} tiles of {given.tile_px} px in {len(slides)} slides, {given.student}, {device}")
        for kept, cache in (("kept", 4096), ("read anew", 0)):
            settings = DistillSettings(batch_size=given.batch_size, cache_mib=cache)
            network, pre = fresh(given.student, given.tile_px)
            k, dim = slides[0].children.k, given.dim
            student = Student(network, blocks=[], layer_dims=[dim], final_dim=dim, k=k, side_px=given.tile_px)
            student.to(device).requires_grad_(True).train()
            run, optimizer = Runner(student, pre, device, torch.float32), make_optimizer(student, settings)
            feed = Feed(PixelSource(slides, settings), stats, device)
            variances = variances_of(feed, settings)

            def step(batch: ReadyBatch, run: Runner = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
                train_step(run, batch, variances, optimizer, settings)  # noqa: B023

            def endless(feed: Feed = feed) -> object:
                epoch = 0
                while True:
                    yield from (b for b in feed.shuffled([0, epoch]) if len(b.source.tile) == given.batch_size)
                    epoch += 1

            batches = endless()
            ready = next(batches)  # type: ignore[call-overload]
            for _ in range(2):
                step(ready)
            bare: list[tuple[float, float]] = []
            loaded: list[tuple[float, float]] = []
            for _ in range(max(given.steps // CHUNK, 2)):
                bare.append(spent(lambda: [step(ready) for _ in range(CHUNK)]))  # noqa: B023
                loaded.append(spent(lambda: [step(next(batches)) for _ in range(CHUNK)]))  # noqa: B023
            row = {}
            for number, clock in enumerate(("wall", "processor")):
                one, both = (statistics.median(times[number] for times in kind) / CHUNK for kind in (bare, loaded))
                total = sum(times[number] for times in bare) / sum(times[number] for times in loaded)
                row |= {f"bare {clock} s": one, f"with loader {clock} s": both, f"share {clock}": one / both}
                row[f"share {clock}, of sums"] = total
            result[kept] = row
            print(f"tiles {kept}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps(vars(given) | {"json": "", "result": result}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
