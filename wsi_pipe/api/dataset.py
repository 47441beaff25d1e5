"""Tiles of slides for PyTorch's DataLoader, read in its workers."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.grids import as_label, as_mpp
from wsi_pipe.api.show import table
from wsi_pipe.api.slide import Slide, segment_settings, tile_settings
from wsi_pipe.api.source import Source
from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.errors import ConfigError, SlideError
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.alone import find_mask, lay_grids
from wsi_pipe.manifest import collect_slides
from wsi_pipe.slides.base import Slide as BaseSlide
from wsi_pipe.tiles import stream_tiles

if TYPE_CHECKING:
    import torch

__all__ = ["TileDataset"]

_log = logging.getLogger(__name__)

MOST_OPEN = 32
"""Slides that a process keeps open: some readers take several files for one."""

Slides = str | os.PathLike[str] | Slide | Sequence[str | os.PathLike[str] | Slide]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One slide's tiles: how to open it, and where they lie."""

    source: Source
    grid: TileGrid


class TileDataset:
    """The tiles of many slides at one resolution, as a map-style data set.

    An item is a dict: "image", uint8 tensor (3, H, W), or what ``transform`` makes of the tile uint8 (H, W, 3);
    "slide_id"; "slide", its number; "row", of the slide's grid; "coords", int64 (2,), level-0 pixels.

    Batches that are asked for in one go (``__getitems__``, which DataLoader uses) read each native block of the file
    once, so neighbours in one batch are cheap and shuffled tiles are not: shuffle by blocks where speed matters, as
    ``chunks`` does. Pickles as paths, settings and where tiles lie; every worker opens slides for itself, and only
    those that it reads.
    """

    def __init__(
        self,
        slides: Slides,
        resolution: str | float = "20x",
        *,
        transform: Callable[[NDArray[np.uint8]], Any] | None = None,
        with_resolutions: Sequence[str | float] = (),
        mpp: float | tuple[float, float] | None = None,
        reader: str = "auto",
        segment: SegmentSettings | None = None,
        threads: int = 1,
        skip_bad: bool = False,
        **values: Any,
    ) -> None:
        """slides: files, folders, URLs, slide lists, or slides that are open. with_resolutions: further resolutions to
        lay the grid beside, as a job with several would. mpp: of slides that state none. segment: settings by which
        tissue is found; others, such as ``tile_px`` and ``min_tissue``, by name. threads: that read, in each worker.
        skip_bad: leave out slides that cannot be opened or tiled; ``failures`` says which and why.

        Tissue is found, and grids are laid, here and once. Raises what ``Slide.grids`` raises, naming the slide.
        """
        self.failures: dict[str, str] = {}
        self._recent: dict[int, None] = {}
        self.transform = transform
        self.threads = threads
        self.label = as_label(resolution)
        settings: TileSettings = tile_settings([resolution, *with_resolutions], None, values)
        tissue = segment_settings(segment, {})
        self._parts: list[_Part] = []
        for source in _sources(slides, mpp, reader):
            try:
                self._parts.append(_Part(source, _grid_of(source, as_mpp(resolution), settings, tissue)))
            except SlideError as error:
                if not skip_bad:
                    raise
                self.failures[source.entry.slide_id] = str(error)
                _log.warning("%s is left out: %s", source.entry.slide_id, error)
        self._ends = np.cumsum([len(part.grid) for part in self._parts], dtype=np.int64).tolist()

    @property
    def slide_ids(self) -> list[str]:
        """The slides, in order."""
        return [part.source.entry.slide_id for part in self._parts]

    @property
    def slide_of_tile(self) -> NDArray[np.int64]:
        """The number of each tile's slide, int64 (N,): for samplers."""
        return np.repeat(np.arange(len(self._parts)), [len(part.grid) for part in self._parts])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One tile. Raises IndexError for one that does not exist, SlideReadError."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Tiles in the order asked for, each slide's read together."""
        places = [self._place(int(index)) for index in indices]
        found: list[dict[str, Any]] = [{} for _ in places]
        for number in dict.fromkeys(slide for slide, _ in places):
            part = self._parts[number]
            asked = [(position, row) for position, (slide, row) in enumerate(places) if slide == number]
            # In the grid's order, so that blocks are shared, and each tile once.
            rows = np.unique([row for _, row in asked])
            positions: dict[int, list[int]] = {}
            for position, row in asked:
                positions.setdefault(row, []).append(position)
            stream = stream_tiles(
                self._opened(number), part.grid.take(rows), batch_size=max(len(rows), 1), threads=self.threads
            )
            for batch in stream:
                for pixels, row in zip(batch.pixels, rows[batch.index].tolist(), strict=True):
                    for position in positions[row]:
                        found[position] = self._item(number, part, row, pixels)
        return found

    def _opened(self, number: int) -> BaseSlide:
        """A slide, open; of those that were read before, the ones of longest ago are closed."""
        self._recent.pop(number, None)
        self._recent[number] = None
        for old in list(self._recent)[:-MOST_OPEN]:
            del self._recent[old]
            self._parts[old].source.rest()
        return self._parts[number].source.slide

    def _item(self, number: int, part: _Part, row: int, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        return {
            "image": self.transform(pixels) if self.transform is not None else _tensor(pixels),
            "slide_id": part.source.entry.slide_id,
            "slide": number,
            "row": row,
            "coords": part.grid.coords[row],
        }

    def _place(self, index: int) -> tuple[int, int]:
        """Slide and row of a tile."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no tile {index}: there are {len(self)}")
        index %= len(self)
        slide = bisect.bisect_right(self._ends, index)
        return slide, index - (self._ends[slide - 1] if slide else 0)

    def chunks(self, size: int, *, seed: int | None = None) -> Iterator[list[int]]:
        """Batches of ``size`` neighbours, for DataLoader's ``batch_sampler``; shuffled as wholes with a seed."""
        if size < 1:
            raise ConfigError(f"chunks of {size} tiles hold nothing")
        starts = [0, *self._ends[:-1]]
        found = [
            list(range(first, min(first + size, end)))
            for start, end in zip(starts, self._ends, strict=True)
            for first in range(start, end, size)
        ]
        order = np.arange(len(found)) if seed is None else np.random.default_rng(seed).permutation(len(found))
        yield from (found[i] for i in order.tolist())

    def close(self) -> None:
        """Close the slides that this process opened."""
        for part in self._parts:
            part.source.close()

    def __repr__(self) -> str:
        return f"<TileDataset: {len(self):,} tiles of {len(self._parts):,} slides at {self.label}>"

    def _repr_html_(self) -> str:
        rows = [[part.source.entry.slide_id, f"{len(part.grid):,}"] for part in self._parts]
        return table(f"{len(self):,} tiles at {self.label}", ["slide", "tiles"], rows)


def _sources(slides: Slides, mpp: float | tuple[float, float] | None, reader: str) -> list[Source]:
    given = [slides] if isinstance(slides, (str, os.PathLike, Slide)) else list(slides)
    paths = [os.fspath(item) for item in given if not isinstance(item, Slide)]
    opened = [
        Source(item.source.entry, item.source.reader, item.source.cache) for item in given if isinstance(item, Slide)
    ]
    # Paths all in one go: two slides of one name get ids that tell them apart.
    entries = collect_slides(paths) if paths else []
    pair = (float(mpp), float(mpp)) if isinstance(mpp, (int, float)) else mpp
    listed = [Source(entry.stating(mpp_if_missing=pair) if pair else entry, reader) for entry in entries]
    return [*opened, *listed]


def _grid_of(source: Source, mpp: float, settings: TileSettings, segment: SegmentSettings) -> TileGrid:
    slide = source.new()
    try:
        laid = lay_grids(source.entry, slide, find_mask(source.entry, slide, segment, source.reader), settings)
    finally:
        slide.close()
    return next(grid for grid in laid.grids if grid.spec.mpp == mpp)


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    import torch

    # Small and whole, so that a worker hands over the tile and not the batch that it lies in.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
