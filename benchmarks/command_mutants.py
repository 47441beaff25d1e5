"""Commands on damaged files of every kind that they read: what ``archive_trials.py mutants`` does beside its batch.

Each mutant goes through the commands themselves, ``info``, ``plan``, ``run`` and ``benchmark`` on a folder that holds
it and a sound slide, or, where it is a list, settings, a mask or a file of a job, through what reads that. A child
process does many in turn and says of each what came; where it dies or hangs, the mutant is named and another goes on.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from wsi_pipe.cli import group, run_group
from wsi_pipe.job import read_outcomes
from wsi_pipe.slides.writing.write import write_pyramid

LIMIT_S = 300.0
"""Far more than any mutant takes, also on a busy machine; the commands have a time-out for slides of their own."""
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


def commands_on(kind: str, mutant: Path, folder: Path, sound: dict[str, Path]) -> Iterator[list[str]]:
    """The commands that read a mutant, in a folder of its own."""
    slide = sound["slides.csv"].parent / "good.svs"
    job, inside = folder / "job", folder / "in"
    if kind in SLIDES:
        inside.mkdir()
        shutil.copy(slide, inside / "good.svs")
        mutant.rename(inside / mutant.name)
        yield ["info", str(inside)]
        yield ["plan", str(inside), *OPTIONS]
        yield ["run", str(inside), "-o", str(job), *OPTIONS]
        yield ["benchmark", str(inside), "-o", str(folder / "bench"), "--repeats", "1", *OPTIONS]
        return
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


def faults_of(kind: str, mutant: Path, folder: Path, sound: dict[str, Path]) -> list[str]:
    """What is wrong with how the commands took one mutant; nothing where each ended in words."""
    found = []
    for arguments in commands_on(kind, mutant, folder, sound):
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


def worker(folder: Path, kinds: list[str]) -> None:
    """Take mutants, one path a line, through their commands; a line of JSON for each."""
    sound = {kind: Path(path) for kind, path in json.loads((folder / "sound.json").read_text()).items()}
    # What commands print goes into memory; this channel is for what the parent reads.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        kind, name = json.loads(line)
        place = folder / "work"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        mutant = place / Path(name).name
        shutil.copy(name, mutant)
        print(json.dumps(faults_of(kind, mutant, place, sound)), file=channel)


def try_commands(folder: Path, mutate: Mutate, each: int, seed: int) -> dict[str, Any]:
    """``each`` mutants of every kind of file through the commands that read it: how many, and what went wrong."""
    sound = originals(folder / "sound")
    (folder / "sound.json").write_text(json.dumps({kind: str(path) for kind, path in sound.items()}))
    rng = np.random.default_rng(seed)
    counts, faults = Counter[str](), []
    child: subprocess.Popen[str] | None = None
    start = time.perf_counter()
    for kind, original in sound.items():
        data = original.read_bytes()
        for number in range(each):
            how, changed = mutate(data, rng)
            path = folder / f"{number:03d}.{kind}"
            path.write_bytes(changed)
            if child is None:
                command = [sys.executable, __file__, "worker", str(folder)]
                child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps([kind, str(path)]) + "\n")
            child.stdin.flush()
            ready = select.select([child.stdout], [], [], LIMIT_S)[0]
            line = child.stdout.readline() if ready else ""
            counts[kind] += 1
            if line:
                found = json.loads(line)
            else:
                found = [f"the process {'died' if ready else 'hangs'}"]
                child.kill()
                child.wait()
                child = None
            for fault in found:
                faults.append(f"{kind} {number} ({how}): {fault}")
                print("fault:", faults[-1], flush=True)
            if not found:
                path.unlink()
    if child is not None and child.stdin is not None:
        child.stdin.close()
        child.wait()
    return {
        "files through commands": dict(counts),
        "faults of commands": len(faults),
        "seconds of commands": time.perf_counter() - start,
    }


if __name__ == "__main__":
    worker(Path(sys.argv[2]), sys.argv[3:])
