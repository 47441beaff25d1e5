"""The reading half of extraction: slides in, batches of tiles into the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np

from wsi_pipe.encoders.base import Encoder, batch_of, check_grid
from wsi_pipe.errors import ConfigError
from wsi_pipe.extract.lines import END, Lines, StoppedError
from wsi_pipe.extract.values import ExtractItem, Level, PartRows, SlideState, StoredArray
from wsi_pipe.geometry import TileGrid
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
                state.levels[grid.label] = self._begun(state, grid, names)
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

    def _begun(self, state: SlideState, grid: TileGrid, names: tuple[str, ...]) -> Level:
        """A level with the features that earlier work left of it."""
        sizes = {name: batch_of(self._encoders[name], grid.spec.size_px, self._batch_size) for name in names}
        layout = {name: self._layout(name, max(sizes.values()), size) for name, size in sizes.items()}
        there = {name: np.zeros(len(grid), bool) for name in names}
        level = Level(state, grid, names, dict.fromkeys(names, len(grid)), there, layout)
        for name in names:
            part = state.item.parts.get(grid.label, {}).get(name)
            if part is None or part.layout != layout[name] or not len(part.index):
                continue
            slug = self._encoders[name].info.slug
            level.features[slug] = _spread(part, part.values, len(grid))
            if part.layers:
                level.layers[slug] = {block: _spread(part, cls, len(grid)) for block, cls in part.layers.items()}
            there[name][part.index] = True
            level.missing[name] -= len(part.index)
            level.encode_s[name] = part.encode_s
        return level

    def _layout(self, name: str, read: int, size: int) -> str:
        """How tiles become batches. Where slides share them it is another in every run, and means nothing."""
        shared = bool(getattr(self._encoders[name], "shares_batches", False))
        return "shared" if shared else f"{size} of {read}"

    def _level(self, slide: Slide, level: Level) -> None:
        batch = max(batch_of(self._encoders[name], level.grid.spec.size_px, self._batch_size) for name in level.names)
        # All tiles, also those whose features are there already: their quality is measured here, reading costs little
        # beside encoding, and what is still to be encoded comes in the company that it would have had.
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


def _spread(part: PartRows, values: StoredArray, count: int) -> StoredArray:
    """Rows of a part at their places among ``count``."""
    whole: StoredArray = np.zeros((count, values.shape[1]), values.dtype)
    whole[part.index] = values
    return whole
