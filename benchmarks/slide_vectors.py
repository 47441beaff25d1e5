"""Processor time and memory of slide vectors, of a probe and of stain normalisation.

    python benchmarks/slide_vectors.py

Bags are made here, of random features: what they say does not change what it takes. Slide encoders get weights of the
published shapes, drawn. Times are processor seconds of this process; memory is what its peak grew by.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lrmil.leaks import Judged
from lrmil.probe import Samples, probe
from lrmil.splits import make_splits
from wsi_pipe.bag import Bag, BagAttrs, BagLevel, Features, write_bag
from wsi_pipe.encoders.stain import StainNormaliser
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.pooling import pool_job
from wsi_pipe.pooling.networks import ChiefNetwork


def write_cohort(folder: Path, slides: int, tiles: int, dim: int) -> None:
    """Bags of one grid at 10x with features named as CTransPath's."""
    rng = np.random.default_rng(0)
    cells = np.stack([np.arange(tiles) % 100, np.arange(tiles) // 100], axis=1).astype(np.int32)
    grid = TileGrid(
        TileSpec(1.0),
        (1.0, 1.0),
        (0.0, 0.0),
        (1024.0, 1024.0),
        (1024.0, 1024.0),
        cells,
        np.ones(tiles, np.float32),
        None,
    )
    for number in range(slides):
        name = f"slide{number:03d}"
        values = rng.normal(size=(tiles, dim)).astype(np.float16)
        features = Features("ctranspath", values, "ab" * 32, "GPL-3.0", "float32", "{}", f"fp-{name}")
        attrs = BagAttrs(
            name, f"case{number:03d}", f"/slides/{name}.svs", f"{number:064d}", 200_000, 200_000, (0.25, 0.25), "file",
            "aperio", "tiff", "", "0.1.0", "2026-01-01T00:00:00Z", "done", "", "a", "b", "10x", "ctranspath",
        )  # fmt: skip
        write_bag(folder / f"{name}.h5", Bag(attrs, (BagLevel(grid, {"ctranspath": features}),)))


def measured(what: str, work: Callable[[], object], each: int, unit: str) -> None:
    """Run, and print a row of the table."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    work()
    spent = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"| {what} | {1000 * spent / each:.1f} ms a {unit} | {grown:.0f} MiB |")


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=4000, help="of a slide")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| step | processor time | memory at its peak, more than before |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder, given.slides, given.tiles, 768)
        torch.save(ChiefNetwork(768, 512, 256).state_dict(), folder / "chief.pth")
        for encoder, weights in (("mean", None), ("mean-spread", None), ("chief", folder / "chief.pth")):

            def pool(encoder: str = encoder, weights: Path | None = weights) -> None:
                done = list(pool_job(folder, encoder, weights=weights))
                assert {item.status for item in done} == {"written"}, done

            measured(f"`pool --slide-encoder {encoder}`, {given.tiles:,} tiles of 768", pool, given.slides, "slide")
    rng = np.random.default_rng(1)
    names = tuple(f"s{number}" for number in range(200))
    blank = ("",) * len(names)
    labels = np.arange(200) % 2
    samples = Samples(
        rng.normal(size=(200, 768)).astype(np.float32), labels, ("a", "b"), names, names, "net",
        Judged(names, names, blank, blank),
    )  # fmt: skip
    splits = make_splits(samples.case_labels(), 5)
    measured("`lrmil probe`, 200 slides of 768, five folds, all methods", lambda: probe(samples, splits), 1, "call")
    tiles = torch.from_numpy(rng.integers(60, 240, (64, 256, 256, 3)).astype(np.uint8))
    for method in ("macenko", "reinhard"):
        normalise = StainNormaliser(method)
        measured(f"`--normalise {method}`, tiles of 256 px", lambda: normalise(tiles), 64, "tile")  # noqa: B023


if __name__ == "__main__":
    main()
