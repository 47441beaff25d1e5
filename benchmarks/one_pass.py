"""Four resolutions in one pass against 20x alone: processor seconds outside the encoder.

Each native tile is read and decoded once for all resolutions. The encoder gives zeros, so that what is measured is
opening, tissue, grids, reading, resampling, quality and bags. Tiles alone are 1.33 times as many.

    python benchmarks/one_pass.py --side 4096 --times 3
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.encoders.base import EncoderInfo, PendingFeatures
from wsi_pipe.job import open_job
from wsi_pipe.job.run import process
from wsi_pipe.manifest import SlideEntry, read_manifest
from wsi_pipe.synthetic import make_cohort

ARMS = {"20x": (0.5,), "20x 10x 5x 2.5x": (0.5, 1.0, 2.0, 4.0)}


class Nothing:
    """An encoder that costs nothing."""

    info = EncoderInfo("texture", "texture", 8, "0" * 64, "MIT")

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.zeros((len(tiles), 8), np.float32)

    def submit(self, tiles: NDArray[np.uint8]) -> PendingFeatures:
        values = self.encode(tiles)

        class Done:
            def result(self) -> NDArray[np.float32]:
                return values

        return Done()  # type: ignore[return-value]


def cpu_seconds(entries: list[SlideEntry], resolutions: tuple[float, ...], folder: Path) -> tuple[float, int]:
    """Processor seconds of all threads for a run over the slides into a new job, and its tiles."""
    settings = JobSettings(
        tile=TileSettings(resolutions=resolutions), extract=ExtractSettings(encoders={"*": ("texture",)})
    )
    paths = open_job(folder, settings, entries)
    start = time.process_time()
    outcomes = list(process(entries, settings, paths, encoders={"texture": Nothing()}))  # type: ignore[dict-item]
    seconds = time.process_time() - start
    wrong = [outcome.reason for outcome in outcomes if outcome.status != "done"]
    if wrong:
        raise SystemExit(f"failed: {wrong[0]}")
    return seconds, sum(sum(outcome.tiles.values()) for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="Of the slides, in pixels at 0.5 um.")
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = (arguments.side, arguments.side)
        make_cohort(root / "slides", arguments.slides, seed=1, size_px=size, mpp=0.5, max_slides_per_case=1)
        entries = read_manifest(root / "slides" / "slides.csv")
        found: dict[str, list[float]] = {name: [] for name in ARMS}
        for turn in range(arguments.times + 1):
            for name, resolutions in ARMS.items():
                seconds, tiles = cpu_seconds(entries, resolutions, root / "job")
                shutil.rmtree(root / "job")
                # The first turn warms up: imports, and tables that are made once.
                if turn:
                    found[name].append(seconds)
                    print(f"{name}: {seconds:.2f} s, {tiles:,} tiles", flush=True)
        alone, together = (float(np.median(values)) for values in found.values())
        print(f"ratio of medians {together / alone:.3f}: {alone:.2f} s alone, {together:.2f} s together")


if __name__ == "__main__":
    main()
