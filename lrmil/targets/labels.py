"""Truth of targets from a label table, joined to bags as ``lrmil.data.load_labels`` joins classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.data import UNLABELLED, LabelTable
from lrmil.errors import LabelError
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, read, renamed, whole_number
from lrmil.targets.base import Target
from lrmil.targets.classification import Classification
from lrmil.targets.kinds import Asked
from lrmil.targets.several import Several
from wsi_pipe.ids import Ids, same_name, table_ids
from wsi_pipe.tables import Table, is_missing

__all__ = ["TargetTable", "load_targets", "read_case_strata"]

LEAST_OF_STRATUM = 10
"""Cases that a stratum needs for folds to be made even by it."""


@dataclass(frozen=True)
class TargetTable(LabelTable):
    """A target, and the truth of the bags of a store. ``classes`` and ``labels`` are its strata.

    truth: float64 (bags, W), NaN where not known. usable: bags with rows of which anything is known.
    """

    target: Target = field(default_factory=Classification)
    truth: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 1)))

    def counts(self) -> list[str]:
        """How many bags have a value of each of several targets, where some lack one."""
        if not isinstance(self.target, Several):
            return []
        known = [(part.name, int(part.known(own).sum())) for part, own, _ in self.target.each(self.truth)]
        return [
            f"{name}: {count} of {len(self.truth)} bags have a value"
            for name, count in known
            if count < len(self.truth)
        ]

    def case_labels(self) -> dict[str, str]:
        """Stratum of each case with a usable bag, by which folds are made even; rare ones count as the commonest."""
        found: dict[str, int] = {}
        for i in self.usable.tolist():
            found[self.case_ids[i]] = max(found.get(self.case_ids[i], 0), int(self.labels[i]))
        if isinstance(self.target, Classification):
            return {case: self.classes[k] for case, k in found.items()}
        counts = Counter(found.values())
        common = max(counts, key=lambda k: (counts[k], -k)) if counts else 0
        return {case: self.classes[k if counts[k] >= LEAST_OF_STRATUM else common] for case, k in found.items()}


class JoinedColumns:
    """The columns of a table by bag."""

    def __init__(self, table: Table, rows: Mapping[str, list[tuple[int, list[str]]]], keys: Sequence[str],
                 renames: Mapping[str, str]) -> None:  # fmt: skip
        self.table, self.rows, self.keys, self.renames = table, rows, keys, renames

    def names(self) -> Sequence[str]:
        """All columns, as the table writes them."""
        return self.table.columns

    def find(self, name: str) -> str | None:
        """The column of that name, whatever its case, spaces and underscores; None where there is none."""
        place = self.table.find(name)
        return None if place is None else self.table.columns[place]

    def error(self, text: str, remedy: str | None = None) -> LabelError:
        """An error that names the table."""
        return LabelError(f"{self.table.path}: {text}", remedy=remedy)

    def cells(self, name: str) -> list[str | None]:
        """One cell a bag. Raises LabelError when two rows of a bag contradict each other."""
        place = self.table.find(name)
        assert place is not None
        found: dict[str, str | None] = {}
        for key in dict.fromkeys(self.keys):
            first: tuple[int, str] | None = None
            for row, cells in self.rows.get(key, ()):
                value = renamed(cells[place], self.renames)
                if is_missing(value):
                    continue
                if first is not None and whole_number(first[1]) != whole_number(value):
                    raise LabelError(
                        f"{self.table.where(row)}: {key} has {first[1]!r} and {value!r} (column {name}, rows "
                        f"{first[0]} and {row})",
                        remedy="give each slide, or each case, one value",
                    )
                first = first or (row, value)
            found[key] = None if first is None else first[1]
        return [found[key] for key in self.keys]


def load_targets(
    path: str | Path,
    slide_ids: Sequence[str],
    case_ids: Sequence[str],
    asked: Sequence[Asked],
    *,
    lengths: ArrayLike | None = None,
    by: str = "auto",
    like: Target | None = None,
    renames: Mapping[str, str] | None = None,
    empty_reasons: Mapping[str, str] | None = None,
) -> TargetTable:
    """Join a label table to bags for one target or several.

    slide_ids, case_ids, lengths: of the bags. by: what a row is about, as in ``load_labels``. like: the target of a
    trained model, whose levels and constants stand. renames: values of the table that mean another.

    Raises LabelError for a missing column, a bad cell or rows that contradict, and when no bag has any truth.
    """
    table = read(path, "label table", LabelError)
    slide_place, case_place = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    by_slide = slide_place is not None if by == "auto" else by == "slide"
    key_place = slide_place if by_slide else case_place
    if key_place is None:
        raise LabelError(
            f"{path} has no column {'slide_id' if by_slide else 'case_id'}",
            remedy=f"its columns are {', '.join(table.columns)}",
        )
    own_cases = [same_name(case) for case in case_ids]
    rows, cases = _rows(table, key_place, case_place if by_slide else None, slide_ids if by_slide else own_cases)
    bag_cases = [cases.get(slide, case) for slide, case in zip(slide_ids, own_cases, strict=True)]
    keys = list(slide_ids) if by_slide else bag_cases
    columns = JoinedColumns(table, rows, keys, renames or {})
    target, truth = _truth(asked, columns, like)
    known = target.known(truth)
    sizes = np.ones(len(keys), np.int64) if lengths is None else np.asarray(lengths, np.int64)
    strata, labels = target.strata(truth) if known.any() else (("all",), np.full(len(keys), UNLABELLED))
    reasons = empty_reasons or {}
    usable = np.flatnonzero(known & (sizes > 0))
    if not len(usable):
        example = f"the table has {next(iter(rows), 'nothing')!r}, the bags have {next(iter(keys), 'nothing')!r}"
        raise LabelError(f"{path}: no bag has a value of {target_words(asked)}", remedy=f"check the ids: {example}")
    return TargetTable(
        strata,
        np.asarray(labels, np.int64),
        tuple(bag_cases),
        usable,
        missing=tuple(sorted(set(rows) - set(keys))),
        unlabelled=tuple(s for s, there in zip(slide_ids, known.tolist(), strict=True) if not there),
        empty=tuple(
            f"{slide_ids[i]} ({reasons.get(slide_ids[i]) or 'no tiles'})"
            for i in np.flatnonzero(known & (sizes == 0)).tolist()
        ),
        remarks=table.notes,
        target=target,
        truth=truth,
    )


def target_words(asked: Sequence[Asked]) -> str:
    """The targets' names, for messages."""
    return ", ".join(one.name for one in asked)


