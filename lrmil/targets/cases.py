"""Predictions of slides as predictions of cases, and the truth of slides as that of cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lrmil.data import UNLABELLED, LabelTable
from lrmil.errors import LabelError
from lrmil.targets.base import Fold
from lrmil.targets.labels import TargetTable

__all__ = ["CaseFold", "averaged", "table_by_case"]


@dataclass(frozen=True)
class CaseFold:
    """A fold by case. fold: one row a case, called as the case. slides: how many each has. torn: cases whose slides are
    labelled differently, which are left out."""

    fold: Fold
    slides: tuple[int, ...]
    torn: tuple[str, ...]


def averaged(fold: Fold, *, keep_torn: bool = False) -> CaseFold:
    """Predictions of cases as the mean of those of their slides (of probabilities where there are some), see
    ``Target.together``. keep_torn: cases whose slides are labelled differently stay, without a label."""
    members: dict[str, list[int]] = {}
    for place, case in enumerate(fold.cases):
        members.setdefault(case, []).append(place)
    truth, outputs, cases, slides, torn = [], [], [], [], []
    wide = fold.truth if fold.truth.ndim == 2 else np.where(fold.truth < 0, np.nan, fold.truth)[:, None].astype(float)
    for case, places in members.items():
        own = fold.target.case_truth(wide[places])
        if own is None:
            torn.append(case)
            if not keep_torn:
                continue
            own = np.full(wide.shape[1], np.nan)
        truth.append(own)
        outputs.append(fold.target.together(fold.outputs[places]))
        cases.append(case)
        slides.append(len(places))
    width = wide.shape[1]
    found = Fold(
        fold.target,
        np.array(truth).reshape(len(cases), width),
        np.array(outputs).reshape(len(cases), fold.outputs.shape[1]),
        tuple(cases),
    )
    return CaseFold(found, tuple(slides), tuple(torn))


def table_by_case(
    table: LabelTable, slides: Sequence[NDArray[np.int64]], case_ids: Sequence[str], lengths: NDArray[np.int64]
) -> LabelTable:
    """The labels of joined bags. slides: places in ``table`` of each; case_ids, lengths: of each.

    Raises LabelError for a case whose slides are labelled differently.
    """
    labels = np.array([_one(table.labels[own]) for own in slides], np.int64)
    torn = [case for case, label in zip(case_ids, labels.tolist(), strict=True) if label < UNLABELLED]
    truth = None
    if isinstance(table, TargetTable):
        found = [table.target.case_truth(table.truth[own]) for own in slides]
        torn = [case for case, own in zip(case_ids, found, strict=True) if own is None]
        truth = np.array([own for own in found if own is not None])
    if torn:
        raise LabelError(
            f"{len(torn)} cases have slides with different labels: {', '.join(sorted(torn)[:5])}",
            remedy="give each case one label, or predict slides: --by slide",
        )
    changed = replace(table, labels=labels, case_ids=tuple(case_ids), usable=np.flatnonzero(labels >= 0), empty=())
    if isinstance(changed, TargetTable):
        assert truth is not None
        strata, groups = changed.target.strata(truth)
        changed = replace(changed, truth=truth, classes=strata, labels=groups)
    known = changed.target.known(changed.truth) if isinstance(changed, TargetTable) else labels >= 0
    names = list(case_ids)
    return replace(
        changed,
        usable=np.flatnonzero(known & (lengths > 0)),
        empty=tuple(f"{names[i]} (no tiles)" for i in np.flatnonzero(known & (lengths == 0)).tolist()),
        unlabelled=tuple(name for name, there in zip(names, known.tolist(), strict=True) if not there),
    )


def _one(labels: NDArray[np.int64]) -> int:
    """The label of all that have one; below ``UNLABELLED`` where they differ."""
    known = set(labels[labels >= 0].tolist())
    return UNLABELLED if not known else known.pop() if len(known) == 1 else UNLABELLED - 1
