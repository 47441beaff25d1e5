"""How much of the teacher's HR features can be had from LR pixels, against what is had without distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.targets import DistillSlide, TargetStats

__all__ = ["Agreement", "RunningAgreement", "child_targets", "linear_baseline", "mean_baseline"]

RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties tried, relative to the mean variance of the inputs."""


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
    values, _ = child_targets(slide, None)
    return np.asarray(np.einsum("mk,mkd->md", slide.weights, values), np.float32)


def linear_baseline(
    train: Sequence[DistillSlide], val: Sequence[DistillSlide], stats: TargetStats, seed: int = 0
) -> dict[str, Agreement]:
    """Ridge regression from undistilled LR features to the teacher's HR features: one map for each place of a child.

    Keys "layer0", ... and "final", as the distilled student's figures. The penalty is the best of ``RIDGE`` on a part
    of the training slides held out. Empty where a slide has no LR features of the teacher.
    """
    if not train or not val or any(slide.baseline is None for slide in [*train, *val]):
        return {}
    inputs = np.concatenate([np.asarray(s.baseline, np.float64) for s in train])
    mean, std = inputs.mean(0), inputs.std(0)
    std[std == 0] = 1

    def scaled(slide: DistillSlide) -> NDArray[np.float64]:
        return np.hstack([(np.asarray(slide.baseline, np.float64) - mean) / std, np.ones((len(slide), 1))])

    x_train, x_val = np.concatenate([scaled(s) for s in train]), np.concatenate([scaled(s) for s in val])
    ids = list(dict.fromkeys(slide.slide_id for slide in train))
    order = np.random.default_rng(seed).permutation(len(ids))
    held = {ids[i] for i in order[: max(len(order) // 6, 1)]}
    inner = np.concatenate([np.full(len(slide), slide.slide_id in held) for slide in train])
    if len(ids) == 1:
        inner = np.arange(len(x_train)) % 6 == 0
    found = {}
    for layer in range(len(train[0].layers)):
        parts = [child_targets(s, layer) for s in train]
        y, m = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        parts = [child_targets(s, layer) for s in val]
        y_val, m_val = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        running = RunningAgreement(stats.layer_centre[layer], stats.layer_std[layer])
        for place in range(y.shape[1]):
            rows, wanted = m[:, place], m_val[:, place]
            if rows.sum() > 1 and wanted.any():
                solved = _ridge(x_train[rows], y[rows, place], inner[rows])
                running.add(x_val[wanted] @ solved, y_val[wanted, place])
        found[f"layer{layer}"] = running.result()
    running = RunningAgreement(stats.final_centre, stats.final_std)
    y = np.concatenate([final_target(s) for s in train])
    running.add(x_val @ _ridge(x_train, y, inner), np.concatenate([final_target(s) for s in val]))
    return found | {"final": running.result()}


def mean_baseline(val: Sequence[DistillSlide], stats: TargetStats) -> dict[str, Agreement]:
    """What the mean of the training targets reaches: 0 or a little less, as far as ``val`` differs from training."""
    found = {}
    for layer, (centre, std) in enumerate(zip(stats.layer_centre, stats.layer_std, strict=True)):
        running = RunningAgreement(centre, std)
        for slide in val:
            values, present = child_targets(slide, layer)
            running.add(np.broadcast_to(centre, values[present].shape), values[present])
        found[f"layer{layer}"] = running.result()
    running = RunningAgreement(stats.final_centre, stats.final_std)
    for slide in val:
        wanted = final_target(slide)
        running.add(np.broadcast_to(stats.final_centre, wanted.shape), wanted)
    return found | {"final": running.result()}


def _ridge(x: NDArray[np.float64], y: NDArray[np.floating[Any]], inner: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights (inputs, D) at the penalty that predicts the rows of ``inner`` best from the others."""
    target = np.asarray(y, np.float64)

    def solve(a: NDArray[np.float64], b: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        gram = a.T @ a
        strength = penalty * np.trace(gram) / len(gram)
        regular = strength * np.eye(len(gram))
        regular[-1, -1] = 1e-9 * strength
        result: NDArray[np.float64] = np.linalg.solve(gram + regular, a.T @ b)
        return result

    if not inner.any() or inner.all():
        return solve(x, target, 1.0)
    errors = [((x[inner] @ solve(x[~inner], target[~inner], p) - target[inner]) ** 2).sum() for p in RIDGE]
    return solve(x, target, RIDGE[int(np.argmin(errors))])
