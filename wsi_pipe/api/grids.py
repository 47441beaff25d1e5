"""Aligned grids of one slide, their tiles, and features of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.encoders import EncodesTiles, ready_encoder
from wsi_pipe.api.features import TileFeatures
from wsi_pipe.api.layout import Layout, frame_of
from wsi_pipe.api.show import card, number
from wsi_pipe.api.source import Source
from wsi_pipe.config import ExtractSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import ConfigError
from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, extract_features
from wsi_pipe.geometry import TileGrid, level_label, parse_resolution
from wsi_pipe.job.alone import level_features
from wsi_pipe.job.prepared import Prepared
from wsi_pipe.overview import read_thumbnail
from wsi_pipe.pictures import thumbnail_with_grids
from wsi_pipe.tiles import DEFAULT_MEMORY_BYTES, stream_tiles

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = ["Grid", "Grids", "TileBatch", "as_label"]


def as_label(resolution: str | float) -> str:
    """The name of a resolution: "20x" of "20x", "0.5um" or 0.5 (um/px). Raises ConfigError for anything else."""
    return level_label(as_mpp(resolution))


def as_mpp(resolution: str | float) -> float:
    """Micrometres per pixel of "20x", "0.5um" or 0.5. Raises ConfigError for anything else."""
    if isinstance(resolution, str):
        return parse_resolution(resolution)
    if isinstance(resolution, bool) or not resolution > 0:
        raise ConfigError(f"resolution {resolution!r} is none", remedy='write "20x", "0.5um" or 0.5 (um/px)')
    return float(resolution)


def is_among(resolution: object, labels: Container[str]) -> bool:
    """Whether one of these names is that of a resolution; False for what is no resolution."""
    try:
        return isinstance(resolution, (str, int, float)) and as_label(resolution) in labels
    except ConfigError:
        return False


@dataclass(frozen=True)
class TileBatch:
    """Neighbouring tiles of a grid, in its order.

    pixels: uint8 (B, H, W, 3), RGB; the receiver's own. index: int64 (B,), rows of the grid. coords: int64 (B, 2),
    top-left corners (x, y) in level-0 pixels. ``numpy.asarray`` gives the pixels.
    """

    pixels: NDArray[np.uint8]
    index: NDArray[np.int64]
    coords: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype, copy=copy)


class Grid(Layout):
    """The kept tiles of one slide at one resolution."""

    def __init__(self, source: Source, prepared: Prepared, layout: TileGrid, finer: TileGrid | None) -> None:
        super().__init__(layout, finer)
        self._source = source
        self.prepared = prepared

    def tiles(
        self,
        batch_size: int = 64,
        *,
        rows: Sequence[int] | NDArray[np.integer[Any]] | slice | None = None,
        threads: int | None = None,
        memory_mib: int | None = None,
    ) -> Iterator[TileBatch]:
        """The tiles in batches, read by the fast reader: every native block of the file once, on several threads.

        rows: some of the tiles, in this order, by default all. threads: by default the cores that this process may use.
        memory_mib: for decoded pixels that were not handed out yet. Raises SlideReadError, naming slide and tile, when
        a block cannot be read.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} must be at least 1")
        chosen = np.arange(len(self))[slice(None) if rows is None else rows].astype(np.int64)
        layout = self.layout if rows is None else self.layout.take(chosen)
        if not len(layout):
            return
        memory = DEFAULT_MEMORY_BYTES if memory_mib is None else memory_mib << 20
        stream = stream_tiles(self._source.slide, layout, batch_size=batch_size, threads=threads, memory_bytes=memory)
        for batch in stream:
            index = chosen[batch.index]
            yield TileBatch(batch.pixels, index, self.coords[index])

    def tile(self, row: int) -> NDArray[np.uint8]:
        """One tile, uint8 (H, W, 3). Raises IndexError for a row that does not exist."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.label} has no tile {row}: it has {len(self)}")
        (batch,) = self.tiles(1, rows=[row])
        return np.asarray(batch.pixels[0], np.uint8)

    def encode(
        self,
        encoder: str | Encoder | torch.nn.Module | EncodesTiles = "texture",
        *,
        name: str | None = None,
        version: str = "",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_px: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        dtype: str = "float16",
        layers: Sequence[int] = (),
        batch_size: int | None = None,
        compile: bool = False,
        random_weights: bool = False,
        read_threads: int | None = None,
        memory_mib: int = 2048,
        progress: Callable[[int, int], object] | None = None,
    ) -> TileFeatures:
        """Features of all tiles.

        encoder: a name as ``wsi-pipe encoders`` lists them, the file of an LR encoder, an encoder that is loaded
        already, a ``torch.nn.Module`` or any callable. A network gets float32 images (B, 3, H, W) on its device,
        ``(tile / 255 - mean) / std`` with ImageNet's mean and standard deviation unless others are given, resized to
        ``input_px`` where that is given; it is copied, and runs in float32 unless ``precision`` says otherwise. A
        callable gets uint8 (B, H, W, 3), RGB, in a thread of its own. Both give (B, D). name: what such an encoder is
        called in bags, by default its own; version: tells apart callables of one name, of which nothing else is known.

        device, precision, dtype, layers, batch_size, compile, random_weights, read_threads, memory_mib: as of
        ``wsi-pipe run``. progress: called with the tiles done and all tiles, from another thread.

        Raises EncoderError where the encoder cannot be had or fails, ResolutionError where it was made for another
        resolution, SlideReadError, and ConfigError for arguments that do not fit together.
        """
        devices = tuple(part.strip() for part in device.split(","))
        settings = ExtractSettings(
            layers=tuple(layers),
            dtype=dtype,
            precision=precision,
            random_weights=random_weights,
            batch_size=batch_size,
            devices=devices,
            compile=compile,
            read_threads=read_threads,
            memory_mib=memory_mib,
        )
        ready = ready_encoder(
            encoder,
            settings,
            tile_px=self.tile_px,
            name=name,
            version=version,
            mean=mean,
            std=std,
            input_px=input_px,
        )
        return self._encoded(ready, settings, progress)

    def _encoded(
        self, encoder: Encoder, settings: ExtractSettings, progress: Callable[[int, int], object] | None
    ) -> TileFeatures:
        """The features, by the engine of the command line."""
        own, done, total = encoder.info.name, 0, len(self)
        settings = dataclasses.replace(settings, encoders={"*": (own,)})

        def tell(slide_id: str, label: str, count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        # Opened once more: the engine closes what it reads from. A closed slide says so here.
        _ = self._source.slide
        item = ExtractItem(self.prepared.entry.slide_id, self._source.new, [self.layout], {self.label: (own,)})
        computing = extract_features(
            [item],
            {own: encoder},
            batch_size=settings.batch_size,
            read_threads=settings.read_threads,
            memory_bytes=settings.memory_mib << 20,
            dtype=settings.dtype,
            layers=settings.layers,
            progress=tell,
        )
        # Closed here, also where the work is interrupted: its threads would go on until somebody collects it.
        with closing(computing):
            results = list(computing)
        for result in results:
            if isinstance(result, SlideFailure):
                raise result.error
        (found,) = (result for result in results if isinstance(result, SlideFeatures))
        computed = level_features(self.prepared, self.label, found, encoder, settings, self._source.reader)
        return TileFeatures(self, self.prepared, computed)

    def to_frame(self) -> pd.DataFrame:
        """One row a tile: level, x, y (level-0 pixels), column, row, tissue, parent (pandas)."""
        return frame_of(self)

    def picture(self, max_px: int = 1600) -> NDArray[np.uint8]:
        """The slide with the tiles drawn on it, uint8 (H, W, 3)."""
        return _picture(self._source, [self.layout], self.prepared, max_px)

    def __repr__(self) -> str:
        return f"<Grid {self.label}: {len(self):,} tiles of {self.tile_px} px>"

    def _repr_html_(self) -> str:
        return card(f"{self.prepared.attrs.slide_id}, {self.label}", _facts(self), self.picture(900))


class Grids(Mapping[str, Grid]):
    """A slide's grids by name, coarsest first; each finer one subdivides the one before it by a whole number."""

    def __init__(self, source: Source, prepared: Prepared) -> None:
        self._source = source
        self.prepared = prepared
        finer = [*prepared.grids[1:], None]
        self._grids = {
            layout.label: Grid(source, prepared, layout, below)
            for layout, below in zip(prepared.grids, finer, strict=True)
        }

    def __getitem__(self, resolution: str | float) -> Grid:
        label = as_label(resolution)
        try:
            return self._grids[label]
        except KeyError:
            raise KeyError(f"no grid {label}: there are {', '.join(self._grids)}") from None

    def __contains__(self, resolution: object) -> bool:
        return is_among(resolution, self._grids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._grids)

    def __len__(self) -> int:
        return len(self._grids)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of mask, annotations and tiles that were left out."""
        return self.prepared.notes

    @property
    def empty_reason(self) -> str:
        """Why there is no tile, "" where there are some."""
        return self.prepared.attrs.empty_reason

    def encode(self, encoder: Any = "texture", **options: Any) -> dict[str, TileFeatures]:
        """Features of all grids by name; see ``Grid.encode``. An encoder that goes by its name is loaded for each."""
        return {label: grid.encode(encoder, **options) for label, grid in self._grids.items()}

    def picture(self, max_px: int = 1600) -> NDArray[np.uint8]:
        """The slide with the tiles of all grids drawn on it, uint8 (H, W, 3)."""
        return _picture(self._source, self.prepared.grids, self.prepared, max_px)

    def __repr__(self) -> str:
        counts = ", ".join(f"{label}: {len(grid):,} tiles" for label, grid in self._grids.items())
        return f"<Grids of {self.prepared.attrs.slide_id}: {counts}>"

    def _repr_html_(self) -> str:
        facts = [(label, f"{len(grid):,} tiles of {grid.tile_px} px") for label, grid in self._grids.items()]
        return card(f"Grids of {self.prepared.attrs.slide_id}", facts, self.picture(900))


def _facts(grid: Grid) -> list[tuple[str, object]]:
    return [
        ("tiles", f"{len(grid):,}"),
        ("tile", f"{grid.tile_px} px, {number(grid.tile_px * grid.mpp[0])} um"),
        ("um per px", number(grid.mpp[0])),
        ("kept from", f"{grid.layout.min_tissue:.0%} tissue"),
    ]


def _picture(source: Source, grids: Sequence[TileGrid], prepared: Prepared, max_px: int) -> NDArray[np.uint8]:
    slide = source.slide
    rgb = read_thumbnail(slide, max_px)
    size, mpp = slide.pyramid.size_l0, slide.pyramid.isotropic_mpp
    scale = (size[0] / rgb.shape[1], size[1] / rgb.shape[0])
    um = None if mpp is None else (scale[0] * mpp[0], scale[1] * mpp[1])
    return thumbnail_with_grids(rgb, scale, grids, um_per_px=um, title=prepared.attrs.slide_id, max_px=max_px)
