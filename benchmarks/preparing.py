#!/usr/bin/env python3
"""Whether slides are prepared on all cores while the device encodes: the engine's wall time against its bounds.

Small slides go through ``run``'s own engine at 5x, with a stand-in for an encoder on a GPU: it takes a given time a
tile in which it holds no lock and no core. No engine can be faster than the stand-in alone, nor than all processor time
spread evenly over the cores; the first figure is how near it comes to the larger of the two. Trees take turns:

    python benchmarks/preparing.py                           # 40 slides, this tree alone
    python benchmarks/preparing.py --old-tree ../old --rounds 3 --json figures.json
    python benchmarks/preparing.py --tile-ms 0               # bound by the processor
    python benchmarks/preparing.py --tile-ms 20              # bound by the stand-in

Where other programs are at work the cores are not the engine's own: then "cores" are those that it got, its processor
seconds over its wall seconds at best, and only processor seconds say anything. The load is printed.
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
import threading
import time
from pathlib import Path
from typing import Any


def measure(folder: Path, count: int, tile_ms: float, resolution: str) -> dict[str, float]:
    """This process's tree: seconds of the engine on ``count`` slides, after one slide that does not count."""
    import numpy as np

    from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
    from wsi_pipe.cores import available_cores
    from wsi_pipe.encoders.base import EncoderInfo
    from wsi_pipe.geometry import parse_resolution
    from wsi_pipe.job import open_job
    from wsi_pipe.job.run import process
    from wsi_pipe.manifest import SlideEntry

    asleep = 0.0

    class Later:
        def __init__(self, values: Any, due: float) -> None:
            self.values, self.due = values, due

        @property
        def ready(self) -> bool:
            return time.perf_counter() >= self.due

        def result(self) -> Any:
            time.sleep(max(self.due - time.perf_counter(), 0))
            return self.values

    class StandIn:
        """Batches one after the other, each for so long a tile, as on a device of its own."""

        info = EncoderInfo("stand-in", "stand-in", 384, "0" * 64, "none")
        shares_batches = True
        in_flight = 2
        free_at = 0.0

        def encode(self, tiles: Any) -> Any:
            return self.submit(tiles).result()

        def submit(self, tiles: Any) -> Later:
            nonlocal asleep
            takes = len(tiles) * tile_ms / 1000
            asleep += takes
            self.free_at = max(self.free_at, time.perf_counter()) + takes
            return Later(np.repeat(tiles[:, :1, 0, 0].astype(np.float32), 384, axis=1), self.free_at)

    slides = sorted(folder.glob("*.svs"))
    settings = JobSettings(
        tile=TileSettings(resolutions=(parse_resolution(resolution),)),
        extract=ExtractSettings(encoders={"*": ("stand-in",)}),
    )
    most = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, sum(t.name == "wsi-pipe-prepare" for t in threading.enumerate()))

    found: dict[str, float] = {}
    for name, entries in (
        ("first", [SlideEntry(slide_id="first", path=str(slides[0]), case_id="first")]),
        ("all", [SlideEntry(f"s{n}", str(slides[n % len(slides)]), f"s{n}") for n in range(count)]),
    ):
        root = folder / f"job-{os.getpid()}-{name}"
        paths = open_job(root, settings, entries)
        over.clear()
        watcher = threading.Thread(target=watch, daemon=True)
        if name == "all":
            watcher.start()
        asleep = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = list(process(entries, settings, paths, encoders={"stand-in": StandIn()}))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        over.set()
        assert all(outcome.status == "done" for outcome in outcomes), outcomes
        assert {outcome.slide_id for outcome in outcomes} == {entry.slide_id for entry in entries}
        found = {
            "wall_s": wall,
            "cpu_s": cpu,
            "stand_in_s": asleep,
            "cores": available_cores(),
            "tiles": sum(sum(outcome.tiles.values()) for outcome in outcomes),
            "preparing_threads": most,
        }
        shutil.rmtree(root)
    found["bound_s"] = max(found["stand_in_s"], found["cpu_s"] / found["cores"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=40, help="slides in a job")
    parser.add_argument("--size-px", type=int, default=16384, help="level-0 pixels a side, a multiple of 4,096")
    parser.add_argument("--tile-ms", type=float, default=5.0, help="what the stand-in takes a tile")
    parser.add_argument("--resolution", default="5x")
    parser.add_argument("--old-tree", type=Path, help="a checkout of another commit, to take turns with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.slides, args.tile_ms, args.resolution)))
        return
    from real_size import make_real_slide

    trees = {"new": Path(__file__).resolve().parents[1]} | ({"old": args.old_tree} if args.old_tree else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(prefix="preparing-") as scratch:
        folder = Path(scratch)
        for seed in range(4):
            make_real_slide(folder / f"{seed}.svs", args.size_px, seed=seed)
        command = [sys.executable, str(Path(__file__).absolute()), "--measure", str(folder)]
        command += ["--slides", str(args.slides), "--tile-ms", str(args.tile_ms), "--resolution", args.resolution]
        for turn in range(args.rounds):
            for name in list(trees) if turn % 2 == 0 else list(trees)[::-1]:
                environment = os.environ | {"PYTHONPATH": str(trees[name].absolute())}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                one = json.loads(done.stdout.splitlines()[-1]) | {"load": os.getloadavg()[0]}
                found[name].append(one)
                print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in one.items()), flush=True)
    for name, runs in found.items():
        over = statistics.median(run["wall_s"] / run["bound_s"] for run in runs)
        best = min(run["wall_s"] / run["bound_s"] for run in runs)
        print(f"{name}: wall over bound {over:.2f} (median of {len(runs)}, best {best:.2f})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
