"""Where the time of a stream of tiles goes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

__all__ = ["Stopwatch", "StreamStats"]

STAGES = ("fetch", "decode", "copy", "resample")


@dataclass
class StreamStats:
    """Where a stream's time went, summed over its threads, in seconds; the streams that share it add to it.

    ``*_s`` is time on the clock, ``*_cpu_s`` processor time of the reading threads. decode covers decompressing blocks,
    copy putting them where they belong, resample averaging and filtering. peak_bytes: the most that decoded pixels
    took. spilled_bytes: what went to a temporary file to stay within the budget.
    """

    fetch_s: float = 0.0
    fetch_cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    copy_s: float = 0.0
    copy_cpu_s: float = 0.0
    resample_s: float = 0.0
    resample_cpu_s: float = 0.0
    tiles: int = 0
    blocks: int = 0
    peak_bytes: int = 0
    spilled_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, clock: Stopwatch, blocks: int) -> None:
        """Add a job's times."""
        cpu = clock.cpu()
        with self._lock:
            self.blocks += blocks
            for stage, wall in clock.wall.items():
                setattr(self, f"{stage}_s", getattr(self, f"{stage}_s") + wall)
                setattr(self, f"{stage}_cpu_s", getattr(self, f"{stage}_cpu_s") + cpu[stage])


class Stopwatch:
    """Time of one job by stage: each lap goes to the stage that it ends.

    Laps are many, and the processor's clock is a system call: it is read around the fetch, which waits, and at the end;
    what lies between is work and is divided as the time on the clock.
    """

    def __init__(self) -> None:
        self.wall = dict.fromkeys(STAGES, 0.0)
        self._fetch_cpu = 0.0
        self._begin_cpu = self._fetch_begin_cpu = time.thread_time()
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as the stage's."""
        now = time.perf_counter()
        self.wall[stage] += now - self._last
        self._last = now
        if stage == "fetch":
            self._fetch_cpu += time.thread_time() - self._fetch_begin_cpu

    def lap_decode(self, fetch_s: float, fetch_cpu_s: float) -> None:
        """Count the time since the last lap as decoding, but for the part, given too, that went into fetching."""
        self.lap("decode")
        self.wall["decode"] -= fetch_s
        self.wall["fetch"] += fetch_s
        self._fetch_cpu += fetch_cpu_s
        self._fetch_begin_cpu = time.thread_time()

    def cpu(self) -> dict[str, float]:
        """Processor seconds by stage, up to now."""
        worked = time.thread_time() - self._begin_cpu - self._fetch_cpu
        wall = sum(self.wall.values()) - self.wall["fetch"]
        shares = {stage: worked * spent / wall if wall else 0.0 for stage, spent in self.wall.items()}
        return shares | {"fetch": self._fetch_cpu}
