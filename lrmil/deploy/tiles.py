"""Tiles of the slides that a model was trained on and stopped by, found by the marks in its file and read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard
from lrmil.errors import ExportError
from lrmil.store import check_readable, find_bags
from wsi_pipe.bag import BagAttrs, read_attrs, read_grids
from wsi_pipe.errors import BagError
from wsi_pipe.geometry import TileGrid
from wsi_pipe.masking import MASK
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["TileSlide", "read_tiles", "sampled", "slides_of"]


@dataclass(frozen=True)
class TileSlide:
    """A slide and its tiles at the model's resolution. path: of its file. attrs: of its bag."""

    path: str
    attrs: BagAttrs
    grid: TileGrid

    @property
    def slide_id(self) -> str:
        """The slide's id."""
        return self.attrs.slide_id


def slides_of(
    bags: Path, card: ModelCard, files: Mapping[str, str], cases: Mapping[str, str]
) -> tuple[list[TileSlide], list[TileSlide], str]:
    """Slides to calibrate by and slides to judge by, and of which part of training the latter are.

    bags: a job, or a folder of bags of this project, with the model's level. files, cases: slide id -> file, case,
    where the bags' own do not hold. A slide's part is told by the marks in the model's card. Where no slide is of the
    validation part, every second one of training is judged by. Raises ExportError where there are too few.
    """
    parts: dict[str, list[TileSlide]] = {"train": [], "val": []}
    for bag in find_bags(bags):
        check_readable(bag)
        attrs = read_attrs(bag)
        case = cases.get(attrs.slide_id) or attrs.case_id or attrs.slide_id
        part = card.seen.part_of(case, attrs.slide_fingerprint)
        if part not in parts:
            continue
        grid = next((grid for grid in read_grids(bag) if grid.label == card.level), None)
        if grid is None or not len(grid):
            continue
        path = files.get(attrs.slide_id) or attrs.slide_path
        if not path or MASK in path:
            raise BagError(f"{bag}: does not say where its slide lies", remedy="give the slides: --slides CSV")
        parts[part].append(TileSlide(path, attrs, grid))
    train, judged = parts["train"], parts["val"]
    part = "val"
    if not judged:
        train, judged, part = train[::2], train[1::2], "train"
    if not train or not judged:
        raise ExportError(
            f"{bags}: of its slides with tiles at {card.level}, the model was trained on {len(train) + len(judged)}, "
            "and it takes two to calibrate by one and judge by another",
            remedy="give the bags that it was trained on: --bags",
        )
    return train, judged, part


def read_tiles(slide: TileSlide, rows: NDArray[np.int64] | None = None, most: int = 256) -> Iterator[NDArray[np.uint8]]:
    """Tiles uint8 (B, S, S, 3), ``most`` at a time, of all of a slide or of the ``rows``, in order."""
    grid = slide.grid if rows is None else slide.grid.take(rows)
    opened = open_slide(slide.path, mpp=slide.attrs.mpp_l0, scene=slide.attrs.scene, z=slide.attrs.z)
    side = grid.spec.size_px
    try:
        for start in range(0, len(grid), most):
            part = grid.take(np.arange(start, min(start + most, len(grid)), dtype=np.int64))
            out = np.empty((len(part), side, side, 3), np.uint8)
            for batch in stream_tiles(opened, part):
                out[batch.index] = batch.pixels
            yield out
    finally:
        opened.close()


def sampled(slides: Sequence[TileSlide], count: int, batch: int = 8) -> Iterator[NDArray[np.uint8]]:
    """About ``count`` tiles of all slides alike, spread over each, in batches."""
    each = max(-(-count // len(slides)), 1)
    for slide in slides:
        rows = np.unique(np.linspace(0, len(slide.grid) - 1, min(each, len(slide.grid))).round().astype(np.int64))
        yield from read_tiles(slide, rows, batch)
