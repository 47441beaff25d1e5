"""What the stages of one slide hand to one another, and the error for work that was made otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from wsi_pipe.bag import BagAttrs, TileValues
from wsi_pipe.errors import StaleWorkError
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.drawing import SlidePictures
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import Stage
from wsi_pipe.stopping import Stop, StopRequested

__all__ = ["Prepared", "StageClock", "stale_error"]


class StageClock:
    """Wall seconds by stage of one slide, the stage it is in, whether its mask was valid already, and notes on it.

    pictures: what is to be drawn of it as far as it got, also where it gets no further.

    Raises StopRequested where a stage would begin after ``stop`` was asked for.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self._stop = stop
        self.seconds: dict[str, float] = {}
        self.cached: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.stage: Stage = "open"
        self.pictures: SlidePictures | None = None

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if self._stop is not None and self._stop.asked:
            raise StopRequested
        self.stage, start = stage, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Prepared:
    """A slide whose grids are known.

    attrs: the root attributes of its bag to be. grids: coarsest first, all that the slide has; asked: labels of those
    that the call is about. cached: stages that were valid already. notes: what is to be said of the slide.
    counts: for the outcome. "tissue_mm2", and where tissue was looked for now "prepare_bytes_fetched": what was read of
    the file until then, its header, what its fingerprint is made of and the overview. annotation: covered fractions by
    level label and class, None where the file of grids, or the bag, holds them. stored: whether grids are in a file
    already, of their own or the bag.
    """

    entry: SlideEntry
    attrs: BagAttrs
    grids: tuple[TileGrid, ...]
    asked: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    annotation: Mapping[str, Mapping[str, TileValues]] | None = None
    stored: bool = True


def stale_error(entry: SlideEntry, what: str, why: Sequence[str]) -> StaleWorkError:
    """The error for finished work of a slide that was made otherwise than is wanted now."""
    return StaleWorkError(
        f"{entry.slide_id}: {what} {'were' if what.endswith('s') else 'was'} made otherwise: {'; '.join(why)}",
        remedy="--redo makes it anew here, another -o keeps both; with the settings of before it stays as it is",
    )
