"""Folds in which a site's cases all stand in one part, so that no test is won by knowing the hospital."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import SplitError
from lrmil.splits import Part, SplitTable

__all__ = ["make_site_splits", "missing_classes", "torn_sites"]

SHOWN = 5
STARTS = 8
"""Orders that sites are dealt in before the best assignment is taken."""
LACKING = 1e6
"""What a part without a case of some class costs, beside which imbalance is nothing."""


def make_site_splits(
    case_labels: Mapping[str, str],
    site_of: Mapping[str, str],
    folds: int = 5,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
) -> SplitTable:
    """Folds of whole sites: each site tests once, and whole sites of a fold's others validate.

    case_labels: case -> class. site_of: case -> site. folds, val_fraction, test_fraction: as of
    ``lrmil.splits.make_splits``, met as nearly as whole sites allow. Stratified: sites are dealt out, largest first,
    and then moved and swapped as long as that lowers the sum over parts and classes of (cases - wanted)^2 / wanted, a
    part without a class being worse than any imbalance. Depends on cases, sites and the seed, not on the cases' order.

    Raises SplitError for cases without a site, for fewer sites than folds, for too few to keep training, validation and
    test apart, for a class that is left without a training case, and for fractions out of range.
    """
    fraction = 0.2 if test_fraction is None else test_fraction
    if folds < 1 or (folds > 1 and test_fraction is not None):
        raise SplitError(f"{folds} folds with a test fraction of {test_fraction}", remedy="a fraction goes with 1 fold")
    if not 0 <= val_fraction < 1 or not 0 < fraction < 1:
        raise SplitError(f"fractions {val_fraction:g} (val) and {fraction:g} (test) must lie between 0 and 1")
    cases = sorted(case_labels)
    unknown = [case for case in cases if not site_of.get(case)]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise SplitError(
            f"{len(unknown)} cases have no site: {', '.join(unknown[:SHOWN])}{more}",
            remedy="fill in the column of sites (--site-column), or leave these cases out",
        )
    sites = sorted({site_of[case] for case in cases})
    parts = max(folds, 2)
    if len(sites) < parts:
        raise SplitError(
            f"{len(cases)} cases are of {len(sites)} sites ({', '.join(sites[:SHOWN])}), too few for {folds} folds",
            remedy="use fewer folds, or split by case (--by case), which tests on sites that were trained on",
        )
    if val_fraction > 0 and len(sites) < 3:
        raise SplitError(
            "2 sites cannot be told apart into training, validation and test",
            remedy="give --val-fraction 0, which leaves nothing to stop and calibrate by",
        )
    classes = sorted(set(case_labels.values()))
    counts = np.zeros((len(sites), len(classes)), np.int64)
    for case in cases:
        counts[sites.index(site_of[case]), classes.index(case_labels[case])] += 1
    rng = np.random.default_rng(seed)
    shares = [1 / folds] * folds if folds > 1 else [fraction, 1 - fraction]
    test_of = dict(zip(sites, _assign(counts, shares, rng).tolist(), strict=True))
    columns: dict[str, tuple[Part, ...]] = {}
    for fold in range(folds):
        part_of: dict[str, Part] = {site: "test" if test_of[site] == fold else "train" for site in sites}
        rest = [i for i, site in enumerate(sites) if part_of[site] == "train"]
        if val_fraction > 0 and len(rest) > 1:
            for i, held in zip(rest, _assign(counts[rest], [1 - val_fraction, val_fraction], rng), strict=True):
                part_of[sites[i]] = "val" if held else "train"
        trained = counts[[part_of[site] == "train" for site in sites]].sum(0)
        if not trained.all():
            raise SplitError(
                f"fold_{fold + 1} is left without a training case of class {classes[int(trained.argmin())]!r}",
                remedy="its cases are of too few sites: use fewer folds, a smaller --val-fraction, or --by case",
            )
        columns[f"fold_{fold + 1}"] = cast(tuple[Part, ...], tuple(part_of[site_of[case]] for case in cases))
    return SplitTable("case", tuple(cases), columns)


class _Goal(NamedTuple):
    """wanted: (P, C) cases by part and class, none 0. lacking: (P,), what a part costs without a case of some class."""

    wanted: NDArray[np.float64]
    lacking: NDArray[np.float64]

    def costs(self, held: NDArray[Any], parts: Sequence[int] | slice = slice(None)) -> NDArray[np.float64]:
        """Of each part, (..., P), of cases by part and class (..., P, C). parts: which of all parts these are."""
        wanted, lacking = self.wanted[parts], self.lacking[parts]
        found = (np.square(held - wanted) / wanted).sum(-1) + lacking * (held == 0).sum(-1)
        return np.asarray(found, np.float64)

    def is_near(self, held: NDArray[np.int64]) -> bool:
        """Whether every part has of every class what is wanted, rounded up or down."""
        return bool((np.abs(held - self.wanted) < 1).all() and (held > 0).all())


def _assign(counts: NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """The part of each site, (S,), the first of the best found; no part is empty.

    counts: (S, C) cases by site and class. shares: of each part, summing to 1. The larger a part, the more a class that
    it lacks weighs: what nobody learns is worse than what is not tested.
    """
    counts = counts[:, counts.any(0)]
    goal = _Goal(np.outer(shares, counts.sum(0)), LACKING * np.asarray(shares))
    best, lowest = np.zeros(len(counts), np.int64), np.inf
    for _ in range(STARTS):
        found = _improved(counts, goal, _dealt(counts, goal, rng))
        held = _held(counts, found, len(shares))
        cost = float(goal.costs(held).sum())
        # Not by the last digit, which the order of a sum decides.
        if cost < lowest - 1e-9:
            best, lowest = found, cost
        if goal.is_near(held):
            break
    return best


def _held(counts: NDArray[np.int64], parts: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Cases by part and class, (P, C)."""
    held = np.zeros((number, counts.shape[1]), np.int64)
    np.add.at(held, parts, counts)
    return held


