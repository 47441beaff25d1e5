"""The encoding half of extraction: tiles out of the queue, batches through the encoders, rows into their slides."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders.base import Encoder, LayeredEncoder, LayerFeatures, NonFiniteFeaturesError, batch_of
from wsi_pipe.errors import EncoderOutputError
from wsi_pipe.extract.lines import END, Lines, StoppedError
from wsi_pipe.extract.values import (
    Level,
    PartRows,
    Progress,
    Rows,
    SlideFailure,
    SlideFeatures,
    SlidePart,
    SlideState,
    StoredArray,
)
from wsi_pipe.tiles import TileBatch

__all__ = ["Encoding"]

ARRIVAL_POLL_S = 0.002
"""How often results under way are asked for while there is nothing to encode; a batch takes tens of milliseconds."""


@dataclass
class _Flight:
    """A submitted batch: whose rows it holds and where its results will be."""

    name: str
    rows: list[Rows]
    pending: Any
    started: float

    @property
    def ready(self) -> bool:
        """False where waiting for the results would take time; encoders that do not say have them at once."""
        return bool(getattr(self.pending, "ready", True))


class Encoding:
    """Makes batches, submits them, sorts their rows into slides, and hands out each slide that is complete.

    An encoder that does not share batches gets those of one level of one slide, always cut at the same places, so that
    its features do not depend on which slides were read before.
    """

    def __init__(
        self,
        lines: Lines,
        encoders: Mapping[str, Encoder],
        *,
        batch_size: int | None,
        dtype: np.dtype[Any],
        layers: tuple[int, ...],
        progress: Progress | None,
    ) -> None:
        self._lines = lines
        self._encoders = encoders
        self._batch_size = batch_size
        self._dtype = dtype
        self._layers = layers
        self._progress = progress
        self._buffers: dict[tuple[Any, ...], deque[Rows]] = {}
        self._flights: dict[str, deque[_Flight]] = {name: deque() for name in encoders}
        self._landed = 0.0
        self._storing = threading.Lock()
        """Held while rows arrive, so that another thread may take what is there."""
        self._under_way: dict[str, SlideState] = {}

    def run(self) -> None:
        """Encode until the queue ends; hand out END after the last slide.

        Told to stop, no batch is begun any more; what the device computes already is still taken in.
        """
        try:
            self._run()
        except StoppedError:
            for name in self._flights:
                while self._flights[name]:
                    self._land(name)
            raise

    def parts(self) -> list[SlidePart]:
        """What there is of the slides that were not handed over, as of now; from any thread."""
        with self._storing:
            return [part for state in self._under_way.values() if (part := self._part(state)).tiles]

    def handed_over(self, slide_id: str) -> None:
        """The caller has a slide's result: it is not under way any more."""
        with self._storing:
            self._under_way.pop(slide_id, None)

    def _part(self, state: SlideState) -> SlidePart:
        rows: dict[str, dict[str, PartRows]] = {}
        for label, level in state.levels.items():
            for name in level.names:
                slug, index = self._encoders[name].info.slug, np.flatnonzero(level.there[name])
                if not len(index):
                    continue
                layers = {block: values[index] for block, values in level.layers.get(slug, {}).items()}
                rows.setdefault(label, {})[name] = PartRows(
                    level.layout[name],
                    index,
                    level.features[slug][index],
                    layers,
                    level.encode_s.get(name, 0.0),
                )
        return SlidePart(state.item.slide_id, rows)

    def _run(self) -> None:
        while True:
            # While nothing is there to encode, bring home what has arrived, so that finished slides do not wait for the
            # next one to be read. Not what is under way: the next tiles would wait for it, and the device for them.
            while self._lines.waiting.empty and any(self._flights.values()):
                arrived = next((name for name, flights in self._flights.items() if flights and flights[0].ready), None)
                if arrived is None:
                    self._lines.waiting.wait(ARRIVAL_POLL_S)
                else:
                    self._land(arrived)
            entry = self._lines.waiting.get()
            if entry is END:
                break
            subject, what = entry
            state = subject.slide if isinstance(subject, Level) else subject
            if not state.seen:
                self._begin(state)
            if isinstance(subject, Level):
                if what is None:
                    self._end_of_level(subject)
                elif not subject.slide.settled:
                    self._take(subject, what)
            elif what is not None:
                self._fail(subject, what)
            else:
                subject.read_to_end = True
                self._settle(subject)
        for key in list(self._buffers):
            self._submit_full(key, 1)
        for name in self._flights:
            while self._flights[name]:
                self._land(name)
        self._lines.hand_out(END)

    def _begin(self, state: SlideState) -> None:
        """A slide's first tiles are here, or it turned out to have none to encode."""
        state.seen = True
        with self._storing:
            self._under_way[state.item.slide_id] = state
        for level in state.levels.values():
            for name in level.names:
                known = int(np.count_nonzero(level.there[name]))
                if known and self._progress is not None:
                    self._progress(state.item.slide_id, level.grid.label, known)

    def _batch_of(self, name: str, tile_px: int) -> int:
        return batch_of(self._encoders[name], tile_px, self._batch_size)

    def _key(self, level: Level, name: str) -> tuple[Any, ...]:
        """Which tiles may share a batch: one encoder's, of one size, and of one level where it does not share."""
        shared = bool(getattr(self._encoders[name], "shares_batches", False))
        return (name, level.grid.spec.size_px, None if shared else (level.slide.item.slide_id, level.grid.label))

    def _take(self, level: Level, tiles: TileBatch) -> None:
        """Submit what fills batches by itself, as it is; only what is left over waits for company and is copied."""
        for name in level.names:
            size = self._batch_of(name, level.grid.spec.size_px)
            count = len(tiles.index)
            for start in range(0, count - size + 1, size):
                rows = self._wanted(level, name, tiles, slice(start, start + size))
                if rows is not None:
                    self._submit(name, [rows])
            rest = slice(count - count % size, count)
            if count % size and not level.slide.settled:
                rows = self._wanted(level, name, tiles, rest)
                if rows is not None:
                    key = self._key(level, name)
                    self._buffers.setdefault(key, deque()).append(rows)
                    self._submit_full(key, size)

    @staticmethod
    def _wanted(level: Level, name: str, tiles: TileBatch, part: slice) -> Rows | None:
        """The tiles of a part of a batch that an encoder has not seen; None where it has seen them all."""
        index = tiles.index[part]
        there = level.there[name][index]
        if not there.any():
            return Rows(level, tiles.pixels[part], index)
        return None if there.all() else Rows(level, tiles.pixels[part][~there], index[~there])

    def _end_of_level(self, level: Level) -> None:
        for name in level.names:
            key = self._key(level, name)
            if key[2] is not None and key in self._buffers:
                self._submit_full(key, 1)
                del self._buffers[key]

    def _submit_full(self, key: tuple[Any, ...], least: int) -> None:
        """Submit batches from a buffer while it holds at least ``least`` tiles."""
        name, tile_px, _ = key
        waiting = self._buffers[key]
        size = self._batch_of(name, tile_px)
        while waiting and sum(len(rows.index) for rows in waiting) >= least:
            chosen: list[Rows] = []
            room = size
            while waiting and room:
                rows = waiting.popleft()
                if len(rows.index) > room:
                    waiting.appendleft(Rows(rows.level, rows.pixels[room:], rows.index[room:]))
                    rows = Rows(rows.level, rows.pixels[:room], rows.index[:room])
                room -= len(rows.index)
                chosen.append(rows)
            chosen = [rows for rows in chosen if not rows.level.slide.settled]
            if chosen:
                self._submit(name, chosen)

    def _submit(self, name: str, rows: list[Rows]) -> None:
        if self._lines.stopped.is_set():
            raise StoppedError
        encoder = self._encoders[name]
        pixels = rows[0].pixels if len(rows) == 1 else np.concatenate([part.pixels for part in rows])
        started = time.perf_counter()
        try:
            if self._layers:
                assert isinstance(encoder, LayeredEncoder)
                pending: Any = encoder.submit_layers(pixels, self._layers, patches=False)
            else:
                pending = encoder.submit(pixels)
        except EncoderOutputError as error:
            for part in rows:
                self._fail(part.level.slide, error)
            return
        self._flights[name].append(_Flight(name, rows, pending, started))
        while len(self._flights[name]) >= max(int(getattr(encoder, "in_flight", 1)), 1):
            self._land(name)

    def _land(self, name: str) -> None:
        """Wait for the oldest batch of an encoder and sort its rows into their slides."""
        flight = self._flights[name].popleft()
        bad: frozenset[int] = frozenset()
        problem: NonFiniteFeaturesError | None = None
        try:
            result = flight.pending.result()
        except NonFiniteFeaturesError as error:
            result, bad, problem = error.features, frozenset(error.rows), error
        except EncoderOutputError as error:  # an encoder that does not say which tiles: the whole batch is lost
            for part in flight.rows:
                self._fail(part.level.slide, error)
            return
        # Batches overlap in time: each counts from where the one before it ended.
        now = time.perf_counter()
        elapsed = now - max(flight.started, self._landed)
        self._landed = now
        total = sum(len(part.index) for part in flight.rows)
        start = 0
        for part in flight.rows:
            stop = start + len(part.index)
            wrong = [row - start for row in range(start, stop) if row in bad]
            spent = part.level.encode_s
            spent[name] = spent.get(name, 0.0) + elapsed * len(part.index) / total
            if wrong:
                assert problem is not None
                self._fail(part.level.slide, _at_tiles(problem, part, wrong))
            elif not part.level.slide.settled:
                self._store(name, part, result, slice(start, stop))
            start = stop

    def _store(self, name: str, part: Rows, result: Any, rows: slice) -> None:
        level, slug = part.level, self._encoders[name].info.slug
        whole = result if isinstance(result, LayerFeatures) else LayerFeatures(result, {}, {})
        if whole.features.shape[1] != self._encoders[name].info.dim:
            told = f"encoder {name} gave {whole.features.shape[1]} features instead of {self._encoders[name].info.dim}"
            self._fail(level.slide, EncoderOutputError(told, remedy="correct the dimension that it states"))
            return
        try:
            with self._storing:
                self._put(level, slug, level.features, part.index, whole.features[rows])
                for block, cls in whole.cls.items():
                    self._put(level, block, level.layers.setdefault(slug, {}), part.index, cls[rows])
                level.there[name][part.index] = True
        except _OverflowError as overflow:
            x, y = level.grid.coords[overflow.tile]
            error = EncoderOutputError(
                f"a feature of encoder {name} at {level.grid.label} tile x={x}, y={y} (level-0 pixels) is too large "
                "for float16",
                remedy="store the features as float32",
            )
            self._fail(level.slide, error)
            return
        level.missing[name] -= len(part.index)
        if self._progress is not None:
            self._progress(level.slide.item.slide_id, level.grid.label, len(part.index))
        self._settle(level.slide)

    def _put(
        self,
        level: Level,
        key: Any,
        into: dict[Any, StoredArray],
        index: NDArray[np.int64],
        values: NDArray[np.float32],
    ) -> None:
        if key not in into:
            into[key] = np.zeros((len(level.grid), values.shape[1]), self._dtype)
        with np.errstate(over="ignore"):
            stored = values.astype(self._dtype)
        if self._dtype == np.float16 and not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            raise _OverflowError(int(index[row]))
        into[key][index] = stored

    def _fail(self, state: SlideState, error: Exception) -> None:
        if not state.settled:
            state.settled = True
            with self._storing:
                state.levels.clear()
            self._lines.hand_out(SlideFailure(state.item.slide_id, error))

    def _settle(self, state: SlideState) -> None:
        """Hand the slide out if nothing of it is missing."""
        if state.settled or not state.complete:
            return
        state.settled = True
        features: dict[str, dict[str, StoredArray]] = {}
        layers: dict[str, dict[str, dict[int, StoredArray]]] = {}
        for label, level in state.levels.items():
            features[label], layers[label] = {}, {}
            for name in level.names:
                info = self._encoders[name].info
                empty: StoredArray = np.zeros((0, info.dim), self._dtype)
                features[label][info.slug] = level.features.get(info.slug, empty)
                if self._layers:
                    layers[label][info.slug] = level.layers.get(info.slug, dict.fromkeys(self._layers, empty))
        counts = {"tiles": float(sum(len(level.grid) for level in state.levels.values())), **state.counts}
        for label, level in state.levels.items():
            counts |= {f"read_s.{label}": level.read_s, f"encode_s.{label}": sum(level.encode_s.values())}
            counts |= {f"quality_s.{label}": level.quality_s}
        levels = state.levels.values()
        seconds = {
            "read": state.open_s + sum(level.read_s for level in levels),
            "encode": sum(sum(level.encode_s.values()) for level in levels),
        }
        costs = self._costs(state)
        quality = {label: level.quality.values() for label, level in state.levels.items() if level.quality is not None}
        self._lines.hand_out(SlideFeatures(state.item.slide_id, features, layers, seconds, counts, costs, quality))

    def _costs(self, state: SlideState) -> dict[str, dict[str, float]]:
        """Seconds of each encoder at each level, which add up to those of the slide."""
        opening_s = state.open_s / max(sum(len(level.names) for level in state.levels.values()), 1)
        return {
            f"{label}/{self._encoders[name].info.slug}": {
                "read": opening_s + level.read_s / len(level.names),
                "encode": level.encode_s.get(name, 0.0),
            }
            for label, level in state.levels.items()
            for name in level.names
        }


class _OverflowError(Exception):
    """A finite float32 feature is infinite in float16."""

    def __init__(self, tile: int) -> None:
        super().__init__(tile)
        self.tile = tile


def _at_tiles(problem: NonFiniteFeaturesError, part: Rows, wrong: list[int]) -> EncoderOutputError:
    """The error again, with the place of the first bad tile of this slide."""
    grid = part.level.grid
    x, y = grid.coords[part.index[wrong[0]]]
    return EncoderOutputError(
        f"{problem.message.split(' for ')[0]} for {len(wrong)} tiles of {part.level.slide.item.slide_id}, the first at "
        f"{grid.label} tile x={x}, y={y} (level-0 pixels)",
        remedy=problem.remedy,
    )
