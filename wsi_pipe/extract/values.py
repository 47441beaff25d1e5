"""What goes into extraction and what comes out, and the slides that are under way between the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import TileGrid
from wsi_pipe.quality import LevelQuality
from wsi_pipe.slides.base import Slide

__all__ = [
    "ExtractItem",
    "Level",
    "PartRows",
    "Progress",
    "Rows",
    "SlideFailure",
    "SlideFeatures",
    "SlidePart",
    "SlideState",
    "StoredArray",
]

TileArray = NDArray[np.uint8]
StoredArray = NDArray[np.float16] | NDArray[np.float32]
Progress = Callable[[str, str, int], None]
"""Called with a slide's id, a level's label, and the number of tiles that an encoder has just finished of it."""


@dataclass(frozen=True)
class PartRows:
    """Features of some tiles of one grid by one encoder, of work that ended before all were there.

    layout: how the grid's tiles were cut into batches; where another is used now they are of no use, since the batches
    that are still to do would not be those of an undisturbed run. index: int64 (M,), rows of the grid. values: (M, D),
    float16 or float32. layers: block -> (M, C). encode_s: what they took.
    """

    layout: str
    index: NDArray[np.int64]
    values: StoredArray
    layers: Mapping[int, StoredArray] = field(default_factory=dict)
    encode_s: float = 0.0


@dataclass(frozen=True)
class SlidePart:
    """What there is of a slide that is not finished: level label -> encoder's name -> rows."""

    slide_id: str
    rows: Mapping[str, Mapping[str, PartRows]]

    @property
    def tiles(self) -> int:
        """Features that it holds, of all grids and encoders together."""
        return sum(len(part.index) for level in self.rows.values() for part in level.values())


@dataclass(frozen=True)
class ExtractItem:
    """One slide to extract: how to open it, its grids, and the encoders that run on each level.

    open is called in a reading thread; the slide is closed there. encoders: level label -> names, as in the mapping
    of encoders given to ``extract_features``. Grids whose label has none are left out. parts: features that are there
    already, of these very grids and encoders, by label and name; see ``SlidePart``.
    """

    slide_id: str
    open: Callable[[], Slide]
    grids: Sequence[TileGrid]
    encoders: Mapping[str, Sequence[str]]
    parts: Mapping[str, Mapping[str, PartRows]] = field(default_factory=dict)


@dataclass(frozen=True)
class SlideFeatures:
    """The features of one slide, rows in the order of its grids.

    features: level label -> encoder's slug -> (N, D). layers: label -> slug -> block -> (N, C), the CLS token after
    that block. Both float16 or float32. seconds: "read", "encode" (its share, by tiles, of batches it shared).
    counts: "tiles", what the reader counted ("bytes_fetched", "requests", "blocks_decoded", "blocks_missing"), and the
    seconds of each level: "read_s.20x", "encode_s.20x" and so on. costs: the same seconds by what they were spent on,
    "20x/uni" -> "read", "encode"; encoders that share the reading of a level share its time evenly. quality: label ->
    measure (see ``wsi_pipe.quality``) -> float32 (N,), of every level that was read.
    """

    slide_id: str
    features: Mapping[str, Mapping[str, StoredArray]]
    layers: Mapping[str, Mapping[str, Mapping[int, StoredArray]]]
    seconds: Mapping[str, float]
    counts: Mapping[str, float]
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)


@dataclass(frozen=True)
class SlideFailure:
    """A slide that could not be extracted, and why. Other slides are not touched by it."""

    slide_id: str
    error: Exception


@dataclass
class Level:
    """One level of one slide under way: rows arrive in any order, of each of its encoders.

    missing: features that have not arrived, by encoder's name. there: bool (N,), which have. layout: as of PartRows.
    """

    slide: SlideState
    grid: TileGrid
    names: tuple[str, ...]
    missing: dict[str, int]
    there: dict[str, NDArray[np.bool_]]
    layout: dict[str, str]
    features: dict[str, StoredArray] = field(default_factory=dict)
    layers: dict[str, dict[int, StoredArray]] = field(default_factory=dict)
    read_s: float = 0.0
    encode_s: dict[str, float] = field(default_factory=dict)
    quality: LevelQuality | None = None
    quality_s: float = 0.0


@dataclass
class SlideState:
    """One slide under way."""

    item: ExtractItem
    levels: dict[str, Level] = field(default_factory=dict)
    open_s: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    read_to_end: bool = False
    settled: bool = False
    seen: bool = False

    @property
    def complete(self) -> bool:
        """True when every tile is read and has come back from all its encoders."""
        return self.read_to_end and all(n == 0 for level in self.levels.values() for n in level.missing.values())


@dataclass
class Rows:
    """A stretch of tiles of one level on their way through an encoder."""

    level: Level
    pixels: TileArray
    index: NDArray[np.int64]
