"""What the student learns: the teacher's layers and final features on HR tiles, and the weights of the children.

They come out of the bags where extraction stored them (``wsi-pipe extract --layers``), or are computed once, slide by
slide, into files beside the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.children import ChildMap, child_map
from lrmil.distill.shelf import Shelf
from lrmil.errors import BagMismatchError, SettingsError
from wsi_pipe.bag import (
    Features,
    read_attrs,
    read_feature_file,
    read_feature_header,
    read_grids,
    read_level,
    write_feature_file,
)
from wsi_pipe.config import fingerprint
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import BagError
from wsi_pipe.extract import ExtractItem, SlideFailure, extract_features
from wsi_pipe.geometry import TileGrid
from wsi_pipe.slides.base import Slide

__all__ = [
    "DistillSlide",
    "Lesson",
    "TargetItem",
    "TargetStats",
    "compute_targets",
    "load_slide",
    "target_stats",
    "uniform_weights",
]


@dataclass(frozen=True)
class DistillSlide:
    """One slide as distillation needs it.

    path: the slide's file. mpp: its (x, y). scene, z: which picture in it, or None. lr: the grid of LR tiles that have
    children, in the order of ``children``. children: rows into the HR tiles. layers: teacher's layers, each (N_hr, C_l)
    float; final: (N_hr, D). weights: float32 (M, k * k), 0 where there is no child, summing to 1 over a tile. baseline:
    the undistilled LR features of the same tiles (M, D_b), or None.
    """

    slide_id: str
    case_id: str
    path: str
    mpp: tuple[float, float]
    lr: TileGrid
    children: ChildMap
    layers: tuple[NDArray[np.floating[Any]], ...]
    final: NDArray[np.floating[Any]]
    weights: NDArray[np.float32]
    baseline: NDArray[np.floating[Any]] | None = None
    scene: int | None = None
    z: int | None = None

    def __len__(self) -> int:
        return len(self.lr)


def uniform_weights(children: ChildMap) -> NDArray[np.float32]:
    """1 / number of children for each child, (M, k * k) float32."""
    present = (children.children >= 0).astype(np.float32)
    return np.asarray(present / np.maximum(present.sum(1, keepdims=True), 1), np.float32)


def attention_weights(children: ChildMap, attention: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The slide's softmax attention over HR tiles (N_hr,), renormalised over the children of each LR tile.

    Uniform over a tile whose children have no attention at all.
    """
    present = children.children >= 0
    weights = np.where(present, np.asarray(attention, np.float64)[np.maximum(children.children, 0)], 0.0)
    total = weights.sum(1, keepdims=True)
    even = present / np.maximum(present.sum(1, keepdims=True), 1)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), even).astype(np.float32)


def load_slide(
    bag: Path,
    slide_path: str,
    lr_label: str,
    hr_label: str,
    encoder: str,
    layers: Sequence[int],
    depth: int,
    targets: Path | None,
    shelf: Shelf,
) -> DistillSlide | None:
    """One slide's grids and targets; None where no LR tile has a child.

    targets: file of ``compute_targets`` to use instead of what the bag holds. shelf: keeps the arrays. Raises BagError
    or BagMismatchError when the bag lacks a level, the encoder's features or its layers, OutputError when the shelf has
    no room for them.
    """
    grids = {grid.label: grid for grid in read_grids(bag)}
    for label in (lr_label, hr_label):
        if label not in grids:
            raise BagError(f"{bag}: has no level {label}", remedy=f"its levels are {', '.join(grids)}")
    lr, hr = grids[lr_label], grids[hr_label]
    children = child_map(lr, hr, bag.stem)
    if not len(children.rows):
        return None
    if targets is not None:
        stored = read_feature_file(targets)
        held, final, attrs = dict(stored.layers), stored.values, read_attrs(bag)
    else:
        view = read_level(bag, hr_label, encoder, layers=True)
        held, final, attrs = view.layers, view.features, view.attrs
    # Bags name blocks as they were asked for, which may have been from the end.
    held = {str(int(name) % depth) if depth else name: values for name, values in held.items()}
    missing = [layer for layer in layers if str(layer) not in held]
    if missing:
        raise BagMismatchError(
            f"{bag}: holds no layers {', '.join(map(str, missing))} of {encoder} at {hr_label}",
            remedy=f"extract with --layers {','.join(map(str, layers))}, or distil with --targets compute",
        )
    kept = shelf.put(np.asarray(final))
    baseline = _baseline(bag, lr_label, encoder, children)
    return DistillSlide(
        slide_id=attrs.slide_id,
        case_id=attrs.case_id,
        path=slide_path or attrs.slide_path,
        mpp=attrs.mpp_l0,
        lr=lr.take(children.rows),
        children=children,
        layers=tuple(shelf.put(np.asarray(held[str(layer)])) for layer in layers) or (kept,),
        final=kept,
        weights=uniform_weights(children),
        baseline=None if baseline is None else shelf.put(baseline),
        scene=attrs.scene,
        z=attrs.z,
    )


def _baseline(bag: Path, lr_label: str, encoder: str, children: ChildMap) -> NDArray[np.floating[Any]] | None:
    try:
        return np.asarray(read_level(bag, lr_label, encoder).features)[children.rows]
    except BagError:
        return None


@dataclass(frozen=True)
class TargetItem:
    """Grids of one slide on which the teacher runs. place: what says, beside the teacher, which tiles these are."""

    name: str
    open: Callable[[], Slide]
    grids: Sequence[TileGrid]
    place: str


