"""Bags: written from what was made of a slide, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.features import TileFeatures
from wsi_pipe.api.grids import Grids, as_label, is_among
from wsi_pipe.api.layout import Layout, frame_of
from wsi_pipe.api.show import card, number
from wsi_pipe.api.slide import Slide
from wsi_pipe.bag import BagAttrs, BagHeader, check_bag, read_header, read_level, read_slide_vectors
from wsi_pipe.bag import write_bag as write_file
from wsi_pipe.bag.columns import read_columns
from wsi_pipe.encoders.naming import check_slugs, slug_of
from wsi_pipe.errors import ConfigError, NotOursError
from wsi_pipe.geometry import FloatPair, IntPair, TileGrid
from wsi_pipe.job.alone import bag_of
from wsi_pipe.job.guard import problems_guarded, read_guarded
from wsi_pipe.job.ownership import refuse_other_hdf5
from wsi_pipe.job.prepared import Prepared

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Bag", "BagLevel", "open_bag", "write_bag"]

Part = Grids | TileFeatures | Iterable[TileFeatures] | Mapping[str, TileFeatures]


def write_bag(path: str | Path, slide: Slide, *parts: Part, overwrite: bool = False) -> Bag:
    """Write the bag of a slide: the file that ``wsi-pipe run`` would write, fingerprints and all.

    parts: the slide's grids, and features of them, one by one, in lists, or as ``Grids.encode`` gives them. The bag
    holds all grids that the features belong to. Of the coarsest grid, the first features given are the primary ones.

    Raises ConfigError where parts are of another slide or of grids that were laid otherwise, or two features would have
    one place; NotOursError where a file is there, unless ``overwrite``, and also then for a file of others; OutputError
    when it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise NotOursError(f"{path}: is there already", remedy="give another name, or overwrite=True")
    refuse_other_hdf5(path)
    prepared, features = _sorted_parts(slide, parts)
    for label in {item.label for item in features}:
        own = [item.computed.wanted.info for item in features if item.label == label]
        names = [info.slug for info in own]
        if len(set(names)) < len(names):
            raise ConfigError(f"features of one encoder are given twice at {label}", remedy="give them once")
        check_slugs((info.name, info.slug) for info in own)
    write_file(path, bag_of(prepared, [item.computed for item in features]))
    return open_bag(path)


def _sorted_parts(slide: Slide, parts: Iterable[Any]) -> tuple[Prepared, list[TileFeatures]]:
    laid: list[Prepared] = []
    features: list[TileFeatures] = []
    for part in parts:
        if isinstance(part, Grids):
            laid.append(part.prepared)
            continue
        several = part.values() if isinstance(part, Mapping) else part
        inside = [part] if isinstance(part, TileFeatures) else list(several)
        for item in inside:
            if not isinstance(item, TileFeatures):
                raise ConfigError(
                    f"a {type(item).__name__} is no part of a bag",
                    remedy="give grids, as slide.grids() lays them, and features, as grid.encode() gives them",
                )
        features += inside
    laid += [item.prepared for item in features]
    if not laid:
        raise ConfigError("the bag has no grids", remedy="give slide.grids(...), or features of them")
    first = laid[0]
    for other in laid:
        if other.attrs.slide_fingerprint != slide.info.fingerprint or other.entry.slide_id != slide.slide_id:
            raise ConfigError(
                f"grids or features of {other.entry.slide_id} are given for {slide.slide_id}",
                remedy="write a bag a slide",
            )
        if other.attrs.fingerprint_tile != first.attrs.fingerprint_tile:
            raise ConfigError(
                "features of grids that were laid otherwise are given for one bag",
                remedy='lay all grids in one call, as slide.grids("20x", "5x")',
            )
    return first, features


def open_bag(path: str | Path) -> Bag:
    """Open the bag of a slide; features are read when they are asked for.

    Raises BagError when the file is no bag or is damaged, FileAccessError when it cannot be looked at.
    """
    path = Path(path)
    return Bag(path, read_guarded(read_header, path))


class _Columns(Mapping[str, NDArray[np.float32]]):
    """Columns of one kind, one number a tile, by name."""

    def __init__(self, path: Path, label: str, kind: str) -> None:
        self._columns = read_columns(path, label)[kind]
        self._what = f"{path}: {label} has no {kind}"

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._columns:
            raise KeyError(f"{self._what} {name!r}: it has {', '.join(self._columns) or 'none'}")
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class _Features(Mapping[str, NDArray[np.floating[Any]]]):
    """Features of a level by the encoder's name, alias or name in paths; read once, when they are asked for."""

    def __init__(self, path: Path, label: str, header: BagHeader) -> None:
        self._path, self._label = path, label
        self._slugs = {slug: item.encoder for slug, item in header.features[label].items()}
        self._read: dict[str, NDArray[np.floating[Any]]] = {}

    def _slug(self, name: str) -> str:
        by_name = {encoder: slug for slug, encoder in self._slugs.items()}
        for slug in (name, by_name.get(name, ""), slug_of(name)):
            if slug in self._slugs:
                return slug
        have = ", ".join(self._slugs) or "none"
        raise KeyError(f"{self._path}: has no features of {name!r} at {self._label}: it has {have}")

    def __getitem__(self, name: str) -> NDArray[np.floating[Any]]:
        slug = self._slug(name)
        if slug not in self._read:
            self._read[slug] = read_level(self._path, self._label, slug).features
        return self._read[slug]

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self._slug(name))
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._slugs)

    def __len__(self) -> int:
        return len(self._slugs)

    def __repr__(self) -> str:
        return f"<features of {', '.join(self._slugs) or 'no encoder'}>"


