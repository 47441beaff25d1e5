#!/usr/bin/env python3
"""What a batch survives: kills, mutated slides, thousands of slides, a plan of a hundred thousand.

    python benchmarks/archive_trials.py kills   [--kills 50]
    python benchmarks/archive_trials.py mutants [--slides DIR] [--mutants 500] [--each 300]
    python benchmarks/archive_trials.py files   [--each 300] [--kinds svs bag.h5]
    python benchmarks/archive_trials.py resume  [--count 5000]
    python benchmarks/archive_trials.py many    [--count 2000]
    python benchmarks/archive_trials.py plan    [--rows 100000]

Each makes what it needs in a temporary folder, prints a table, and with --json FILE writes the figures. A trial's
``ok`` holds all its targets, and what was missed is listed by name. Exit code 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from command_mutants import FILES, SLIDES, try_commands

from wsi_pipe.bag import check_bag, read_bag
from wsi_pipe.job import read_outcomes
from wsi_pipe.outcome import STAGE_TIMES
from wsi_pipe.synthetic import make_cohort

RUN = [sys.executable, "-m", "wsi_pipe", "run"]


def features(job: Path) -> str:
    """One hash over the features of all bags."""
    digest = hashlib.sha256()
    for path in sorted((job / "bags").glob("*.h5")):
        for level in read_bag(path).levels:
            digest.update(path.name.encode() + level.features["texture"].values.tobytes())
    return digest.hexdigest()


def watched(command: list[str], log: Path, *, limit_s: float = 24 * 3600.0, **environment: str) -> dict[str, Any]:
    """Run a command to its end: wall and processor seconds, exit code, and memory over time of all its processes.

    limit_s: after that it hangs, and is ended; its exit code is None then.
    """
    start, before, samples = time.perf_counter(), _processor_s(), []
    with log.open("wb") as handle:
        process = psutil.Popen(command, stdout=handle, stderr=handle, env=os.environ | environment)
        while process.poll() is None and time.perf_counter() - start < limit_s:
            total = 0
            for one in [process, *_children(process)]:
                try:
                    total += one.memory_info().rss
                except psutil.Error:
                    continue
            samples.append(total)
            time.sleep(0.1)
        hangs = process.poll() is None
        if hangs:
            # Its worker processes end with it.
            process.kill()
            process.wait()
    return {
        "seconds": time.perf_counter() - start,
        "processor_s": _processor_s() - before,
        "code": None if hangs else process.returncode,
        "peak_mib": max(samples, default=0) >> 20,
        "samples": samples,
    }


def _processor_s() -> float:
    """Processor seconds of all children that have ended, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def verdict(targets: dict[str, bool]) -> dict[str, Any]:
    """Whether all targets were met, and those that were not."""
    missed = [target for target, met in targets.items() if not met]
    return {"missed": ", ".join(missed) or "none", "ok": not missed}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL a run at random moments, each resumed, against a run that nobody disturbed."""
    make_cohort(folder / "slides", 12, seed=1, size_px=(1536, 1536))
    base = [*RUN, str(folder / "slides/slides.csv"), "--workers", str(arguments.workers)]
    whole = watched([*base, "-o", str(folder / "whole")], folder / "whole.log")
    expected = features(folder / "whole")
    rng = np.random.default_rng(arguments.seed)
    job, corrupt, killed, runs = folder / "job", 0, 0, 0
    while killed < arguments.kills:
        runs += 1
        process = subprocess.Popen(
            [*base, "-o", str(job), "--no-report"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # From the first import to the last bag; a run that ends before its moment is done is no kill.
        time.sleep(float(rng.uniform(0.2, whole["seconds"])))
        killed += process.poll() is None
        process.kill()
        process.wait()
        bags = sorted((job / "bags").glob("*.h5"))
        corrupt += sum(bool(check_bag(path)) for path in bags)
        if len(bags) == 12 and process.returncode == 0:
            # All done: start over, so that the remaining kills meet work.
            same = features(job) == expected
            corrupt += not same
            subprocess.run(["rm", "-rf", str(job)], check=True)
    watched([*base, "-o", str(job)], folder / "last.log")
    outcomes = read_outcomes(job)
    return {
        "kills": killed,
        "runs": runs,
        "corrupt bags seen": corrupt,
        "slides lost": 12 - sum(o.status == "done" for o in outcomes.values()),
        "features equal byte for byte": features(job) == expected,
        **verdict({"no corrupt bag": corrupt == 0, "features equal byte for byte": features(job) == expected}),
    }


def mutate(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A truncated, bit-flipped, zeroed or lying copy."""
    kind = ["truncated", "flipped", "zeroed", "header"][int(rng.integers(4))]
    changed = bytearray(data)
    if kind == "truncated":
        return kind, data[: int(rng.integers(0, len(data)))]
    if kind == "flipped":
        for position in rng.integers(0, len(data), 64):
            changed[position] ^= 1 << int(rng.integers(8))
    elif kind == "zeroed":
        start = int(rng.integers(0, len(data)))
        changed[start : start + 4096] = bytes(len(changed[start : start + 4096]))
    else:
        # Tags and sizes lie near the start or near the end of a TIFF.
        for _ in range(8):
            near = int(rng.integers(0, 2048)) if rng.random() < 0.5 else len(data) - 1 - int(rng.integers(0, 4096))
            changed[min(max(near, 0), len(data) - 1)] = int(rng.integers(256))
    return kind, bytes(changed)


