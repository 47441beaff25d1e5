#!/usr/bin/env python3
"""An event-driven model of a large run: workers, stragglers, failures, and a scheduler that takes its time a task.

    python benchmarks/cluster_model.py [--outcomes JOB/outcomes.jsonl] [--workers 1000] [--slides 100000]

Slides' seconds are drawn from the outcomes of a job that was really run (scaled by --scale), or from a log-normal
distribution. A task costs the scheduler --scheduler-ms of its one thread when it is sent and when it comes back. A
straggling worker is slower by --straggle for as long as it lives; a worker dies at random, its task is done again
elsewhere and a new worker comes after a while. The client keeps two tasks a worker in flight, as wsi_pipe.execute
does, sees finished ones at once, and hands over the next.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

AHEAD = 2


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted."""

    workers: int
    slides: int
    scheduler_s: float
    straggler_share: float
    straggle: float
    worker_hours: float
    restart_s: float
    seed: int


def simulate(seconds: NDArray[np.float64], a: Assumptions) -> dict[str, float]:
    """Run the model; hours, efficiency, the scheduler's load, and tasks done twice."""
    rng = np.random.default_rng(a.seed)
    work = rng.choice(seconds, a.slides)
    slow = np.where(rng.random(a.workers) < a.straggler_share, a.straggle, 1.0)
    death = rng.exponential(a.worker_hours * 3600, a.workers)
    waiting = list(range(a.slides - 1, -1, -1))
    queues: list[list[int]] = [[] for _ in range(a.workers)]
    scheduler_free = scheduler_busy = lost = 0.0
    again = finished = 0
    events: list[tuple[float, int, int, int]] = []  # time, worker, slide (or -1: the worker starts), life

    def through_scheduler(now: float) -> float:
        nonlocal scheduler_free, scheduler_busy
        scheduler_free = max(scheduler_free, now) + a.scheduler_s
        scheduler_busy += a.scheduler_s
        return scheduler_free

    def feed(worker: int, now: float) -> None:
        while len(queues[worker]) < AHEAD and waiting:
            queues[worker].append(waiting.pop())
            through_scheduler(now)

    life = np.zeros(a.workers, int)
    running = np.full(a.workers, -1)

    def begin(worker: int, now: float) -> None:
        if running[worker] < 0 and queues[worker]:
            slide = queues[worker].pop(0)
            running[worker] = slide
            start = max(now, scheduler_free)
            heapq.heappush(events, (start + work[slide] * slow[worker], worker, slide, int(life[worker])))

    for worker in range(a.workers):
        heapq.heappush(events, (0.0, worker, -1, 0))
        heapq.heappush(events, (float(death[worker]), worker, -2, 0))
    now = 0.0
    while finished < a.slides:
        now, worker, slide, own_life = heapq.heappop(events)
        if own_life != life[worker]:
            continue
        if slide == -2:
            if running[worker] >= 0:
                again += 1
                lost += work[running[worker]] * slow[worker] / 2
                waiting.append(int(running[worker]))
            waiting.extend(queues[worker])
            queues[worker], running[worker] = [], -1
            life[worker] += 1
            slow[worker] = a.straggle if rng.random() < a.straggler_share else 1.0
            heapq.heappush(events, (now + a.restart_s, worker, -1, int(life[worker])))
            until = now + a.restart_s + rng.exponential(a.worker_hours * 3600)
            heapq.heappush(events, (float(until), worker, -2, int(life[worker])))
            continue
        if slide >= 0:
            finished += 1
            running[worker] = -1
            through_scheduler(now)
        feed(worker, now)
        begin(worker, now)
        if not waiting and running[worker] < 0:
            # Another worker's queue may be the only work left: an idle one takes from it, as Dask steals.
            full = max(range(a.workers), key=lambda w: len(queues[w]))
            if queues[full]:
                queues[worker].append(queues[full].pop())
                through_scheduler(now)
                begin(worker, now)
    return {
        "hours": now / 3600,
        "efficiency": float(work.sum() / (a.workers * now)),
        "scheduler busy": scheduler_busy / now,
        "tasks a second": 2 * a.slides / now,
        "tasks done again": float(again),
        "worker hours lost": lost / 3600,
    }


def seconds_of(path: Path) -> NDArray[np.float64]:
    """Seconds a slide from the outcomes of a job."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = np.asarray([sum(line["seconds"].values()) for line in lines if line["status"] == "done"], float)
    if not len(found):
        raise SystemExit(f"{path}: no slide is done")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="real slides are larger than those that were run")
    parser.add_argument("--mean-s", type=float, default=60.0, help="without outcomes: mean seconds a slide")
    parser.add_argument("--spread", type=float, default=0.8, help="without outcomes: sigma of the log-normal")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--slides", type=int, default=100_000)
    parser.add_argument("--scheduler-ms", type=float, default=1.0)
    parser.add_argument("--straggler-share", type=float, default=0.02)
    parser.add_argument("--straggle", type=float, default=5.0)
    parser.add_argument("--worker-hours", type=float, default=24.0, help="mean life of a worker")
    parser.add_argument("--restart-s", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.outcomes:
        seconds = seconds_of(a.outcomes) * a.scale
    else:
        rng = np.random.default_rng(a.seed)
        seconds = rng.lognormal(np.log(a.mean_s) - a.spread**2 / 2, a.spread, 10_000)
    rows = []
    for workers in sorted({10, 100, a.workers}):
        assumed = Assumptions(
            workers, a.slides if workers == a.workers else max(a.slides * workers // a.workers, 1000),
            a.scheduler_ms / 1000, a.straggler_share, a.straggle, a.worker_hours, a.restart_s, a.seed,
        )  # fmt: skip
        rows.append({"workers": workers, "slides": assumed.slides, **simulate(seconds, assumed)})
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:,.3g}" if isinstance(v, float) else f"{v:,}" for v in row.values()) + " |")
    if a.json:
        a.json.write_text(json.dumps({"mean seconds a slide": float(seconds.mean()), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
