"""How far a run is and how long it still takes, from what it has done so far."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from wsi_pipe.outcome import SlideOutcome

__all__ = ["Pace", "span"]

WINDOW_S = 120.0
SAMPLE_S = 1.0


class Pace:
    """Counts slides and tiles; knows how many tiles there will be in all as soon as the first slide's grids are laid.

    total: slides of the run. clock: seconds, of any beginning. A slide of which nothing is known yet is taken to have
    as many tiles as the mean of those of which it is known, and which had any work in them.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.tiles = total, 0, 0
        self._clock = clock
        # Told by the threads that read and encode, and asked by the one that draws.
        self._lock = threading.Lock()
        self._known: dict[str, int | None] = {}
        self._counted: dict[str, int] = {}
        self._slides, self._sum = 0, 0
        self._worked = 0
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self) -> None:
        """Work begins on a slide."""
        with self._lock:
            if not self._samples:
                self._samples.append((self._clock(), 0))

    def laid(self, slide_id: str, tiles: int) -> None:
        """A slide has so many tiles to encode, one for each encoder that sees it."""
        with self._lock:
            self._know(slide_id, tiles)

    def encoded(self, slide_id: str, tiles: int) -> None:
        """So many more of its tiles are encoded."""
        self.begin()
        with self._lock:
            self.tiles += tiles
            self._counted[slide_id] = self._counted.get(slide_id, 0) + tiles
            now = self._clock()
            if now - self._samples[-1][0] >= SAMPLE_S:
                self._samples.append((now, self.tiles))
            # The first stays as long as there is no other that old.
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_S:
                self._samples.popleft()

    def finished(self, outcome: SlideOutcome) -> None:
        """One more slide is through."""
        with self._lock:
            self.done += 1
            counted = self._counted.pop(outcome.slide_id, 0)
            self._know(outcome.slide_id, None if outcome.nothing_new else counted)
            self._worked += outcome.status != "failed" and not outcome.nothing_new

    def _know(self, slide_id: str, tiles: int | None) -> None:
        """How many tiles a slide has; None where it had no work in it, which tells nothing of others."""
        before = self._known.get(slide_id)
        if before is not None:
            self._slides, self._sum = self._slides - 1, self._sum - before
        self._known[slide_id] = tiles
        if tiles is not None:
            self._slides, self._sum = self._slides + 1, self._sum + tiles

    @property
    def is_exact(self) -> bool:
        """Whether all slides' tiles are known."""
        return len(self._known) >= self.total

    @property
    def expected(self) -> int | None:
        """Tiles in all; None before anything is known of any slide that has work in it."""
        with self._lock:
            if not self._slides:
                return None
            unknown = max(self.total - len(self._known), 0)
            return max(round(self._sum * (1 + unknown / self._slides)), self.tiles)

    @property
    def tiles_per_s(self) -> float | None:
        """Of late, None before the first tiles. What comes before the first tiles counts as well."""
        if not self.tiles or not self._samples:
            return None
        then, before = self._samples[0]
        seconds = self._clock() - then
        return (self.tiles - before) / seconds if seconds > 0 and self.tiles > before else None

    @property
    def left_s(self) -> float | None:
        """Seconds to go, None while nobody can know."""
        rate, expected = self.tiles_per_s, self.expected
        if rate and expected:
            return (expected - self.tiles) / rate
        if self.tiles or expected or not self._worked or not self._samples:
            return None
        # Stages without tiles: by slides. Those that fail at once tell nothing of the others.
        return (self._clock() - self._samples[0][0]) / self._worked * (self.total - self.done)


def span(seconds: float) -> str:
    """A time in words, no finer than one cares to know: 8 s, 4 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{round(seconds / 3600)} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours and days < 10 else f"{round(seconds / 86400)} d"
