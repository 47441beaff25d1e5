"""Tiles as image files, one a tile, or in tar shards that WebDataset reads."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag import BagAttrs, read_header
from wsi_pipe.config import JobSettings, fingerprint
from wsi_pipe.cores import available_cores
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import atomic_path, parse_json, write_text_atomically
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.fingerprints import grid_fingerprint
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["IMAGE_KINDS", "TileImages", "save_tile_images"]

IMAGES_VERSION = 1
IMAGE_KINDS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "subsampling": 0, "comment": b"wsi-pipe"},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "method": 4},
}
ENCODERS = 4
"""Threads that encode; one keeps up with reading nearly."""


@dataclass(frozen=True)
class TileImages:
    """How tiles are saved.

    kind: "jpg", "png" or "webp". quality: 1 to 100, of jpg and webp. most: at most so many a grid, spread evenly over
    it; None for all. shard_size: tiles a tar file; None for a file a tile.
    """

    kind: str = "jpg"
    quality: int = 90
    most: int | None = None
    shard_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in IMAGE_KINDS:
            raise ConfigError(f"pictures of kind {self.kind!r} are not known", remedy=f"use {', '.join(IMAGE_KINDS)}")

    @property
    def index_name(self) -> str:
        """The file that says what was saved; one for each form, which may lie side by side."""
        return f"{'shards' if self.shard_size else 'tiles'}.{self.kind}.json"


def save_tile_images(
    entry: SlideEntry,
    settings: JobSettings,
    paths: JobPaths,
    how: TileImages,
    *,
    check: Callable[[], object] = lambda: None,
) -> dict[str, int]:
    """Save the tiles of each grid; by level, how many were saved now: 0 where they were right already.

    Files are ``tiles/<id>/<level>/<column>_<row>.<kind>``, or ``<id>-<level>-000000.tar`` there, with
    ``<id>/<level>/<column>_<row>.<kind>`` and a ``.json`` of the same name for each tile. One slide, grid and way of
    saving give the same bytes. Tiles of an earlier grid that were saved in the same form are removed. check: called
    between batches, to end the work.

    Raises SlideError when the slide cannot be read, BagError when its grids cannot, OutputError when the folder cannot
    be written.
    """
    header = read_guarded(read_header, paths.tiles(entry.slide_id))
    counts = dict.fromkeys((grid.label for grid in header.grids), 0)
    with ExitStack() as stack:
        slide: Slide | None = None
        for grid in header.grids:
            some = grid if how.most is None else grid.spread(how.most)
            folder = paths.tile_images(entry.slide_id, grid.label)
            mark = fingerprint(
                IMAGES_VERSION, grid_fingerprint(header.attrs.slide_fingerprint, some), settings.reader, how
            )
            before = _index(folder / how.index_name)
            if _is_done(folder, before, mark):
                continue
            if slide is None:
                slide = open_entry(entry, settings.reader, settings.cache)
                stack.callback(slide.close)
            tiles = _encoded(slide, some, how, check)
            if how.shard_size:
                files = _write_shards(folder, header.attrs, some, tiles, how)
            else:
                files = [_write_one(folder, some, row, data, how) for row, data in tiles]
            _remove_older(folder, before, set(files))
            told = {"schema": "wsi-pipe-tiles", "fingerprint": mark, "tiles": len(some), "files": files}
            write_text_atomically(folder / how.index_name, json.dumps(told) + "\n")
            counts[grid.label] = len(some)
    return counts


def _index(path: Path) -> dict[str, Any]:
    try:
        told = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and told.get("schema") == "wsi-pipe-tiles" else {}


def _is_done(folder: Path, told: dict[str, Any], mark: str) -> bool:
    if told.get("fingerprint") != mark:
        return False
    there = {item.name for item in os.scandir(folder)}
    return there.issuperset(told.get("files", ()))


OWN_NAME = re.compile(r"^(\d+_\d+\.(jpg|png|webp)|.+-\d{6}\.tar)$")


def _remove_older(folder: Path, told: dict[str, Any], kept: set[str]) -> None:
    """Remove what an earlier call saved in this form and this one does not: tiles that are no more."""
    for name in map(str, told.get("files", ())):
        if name not in kept and OWN_NAME.match(name):
            (folder / name).unlink(missing_ok=True)


def _encoded(slide: Slide, grid: TileGrid, how: TileImages, check: Callable[[], object]) -> Iterator[tuple[int, bytes]]:
    """Rows of the grid and their encoded tiles, in the grid's order."""
    encode = partial(_encode, how)
    with ThreadPoolExecutor(min(available_cores(), ENCODERS)) as pool:
        for batch in stream_tiles(slide, grid):
            check()
            yield from zip(batch.index.tolist(), pool.map(encode, batch.pixels), strict=True)


def _encode(how: TileImages, pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    quality: dict[str, Any] = {} if how.kind == "png" else {"quality": how.quality}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, **IMAGE_KINDS[how.kind], **quality)
    return buffer.getvalue()


def _write_one(folder: Path, grid: TileGrid, row: int, data: bytes, how: TileImages) -> str:
    column, line = grid.cells[row].tolist()
    name = f"{column}_{line}.{how.kind}"
    # Many and small, and made again in no time: none is worth waiting for the disk.
    with atomic_path(folder / name, durable=False) as temporary:
        temporary.write_bytes(data)
    return name


def _write_shards(
    folder: Path, attrs: BagAttrs, grid: TileGrid, tiles: Iterator[tuple[int, bytes]], how: TileImages
) -> list[str]:
    assert how.shard_size is not None
    names: list[str] = []
    for start in range(0, len(grid), how.shard_size):
        name = f"{attrs.slide_id}-{grid.label}-{len(names):06d}.tar"
        count = min(how.shard_size, len(grid) - start)
        with (
            atomic_path(folder / name) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for _ in range(count):
                row, data = next(tiles)
                _add_sample(archive, attrs, grid, row, data, how.kind)
        names.append(name)
    return names


def _add_sample(archive: tarfile.TarFile, attrs: BagAttrs, grid: TileGrid, row: int, data: bytes, kind: str) -> None:
    """One tile and what leads back to its place; WebDataset takes all up to the first dot of the last part for the
    key, so that dots of slide ids and levels do no harm in the folders before it."""
    column, line = grid.cells[row].tolist()
    x_l0, y_l0 = grid.coords[row].tolist()
    told = {
        "slide_id": attrs.slide_id,
        "case_id": attrs.case_id,
        "level": grid.label,
        "column": column,
        "row": line,
        "x_l0": x_l0,
        "y_l0": y_l0,
        "size_l0": list(grid.tile_size_l0),
        "mpp": grid.spec.mpp,
        "mpp_effective": list(grid.mpp_effective),
        "tissue": round(float(grid.tissue[row]), 4),
    }
    key = f"{attrs.slide_id}/{grid.label}/{column}_{line}"
    for suffix, content in ((kind, data), ("json", json.dumps(told, sort_keys=True).encode())):
        # Of time, owner and rights tarfile's own defaults: the same everywhere.
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
