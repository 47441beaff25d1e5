"""Commands on damaged files of every kind that they read: what ``archive_trials.py mutants`` does beside its batch.

Each mutant goes through the commands themselves, ``info``, ``plan``, ``run`` and ``benchmark`` on a folder that holds
some of them and a sound slide, or, where it is a list, settings, a mask or a file of a job, through what reads that. A
child process does many in turn and says of each what came; where it dies or hangs, or a folder of several has a fault,
each mutant of it is tried by itself and named, and another process goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import tifffile

from wsi_pipe.cli import group, run_group
from wsi_pipe.job import read_outcomes
from wsi_pipe.slides.writing.write import write_pyramid

BATCH = 15
"""Mutants of slides in one folder: most of a command's time is not theirs."""
LIMIT_CPU_S = 200.0
"""Far more processor seconds than any mutant takes. HDF5 loops for ever on some files; the commands end that after ten
processor seconds each time, which on a busy machine are many minutes."""
IDLE_S = 300.0
"""A process that did not compute for so long waits for something that does not come."""
OPTIONS = ["-r", "5x", "--slide-mpp", "0.5"]
Mutate = Callable[[bytes, np.random.Generator], tuple[str, bytes]]
SLIDES = ("svs", "deflate.tif", "lzw.tif", "jp2k.svs", "png", "jpg")
FILES = ("slides.csv", "config.toml", "mask.geojson", "bag.h5", "tiles.h5", "outcomes.jsonl", "job-slides.csv")


def picture(seed: int) -> Any:
    """An H&E-like picture with tissue in its middle, 768 x 640 px."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:640, :768].astype(np.float32)
    tissue = ((x / 768 - 0.5) / 0.36) ** 2 + ((y / 640 - 0.5) / 0.38) ** 2 < 1
    found = np.full((640, 768, 3), 243, np.float32)
    found[tissue] = (222, 150, 190)
    return np.clip(found + rng.normal(0, 8, (640, 768, 1)) * tissue[..., None], 0, 255).astype(np.uint8)


def originals(folder: Path) -> dict[str, Path]:
    """A sound file of each kind; the files of a job come from a run over a sound slide."""
    folder.mkdir(parents=True)
    full = picture(1)
    levels = [full, cv2.resize(full, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)]
    made = {name: folder / f"m.{name}" for name in SLIDES}
    write_pyramid(made["svs"], levels, mpp=0.5)
    write_pyramid(made["deflate.tif"], levels, mpp=0.5, compression="deflate")
    tifffile.imwrite(made["lzw.tif"], full, tile=(256, 256), compression="lzw", photometric="rgb")
    write_pyramid(made["jp2k.svs"], levels, mpp=0.5, compression="jpeg2000")
    for name in ("png", "jpg"):
        cv2.imwrite(str(made[name]), full)
    slide, job = folder / "good.svs", folder / "job"
    write_pyramid(slide, levels, mpp=0.5)
    code, told, _ = call(["run", str(slide), "-o", str(job), *OPTIONS])
    if code:
        raise SystemExit(f"the sound run failed: {told}")
    table = folder / "list.csv"
    table.write_text(f"slide,slide_id,case_id,mpp,min_tissue\n{slide},good,c1,0.5,0.2\n{slide},again,c2,0.5x0.5,\n")
    return made | {
        "slides.csv": table,
        "config.toml": job / "config.toml",
        "mask.geojson": job / "tissue/good.geojson",
        "bag.h5": job / "bags/good.h5",
        "tiles.h5": job / "tiles/good.h5",
        "outcomes.jsonl": job / "outcomes.jsonl",
        "job-slides.csv": job / "slides.csv",
    }


def call(arguments: list[str]) -> tuple[int | None, str, str]:
    """A command in this process: its exit code, what it printed, and the traceback of what escaped it."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code: int | None = run_group(group, "wsi-pipe", arguments)
            escaped = ""
        except BaseException:  # what escapes is what is looked for
            code, escaped = None, traceback.format_exc()
    return code, told.getvalue(), escaped


def commands_on(kind: str, mutants: list[Path], folder: Path, sound: dict[str, Path]) -> Iterator[list[str]]:
    """The commands that read mutants, one of them unless they are slides, in a folder of their own."""
    slide = sound["slides.csv"].parent / "good.svs"
    job, inside = folder / "job", folder / "in"
    if kind in SLIDES:
        inside.mkdir()
        shutil.copy(slide, inside / "good.svs")
        for mutant in mutants:
            mutant.rename(inside / mutant.name)
        yield ["info", str(inside)]
        yield ["plan", str(inside), *OPTIONS]
        yield ["run", str(inside), "-o", str(job), *OPTIONS]
        yield ["benchmark", str(inside), "-o", str(folder / "bench"), "--repeats", "1", *OPTIONS]
        return
    (mutant,) = mutants
    given = {
        "slides.csv": [str(mutant)],
        "config.toml": [str(slide), "--config", str(mutant)],
        "mask.geojson": [str(slide), "--mask", str(mutant)],
    }.get(kind)
    if given is not None:
        yield ["plan", *given, *OPTIONS]
        yield ["run", *given, "-o", str(job), *OPTIONS]
        if kind == "slides.csv":
            yield ["info", *given]
            yield ["benchmark", *given, "-o", str(folder / "bench"), "--repeats", "1", *OPTIONS]
        return
    shutil.copytree(sound["bag.h5"].parents[1], job)
    place = {"bag.h5": "bags/good.h5", "tiles.h5": "tiles/good.h5", "job-slides.csv": "slides.csv"}.get(kind, kind)
    mutant.rename(job / place)
    yield ["status", str(job)]
    yield ["verify", str(job)]
    yield ["run", "-o", str(job)]
    yield ["run", str(slide), "-o", str(job), "-r", "2.5x", "--slide-mpp", "0.5"]
    yield ["report", str(job)]