def _truth(asked: Sequence[Asked], columns: JoinedColumns, like: Target | None) -> tuple[Target, NDArray[np.float64]]:
    if like is not None:
        parts = like.parts if isinstance(like, Several) else (like,)
        by_name = {one.name: one.options for one in asked}
        found = [part.read_again(by_name.get(part.name, {}), columns) for part in parts]
        return like, np.concatenate(found, axis=1)
    read_all: list[tuple[Any, NDArray[np.float64]]] = [one.kind.read(one.name, one.options, columns) for one in asked]
    if len(read_all) == 1:
        return read_all[0]
    return Several("", tuple(target for target, _ in read_all)), np.concatenate([t for _, t in read_all], axis=1)


def _rows(
    table: Table, key_place: int, case_place: int | None, known: Sequence[str]
) -> tuple[dict[str, list[tuple[int, list[str]]]], dict[str, str]]:
    """The rows of each id, and the case of each slide where the table has one. Raises LabelError."""
    ids = Ids(known)
    names = table_ids([cells[key_place] for _, cells in table.rows])
    rows: dict[str, list[tuple[int, list[str]]]] = {}
    cases: dict[str, str] = {}
    for (row, cells), name in zip(table.rows, names, strict=True):
        if is_missing(cells[key_place]):
            raise LabelError(
                f"{table.where(row)}: {table.columns[key_place]} is empty", remedy="write the id, or delete the row"
            )
        key = ids.match(cells[key_place]) or name
        rows.setdefault(key, []).append((row, cells))
        case = "" if case_place is None or is_missing(cells[case_place]) else same_name(cells[case_place])
        if case and cases.setdefault(key, case) != case:
            raise LabelError(
                f"{table.where(row)}: {key} is of case {cases[key]!r} and {case!r}", remedy="give each slide one case"
            )
    return rows, cases


def read_case_strata(
    path: str | Path, asked: Sequence[Asked], *, renames: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Stratum of each case in a label table, whether or not there are bags; a slide without a case is its own case.

    Raises LabelError as ``load_targets`` does.
    """
    table = read(path, "label table", LabelError)
    place = table.find(*SLIDE_COLUMNS)
    if place is None:
        place = table.find(*CASE_COLUMNS)
    ids = list(dict.fromkeys(table_ids([cells[place] for _, cells in table.rows]))) if place is not None else []
    return load_targets(path, ids, ids, asked, renames=renames).case_labels()
