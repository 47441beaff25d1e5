"""Figures of the slides that a model answers, where it may abstain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lrmil.metrics import Estimate, evaluate, evaluate_folds
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.proportions import Share, share_of
from lrmil.metrics.selective import Abstention

__all__ = ["Answered", "answered_of", "mean_answered"]


@dataclass(frozen=True)
class Answered:
    """A fold's slides with abstention: the threshold, the share of slides that is answered, and figures of these.

    estimates: empty where no slide is answered.
    """

    abstention: Abstention
    coverage: Share
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


class Judged(Protocol):
    """Predictions of slides with their labels: int64 (N,), and calibrated probabilities, float64 (N, C)."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def case_ids(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def probabilities(self) -> NDArray[np.float64]: ...


def answered_of(p: Judged, abstention: Abstention, *, positive: int, replicates: int, seed: int) -> Answered:
    """What abstention makes of one fold's predictions. positive, replicates, seed: as of ``lrmil.metrics.evaluate``."""
    kept = _answers(p, abstention)
    coverage = share_of(kept, case_numbers(p.case_ids, len(p.labels)))
    if not kept.any():
        return Answered(abstention, coverage)
    figures = evaluate(
        p.labels[kept],
        p.probabilities[kept],
        _of(p.case_ids, kept),
        classes=p.classes,
        positive=positive,
        replicates=replicates,
        seed=seed,
    )
    return Answered(abstention, coverage, figures)


def mean_answered(
    found: Sequence[Judged], answered: Sequence[Answered | None], *, positive: int, replicates: int, seed: int
) -> dict[str, Estimate]:
    """The mean over the folds that answer any slide; empty where none does, or abstention was not asked for."""
    parts = [(p, _answers(p, one.abstention)) for p, one in zip(found, answered, strict=True) if one is not None]
    parts = [(p, kept) for p, kept in parts if kept.any()]
    if not parts:
        return {}
    return dict(
        evaluate_folds(
            [p.labels[kept] for p, kept in parts],
            [p.probabilities[kept] for p, kept in parts],
            [_of(p.case_ids, kept) for p, kept in parts],
            positive=positive,
            replicates=replicates,
            seed=seed,
        )
    )


def _answers(p: Judged, abstention: Abstention) -> NDArray[np.bool_]:
    return np.array([not abstention.abstains(value) for value in p.probabilities.max(axis=1).tolist()], bool)


def _of(cases: Sequence[str], kept: NDArray[np.bool_]) -> list[str]:
    return [case for case, own in zip(cases, kept.tolist(), strict=True) if own]
