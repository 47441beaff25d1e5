"""All methods over all folds, with intervals by case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import SplitError
from lrmil.leaks import Judged, check_encoder
from lrmil.metrics import Estimate, evaluate_folds
from lrmil.probe.given import Samples
from lrmil.probe.methods import few_shot_rows, linear, neighbours, prototypes
from lrmil.splits import SplitTable

__all__ = ["METHODS", "ProbeResult", "probe"]

METHODS = ("linear", "knn", "few-shot")


@dataclass(frozen=True)
class ProbeResult:
    """Figures of one method; see ``lrmil.metrics.NAMES``. shots: of few-shot, else 0. draws: of shots in each fold."""

    method: str
    figures: Mapping[str, Estimate]
    shots: int = 0
    draws: int = 1

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.shots}-shot prototypes" if self.shots else self.method


@dataclass(frozen=True)
class _Fold:
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def probe(
    samples: Samples,
    splits: SplitTable,
    *,
    methods: Sequence[str] = METHODS,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 10,
    positive: int = 1,
    replicates: int = 2000,
    seed: int = 0,
    allow_seen: bool = False,
    say: Callable[[str], object] | None = None,
) -> list[ProbeResult]:
    """Figures of each method as means over folds, with 95 % intervals over cases.

    A fold's training and validation cases are learnt from, its test cases are judged; no case is in both. Few-shot
    draws ``shots`` cases of each class, ``draws`` times a fold; the figure is the mean over draws. A number of shots
    that some fold has too few cases for is left out, which ``say`` tells.

    Raises LeakageError where cases are torn or the encoder has seen them, SplitError where no fold can be judged.
    """
    tell = say or (lambda text: None)
    numbers = np.unique(np.asarray(samples.case_ids, str), return_inverse=True)[1].astype(np.int64)
    folds = _folds(samples, splits)
    _check_seen(samples, folds, allow_seen, tell)
    x = samples.features.astype(np.float64)
    count = len(samples.classes)

    def figures(given: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> dict[str, Estimate]:
        return evaluate_folds(
            [samples.labels[rows] for rows, _ in given],
            [p for _, p in given],
            [[samples.case_ids[i] for i in rows.tolist()] for rows, _ in given],
            positive=positive,
            replicates=replicates,
            seed=seed,
        )

    results = []
    if "linear" in methods:
        found = [
            (f.test, linear(x[f.train], samples.labels[f.train], numbers[f.train], x[f.test], count, seed))
            for f in folds
        ]
        results.append(ProbeResult("linear", figures(found)))
    if "knn" in methods:
        found = [(f.test, neighbours(x[f.train], samples.labels[f.train], x[f.test], count)) for f in folds]
        results.append(ProbeResult("knn", figures(found)))
    for size in shots if "few-shot" in methods else ():
        drawn = _few_shot(x, samples.labels, numbers, folds, size, draws, count, seed)
        if drawn is None:
            tell(f"{size}-shot is left out: a class has fewer cases to learn from")
            continue
        results.append(ProbeResult("few-shot", figures(drawn), size, draws))
    return results


def _folds(samples: Samples, splits: SplitTable) -> list[_Fold]:
    folds = []
    for name in splits.folds:
        parts = splits.indices(name, samples.slide_ids, samples.case_ids)
        train = np.sort(np.concatenate([parts.train, parts.val]))
        if len(parts.test) and len(np.unique(samples.labels[train])) > 1:
            folds.append(_Fold(train, parts.test))
    if not folds:
        raise SplitError("no fold has test cases, and two classes to learn from", remedy="make others: lrmil split")
    return folds


def _check_seen(samples: Samples, folds: Sequence[_Fold], allow: bool, say: Callable[[str], object]) -> None:
    tested = {samples.slide_ids[i] for fold in folds for i in fold.test.tolist()}
    judged = samples.judged
    kept = [i for i, slide in enumerate(judged.slide_ids) if slide in tested]
    check_encoder(
        samples.encoder,
        Judged(
            tuple(judged.slide_ids[i] for i in kept),
            tuple(judged.case_ids[i] for i in kept),
            tuple(judged.slide_fingerprints[i] for i in kept),
            tuple(judged.encoder_saw[i] for i in kept),
        ),
        allow=allow,
        say=say,
    )


def _few_shot(
    x: NDArray[np.float64],
    labels: NDArray[np.int64],
    cases: NDArray[np.int64],
    folds: Sequence[_Fold],
    shots: int,
    draws: int,
    count: int,
    seed: int,
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]] | None:
    found = []
    for number, fold in enumerate(folds):
        rng = np.random.default_rng([seed, shots, number])
        for _ in range(draws):
            rows = few_shot_rows(labels[fold.train], cases[fold.train], shots, rng)
            if rows is None:
                return None
            chosen = fold.train[rows]
            found.append((fold.test, prototypes(x[chosen], labels[chosen], x[fold.test], count)))
    return found
