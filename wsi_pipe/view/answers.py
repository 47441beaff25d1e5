"""What the viewer answers, apart from how: each method gives JSON-able values or bytes, and may take a while."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsi_pipe.bag import read_grids, read_level
from wsi_pipe.errors import BagError, MaskError, MissingMppError, WsiPipeError
from wsi_pipe.files import output_error
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.opening import open_entry
from wsi_pipe.overview import Overview, read_overview
from wsi_pipe.slides.base import Slide
from wsi_pipe.tissue import mask_from_geojson
from wsi_pipe.view.catalogue import Catalogue
from wsi_pipe.view.layers import layer_values, layers_of
from wsi_pipe.view.nearest import nearest_tiles
from wsi_pipe.view.opened import OpenSlides
from wsi_pipe.view.pixels import VIEW_PX, DeepZoom, jpeg, tile_pixels
from wsi_pipe.view.trial import outline_of, slider_rows, tried_settings, tried_tissue

__all__ = ["Answers", "NotThereError"]

CACHED_BYTES = 64 * 2**20
"""Of pictures that were made already."""

THUMBNAIL_PX = 320
OVERVIEWS = 4
"""Overviews kept for trials of settings: up to 48 million pixels each."""


class NotThereError(WsiPipeError):
    """What was asked for does not exist."""


class _Kept:
    """What was made last, up to a total size. Any thread may ask."""

    def __init__(self, most: int, size: Callable[[Any], int]) -> None:
        self._most, self._size, self._total = most, size, 0
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under ``key``, or what ``make`` gives; two at once may both make it."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        made = make()
        with self._lock:
            if key not in self._items:
                self._items[key] = made
                self._total += self._size(made)
            while self._total > self._most and len(self._items) > 1:
                self._total -= self._size(self._items.popitem(last=False)[1])
        return made


class Answers:
    """Everything that the page can ask, for the slides of a catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._slides = OpenSlides(self._open)
        self._pictures = _Kept(CACHED_BYTES, len)
        self._overviews = _Kept(OVERVIEWS, lambda _: 1)
        self._grids = _Kept(16, lambda _: 1)

    def close(self) -> None:
        """Close the slides."""
        self._slides.close()

    def _open(self, number: int) -> Slide:
        return open_entry(self._listed(number).entry, self.catalogue.settings.reader)

    def _listed(self, number: int) -> Any:
        if not 0 <= number < len(self.catalogue.slides):
            raise NotThereError(f"there is no slide {number}")
        return self.catalogue.slides[number]

    @contextmanager
    def slide(self, number: int) -> Iterator[Slide]:
        """An open slide."""
        self._listed(number)
        with self._slides.use(number) as slide:
            yield slide

    def slides(self) -> dict[str, Any]:
        """The list of slides, and what the job is."""
        return {
            "title": self.catalogue.title,
            "job": str(self.catalogue.job.root.resolve()) if self.catalogue.job else "",
            "slides": [listed.to_json() for listed in self.catalogue.slides],
            "sliders": slider_rows(self.catalogue.settings),
        }

    def about(self, number: int) -> dict[str, Any]:
        """Size, resolution, grids, layers and tissue of a slide. What cannot be read of its bag is told in "notes"."""
        with self.slide(number) as slide:
            zoom, info, mpp = DeepZoom(slide.pyramid.size_l0), slide.info, slide.pyramid.mpp
            facts: dict[str, Any] = {
                **self._listed(number).to_json(),
                "size": list(zoom.size_l0),
                "max_level": zoom.max_level,
                "picture_px": VIEW_PX,
                "mpp": list(mpp) if mpp else None,
                "mpp_source": info.mpp_source,
                "vendor": info.vendor,
                "reader": info.reader,
                "power": info.objective_power,
                "levels": [[*level.size_px] for level in slide.pyramid.levels],
                "notes": list(info.notes),
            }
        facts |= {"grids": [], "layers": [], "outline": None}
        bag = self.catalogue.bag(number)
        if bag is not None:
            try:
                facts["grids"] = [self._grid_facts(grid) for grid in self._grids_of(bag)]
                facts["layers"] = [layer.to_json() for layer in layers_of(bag)]
            except WsiPipeError as error:
                facts["notes"].append(str(error))
        try:
            facts["outline"] = self._outline(number, zoom)
        except WsiPipeError as error:
            facts["notes"].append(str(error))
        return facts

    def _grids_of(self, bag: Path) -> tuple[TileGrid, ...]:
        stamp = bag.stat()
        grids: tuple[TileGrid, ...] = self._grids.get(
            (str(bag), stamp.st_mtime_ns, stamp.st_size), lambda: read_grids(bag)
        )
        return grids

    @staticmethod
    def _grid_facts(grid: TileGrid) -> dict[str, Any]:
        return {
            "label": grid.label,
            "count": len(grid),
            "size_px": grid.spec.size_px,
            "mpp": list(grid.mpp_effective),
            "origin": list(grid.origin_l0),
            "stride": list(grid.stride_l0),
            "size": list(grid.tile_size_l0),
        }

    def _outline(self, number: int, zoom: DeepZoom) -> list[list[list[float]]] | None:
        job = self.catalogue.job
        path = job.tissue(self._listed(number).entry.slide_id) if job else None
        if path is None or not path.is_file():
            return None
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise MaskError(f"{path}: is not JSON") from error
        except OSError as error:
            raise output_error(path, error) from error
        return outline_of(mask_from_geojson(data, zoom.size_l0))

    def picture(self, number: int, level: int, column: int, row: int) -> bytes:
        """A picture of the slide's pyramid as JPEG."""

        def make() -> bytes:
            with self.slide(number) as slide:
                zoom = DeepZoom(slide.pyramid.size_l0)
                if not zoom.holds(level, column, row):
                    raise NotThereError(f"slide {number} has no picture {column}, {row} at level {level}")
                return jpeg(zoom.read(slide, level, column, row))

        return bytes(self._pictures.get(("picture", number, level, column, row), make))

    def thumbnail(self, number: int) -> bytes:
        """The whole slide as a small JPEG: from the job's pictures where it has one."""

        def make() -> bytes:
            job = self.catalogue.job
            entry = self._listed(number).entry
            if job is not None and (path := job.overview_picture(entry.slide_id)).is_file():
                pixels = cv2.imread(str(path))
                if pixels is not None:
                    return jpeg(_shrunk(np.ascontiguousarray(pixels[..., ::-1]), THUMBNAIL_PX), 80)
            with self.slide(number) as slide:
                zoom = DeepZoom(slide.pyramid.size_l0)
                level = next(n for n in range(zoom.max_level, -1, -1) if max(zoom.size_px(n)) <= VIEW_PX)
                return jpeg(_shrunk(zoom.read(slide, level, 0, 0), THUMBNAIL_PX), 80)

        return bytes(self._pictures.get(("thumbnail", number), make))

    def grid(self, number: int, label: str) -> dict[str, Any]:
        """Cells of all tiles of a grid, flat, and their parents."""
        grid = self._grid(number, label)
        parent = grid.parent.tolist() if grid.parent is not None else None
        return {"cells": grid.cells.ravel().tolist(), "parent": parent}

    def _grid(self, number: int, label: str) -> TileGrid:
        for grid in self._grids_of(self._bag(number)):
            if grid.label == label:
                return grid
        raise NotThereError(f"slide {number} has no grid {label}")

    def _bag(self, number: int) -> Path:
        self._listed(number)
        bag = self.catalogue.bag(number)
        if bag is None:
            raise NotThereError(f"slide {number} has no bag")
        return bag

    def layer(self, number: int, label: str, key: str) -> dict[str, Any]:
        """Values of a layer of a grid."""
        try:
            return layer_values(self._bag(number), label, key)
        except BagError as error:
            raise NotThereError(str(error)) from error

    def tile(self, number: int, label: str, row: int) -> bytes:
        """A tile as PNG: the very pixels that an encoder gets."""
        grid = self._grid(number, label)
        if not 0 <= row < len(grid):
            raise NotThereError(f"slide {number} has no tile {row} at {label}")
        with self.slide(number) as slide:
            pixels = tile_pixels(slide, grid, row)
        encoded: bytes = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()
        return encoded

    def nearest(
        self, number: int, label: str, row: int, encoder: str, everywhere: bool, stopped: Callable[[], bool]
    ) -> list[dict[str, Any]]:
        """The ten tiles most alike in the slide, or in the whole job."""
        bag = self._bag(number)
        try:
            features = read_level(bag, label, encoder).features
        except BagError as error:
            raise NotThereError(str(error)) from error
        if not 0 <= row < len(features):
            raise NotThereError(f"slide {number} has no tile {row} at {label}")
        numbers = range(len(self.catalogue.slides)) if everywhere else [number]
        bags = ((n, path) for n in numbers if (path := self.catalogue.bag(n)) is not None)
        found = nearest_tiles(features[row], bags, label, encoder, but=(number, row), stopped=stopped)
        return [{"similarity": round(alike, 5), "slide": n, "row": tile} for alike, n, tile in found]

    def trial(self, number: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Outline and tiles under other settings; with no values those of the job."""
        segment, tile = tried_settings(self.catalogue.settings, values)
        with self.slide(number) as slide:
            if slide.pyramid.mpp is None:
                raise MissingMppError("the slide states no resolution, so no tissue can be looked for")
            overview: Overview = self._overviews.get((number, segment.mpp), lambda: read_overview(slide, segment.mpp))
            mask, tiles = tried_tissue(slide, overview, segment, tile)
            area = mask.area_um2(slide.pyramid.mpp) / 1e6
        return {"outline": outline_of(mask), "tiles": tiles, "tissue_mm2": area, "reason": mask.empty_reason or ""}


def _shrunk(pixels: Any, most: int) -> Any:
    factor = most / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    size = (max(round(pixels.shape[1] * factor), 1), max(round(pixels.shape[0] * factor), 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
