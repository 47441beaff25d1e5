"""Tiles of many slides through encoders: reading runs ahead, batches fill up across slides, results come back in time.

Three things go on at once. A reading thread opens slide after slide and puts batches of tiles into a queue that holds
a bounded number of bytes. An encoding thread takes them, makes batches of the encoders' own size, submits them, and
sorts the results into their slides. The caller's thread gets each slide as it is finished and may write it while the
next ones are computed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders.base import (
    Encoder,
    LayeredEncoder,
    LayerFeatures,
    NonFiniteFeaturesError,
    block_indices,
    check_grid,
)
from wsi_pipe.errors import ConfigError, EncoderOutputError
from wsi_pipe.geometry import TileGrid
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import TileBatch, stream_tiles

__all__ = ["ExtractItem", "SlideFailure", "SlideFeatures", "extract_features"]

TileArray = NDArray[np.uint8]
StoredArray = NDArray[np.float16] | NDArray[np.float32]
Progress = Callable[[str, str, int], None]

DEFAULT_BATCH = 64
RESULTS_AHEAD = 4
"""Finished slides that may wait for the caller before encoding stops to wait for it."""
POLL_S = 0.1


@dataclass(frozen=True)
class ExtractItem:
    """One slide to extract: how to open it, its grids, and the encoders that run on each level.

    open is called in the reading thread; the slide is closed there. encoders: level label -> names, as in the mapping
    of encoders given to ``extract_features``. Grids whose label has none are left out.
    """

    slide_id: str
    open: Callable[[], Slide]
    grids: Sequence[TileGrid]
    encoders: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class SlideFeatures:
    """The features of one slide, rows in the order of its grids.

    features: level label -> encoder's slug -> (N, D). layers: label -> slug -> block -> (N, C), the CLS token after
    that block. Both float16 or float32. seconds: "read", "encode" (its share, by tiles, of batches it shared).
    counts: "tiles", what the reader counted ("bytes_fetched", "requests", "blocks_decoded", "blocks_missing"), and the
    seconds of each level: "read_s.20x", "encode_s.20x" and so on.
    """

    slide_id: str
    features: Mapping[str, Mapping[str, StoredArray]]
    layers: Mapping[str, Mapping[str, Mapping[int, StoredArray]]]
    seconds: Mapping[str, float]
    counts: Mapping[str, float]


@dataclass(frozen=True)
class SlideFailure:
    """A slide that could not be extracted, and why. Other slides are not touched by it."""

    slide_id: str
    error: Exception


def extract_features(
    items: Iterable[ExtractItem],
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int | None = None,
    read_threads: int | None = None,
    memory_bytes: int = 2 << 30,
    dtype: str = "float16",
    layers: Sequence[int] = (),
    progress: Progress | None = None,
) -> Iterator[SlideFeatures | SlideFailure]:
    """Features of every slide of ``items``, each as soon as it is finished.

    items: consumed lazily, in another thread, as reading goes on. encoders: by the names that the items use. A level
    is read once, whatever the number of its encoders. batch_size: tiles of an encoder's batch, None for the encoder's
    own choice. read_threads: see ``stream_tiles``. memory_bytes: for tiles that are read and not yet encoded; the
    features of slides under way come on top. dtype: "float16" or "float32", of what is handed out. layers: blocks
    whose CLS is handed out beside the features (-1 is the last). progress: called with slide_id, label and the number
    of tiles encoded, from the encoding thread.

    A slide whose reading or whose features fail (also by a resolution that its encoder was not made for) comes out as
    a SlideFailure. Raises ConfigError for layers that an encoder has not and for a name that ``encoders`` has not,
    and DeviceError, which concerns all slides. What ``items`` itself raises is raised here.
    """
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"feature dtype {dtype!r} must be float16 or float32")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size {batch_size} must be at least 1")
    if layers:
        for name, encoder in encoders.items():
            depth = encoder.depth if isinstance(encoder, LayeredEncoder) else 0
            block_indices(layers, depth, name)
    engine = _Engine(encoders, batch_size, read_threads, memory_bytes, np.dtype(dtype), tuple(layers), progress)
    return engine.run(items)


@dataclass
class _Level:
    """One level of one slide under way: rows arrive in any order, of each of its encoders."""

    slide: _SlideState
    grid: TileGrid
    names: tuple[str, ...]
    missing: dict[str, int]
    features: dict[str, StoredArray] = field(default_factory=dict)
    layers: dict[str, dict[int, StoredArray]] = field(default_factory=dict)
    read_s: float = 0.0
    encode_s: float = 0.0


@dataclass
class _SlideState:
    """One slide under way."""

    item: ExtractItem
    levels: dict[str, _Level] = field(default_factory=dict)
    open_s: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    read_to_end: bool = False
    settled: bool = False

    @property
    def complete(self) -> bool:
        return self.read_to_end and all(n == 0 for level in self.levels.values() for n in level.missing.values())


@dataclass
class _Rows:
    """A stretch of tiles of one level on their way through an encoder."""

    level: _Level
    pixels: TileArray
    index: NDArray[np.int64]


@dataclass
class _Flight:
    """A submitted batch: whose rows it holds and where its results will be."""

    name: str
    rows: list[_Rows]
    pending: Any
    started: float


class _StoppedError(Exception):
    """The caller has gone; the threads end."""


class _ByteQueue:
    """A first-in first-out queue that holds at most so many bytes, but always takes one item."""

    def __init__(self, limit: int, stopped: threading.Event) -> None:
        self._limit = limit
        self._held = 0
        self._items: deque[tuple[Any, int]] = deque()
        self._change = threading.Condition()
        self._stopped = stopped

    def put(self, item: Any, size: int = 0) -> None:
        with self._change:
            while self._items and size and self._held + size > self._limit:
                self._wait()
            self._items.append((item, size))
            self._held += size
            self._change.notify_all()

    def get(self) -> Any:
        with self._change:
            while not self._items:
                self._wait()
            item, size = self._items.popleft()
            self._held -= size
            self._change.notify_all()
            return item

    def _wait(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._change.wait(POLL_S)


_END = object()


class _Engine:
    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        batch_size: int | None,
        read_threads: int | None,
        memory_bytes: int,
        dtype: np.dtype[Any],
        layers: tuple[int, ...],
        progress: Progress | None,
    ) -> None:
        self.encoders = dict(encoders)
        self.batch_size = batch_size
        self.read_threads = read_threads
        self.memory_bytes = memory_bytes
        self.dtype = dtype
        self.layers = layers
        self.progress = progress
        self.stopped = threading.Event()
        # Half for the tiles that wait, half for the native tiles that the reader holds decoded.
        self.waiting = _ByteQueue(memory_bytes // 2, self.stopped)
        self.done: queue.Queue[Any] = queue.Queue(RESULTS_AHEAD)
        self.buffers: dict[tuple[Any, ...], deque[_Rows]] = {}
        self.flights: dict[str, deque[_Flight]] = {name: deque() for name in self.encoders}

    def run(self, items: Iterable[ExtractItem]) -> Iterator[SlideFeatures | SlideFailure]:
        threads = [
            threading.Thread(target=self._guarded, args=(self._read, items), name="wsi-pipe-read", daemon=True),
            threading.Thread(target=self._guarded, args=(self._encode,), name="wsi-pipe-encode", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            while True:
                result = self.done.get()
                if result is _END:
                    return
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except _StoppedError:
            return
        except BaseException as error:  # whatever it is, it is raised again in the caller's thread
            self.stopped.set()
            self._hand_out(error, even_when_stopped=True)

    def _hand_out(self, result: Any, *, even_when_stopped: bool = False) -> None:
        while True:
            try:
                self.done.put(result, timeout=POLL_S)
                return
            except queue.Full:
                if self.stopped.is_set() and not even_when_stopped:
                    raise _StoppedError from None

    # Reading

    def _read(self, items: Iterable[ExtractItem]) -> None:
        for item in items:
            state = _SlideState(item)
            try:
                self._read_slide(item, state)
            except _StoppedError:
                raise
            except Exception as error:
                self.waiting.put((state, error))
            else:
                self.waiting.put((state, None))
        self.waiting.put(_END)

    def _read_slide(self, item: ExtractItem, state: _SlideState) -> None:
        for grid in item.grids:
            names = tuple(item.encoders.get(grid.label, ()))
            for name in names:
                if name not in self.encoders:
                    raise ConfigError(f"no encoder {name!r} is loaded", remedy=f"there are {', '.join(self.encoders)}")
                check_grid(self.encoders[name].info, grid)
            if names:
                state.levels[grid.label] = _Level(state, grid, names, dict.fromkeys(names, len(grid)))
        started = time.perf_counter()
        slide = item.open()
        try:
            state.open_s += time.perf_counter() - started
            for level in state.levels.values():
                if len(level.grid):
                    self._read_level(slide, level)
            stats = slide.stats
            for key in ("bytes_fetched", "requests", "blocks_decoded", "blocks_missing"):
                state.counts[key] = float(getattr(stats, key))
        finally:
            slide.close()

    def _read_level(self, slide: Slide, level: _Level) -> None:
        batch = max(self._batch_of(name, level.grid.spec.size_px) for name in level.names)
        stream = stream_tiles(
            slide, level.grid, batch_size=batch, threads=self.read_threads, memory_bytes=self.memory_bytes // 2
        )
        while True:
            started = time.perf_counter()
            tiles = next(stream, None)
            level.read_s += time.perf_counter() - started
            if tiles is None:
                break
            self.waiting.put((level, tiles), tiles.pixels.nbytes)
        self.waiting.put((level, None))

    def _batch_of(self, name: str, tile_px: int) -> int:
        if self.batch_size is not None:
            return self.batch_size
        suggest = getattr(self.encoders[name], "suggest_batch", None)
        return int(suggest(tile_px)) if suggest is not None else DEFAULT_BATCH

    # Encoding

    def _encode(self) -> None:
        while True:
            entry = self.waiting.get()
            if entry is _END:
                break
            subject, what = entry
            if isinstance(subject, _Level):
                if what is None:
                    self._end_of_level(subject)
                elif not subject.slide.settled:
                    self._take(subject, what)
            elif what is not None:
                self._fail(subject, what)
            else:
                subject.read_to_end = True
                self._settle(subject)
        for key in list(self.buffers):
            self._submit_full(key, 1)
        for name in self.flights:
            while self.flights[name]:
                self._land(name)
        self._hand_out(_END)

    def _key(self, level: _Level, name: str) -> tuple[Any, ...]:
        """Which tiles may share a batch: one encoder's, of one size, and of one level where it does not share."""
        shared = bool(getattr(self.encoders[name], "shares_batches", False))
        return (name, level.grid.spec.size_px, None if shared else (level.slide.item.slide_id, level.grid.label))

    def _take(self, level: _Level, tiles: TileBatch) -> None:
        for name in level.names:
            key = self._key(level, name)
            self.buffers.setdefault(key, deque()).append(_Rows(level, tiles.pixels, tiles.index))
            self._submit_full(key, self._batch_of(name, level.grid.spec.size_px))

    def _end_of_level(self, level: _Level) -> None:
        for name in level.names:
            key = self._key(level, name)
            if key[2] is not None:
                self._submit_full(key, 1)
                self.buffers.pop(key, None)

    def _submit_full(self, key: tuple[Any, ...], least: int) -> None:
        """Submit batches from a buffer while it holds at least ``least`` tiles."""
        name, tile_px, _ = key
        waiting = self.buffers[key]
        size = self._batch_of(name, tile_px)
        while waiting and sum(len(rows.index) for rows in waiting) >= least:
            chosen: list[_Rows] = []
            room = size
            while waiting and room:
                rows = waiting.popleft()
                if len(rows.index) > room:
                    waiting.appendleft(_Rows(rows.level, rows.pixels[room:], rows.index[room:]))
                    rows = _Rows(rows.level, rows.pixels[:room], rows.index[:room])
                room -= len(rows.index)
                chosen.append(rows)
            chosen = [rows for rows in chosen if not rows.level.slide.settled]
            if chosen:
                self._submit(name, chosen)

    def _submit(self, name: str, rows: list[_Rows]) -> None:
        encoder = self.encoders[name]
        pixels = rows[0].pixels if len(rows) == 1 else np.concatenate([part.pixels for part in rows])
        started = time.perf_counter()
        try:
            if self.layers:
                assert isinstance(encoder, LayeredEncoder)
                pending: Any = encoder.submit_layers(pixels, self.layers)
            else:
                pending = encoder.submit(pixels)
        except EncoderOutputError as error:
            for part in rows:
                self._fail(part.level.slide, error)
            return
        self.flights[name].append(_Flight(name, rows, pending, started))
        while len(self.flights[name]) >= max(int(getattr(encoder, "in_flight", 1)), 1):
            self._land(name)

    def _land(self, name: str) -> None:
        """Wait for the oldest batch of an encoder and sort its rows into their slides."""
        flight = self.flights[name].popleft()
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
        elapsed = time.perf_counter() - flight.started
        total = sum(len(part.index) for part in flight.rows)
        start = 0
        for part in flight.rows:
            stop = start + len(part.index)
            wrong = [row - start for row in range(start, stop) if row in bad]
            part.level.encode_s += elapsed * len(part.index) / total
            if wrong:
                assert problem is not None
                self._fail(part.level.slide, _at_tiles(problem, part, wrong))
            elif not part.level.slide.settled:
                self._store(name, part, result, slice(start, stop))
            start = stop

    def _store(self, name: str, part: _Rows, result: Any, rows: slice) -> None:
        level, slug = part.level, self.encoders[name].info.slug
        whole = result if isinstance(result, LayerFeatures) else LayerFeatures(result, {}, {})
        try:
            self._put(level, slug, level.features, part.index, whole.features[rows])
            for block, cls in whole.cls.items():
                self._put(level, block, level.layers.setdefault(slug, {}), part.index, cls[rows])
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
        if self.progress is not None:
            self.progress(level.slide.item.slide_id, level.grid.label, len(part.index))
        self._settle(level.slide)

    def _put(
        self,
        level: _Level,
        key: Any,
        into: dict[Any, StoredArray],
        index: NDArray[np.int64],
        values: NDArray[np.float32],
    ) -> None:
        if key not in into:
            into[key] = np.zeros((len(level.grid), values.shape[1]), self.dtype)
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if self.dtype == np.float16 and not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            raise _OverflowError(int(index[row]))
        into[key][index] = stored

    def _fail(self, state: _SlideState, error: Exception) -> None:
        if not state.settled:
            state.settled = True
            state.levels.clear()
            self._hand_out(SlideFailure(state.item.slide_id, error))

    def _settle(self, state: _SlideState) -> None:
        """Hand the slide out if nothing of it is missing."""
        if state.settled or not state.complete:
            return
        state.settled = True
        features: dict[str, dict[str, StoredArray]] = {}
        layers: dict[str, dict[str, dict[int, StoredArray]]] = {}
        for label, level in state.levels.items():
            features[label], layers[label] = {}, {}
            for name in level.names:
                info = self.encoders[name].info
                empty: StoredArray = np.zeros((0, info.dim), self.dtype)
                features[label][info.slug] = level.features.get(info.slug, empty)
                if self.layers:
                    layers[label][info.slug] = level.layers.get(info.slug, dict.fromkeys(self.layers, empty))
        counts = {"tiles": float(sum(len(level.grid) for level in state.levels.values())), **state.counts}
        for label, level in state.levels.items():
            counts |= {f"read_s.{label}": level.read_s, f"encode_s.{label}": level.encode_s}
        levels = state.levels.values()
        seconds = {
            "read": state.open_s + sum(level.read_s for level in levels),
            "encode": sum(level.encode_s for level in levels),
        }
        self._hand_out(SlideFeatures(state.item.slide_id, features, layers, seconds, counts))


class _OverflowError(Exception):
    """A finite float32 feature is infinite in float16."""

    def __init__(self, tile: int) -> None:
        super().__init__(tile)
        self.tile = tile


def _at_tiles(problem: NonFiniteFeaturesError, part: _Rows, wrong: list[int]) -> EncoderOutputError:
    """The error again, with the place of the first bad tile of this slide."""
    grid = part.level.grid
    x, y = grid.coords[part.index[wrong[0]]]
    return EncoderOutputError(
        f"{problem.message.split(' for ')[0]} for {len(wrong)} tiles of {part.level.slide.item.slide_id}, the first at "
        f"{grid.label} tile x={x}, y={y} (level-0 pixels)",
        remedy=problem.remedy,
    )