def compute_targets(
    items: Sequence[TargetItem], encoder: Encoder, layers: Sequence[int], folder: Path
) -> dict[tuple[str, str], Path]:
    """Run the teacher once over the tiles of every item; files by (name, level), those that fit are kept.

    Raises what a slide's reading raises: a training slide that cannot be read is the user's to know.
    """
    info = encoder.info
    files: dict[tuple[str, str], Path] = {}
    stamps: dict[str, str] = {}
    todo: list[ExtractItem] = []
    for item in items:
        stamps[item.name] = fingerprint(item.place, info.weights_sha256, info.precision, tuple(layers))
        for grid in item.grids:
            name = item.name if len(item.grids) == 1 else f"{item.name}.{grid.label}"
            files[item.name, grid.label] = folder / f"{name}.h5"
        grids = [grid for grid in item.grids if not _is_made(files[item.name, grid.label], stamps[item.name])]
        if grids:
            todo.append(ExtractItem(item.name, item.open, grids, {grid.label: [info.name] for grid in grids}))
    for result in extract_features(todo, {info.name: encoder}, layers=layers):
        if isinstance(result, SlideFailure):
            raise result.error
        for label, found in result.features.items():
            blocks = result.layers.get(label, {}).get(info.slug, {})
            features = Features(
                encoder=info.name,
                values=found[info.slug],
                weights_sha256=info.weights_sha256,
                licence=info.licence,
                precision=info.precision,
                transform="{}",
                fingerprint=stamps[result.slide_id],
                layers={str(block): data for block, data in blocks.items()},
            )
            write_feature_file(files[result.slide_id, label], result.slide_id, label, info.slug, features)
    return files


def _is_made(path: Path, stamp: str) -> bool:
    try:
        return read_feature_header(path).fingerprint == stamp
    except BagError:
        return False


@dataclass(frozen=True)
class TargetStats:
    """What targets are scaled by, and where they lie, on the children of training tiles, layer by layer and final.

    layer_mean, layer_std, final_mean, final_std: of each dimension, or 0 and 1 where targets are learnt as they are.
    variance, final_variance: (L,) of each layer, and of the final features, as a whole: the mean over the dimensions,
    after standardising where that is on.
    layer_centre, final_centre: the mean of what is learnt, in the teacher's units: the best constant guess, which
    agreement is measured against. Of the final features it is the mean over tiles of the weighted children.
    """

    layer_mean: tuple[NDArray[np.float32], ...]
    layer_std: tuple[NDArray[np.float32], ...]
    final_mean: NDArray[np.float32]
    final_std: NDArray[np.float32]
    variance: NDArray[np.float32]
    layer_centre: tuple[NDArray[np.float32], ...]
    final_centre: NDArray[np.float32]
    final_variance: float = 1.0


@dataclass(frozen=True)
class Lesson:
    """What one teacher says of some slides.

    name: the teacher's in figures, "" for an only one. slides: with this teacher's targets; lessons of several teachers
    have the same slides with the same tiles and children. stats: what its targets are scaled by.
    """

    name: str
    slides: Sequence[DistillSlide]
    stats: TargetStats


def target_stats(slides: Sequence[DistillSlide], *, standardise: bool) -> TargetStats:
    """Statistics over all children of training tiles, one pass, in float64.

    Without ``standardise`` means are 0 and deviations 1. Raises SettingsError when there is no child.
    """
    layers = [_moments([s.layers[i] for s in slides], slides) for i in range(len(slides[0].layers))] if slides else []
    if not layers:
        raise SettingsError("no training slide has an LR tile with children", remedy="check the splits and resolutions")
    final_mean, final_std = _moments([s.final for s in slides], slides)
    centres = tuple(mean.astype(np.float32) for mean, _ in layers)
    final_centre = _weighted_mean(slides)
    if standardise:
        variance = np.array([float(np.mean(std > 0)) for _, std in layers], np.float32)
        safe = [(mean, np.where(std > 0, std, 1.0)) for mean, std in layers]
        return TargetStats(
            tuple(m.astype(np.float32) for m, _ in safe),
            tuple(s.astype(np.float32) for _, s in safe),
            final_mean.astype(np.float32),
            np.where(final_std > 0, final_std, 1.0).astype(np.float32),
            np.maximum(variance, 1e-6),
            centres,
            final_centre,
            max(float(np.mean(final_std > 0)), 1e-6),
        )
    return TargetStats(
        tuple(np.zeros_like(m, np.float32) for m, _ in layers),
        tuple(np.ones_like(s, np.float32) for _, s in layers),
        np.zeros_like(final_mean, np.float32),
        np.ones_like(final_std, np.float32),
        np.array([max(float(np.mean(std**2)), 1e-12) for _, std in layers], np.float32),
        centres,
        final_centre,
        max(float(np.mean(final_std**2)), 1e-12),
    )


def _weighted_mean(slides: Sequence[DistillSlide]) -> NDArray[np.float32]:
    """Mean over tiles of their children's final features as weighted, (D,)."""
    total, count = np.zeros(slides[0].final.shape[1]), 0
    for slide in slides:
        share = np.zeros(len(slide.final))
        present = slide.children.children >= 0
        np.add.at(share, slide.children.children[present], slide.weights[present])
        total += share @ np.asarray(slide.final, np.float64)
        count += len(slide)
    return np.asarray(total / max(count, 1), np.float32)


def _moments(
    values: Sequence[NDArray[np.floating[Any]]], slides: Sequence[DistillSlide]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = np.zeros(values[0].shape[1])
    squares = np.zeros(values[0].shape[1])
    count = 0
    for data, slide in zip(values, slides, strict=True):
        rows = slide.children.children
        kept = np.asarray(data[rows[rows >= 0]], np.float64)
        total += kept.sum(0)
        squares += (kept**2).sum(0)
        count += len(kept)
    mean = total / max(count, 1)
    return mean, np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0.0))
