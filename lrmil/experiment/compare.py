"""Two runs on the same slides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.checkpoint import no_nan, read_card
from lrmil.errors import FiguresError
from lrmil.experiment.figures import (
    PREDICTIONS_NAME,
    FoldPredictions,
    fold_folders,
    positive_class,
    read_predictions,
)
from lrmil.experiment.target_figures import is_target_run, read_fold
from lrmil.leaks import Judged, check_model
from lrmil.metrics import DeLong, Difference, compare, delong
from lrmil.metrics.intervals import bootstrap_compare
from lrmil.targets import Fold

__all__ = ["Comparison", "compare_runs"]


@dataclass(frozen=True)
class Comparison:
    """Run A against run B.

    differences: paired bootstrap by case of each figure's mean over folds. delong: by fold, for two classes only.
    delong_mean: the mean of the folds' AUC differences with its test, None where folds share test cases or there are
    more than two classes. slides: over all folds.
    """

    folds: tuple[str, ...]
    slides: int
    differences: Mapping[str, Difference]
    delong: Mapping[str, DeLong]
    delong_mean: DeLong | None

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; NaN becomes null."""
        plain: dict[str, Any] = no_nan(asdict(self))
        return plain


def compare_runs(
    a: str | Path,
    b: str | Path,
    *,
    part: str = "test",
    positive: str | None = None,
    replicates: int = 2000,
    seed: int = 0,
    allow_seen: bool = False,
    say: Callable[[str], object] | None = None,
) -> Comparison:
    """Differences by case, and DeLong's test, of two runs of ``lrmil train``.

    Both must have predicted the same slides with the same labels in each fold. positive: which of two classes is looked
    for. Raises FiguresError naming the slides where they have not; LeakageError when a model of either run has seen
    cases of its test part, unless allow_seen, which is told to ``say``.
    """
    a, b = Path(a), Path(b)
    folders_a, folders_b = fold_folders(a), fold_folders(b)
    names_a, names_b = [p.name for p in folders_a], [p.name for p in folders_b]
    if len(names_a) == len(names_b) == 1:
        names = [names_a[0]]
    elif names_a == names_b:
        names = names_a
    else:
        raise FiguresError(
            f"{a} has {', '.join(names_a)}, {b} has {', '.join(names_b)}", remedy="compare runs with the same folds"
        )
    if is_target_run(folders_a[0]) or is_target_run(folders_b[0]):
        if positive is not None:
            raise FiguresError("a positive class is for two classes", remedy="leave it out")
        return _compare_targets(names, folders_a, folders_b, part, replicates, seed, allow_seen, say)
    pairs = [
        _paired(read_predictions(x / PREDICTIONS_NAME, part), read_predictions(y / PREDICTIONS_NAME, part), x, y)
        for x, y in zip(folders_a, folders_b, strict=True)
    ]
    if part == "test":
        for folder, (x, _) in zip((*folders_a, *folders_b), (*pairs, *pairs), strict=True):
            _check_seen(folder, x.slide_ids, x.case_ids, allow_seen, say)
    sought = positive_class(pairs[0][0].classes, positive)
    differences = compare(
        [x.labels for x, _ in pairs],
        [x.probabilities for x, _ in pairs],
        [y.probabilities for _, y in pairs],
        [x.case_ids for x, _ in pairs],
        positive=sought,
        replicates=replicates,
        seed=seed,
    )
    tests: dict[str, DeLong] = {}
    if len(pairs[0][0].classes) == 2:
        for name, (x, y) in zip(names, pairs, strict=True):
            tests[name] = delong(x.labels == sought, x.probabilities[:, sought], y.probabilities[:, sought], x.case_ids)
    cases = [set(x.case_ids) for x, _ in pairs]
    apart = sum(map(len, cases)) == len(set().union(*cases))
    mean = _mean(list(tests.values())) if tests and apart else None
    return Comparison(tuple(names), sum(len(x.labels) for x, _ in pairs), differences, tests, mean)