def faults_of(kind: str, mutants: list[Path], folder: Path, sound: dict[str, Path]) -> list[str]:
    """What is wrong with how the commands took mutants; nothing where each ended in words."""
    found = []
    for arguments in commands_on(kind, mutants, folder, sound):
        code, told, escaped = call(arguments)
        what = arguments[0]
        if escaped:
            found.append(f"{what}: {escaped.strip().splitlines()[-1]} [{escaped.strip().splitlines()[-3].strip()}]")
        elif "Traceback" in told:
            found.append(f"{what}: a traceback on the terminal")
        elif code not in (0, 1, 2):
            found.append(f"{what}: exit code {code}")
    if (folder / "job/outcomes.jsonl").is_file() and kind in SLIDES:
        outcomes = read_outcomes(folder / "job")
        found += [f"run: unforeseen: {o.reason} ({o.error})" for o in outcomes.values() if " at " in str(o.error)]
        if outcomes.get("good") is None or outcomes["good"].status != "done":
            found.append("run: the sound slide beside it is not done")
    return found


def worker(folder: Path) -> None:
    """Take mutants, a kind and paths a line, through their commands; a line of JSON for each line."""
    sound = {kind: Path(path) for kind, path in json.loads((folder / "sound.json").read_text()).items()}
    # What commands print goes into memory; this channel is for what the parent reads.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # Files are damaged here, and no power is cut: waiting for the disk is most of the time that small files take.
    os.fsync = lambda handle: None
    for line in sys.stdin:
        kind, names = json.loads(line)
        place = folder / "work"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        mutants = [Path(shutil.copy(name, place)) for name in names]
        print(json.dumps(faults_of(kind, mutants, place, sound)), file=channel)


def _processor_s(process: psutil.Process) -> float:
    """Processor seconds of a process, of its children, and of those that have ended."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


class Worker:
    """A child process that takes mutants, begun anew where it died or hung."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.child: subprocess.Popen[str] | None = None

    def faults(self, kind: str, mutants: list[Path]) -> list[str]:
        """``faults_of`` in the child."""
        if self.child is None:
            command = [sys.executable, __file__, str(self.folder)]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps([kind, list(map(str, mutants))]) + "\n")
        self.child.stdin.flush()
        ready = self._answers(len(mutants))
        line = self.child.stdout.readline() if ready else ""
        if line:
            found: list[str] = json.loads(line)
            return found
        self.child.kill()
        self.child.wait()
        self.child = None
        return [f"the process {'died' if ready else 'hangs'}"]

    def _answers(self, count: int) -> bool:
        """Wait for a line, or the end, of the child; False where it hangs."""
        assert self.child is not None
        process, before = psutil.Process(self.child.pid), -1.0
        start = _processor_s(process)
        while not select.select([self.child.stdout], [], [], IDLE_S)[0]:
            spent = _processor_s(process) - start
            if spent > LIMIT_CPU_S * count or spent <= before + 0.1:
                return False
            before = spent
        return True

    def close(self) -> None:
        if self.child is not None and self.child.stdin is not None:
            self.child.stdin.close()
            self.child.wait()


def try_commands(folder: Path, mutate: Mutate, each: int, seed: int, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """``each`` mutants of every kind of file, or of some, through the commands that read it: how many, and what went
    wrong."""
    sound = originals(folder / "sound")
    (folder / "sound.json").write_text(json.dumps({kind: str(path) for kind, path in sound.items()}))
    rng = np.random.default_rng(seed)
    counts, faults = Counter[str](), []
    child = Worker(folder)
    start = time.perf_counter()
    for kind, original in sound.items():
        if kinds and kind not in kinds:
            continue
        data = original.read_bytes()
        made: dict[Path, str] = {}
        for number in range(each):
            how, changed = mutate(data, rng)
            path = folder / f"{number:03d}.{kind}"
            path.write_bytes(changed)
            made[path] = f"{kind} {number} ({how})"
            if len(made) < (BATCH if kind in SLIDES else 1) and number + 1 < each:
                continue
            found = {what: child.faults(kind, list(made)) for what in [", ".join(made.values())]}
            if len(made) > 1 and any(found.values()):
                alone = {what: child.faults(kind, [path]) for path, what in made.items()}
                found = alone if any(alone.values()) else found
            counts[kind] += len(made)
            for what, said in found.items():
                for fault in said:
                    faults.append(f"{what}: {fault}")
                    print("fault:", faults[-1], flush=True)
            if not any(found.values()):
                for path in made:
                    path.unlink()
            made = {}
        print(f"{kind}: {counts[kind]} through commands", file=sys.stderr, flush=True)
    child.close()
    return {
        "files through commands": dict(counts),
        "faults of commands": len(faults),
        "seconds of commands": time.perf_counter() - start,
    }


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
