#!/usr/bin/env python3
"""What a slide costs beside reading tiles and encoding: milliseconds of processor time by step, beside an old commit.

A slide of real size (``real_size.py``) goes through ``run``'s own engine at 5x, again and again, each time in a job of
its own, with an encoder that costs nothing. Steps are clocked by the processor time of the process around the functions
that do them; with one slide at a time nothing else goes on then. What is between the slide's grids and its features is
reading and encoding, and counts for nothing here. Two trees take turns, a process each:

    python benchmarks/fixed_costs.py                              # this tree against the commit before the work on it
    python benchmarks/fixed_costs.py --old COMMIT --cm2 4 --rounds 5 --json figures.json
    python benchmarks/fixed_costs.py --slide a.svs --only new     # this tree alone, on a slide of yours

Also printed: files written and bytes of them that a job of one slide has, and whether matplotlib and pandas were
imported by the time the bag was there.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLD = "03787ff"
"""Before pictures left the critical path and the bag became the one file that is checked."""

STEPS: dict[str, tuple[str, ...]] = {
    "open": ("wsi_pipe.job.prepare.open_entry", "wsi_pipe.job.prepare.Identity"),
    "overview": ("wsi_pipe.job.masks.read_overview", "wsi_pipe.job.grids.read_overview"),
    "tissue": ("wsi_pipe.job.masks.find_tissue",),
    "mask file": ("wsi_pipe.job.masks._write_mask", "wsi_pipe.job.masks.trace_mask"),
    "grids": ("wsi_pipe.job.grids.plan_grids", "wsi_pipe.job.grids.mask_content", "wsi_pipe.job.grids.laid_attrs"),
    "grid file": ("wsi_pipe.job.grids.write_bag",),
    "pictures": (
        "wsi_pipe.job.masks._draw_tissue",
        "wsi_pipe.job.grids._draw_grids",
        "wsi_pipe.job.run.draw_slide",
    ),
    "bag": ("wsi_pipe.job.run.assemble",),
    "outcome": ("wsi_pipe.job.run._Run._note",),
}
"""Step -> the functions that do it, of this version and of earlier ones; those that are not there are passed over."""


def clocked(spent: dict[str, float]) -> None:
    """Put clocks of processor time around the functions of all steps; what one does within another counts once."""
    import importlib

    inside: list[str] = []

    def wrapped(step: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return fn(*args, **kwargs)
            inside.append(step)
            before = time.process_time()
            try:
                return fn(*args, **kwargs)
            finally:
                spent[step] = spent.get(step, 0.0) + time.process_time() - before
                inside.pop()

        return work

    for step, names in STEPS.items():
        for name in names:
            path, _, attribute = name.rpartition(".")
            owner: Any = None
            parts = path.split(".")
            for length in range(len(parts), 0, -1):
                try:
                    owner = importlib.import_module(".".join(parts[:length]))
                except ImportError:
                    continue
                for part in parts[length:]:
                    owner = getattr(owner, part, None)
                break
            if owner is not None and hasattr(owner, attribute):
                setattr(owner, attribute, wrapped(step, getattr(owner, attribute)))


def measure(slide: Path, resolution: str, repeats: int, folder: Path) -> dict[str, Any]:
    """This process's tree: milliseconds by step, medians over the repeats."""
    import numpy as np

    from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
    from wsi_pipe.encoders.base import EncoderInfo
    from wsi_pipe.geometry import parse_resolution
    from wsi_pipe.job import open_job
    from wsi_pipe.job import run as job_run
    from wsi_pipe.manifest import SlideEntry

    class Done:
        def __init__(self, values: Any) -> None:
            self.values = values

        def result(self) -> Any:
            return self.values

    class Nothing:
        """An encoder that costs next to nothing: the first pixel of each tile, repeated."""

        info = EncoderInfo("nothing", "nothing", 384, "0" * 64, "none")

        def encode(self, tiles: Any) -> Any:
            return np.repeat(tiles[:, :1, 0, 0].astype(np.float32), 384, axis=1)

        def submit(self, tiles: Any) -> Any:
            return Done(self.encode(tiles))

    settings = JobSettings(
        tile=TileSettings(resolutions=(parse_resolution(resolution),)),
        extract=ExtractSettings(encoders={"*": ("nothing",)}),
    )
    spent: dict[str, float] = {}
    plain = job_run.extract_features
    edge: dict[str, float] = {}

    def watched(items: Any, *args: Any, **kwargs: Any) -> Any:
        def handed() -> Any:
            for item in items:
                edge["begin"] = time.process_time()
                yield item

        for result in plain(handed(), *args, **kwargs):
            edge["end"] = time.process_time()
            yield result

    job_run.extract_features = watched
    clocked(spent)
    rows: list[dict[str, float]] = []
    facts: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        root = folder / f"job{repeat}"
        entry = SlideEntry(slide_id="slide", path=str(slide), case_id="slide")
        paths = open_job(root, settings, [entry])
        spent.clear()
        begin, wall = time.process_time(), time.perf_counter()
        (outcome,) = job_run.process([entry], settings, paths, encoders={"nothing": Nothing()})
        total = time.process_time() - begin
        assert outcome.status == "done", outcome
        reading = edge["end"] - edge["begin"]
        # The engine's thread takes the item that was made in the caller's: what it does from there on is reading.
        row = {step: 1000 * spent.get(step, 0.0) for step in STEPS}
        row["all but reading and encoding"] = 1000 * (total - reading)
        row["reading and encoding"] = 1000 * reading
        row["clock, all"] = 1000 * (time.perf_counter() - wall)
        if repeat:
            rows.append(row)
        else:
            facts["imported"] = [name for name in ("matplotlib", "pandas") if name in sys.modules]
            files = [path for path in root.rglob("*") if path.is_file()]
            facts["files"] = sorted(str(path.relative_to(root)) for path in files)
            facts["bytes"] = sum(path.stat().st_size for path in files)
            facts["tiles"] = dict(outcome.tiles)
            facts["tissue_mm2"] = outcome.counts["tissue_mm2"]
        shutil.rmtree(root)
    facts["ms"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return facts


def tree_of(commit: str, here: Path, folder: Path) -> Path:
    """A checkout of a commit, with the compiled parts of this tree where their source is the same."""
    tree = folder / "old"
    subprocess.run(["git", "clone", "-q", "--shared", str(here), str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "checkout", "-q", commit], check=True)
    for library in here.glob("wsi_pipe/**/_*.so"):
        place = library.relative_to(here)
        source = place.with_suffix(".c")
        if (here / source).read_bytes() == (tree / source).read_bytes():
            shutil.copy(library, tree / place)
        else:
            raise SystemExit(f"{source} is another in {commit}: build it there, and give the tree with --old-tree")
    return tree


def child(tree: Path, args: argparse.Namespace, slide: Path, folder: Path) -> dict[str, Any]:
    """``measure`` in a process of its own, with the packages of a tree."""
    own = folder / "jobs"
    own.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).absolute()), "--measure", str(own), "--slide", str(slide)]
    command += ["--resolution", args.resolution, "--repeats", str(args.repeats)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a slide of yours, in place of one that is made")
    parser.add_argument("--cm2", type=float, default=4.0, help="tissue of the slide that is made")
    parser.add_argument("--resolution", default="5x")
    parser.add_argument("--old", default=OLD, help="commit to compare with")
    parser.add_argument("--old-tree", type=Path, help="a checkout of it that is there already")
    parser.add_argument("--only", choices=("new", "old"))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each tree, in turns")
    parser.add_argument("--repeats", type=int, default=5, help="slides in each process, after one that does not count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.slide, args.resolution, args.repeats, args.measure)))
        return
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="fixed-costs-") as scratch:
        folder = Path(scratch)
        slide = args.slide
        if slide is None:
            from real_size import make_real_slide, size_for_tissue

            slide = folder / "slide.svs"
            make_real_slide(slide, size_for_tissue(args.cm2))
        trees = {"old": args.old_tree, "new": here}
        if args.only:
            trees = {args.only: trees[args.only]}
        if "old" in trees and trees["old"] is None:
            trees["old"] = tree_of(args.old, here, folder)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for turn in range(args.rounds):
            for name in list(trees) if turn % 2 == 0 else list(trees)[::-1]:
                found[name].append(child(trees[name], args, slide.absolute(), folder))
    report(found, args)


def report(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Print the table, and write the figures."""
    figures: dict[str, Any] = {}
    for name, runs in found.items():
        steps = {step: statistics.median(run["ms"][step] for run in runs) for step in runs[0]["ms"]}
        figures[name] = {"ms": steps} | {key: runs[0][key] for key in runs[0] if key != "ms"}
    first = next(iter(figures.values()))
    print(f"{first['tissue_mm2'] / 100:.2f} cm2 of tissue, tiles {first['tiles']}, load {os.getloadavg()[0]:.1f}")
    names = list(figures)
    print(
        f"{'CPU ms a slide':32}" + "".join(f"{name:>10}" for name in names) + ("     ratio" if len(names) > 1 else "")
    )
    for step in first["ms"]:
        values = [figures[name]["ms"][step] for name in names]
        ratio = f"{values[0] / values[1]:10.2f}" if len(values) > 1 and values[1] else ""
        print(f"{step:32}" + "".join(f"{value:10.1f}" for value in values) + ratio)
    for name in names:
        own = figures[name]
        imported = ", ".join(own["imported"]) or "neither"
        print(f"{name}: {len(own['files'])} files, {own['bytes'] / 1e6:.2f} MB; imported: {imported}")
    if args.json:
        args.json.write_text(json.dumps({"slide_cm2": args.cm2, "resolution": args.resolution, **figures}, indent=1))


if __name__ == "__main__":
    main()