def _dealt(counts: NDArray[np.int64], goal: _Goal, rng: np.random.Generator) -> NDArray[np.int64]:
    """Each site, the largest first and equal ones in a random order, to the part where it costs least."""
    shuffled = rng.permutation(len(counts))
    order = shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]
    held = np.zeros(goal.wanted.shape, np.int64)
    parts = np.zeros(len(counts), np.int64)
    for place, site in enumerate(order.tolist()):
        change = goal.costs(held + counts[site]) - goal.costs(held)
        empty = held.sum(1) == 0
        if len(order) - place <= empty.sum():
            # As many sites are left as parts without one.
            change = np.where(empty, change, np.inf)
        parts[site] = int(np.argmin(change))
        held[parts[site]] += counts[site]
    return parts


def _improved(counts: NDArray[np.int64], goal: _Goal, parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``parts`` after the best move of a site or swap of two, again and again, until none lowers the cost."""
    number = len(goal.wanted)
    parts = parts.copy()
    for _ in range(10 * len(counts)):
        held = _held(counts, parts, number)
        if goal.is_near(held):
            break
        now = goal.costs(held)
        best: tuple[float, int, int, int] = (-1e-9, -1, -1, -1)
        members = np.bincount(parts, minlength=number)
        for a, b in itertools.permutations(range(number), 2):
            own, others = np.flatnonzero(parts == a), np.flatnonzero(parts == b)
            if members[a] > 1:
                moved = np.stack([held[a] - counts[own], held[b] + counts[own]], 1)
                change = goal.costs(moved, [a, b]).sum(-1) - now[a] - now[b]
                at = int(change.argmin())
                best = min(best, (float(change[at]), int(own[at]), b, -1))
            if a < b:
                gain = counts[others][None] - counts[own][:, None]
                swapped = np.stack([held[a] + gain, held[b] - gain], 2)
                change = goal.costs(swapped, [a, b]).sum(-1) - now[a] - now[b]
                at = int(change.argmin())
                one, other = divmod(at, len(others))
                best = min(best, (float(change.flat[at]), int(own[one]), b, int(others[other])))
        _, site, part, other = best
        if site < 0:
            break
        if other >= 0:
            parts[other] = parts[site]
        parts[site] = part
    return parts


def missing_classes(table: SplitTable, case_labels: Mapping[str, str]) -> list[str]:
    """One line for each part of a fold that has cases, but none of some class."""
    classes = sorted(set(case_labels.values()))
    found = []
    for name, parts in table.folds.items():
        for part in ("val", "test"):
            there = {case_labels[case] for case, own in zip(table.ids, parts, strict=True) if own == part}
            absent = [label for label in classes if label not in there]
            if there and absent:
                found.append(f"{name}: no case of {', '.join(absent)} is in its {part} part: sites allow no other")
    return found


def torn_sites(table: SplitTable, site_of: Mapping[str, str]) -> dict[str, int]:
    """Of each fold, how many sites stand both in its training or validation part and in its test part.

    site_of: site by the ids of the table; ids without one do not count.
    """
    found = {}
    for name, parts in table.folds.items():
        by_part: dict[bool, set[str]] = {True: set(), False: set()}
        for key, part in zip(table.ids, parts, strict=True):
            if part and site_of.get(key):
                by_part[part == "test"].add(site_of[key])
        found[name] = len(by_part[True] & by_part[False])
    return found
