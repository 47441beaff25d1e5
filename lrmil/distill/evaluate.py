"""How much of the teacher's HR features can be had from LR pixels, against what is had without distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.ridge import RidgeSums
from lrmil.distill.targets import DistillSlide, TargetStats

__all__ = ["Agreement", "RunningAgreement", "child_targets", "linear_baseline", "mean_baseline"]

BLOCK_TILES = 1024
"""LR tiles whose children's targets are in memory at once."""


@dataclass(frozen=True)
class Agreement:
    """explained_variance: 1 - sum (T - P)^2 / sum (T - training mean)^2, over all children and dimensions. cosine: mean
    cosine of P and T, both less the training mean. The mean HR feature has 0 and 0 by definition."""

    explained_variance: float
    cosine: float


class RunningAgreement:
    """Agreement summed up batch by batch.

    centre: mean of the teacher on training tiles. std: scale of its dimensions.
    """

    def __init__(self, centre: NDArray[np.float32], std: NDArray[np.float32]) -> None:
        self._mean, self._std = centre, std
        self._error = self._total = self._cosine = 0.0
        self._count = 0

    def add(self, predicted: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]]) -> None:
        """predicted, wanted: (M, D) in the teacher's own units."""
        p = (np.asarray(predicted, np.float64) - self._mean) / self._std
        t = (np.asarray(wanted, np.float64) - self._mean) / self._std
        self._error += float(((t - p) ** 2).sum())
        self._total += float((t**2).sum())
        norms = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
        self._cosine += float(np.divide((p * t).sum(1), norms, out=np.zeros_like(norms), where=norms > 0).sum())
        self._count += len(p)

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """What ``result`` is made of: sums over parts of the data add up to those of the whole."""
        return self._error, self._total, self._cosine, float(self._count)

    @sums.setter
    def sums(self, values: tuple[float, float, float, float]) -> None:
        self._error, self._total, self._cosine, count = values
        self._count = round(count)

    def result(self) -> Agreement:
        """The figures so far; NaN where nothing was added."""
        if not self._count or self._total == 0:
            return Agreement(float("nan"), float("nan"))
        return Agreement(1 - self._error / self._total, self._cosine / self._count)


