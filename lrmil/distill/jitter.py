"""More training tiles from the same slides: both grids moved by a part of an LR tile, the teacher run there too.

A student that is trained from random weights on a few thousand tiles learns them by heart, grid and all. Tiles cut
elsewhere on the same tissue are new to it, and cost only the teacher's passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lrmil.distill.children import child_map
from lrmil.distill.shelf import Shelf
from lrmil.distill.targets import DistillSlide, TargetItem, compute_targets, uniform_weights
from wsi_pipe.bag import read_attrs, read_feature_file, read_grids
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.geometry import IntPair, TileGrid
from wsi_pipe.slides import open_slide

__all__ = ["jittered_grids", "jittered_slides"]


class _Moved(NamedTuple):
    lr: TileGrid
    hr: TileGrid
    target: TargetItem


def jittered_grids(lr: TileGrid, hr: TileGrid, size_l0: IntPair, rng: np.random.Generator) -> tuple[TileGrid, TileGrid]:
    """Both grids moved together by up to half an LR tile each way, without the tiles that then leave the slide.

    The way is a whole number of LR pixels, so that both are still cut on the pixels of the slide's levels. lr, hr: of
    one slide, ``hr`` with parents in ``lr``. size_l0: (width, height) of the slide in level-0 pixels. Which cells hold
    tissue is taken over from the grids as they were.
    """
    side = lr.spec.size_px
    step = rng.integers(-(side // 2), side // 2 + 1, 2)
    x, y = (origin + float(n) * scale for origin, n, scale in zip(lr.origin_l0, step, lr.scale_l0, strict=True))
    corners = np.asarray((x, y)) + lr.cells * np.asarray(lr.stride_l0)
    # Half a level-0 pixel: a last tile may hang over by what rounding makes of it.
    inside = (corners >= 0).all(1) & (corners + np.asarray(lr.tile_size_l0) <= np.asarray(size_l0) + 0.5).all(1)
    number = np.cumsum(inside, dtype=np.int32) - 1
    assert hr.parent is not None
    kept = inside[hr.parent]
    offset = (x - lr.origin_l0[0], y - lr.origin_l0[1])
    return (
        dataclasses.replace(lr.take(inside), origin_l0=(x, y), parent=None),
        dataclasses.replace(
            hr.take(kept),
            origin_l0=(hr.origin_l0[0] + offset[0], hr.origin_l0[1] + offset[1]),
            parent=number[hr.parent[kept]].astype(np.int32),
        ),
    )


def jittered_slides(
    slides: Sequence[DistillSlide],
    bags: Sequence[Path],
    count: int,
    *,
    hr_label: str,
    teacher: Encoder,
    layers: Sequence[int],
    folder: Path,
    seed: int,
    shelf: Shelf,
) -> list[DistillSlide]:
    """``count`` more DistillSlides of each slide, under its id and case, with targets that the teacher gives now.

    bags: of the slides, in their order. hr_label: the level of the children; the slides' own grids are the LR ones.
    folder: where targets are kept, one file a slide and level; those that still fit are taken. Where the grids go
    depends on ``seed`` and the slide's id alone, so folds that share a folder share its files. shelf: keeps the arrays.

    Raises what ``compute_targets`` does.
    """
    moved: list[tuple[DistillSlide, _Moved]] = []
    items: list[TargetItem] = []
    for slide, bag in zip(slides, bags, strict=True):
        attrs = read_attrs(bag)
        grids = {grid.label: grid for grid in read_grids(bag)}
        for number in range(count):
            rng = np.random.default_rng([seed, number, *slide.slide_id.encode()])
            lr, hr = jittered_grids(grids[slide.lr.label], grids[hr_label], (attrs.width_l0, attrs.height_l0), rng)
            if not len(hr):
                continue
            place = f"{attrs.fingerprint_tile} {lr.origin_l0}"
            opening = partial(open_slide, slide.path, mpp=slide.mpp, scene=slide.scene, z=slide.z)
            target = TargetItem(f"{bag.stem}.jitter{number}", opening, (lr, hr), place)
            moved.append((slide, _Moved(lr, hr, target)))
            items.append(target)
    files = compute_targets(items, teacher, layers, folder)
    return [_slide(slide, one, files, layers, shelf) for slide, one in moved]


def _slide(
    slide: DistillSlide, moved: _Moved, files: dict[tuple[str, str], Path], layers: Sequence[int], shelf: Shelf
) -> DistillSlide:
    children = child_map(moved.lr, moved.hr, moved.target.name)
    stored = read_feature_file(files[moved.target.name, moved.hr.label])
    plain = read_feature_file(files[moved.target.name, moved.lr.label])
    final = shelf.put(np.asarray(stored.values))
    rows = children.rows
    return dataclasses.replace(
        slide,
        lr=moved.lr.take(rows),
        children=children,
        layers=tuple(shelf.put(np.asarray(stored.layers[str(layer)])) for layer in layers) or (final,),
        final=final,
        weights=uniform_weights(children),
        baseline=shelf.put(np.asarray(plain.values)[rows]),
    )