def _compare_targets(
    names: Sequence[str],
    folders_a: Sequence[Path],
    folders_b: Sequence[Path],
    part: str,
    replicates: int,
    seed: int,
    allow: bool,
    say: Callable[[str], object] | None,
) -> Comparison:
    """``compare_runs`` of targets that are no plain class: a paired bootstrap by case of the target's own figures."""
    folds, slides = [], 0
    for a, b in zip(folders_a, folders_b, strict=True):
        for folder, other in ((a, b), (b, a)):
            if not is_target_run(folder):
                raise FiguresError(f"{folder} predicts classes, and {other} does not", remedy="compare like with like")
        (x, ids), (y, theirs) = (read_fold(folder, PREDICTIONS_NAME, part) for folder in (a, b))
        _check_same(ids, theirs, a, b)
        if x.target.truth_names != y.target.truth_names:
            raise FiguresError(f"{a} and {b} predict different targets", remedy="train both for the same targets")
        place = {slide: i for i, slide in enumerate(theirs)}
        order = [place[slide] for slide in ids]
        y = Fold(y.target, y.truth[order], y.outputs[order], x.cases)
        if not np.array_equal(x.truth, y.truth, equal_nan=True):
            raise FiguresError(f"slides have other labels in {a} than in {b}", remedy="train both on the same labels")
        if part == "test":
            for folder in (a, b):
                _check_seen(folder, ids, x.cases, allow, say)
        folds.append((x.cases, x.weighing(), y.weighing()))
        slides += len(ids)
    return Comparison(tuple(names), slides, bootstrap_compare(folds, replicates=replicates, seed=seed), {}, None)


def _check_seen(
    folder: Path,
    slide_ids: tuple[str, ...],
    case_ids: tuple[str, ...],
    allow: bool,
    say: Callable[[str], object] | None,
) -> None:
    path = folder / "model.safetensors"
    if not path.is_file():
        return
    card = read_card(path)
    if card.seen:
        blank = ("",) * len(slide_ids)
        check_model(card, path, Judged(slide_ids, case_ids, blank, blank), allow=allow, say=say)


def _check_same(ours: Sequence[str], theirs: Sequence[str], a: Path, b: Path) -> None:
    odd = sorted(set(ours) ^ set(theirs))
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise FiguresError(
            f"{a} and {b} did not predict the same slides: {', '.join(odd[:5])}{more}",
            remedy="train both on the same splits and bags",
        )


def _paired(x: FoldPredictions, y: FoldPredictions, a: Path, b: Path) -> tuple[FoldPredictions, FoldPredictions]:
    """Both in the order of the first."""
    if x.classes != y.classes:
        raise FiguresError(f"{a} has classes {', '.join(x.classes)}, {b} has {', '.join(y.classes)}")
    _check_same(x.slide_ids, y.slide_ids, a, b)
    place = {slide: i for i, slide in enumerate(y.slide_ids)}
    order = [place[slide] for slide in x.slide_ids]
    labels = y.labels[order]
    if not np.array_equal(labels, x.labels):
        slide = x.slide_ids[int((labels != x.labels).argmax())]
        raise FiguresError(f"{slide} has another label in {a} than in {b}", remedy="train both on the same labels")
    sorted_y = FoldPredictions(y.classes, x.slide_ids, x.case_ids, labels, y.logits[order], y.probabilities[order])
    return x, sorted_y


def _mean(folds: Sequence[DeLong]) -> DeLong | None:
    """The mean difference over folds of different cases: variances add up. None where a fold has no variance."""
    from scipy.stats import norm

    if any(math.isnan(f.difference) or np.isnan(f.covariance).any() for f in folds):
        return None
    k = len(folds)
    covariance = np.sum([f.covariance for f in folds], axis=0) / k**2
    difference = float(np.mean([f.difference for f in folds]))
    error = float(np.sqrt(max(sum(f.standard_error**2 for f in folds), 0.0))) / k
    z = difference / error if error > 0 else math.nan
    p = float(2 * norm.sf(abs(z))) if error > 0 else 1.0 if difference == 0 else math.nan
    half = float(norm.isf(0.025)) * error
    auc = (float(np.mean([f.auc[0] for f in folds])), float(np.mean([f.auc[1] for f in folds])))
    rows = ((float(covariance[0, 0]), float(covariance[0, 1])), (float(covariance[1, 0]), float(covariance[1, 1])))
    reason = None if error > 0 else "the difference does not vary between slides"
    return DeLong(auc, rows, difference, error, difference - half, difference + half, z, p, reason)