def child_targets(
    slide: DistillSlide, layer: int | None, tiles: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The teacher on the children of LR tiles, (M, k * k, D) with 0 where there is none, and the mask (M, k * k).

    layer: which, None for the final features. tiles: int64 (M,), which tiles, None for all of the slide.
    """
    rows = slide.children.children if tiles is None else slide.children.children[tiles]
    data = slide.final if layer is None else slide.layers[layer]
    present = rows >= 0
    values = np.asarray(data[np.maximum(rows, 0)], np.float32)
    values[~present] = 0
    return values, present


def final_target(slide: DistillSlide) -> NDArray[np.float32]:
    """The weighted mean of the children's final features, (M, D): what a final feature can come nearest to."""
    out = np.empty((len(slide), slide.final.shape[1]), np.float32)
    for tiles in _blocks(slide):
        values, _ = child_targets(slide, None, tiles)
        out[tiles] = np.einsum("mk,mkd->md", slide.weights[tiles], values)
    return out


def _blocks(slide: DistillSlide) -> Iterator[NDArray[np.int64]]:
    """The slide's LR tiles, a limited number at a time."""
    for start in range(0, len(slide), BLOCK_TILES):
        yield np.arange(start, min(start + BLOCK_TILES, len(slide)))


class _Inputs:
    """Undistilled LR features, each dimension standardised over the training tiles, and a column of ones."""

    def __init__(self, train: Sequence[DistillSlide]) -> None:
        count = sum(map(len, train))
        # Row after row, as numpy sums the rows of one array, so that the cut into slides leaves no trace.
        self._mean = self._summed(train, lambda x: x) / count
        self._std = np.sqrt(self._summed(train, lambda x: (x - self._mean) ** 2) / count)
        self._std[self._std == 0] = 1

    @staticmethod
    def _summed(
        train: Sequence[DistillSlide], of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        total: NDArray[np.float64] | None = None
        for slide in train:
            values = of(np.asarray(slide.baseline, np.float64))
            total = values.sum(0) if total is None else np.vstack([total, values]).sum(0)
        assert total is not None
        return total

    @property
    def width(self) -> int:
        """Columns, that of ones included."""
        return len(self._mean) + 1

    def of(self, slide: DistillSlide) -> NDArray[np.float64]:
        """(M, width)."""
        scaled = (np.asarray(slide.baseline, np.float64) - self._mean) / self._std
        return np.hstack([scaled, np.ones((len(slide), 1))])


def linear_baseline(
    train: Sequence[DistillSlide],
    val: Sequence[DistillSlide],
    stats: TargetStats,
    seed: int = 0,
    *,
    penalty: float | None = None,
) -> dict[str, Agreement]:
    """Ridge regression from undistilled LR features to the teacher's HR features: one map for each place of a child.

    Keys "layer0", ... and "final", as the distilled student's figures. The penalty is the best of ``RIDGE`` on a part
    of the training slides held out, unless ``penalty`` gives it. Empty where a slide has no LR features of the teacher.
    Slides are taken one by one: in memory are the sums of one layer's maps.
    """
    if not train or not val or any(slide.baseline is None for slide in [*train, *val]):
        return {}
    inputs = _Inputs(train)
    held = _held_out(train, seed)
    found = {}
    for layer, (centre, std) in enumerate(zip(stats.layer_centre, stats.layer_std, strict=True)):
        running = RunningAgreement(centre, std)
        maps = _place_maps(train, layer, inputs, held, penalty)
        for slide in val:
            x = inputs.of(slide)
            for tiles in _blocks(slide):
                values, present = child_targets(slide, layer, tiles)
                for place, weights in maps.items():
                    rows = present[:, place]
                    running.add(x[tiles][rows] @ weights, values[rows, place])
        found[f"layer{layer}"] = running.result()
    running = RunningAgreement(stats.final_centre, stats.final_std)
    sums = RidgeSums(inputs.width, train[0].final.shape[1])
    for slide, apart in zip(train, held, strict=True):
        sums.add(inputs.of(slide), final_target(slide), apart)
    weights = sums.solve(penalty)
    for slide in val:
        running.add(inputs.of(slide) @ weights, final_target(slide))
    return found | {"final": running.result()}


def _held_out(train: Sequence[DistillSlide], seed: int) -> list[NDArray[np.bool_]]:
    """Which rows of each slide the penalty is chosen on: a sixth of the slides, or of the rows of a single one."""
    ids = list(dict.fromkeys(slide.slide_id for slide in train))
    order = np.random.default_rng(seed).permutation(len(ids))
    chosen = {ids[i] for i in order[: max(len(order) // 6, 1)]}
    if len(ids) > 1:
        return [np.full(len(slide), slide.slide_id in chosen) for slide in train]
    every_sixth = np.arange(sum(map(len, train))) % 6 == 0
    return np.split(every_sixth, np.cumsum([len(slide) for slide in train])[:-1])


def _place_maps(
    train: Sequence[DistillSlide],
    layer: int,
    inputs: _Inputs,
    held: Sequence[NDArray[np.bool_]],
    penalty: float | None,
) -> dict[int, NDArray[np.float64]]:
    """Weights (inputs, C) by place of a child, without places that hardly a tile has a child at."""
    width = train[0].layers[layer].shape[1]
    sums = [RidgeSums(inputs.width, width) for _ in range(train[0].children.children.shape[1])]
    for slide, apart in zip(train, held, strict=True):
        x = inputs.of(slide)
        for tiles in _blocks(slide):
            values, present = child_targets(slide, layer, tiles)
            for place, one in enumerate(sums):
                rows = present[:, place]
                one.add(x[tiles][rows], values[rows, place], apart[tiles][rows])
    return {place: one.solve(penalty) for place, one in enumerate(sums) if one.count > 1}


def mean_baseline(val: Sequence[DistillSlide], stats: TargetStats) -> dict[str, Agreement]:
    """What the mean of the training targets reaches: 0 or a little less, as far as ``val`` differs from training."""
    found = {}
    for layer, (centre, std) in enumerate(zip(stats.layer_centre, stats.layer_std, strict=True)):
        running = RunningAgreement(centre, std)
        for slide in val:
            for tiles in _blocks(slide):
                values, present = child_targets(slide, layer, tiles)
                running.add(np.broadcast_to(centre, values[present].shape), values[present])
        found[f"layer{layer}"] = running.result()
    running = RunningAgreement(stats.final_centre, stats.final_std)
    for slide in val:
        wanted = final_target(slide)
        running.add(np.broadcast_to(stats.final_centre, wanted.shape), wanted)
    return found | {"final": running.result()}