class BagLevel(Layout):
    """One resolution of a bag: its tiles, and what was computed of them."""

    def __init__(self, path: Path, header: BagHeader, layout: TileGrid, finer: TileGrid | None) -> None:
        super().__init__(layout, finer)
        self._path, self._header = path, header

    @cached_property
    def features(self) -> Mapping[str, NDArray[np.floating[Any]]]:
        """Features by encoder, float16 or float32 (N, D)."""
        return _Features(self._path, self.label, self._header)

    @property
    def attention(self) -> Mapping[str, NDArray[np.float32]]:
        """Attention by model, float32 (N,), sums to 1. Read anew each time: ``lrmil`` writes it into bags."""
        return _Columns(self._path, self.label, "attention")

    @cached_property
    def annotation(self) -> Mapping[str, NDArray[np.float32]]:
        """By class of the slide's annotations, the fraction of each tile that its areas cover, float32 (N,)."""
        return _Columns(self._path, self.label, "annotation")

    @cached_property
    def quality(self) -> Mapping[str, NDArray[np.float32]]:
        """What was measured of the tiles ("sharpness", "fold", "bubble"), float32 (N,)."""
        return _Columns(self._path, self.label, "quality")

    def to_frame(self, features: str | None = None) -> pd.DataFrame:
        """One row a tile: place, tissue, parent, and quality, annotation and attention by name (pandas).

        features: of this encoder, as columns ``NAME_0`` and so on.
        """
        values: dict[str, Any] = dict(self.quality)
        for kind, columns in (("annotation", self.annotation), ("attention", self.attention)):
            values |= {f"{kind}_{name}": column for name, column in columns.items()}
        if features is not None:
            values[features] = self.features[features]
        return frame_of(self, values)

    def __repr__(self) -> str:
        return f"<BagLevel {self.label}: {len(self):,} tiles, {self.features!r}>"

    def _repr_html_(self) -> str:
        return card(f"{self._header.attrs.slide_id}, {self.label}", _facts(self, self._header))


class Bag(Mapping[str, BagLevel]):
    """One slide's bag: its levels by name, coarsest first. Holds no file open."""

    def __init__(self, path: Path, header: BagHeader) -> None:
        self.path = path
        self._header = header
        finer = [*header.grids[1:], None]
        self._levels = {
            layout.label: BagLevel(path, header, layout, below)
            for layout, below in zip(header.grids, finer, strict=True)
        }

    @property
    def attrs(self) -> BagAttrs:
        """What the bag says of itself: slide, resolution, fingerprints, status."""
        return self._header.attrs

    @property
    def slide_id(self) -> str:
        """The slide's name."""
        return self.attrs.slide_id

    @property
    def case_id(self) -> str:
        """The patient."""
        return self.attrs.case_id

    @property
    def mpp(self) -> FloatPair:
        """Micrometres per level-0 pixel, (x, y)."""
        return self.attrs.mpp_l0

    @property
    def size(self) -> IntPair:
        """(width, height) of the slide's level 0 in pixels."""
        return (self.attrs.width_l0, self.attrs.height_l0)

    @property
    def is_empty(self) -> bool:
        """Whether the slide has no tile; ``attrs.empty_reason`` says why."""
        return self.attrs.status == "empty"

    @property
    def vectors(self) -> Mapping[str, NDArray[np.float32]]:
        """Vectors of the whole slide, float32 (D,), by name; ``wsi-pipe pool`` makes them. Read anew each time."""
        return {name: item.values for name, item in read_guarded(read_slide_vectors, self.path).items()}

    def check(self) -> list[str]:
        """What is wrong with the file, as ``wsi-pipe verify`` finds it; nothing where it is right."""
        return problems_guarded(check_bag, self.path)

    def to_frame(self) -> pd.DataFrame:
        """The tiles of all levels, one row a tile, coarsest first; see ``BagLevel.to_frame`` (pandas)."""
        import pandas as pd

        return pd.concat([level.to_frame() for level in self._levels.values()], ignore_index=True)

    def __getitem__(self, level: str | float) -> BagLevel:
        label = as_label(level)
        if label not in self._levels:
            raise KeyError(f"{self.path}: has no level {label}: it has {', '.join(self._levels) or 'none'}")
        return self._levels[label]

    def __contains__(self, level: object) -> bool:
        return is_among(level, self._levels)

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is to be closed."""

    def __repr__(self) -> str:
        what = ", ".join(f"{label}: {len(level):,} tiles" for label, level in self._levels.items())
        return f"<Bag {self.slide_id}: {what or 'no levels'}>"

    def _repr_html_(self) -> str:
        attrs = self.attrs
        facts: list[tuple[str, object]] = [
            ("slide", attrs.slide_path),
            ("case", attrs.case_id),
            ("status", f"{attrs.status}: {attrs.empty_reason}" if attrs.empty_reason else attrs.status),
            ("um per px", number(attrs.mpp_l0[0])),
        ]
        for label, level in self._levels.items():
            facts.append((label, f"{len(level):,} tiles of {level.tile_px} px; {_shown_features(level, self._header)}"))
        return card(f"Bag {attrs.slide_id}", facts)


def _shown_features(level: BagLevel, header: BagHeader) -> str:
    return ", ".join(f"{slug} ({item.dim})" for slug, item in header.features[level.label].items()) or "no features"


def _facts(level: BagLevel, header: BagHeader) -> list[tuple[str, object]]:
    return [
        ("tiles", f"{len(level):,} of {level.tile_px} px"),
        ("um per px", number(level.mpp[0])),
        ("features", _shown_features(level, header)),
    ]
