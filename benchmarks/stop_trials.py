#!/usr/bin/env python3
"""How a run ends when it is told to: Ctrl-C, SIGTERM and SIGKILL at random moments, and what the next run makes of it.

    python benchmarks/stop_trials.py [--tiles 2000] [--times 20] [--workers 1 --workers 2] [--encoder NAME]

A synthetic slide of about ``--tiles`` tiles goes through a network on the processor, first undisturbed. Then each
signal comes at ``--times`` random moments of such a run, and the same command runs again to its end. Wanted of every
trial: an end within two seconds of the signal, exit code 130 or 143, no traceback, no abort of native code, every bag
that is there valid, and after the next run features that are those of the undisturbed run byte for byte. Seconds are of
this machine and what else is at work on it. Exit code 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsi_pipe.bag import check_bag, read_bag
from wsi_pipe.slides.writing.write import write_pyramid

RUN = [sys.executable, "-m", "wsi_pipe", "run"]
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
LIMIT_S = 2.0
TILE_PX = 256


def write_slide(path: Path, tiles: int, seed: int) -> None:
    """Tissue all over: noise in the colours of H&E, ``tiles`` tiles at 20x."""
    side = math.ceil(math.sqrt(tiles))
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(side * 16, side * 16)).astype(np.float32)
    nuclei = cv2.resize(cv2.GaussianBlur(coarse, (0, 0), 1.0), (side * TILE_PX, side * TILE_PX)) > 0.2
    picture = np.where(nuclei[..., None], np.uint8([110, 70, 150]), np.uint8([225, 160, 200]))
    quarter = cv2.resize(picture, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    write_pyramid(path, [picture, quarter], mpp=0.5)


def features(job: Path) -> str:
    """One hash over the features of all bags."""
    digest = hashlib.sha256()
    for path in sorted((job / "bags").glob("*.h5")):
        for level in read_bag(path).levels:
            for slug, found in sorted(level.features.items()):
                digest.update(f"{path.name} {slug}".encode() + found.values.tobytes())
    return digest.hexdigest()


def trial(command: list[str], job: Path, number: signal.Signals, delay_s: float, log: Path) -> dict[str, Any]:
    """One signal ``delay_s`` into a run, and the run after it."""
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle)
        time.sleep(delay_s)
        early = process.poll() is not None
        sent = time.perf_counter()
        process.send_signal(number)
        process.wait()
    seconds = time.perf_counter() - sent
    said = log.read_text(errors="replace")
    expected = -number if number == signal.SIGKILL else 128 + number
    faults = []
    if not early:
        # Before the signals are heard, while Python starts, the system's own ending holds.
        if process.returncode not in (expected, -number):
            faults.append(f"exit code {process.returncode}")
        if seconds > LIMIT_S:
            faults.append(f"{seconds:.1f} s")
    faults += [word for word in ("Traceback", "terminate called", "core dumped", "Fatal Python") if word in said]
    faults += [f"{path.name}: {problem}" for path in (job / "bags").glob("*.h5") for problem in check_bag(path)]
    kept = (job / "partial").is_dir() and any((job / "partial").glob("*.npz"))
    return {"delay_s": delay_s, "seconds": seconds, "ended before": early, "kept": kept, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--slides", type=int, default=1, help="slides of so many tiles each")
    parser.add_argument("--times", type=int, default=20, help="random moments, of each signal and number of workers")
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--encoder", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A shell that starts this in the background makes it, and what it starts, deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = np.random.default_rng(options.seed)
    report: dict[str, Any] = {"tiles": options.tiles, "slides": options.slides, "encoder": options.encoder}
    report["trials"] = {}
    ok = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for n in range(options.slides):
            write_slide(folder / "in" / f"s{n}.svs", options.tiles, n)
        base = [*RUN, str(folder / "in"), "-r", "20x", "-e", options.encoder]
        if options.encoder != "texture":
            base += ["--random-weights", "--devices", "cpu"]
        log = folder / "log.txt"
        for workers in options.workers or [1, 2]:
            whole = folder / f"whole{workers}"
            begun = time.perf_counter()
            command = [*base, "--workers", str(workers)]
            done = subprocess.run([*command, "-o", str(whole)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            whole_s, wanted = time.perf_counter() - begun, features(whole)
            print(f"{workers} workers, undisturbed: {whole_s:.1f} s", flush=True)
            for which in options.signals:
                rows = []
                for n in range(options.times):
                    job = folder / f"{workers}-{which}-{n}"
                    delay_s = float(rng.uniform(0.2, 0.95)) * whole_s
                    row = trial([*command, "-o", str(job)], job, SIGNALS[which], delay_s, log)
                    again = subprocess.run([*command, "-o", str(job)], capture_output=True, text=True)
                    if again.returncode or features(job) != wanted:
                        row["faults"].append(
                            "the next run gives other features" if not again.returncode else again.stderr
                        )
                    if row["faults"]:
                        print(f"  {which} after {delay_s:.2f} s: {row['faults']}\n{log.read_text()[-600:]}", flush=True)
                    rows.append(row)
                    if not row["faults"]:
                        subprocess.run(["rm", "-r", str(job)], check=True)
                during = [row["seconds"] for row in rows if not row["ended before"]] or [math.nan]
                faults = sum(bool(row["faults"]) for row in rows)
                ok &= faults == 0
                report["trials"][f"{which}, {workers} workers"] = rows
                print(
                    f"{which:8s} {workers} workers: {len(rows)} times, ended after {np.median(during):.2f} s "
                    f"(at most {max(during):.2f}), partial features kept {sum(row['kept'] for row in rows)} times, "
                    f"faults {faults}",
                    flush=True,
                )
    report["ok"] = ok
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + os.linesep)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
