"""The reading half of extraction: slides in, batches of tiles into the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping

from wsi_pipe.encoders.base import Encoder, batch_of, check_grid
from wsi_pipe.errors import ConfigError
from wsi_pipe.extract.lines import END, Lines, StoppedError
from wsi_pipe.extract.values import ExtractItem, Level, SlideState
from wsi_pipe.quality import LevelQuality
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["Reading"]


class Reading:
    """Opens slides and streams their tiles; ``take_items`` runs in one thread, ``read`` in each of ``readers``.

    Into ``lines.waiting`` go (level, batch), (level, None) after a level's last batch, (slide, None) after a slide's
    last level, (slide, error) where it failed, and END after the last slide.
    """

    def __init__(
        self,
        lines: Lines,
        encoders: Mapping[str, Encoder],
        *,
        readers: int,
        batch_size: int | None,
        threads: int | None,
        memory_bytes: int,
    ) -> None:
        self._lines = lines
        self._encoders = encoders
        self._readers = readers
        self._readers_left = readers
        self._lock = threading.Lock()
        self._batch_size = batch_size
        self._threads = threads
        self._memory_bytes = memory_bytes

    def take_items(self, items: Iterable[ExtractItem]) -> None:
        """Take slides from the caller, a little ahead of reading."""
        for item in items:
            self._lines.put_item(item)
        for _ in range(self._readers):
            self._lines.put_item(END)

    def read(self) -> None:
        """Read slides until there are no more."""
        while (item := self._lines.next_item()) is not END:
            state = SlideState(item)
            try:
                self._slide(item, state)
            except StoppedError:
                raise
            except Exception as error:
                self._lines.waiting.put((state, error))
            else:
                self._lines.waiting.put((state, None))
        with self._lock:
            self._readers_left -= 1
            last = self._readers_left == 0
        if last:
            self._lines.waiting.put(END)

    def _slide(self, item: ExtractItem, state: SlideState) -> None:
        for grid in item.grids:
            names = tuple(item.encoders.get(grid.label, ()))
            for name in names:
                if name not in self._encoders:
                    raise ConfigError(f"no encoder {name!r} is loaded", remedy=f"there are {', '.join(self._encoders)}")
                check_grid(self._encoders[name].info, grid)
            if names:
                state.levels[grid.label] = Level(state, grid, names, dict.fromkeys(names, len(grid)))
        started = time.perf_counter()
        slide = item.open()
        try:
            state.open_s += time.perf_counter() - started
            for level in state.levels.values():
                if len(level.grid):
                    self._level(slide, level)
            stats = slide.stats
            for key in ("bytes_fetched", "requests", "blocks_decoded", "blocks_missing"):
                state.counts[key] = float(getattr(stats, key))
        finally:
            slide.close()

    def _level(self, slide: Slide, level: Level) -> None:
        batch = max(batch_of(self._encoders[name], level.grid.spec.size_px, self._batch_size) for name in level.names)
        rooms = [getattr(self._encoders[name], "new_tiles", None) for name in level.names]
        stream = stream_tiles(
            slide,
            level.grid,
            batch_size=batch,
            threads=self._threads,
            memory_bytes=self._memory_bytes,
            new_tiles=next((room for room in rooms if room is not None), None),
        )
        level.quality = LevelQuality(len(level.grid), sum(level.grid.mpp_effective) / 2)
        while True:
            started = time.perf_counter()
            tiles = next(stream, None)
            level.read_s += time.perf_counter() - started
            if tiles is None or level.slide.settled:  # settled before its end: it has failed in encoding
                break
            started = time.perf_counter()
            level.quality.add(tiles.index, tiles.pixels)
            level.quality_s += time.perf_counter() - started
            self._lines.waiting.put((level, tiles), tiles.pixels.nbytes)
        self._lines.waiting.put((level, None))