MUTANT_S = 60
MUTANT_MIB = 512


def mutants(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Mutated slides in one batch with five good ones, and mutants of every kind of file through the commands."""
    commands = try_commands(folder / "commands", mutate, arguments.each, arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    make_cohort(folder / "in/good", 5, seed=2, size_px=(1024, 1024))
    sources = [p for p in sorted(arguments.slides.glob("*")) if p.is_file()] if arguments.slides else []
    sources = sources or sorted((folder / "in/good").glob("*.svs")) or sorted((folder / "in/good").glob("*.tif*"))
    originals = {path: path.read_bytes() for path in sources}
    options = ["-r", "1um", "-r", "4um", "--slide-mpp", "1.0", "--workers", str(arguments.workers), "--no-report"]
    options += ["--timeout", str(MUTANT_S), "--memory", str(MUTANT_MIB)]
    # What the processes take with sound slides; the budget of a run comes on top, and nothing else may.
    sound = watched([*RUN, str(folder / "in/good"), "-o", str(folder / "sound"), *options], folder / "sound.log")
    kinds = Counter()
    (folder / "in/bad").mkdir(parents=True)
    for number in range(arguments.mutants):
        path = sources[number % len(sources)]
        kind, data = mutate(originals[path], rng)
        kinds[kind] += 1
        (folder / "in/bad" / f"m{number:03d}-{path.name}").write_bytes(data)
    # Were every slide to take all the time it may, and its process die and be tried again, the run would still end.
    limit_s = 600 + 2 * MUTANT_S * (arguments.mutants + 5) / arguments.workers
    command = [*RUN, str(folder / "in"), "-o", str(folder / "job"), *options]
    spent = watched(command, folder / "run.log", limit_s=limit_s)
    outcomes = read_outcomes(folder / "job")
    good = [o for o in outcomes.values() if not o.slide_id.startswith("m")]
    bad = [o for o in outcomes.values() if o.slide_id.startswith("m")]
    failed = [o for o in bad if o.status == "failed"]
    causes = Counter(o.error for o in failed)
    explained = [o for o in failed if o.reason and o.stage]
    timed_out = [o for o in failed if o.error == "TaskTimeoutError" and o.reason]
    unforeseen = [o for o in failed if " at " in str(o.error)]
    for outcome in unforeseen[:10]:
        print("unforeseen:", outcome.slide_id, outcome.reason, outcome.error)
    budget_mib = sound["peak_mib"] + MUTANT_MIB
    return {
        "mutants": dict(kinds),
        "good done": sum(o.status == "done" for o in good),
        "bad failed with a reason": len(explained) + len(timed_out),
        "bad that still read (changed pixels only)": sum(o.status != "failed" for o in bad),
        "causes": dict(causes),
        "unforeseen errors": len(unforeseen),
        "processes that died": causes.get("WorkerError", 0),
        "timed out": len(timed_out),
        "peak MiB, all processes": spent["peak_mib"],
        "budget MiB, all processes": budget_mib,
        "seconds": spent["seconds"],
        **commands,
        **verdict(
            {
                "no traceback, death or wait of a command": not commands["faults of commands"],
                "the 5 good slides are done": len(good) == 5 and all(o.status == "done" for o in good),
                "every bad slide has an outcome": len(bad) == arguments.mutants,
                "every failure has a reason": len(explained) + len(timed_out) == len(failed),
                "no error that nobody foresaw": not unforeseen,
                "no process died": not causes.get("WorkerError", 0),
                "the run ended by itself": spent["code"] in (0, 1),
                "memory within the budget": spent["peak_mib"] <= budget_mib,
            }
        ),
    }


def files(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Mutants of files through the commands alone, of every kind or of those named."""
    commands = try_commands(folder / "commands", mutate, arguments.each, arguments.seed, arguments.kinds or ())
    ok = verdict({"no traceback, death or wait of a command": not commands["faults of commands"]})
    return {**commands, **ok}


def many(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Thousands of small slides: memory over time, two workers against one, overhead a slide.

    Overhead is what the tool adds to the work itself: a slide's share of the wall time with one worker, without the
    start and end of a run (those of a run of one slide), less the sum of the slide's stages. The stages of one slide
    overlap a little where tiles are read and encoded, so that the processor time of a slide, in all its processes and
    with the start of the run, is told beside it.
    """
    make_cohort(folder / "slides", 20, seed=3, size_px=(768, 768))
    slides = sorted((folder / "slides").glob("*.svs")) or sorted((folder / "slides").glob("*.tif*"))
    rows = ["slide,slide_id"] + [f"{slides[i % 20]},s{i:05d}" for i in range(arguments.count)]
    part = max(arguments.count // 4, 2)
    for name, count in (("all", arguments.count), ("part", part), ("one", 1)):
        (folder / f"{name}.csv").write_text("\n".join(rows[: 1 + count]) + "\n")
    options = ["-r", "5x", "--no-report", "--memory", "256"]
    codes = []

    def run(name: str, job: str, workers: int, *more: str, **environment: str) -> dict[str, Any]:
        command = [*RUN, "--slides", str(folder / f"{name}.csv"), "-o", str(folder / job), *options]
        spent = watched([*command, "--workers", str(workers), *more], folder / "run.log", **environment)
        codes.append(spent["code"])
        return spent

    # On a quarter of the slides, interleaved.
    ratios, overheads, processor = [], [], []
    for repeat in range(3):
        spent = {}
        for workers in (1, 2):
            # The time-out makes a single worker a process of its own too, and each has one core: like is compared
            # with like.
            alike = {"WSI_PIPE_CORES": str(workers)}
            spent[workers] = run("part", f"job-{repeat}-{workers}", workers, "--timeout", "600", **alike)
        start = run("one", f"one-{repeat}", 1, "--timeout", "600", WSI_PIPE_CORES="1")
        ratios.append(spent[1]["seconds"] / spent[2]["seconds"])
        ends = start["seconds"] - _stages(folder / f"one-{repeat}")
        overheads.append((spent[1]["seconds"] - ends - _stages(folder / f"job-{repeat}-1")) / part)
        processor.append(spent[1]["processor_s"] / part)
    # And on all, where the start of a run weighs as little as it does in an archive.
    alone_on_all = run("all", "job-alone", 1, "--timeout", "600", WSI_PIPE_CORES="1")
    whole = run("all", "job", 2, "--timeout", "600", WSI_PIPE_CORES="2")
    outcomes = list(read_outcomes(folder / "job").values())
    alone = list(read_outcomes(folder / "job-0-1").values())
    tenth = max(len(whole["samples"]) // 10, 1)
    early, late = np.median(whole["samples"][tenth : 2 * tenth]), np.median(whole["samples"][-2 * tenth : -tenth])
    ratio, overhead_ms = alone_on_all["seconds"] / whole["seconds"], 1000 * float(np.median(overheads))
    done = sum(o.status == "done" for o in outcomes)
    return {
        "slides": len(outcomes),
        "done": done,
        "two workers over one": ratio,
        "two workers over one, a quarter of the slides (median of 3)": float(np.median(ratios)),
        "memory late over early": float(late / early),
        "peak MiB, all processes": whole["peak_mib"],
        "overhead a slide, one worker, ms (median of 3)": overhead_ms,
        "processor time a slide, one worker, ms (median of 3)": 1000 * float(np.median(processor)),
        **{f"{name}, ms (median)": 1000 * _median(o.seconds.get(name, 0.0) for o in alone) for name in STAGE_TIMES},
        "seconds": whole["seconds"],
        **verdict(
            {
                "every slide is done": done == len(outcomes) == arguments.count and set(codes) == {0},
                "memory is flat (late at most 1.2 times early)": bool(late <= 1.2 * early),
                "two workers do at least 1.7 times what one does": ratio >= 1.7,
                "overhead under 20 ms a slide": overhead_ms < 20,
            }
        ),
    }


RESUME_MS = 3.0


def resume(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run over slides that are all done: processor time a slide, less that of a run of one slide, and of ``verify``.

    The slides are made by links to twenty files, each an entry of its own.
    """
    make_cohort(folder / "slides", 20, seed=3, size_px=(768, 768))
    slides = sorted((folder / "slides").glob("*.svs")) or sorted((folder / "slides").glob("*.tif*"))
    rows = ["slide,slide_id"] + [f"{slides[i % 20]},s{i:05d}" for i in range(arguments.count)]
    for name, count in (("all", arguments.count), ("one", 1)):
        (folder / f"{name}.csv").write_text("\n".join(rows[: 1 + count]) + "\n")

    def run(name: str) -> dict[str, Any]:
        command = [*RUN, "--slides", str(folder / f"{name}.csv"), "-o", str(folder / name), "-r", "5x", "--no-report"]
        return watched(command, folder / "run.log")

    first = {name: run(name) for name in ("all", "one")}
    again = {name: run(name) for name in ("all", "one")}
    check = watched([sys.executable, "-m", "wsi_pipe", "verify", str(folder / "all")], folder / "verify.log")
    ms = 1000 * (again["all"]["processor_s"] - again["one"]["processor_s"]) / max(arguments.count - 1, 1)
    done = sum(outcome.status == "done" for outcome in read_outcomes(folder / "all").values())
    return {
        "slides": arguments.count,
        "first run, processor ms a slide": 1000 * first["all"]["processor_s"] / arguments.count,
        "resumed, processor ms a slide": ms,
        "resumed, seconds": again["all"]["seconds"],
        "verify, seconds": check["seconds"],
        **verdict(
            {
                "every slide is done": done == arguments.count and again["all"]["code"] == 0,
                "every bag is right": check["code"] == 0,
                f"at most {RESUME_MS:g} ms a slide": ms <= RESUME_MS,
            }
        ),
    }


def _stages(job: Path) -> float:
    """Seconds of all stages of all slides of a job."""
    return sum(o.seconds.get(name, 0.0) for o in read_outcomes(job).values() for name in STAGE_TIMES)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def plan(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A manifest of many rows against stub metadata: seconds and memory of planning itself."""
    rows = (f"https://127.0.0.1/{i}.svs,s{i},case{i // 3}" for i in range(arguments.rows))
    (folder / "all.csv").write_text("slide,slide_id,case_id\n" + "\n".join(rows) + "\n")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from wsi_pipe.config import JobSettings\n"
        "from wsi_pipe.manifest import read_manifest\n"
        "from wsi_pipe.plan import MetadataCache, SlideFacts, survey, total\n"
        "facts = SlideFacts(sizes_px=((100_000, 80_000), (25_000, 20_000)), mpp=(0.25, 0.25), mpp_source='stub')\n"
        "with MetadataCache() as cache:\n"
        "    entries = read_manifest(Path(sys.argv[1]))\n"
        "    totals = total(survey(entries, JobSettings(), cache, describe=lambda entry, reader: facts))\n"
        "print(totals.slides, totals.tiles)\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(folder / "all.csv")], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    targets = {"under 60 s": seconds < 60, "under 500 MiB": peak < 500}
    return {"rows": arguments.rows, "seconds": seconds, "peak MiB": peak, **verdict(targets)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kills", "mutants", "files", "many", "plan", "resume"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mutants", type=int, default=500)
    parser.add_argument("--each", type=int, default=300, help="mutants of each kind of file that go through commands")
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", choices=[*SLIDES, *FILES], help="of files; all by default"
    )
    parser.add_argument("--slides", type=Path, help="slides to mutate; synthetic ones where none are given")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = globals()[arguments.trial](Path(folder), arguments)
    print(f"| {arguments.trial} | |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |")
    if arguments.json:
        machine = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
        arguments.json.write_text(json.dumps({"trial": arguments.trial, "machine": machine, **result}, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
