"""Which cases train, validate and test in each fold.

The table is a CSV: ``case_id`` or ``slide_id``, then ``fold_1`` to ``fold_k`` with ``train``, ``val``, ``test`` or
nothing in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import LeakageError, SplitError
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, read
from wsi_pipe.files import write_text_atomically
from wsi_pipe.ids import Ids, clash, same_name, table_ids
from wsi_pipe.tables import csv_text, folded, is_missing

__all__ = [
    "PARTS",
    "SPLITS_NAME",
    "FoldIndices",
    "Part",
    "SplitTable",
    "make_splits",
    "read_splits",
    "seen_cases",
]

SPLITS_NAME = "splits.csv"
"""A run's folds, beside its folders."""

Part = Literal["train", "val", "test", ""]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SYNONYMS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "none": "",
}
SHOWN = 5


@dataclass(frozen=True)
class FoldIndices:
    """Places of the bags of one fold, each int64."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class SplitTable:
    """Parts of ids in each fold.

    unit: what the ids are. ids: (n,). folds: fold name -> (n,) parts, "" for ids that the fold leaves out.
    """

    unit: Literal["case", "slide"]
    ids: tuple[str, ...]
    folds: Mapping[str, tuple[Part, ...]]

    def fold_name(self, fold: int | str) -> str:
        """The column of fold 1, 2, ... or of a name. Raises SplitError when there is none."""
        name = f"fold_{fold}" if isinstance(fold, int) or str(fold).isdigit() else str(fold)
        if name not in self.folds:
            raise SplitError(f"there is no fold {fold!r}", remedy=f"the splits have {', '.join(self.folds)}")
        return name

    def indices(self, fold: int | str, slide_ids: Sequence[str], case_ids: Sequence[str]) -> FoldIndices:
        """Places of the bags in each part of a fold; bags that the table lacks are in none.

        Raises LeakageError when two parts share a case, SplitError when training or test part has no bag.
        """
        name = self.fold_name(fold)
        self.check_leakage(slide_ids, case_ids)
        keys = case_ids if self.unit == "case" else slide_ids
        rows = self._rows(keys)
        parts = np.array([self.folds[name][rows[key]] if key in rows else "" for key in keys])
        train, val, test = (np.flatnonzero(parts == part).astype(np.int64) for part in PARTS)
        if not len(train):
            raise SplitError(
                f"{name} has no training bag", remedy=f"check that the {self.unit} ids of splits and bags agree"
            )
        return FoldIndices(train, val, test)

    def unassigned(self, slide_ids: Sequence[str], case_ids: Sequence[str]) -> tuple[str, ...]:
        """Slides whose id or case is not in the table."""
        keys = case_ids if self.unit == "case" else slide_ids
        rows = self._rows(keys)
        return tuple(slide for slide, key in zip(slide_ids, keys, strict=True) if key not in rows)

    def _rows(self, keys: Sequence[str]) -> dict[str, int]:
        """Row of the table of each bag's id; bags that the table lacks are left out.

        Raises SplitError when two rows that differ mean one bag.
        """
        known = Ids(keys)
        rows: dict[str, int] = {}
        for row, name in enumerate(self.ids):
            key = known.match(name)
            if key is None:
                continue
            other = rows.setdefault(key, row)
            if any(parts[row] != parts[other] for parts in self.folds.values()):
                raise SplitError(
                    f"{self.ids[other]} and {name} of the splits are both {key}", remedy="give each id one row"
                )
        return rows

    def check_leakage(self, slide_ids: Sequence[str], case_ids: Sequence[str]) -> None:
        """Raise LeakageError naming the cases that stand in two parts of a fold."""
        cases = dict(zip(slide_ids, map(same_name, case_ids), strict=True)) if self.unit == "slide" else {}
        known = Ids(cases)
        case_of = {name: cases[slide] for name in self.ids if (slide := known.match(name)) is not None}
        for name, parts in self.folds.items():
            seen: dict[str, set[str]] = {}
            for key, part in zip(self.ids, parts, strict=True):
                if part:
                    seen.setdefault(case_of.get(key, key), set()).add(part)
            torn = sorted(case for case, found in seen.items() if len(found) > 1)
            if torn:
                more = f" and {len(torn) - SHOWN} more" if len(torn) > SHOWN else ""
                raise LeakageError(
                    f"{name}: {len(torn)} cases stand in two parts: {', '.join(torn[:SHOWN])}{more}",
                    remedy="give every slide of a case the same part, or make the splits with lrmil split",
                )

    def to_csv(self) -> str:
        """The table as CSV text, ids in their order."""
        return csv_text([f"{self.unit}_id", *self.folds], zip(self.ids, *self.folds.values(), strict=True))

    def write(self, path: str | Path) -> None:
        """Write the table. Raises OutputError when it cannot be written."""
        write_text_atomically(Path(path), self.to_csv())


def read_splits(path: str | Path) -> SplitTable:
    """Read a split table; see the module for its columns.

    Raises SplitError for a missing column, an unknown part or an id with two rows.
    """
    table = read(path, "splits", SplitError, *(f"fold_{n}" for n in range(1, 11)))
    slide = table.find(*SLIDE_COLUMNS)
    key = slide if slide is not None else table.find(*CASE_COLUMNS)
    if key is None:
        raise SplitError(
            f"{path} has no column slide_id or case_id", remedy=f"its columns are {', '.join(table.columns)}"
        )
    folds = {place: _fold_name(name) for place, name in enumerate(table.columns) if _fold_name(name)}
    if not folds:
        raise SplitError(f"{path} has no column fold_1", remedy=f"its columns are {', '.join(table.columns)}")
    given: list[str] = []
    parts: dict[str, list[Part]] = {name: [] for name in folds.values()}
    if len(parts) < len(folds):
        raise SplitError(f"{path}: a fold has two columns", remedy="delete one of them")
    for row, cells in table.rows:
        if is_missing(cells[key]):
            raise SplitError(
                f"{table.where(row)}: {table.columns[key]} is empty", remedy="write the id, or delete the row"
            )
        given.append(cells[key])
        for place, name in folds.items():
            cell = "" if is_missing(cells[place]) else cells[place].lower()
            if cell and cell not in SYNONYMS:
                raise SplitError(f"{table.where(row)}: {cells[place]!r} in {name}", remedy="write train, val or test")
            parts[name].append(SYNONYMS[cell] if cell else "")
    twice = clash(given)
    if twice is not None:
        at = [row for (row, _), name in zip(table.rows, given, strict=True) if name in twice]
        raise SplitError(
            f"{path}, rows {at[0]} and {at[1]}: {twice[1]} has two rows", remedy="give each id one row, with its folds"
        )
    return SplitTable(
        "slide" if slide is not None else "case", tuple(table_ids(given)), {n: tuple(p) for n, p in parts.items()}
    )


def _fold_name(column: str) -> str:
    """``fold_1`` for ``Fold 1``; "" for what is no fold."""
    name = folded(column)
    return f"fold_{name[4:]}" if name.startswith("fold") and name != "fold" else ""


def make_splits(
    case_labels: Mapping[str, str],
    folds: int = 5,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
) -> SplitTable:
    """Stratified folds of cases: each case tests once, and ``val_fraction`` of a fold's other cases validate.

    case_labels: case -> class. folds: at least 2, or 1 for a single hold-out of ``test_fraction`` (default 0.2). Within
    each class cases are shuffled by the seed and dealt round; every class has a validation case where it can spare one.
    The result depends on the cases and the seed, not on the cases' order.

    Raises SplitError when a class has fewer cases than folds, or a fraction is out of range.
    """
    fraction = 0.2 if test_fraction is None else test_fraction
    if folds < 1 or (folds > 1 and test_fraction is not None):
        raise SplitError(f"{folds} folds with a test fraction of {test_fraction}", remedy="a fraction goes with 1 fold")
    if not 0 <= val_fraction < 1 or not 0 < fraction < 1:
        raise SplitError(f"fractions {val_fraction:g} (val) and {fraction:g} (test) must lie between 0 and 1")
    cases = sorted(case_labels)
    strata: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        strata.setdefault(case_labels[case], []).append(place)
    least = max(folds, 2)
    for label, members in sorted(strata.items()):
        if len(members) < least:
            raise SplitError(
                f"class {label!r} has {len(members)} cases, too few for {folds} folds",
                remedy="use fewer folds, join classes, or leave the class out",
            )
    rng = np.random.default_rng(seed)
    shuffled = {label: rng.permutation(members) for label, members in sorted(strata.items())}
    test_of = np.full(len(cases), -1)
    dealt = 0
    for places in shuffled.values():
        if folds == 1:
            count = min(max(round(fraction * len(places)), 1), len(places) - 1)
            test_of[places[:count]] = 0
        else:
            # Dealing goes on where the last class ended, so that folds differ by one case at most.
            test_of[places] = (dealt + np.arange(len(places))) % folds
            dealt += len(places)
    columns: dict[str, tuple[Part, ...]] = {}
    for fold in range(folds):
        parts: list[Part] = ["test" if test == fold else "train" for test in test_of.tolist()]
        for places in shuffled.values():
            rest = rng.permutation(places[test_of[places] != fold])
            wanted = round(val_fraction * len(rest))
            count = min(max(wanted, 1 if val_fraction > 0 else 0), len(rest) - 1)
            for place in rest[:count].tolist():
                parts[place] = "val"
        columns[f"fold_{fold + 1}"] = cast(tuple[Part, ...], tuple(parts))
    return SplitTable("case", tuple(cases), columns)


def seen_cases(
    model: Path, model_fold: str, fold: str, splits: SplitTable, slide_ids: Sequence[str], case_ids: Sequence[str]
) -> list[str] | None:
    """Test cases of ``fold`` that a model saw in training, by the splits that lie beside it; None where none lie there.

    model: file in the folder of its fold or of its run. model_fold: the fold that its card names. slide_ids, case_ids:
    of the bags. Raises SplitError or LeakageError as ``SplitTable.indices`` does.
    """
    table = next((p for p in (model.parent / SPLITS_NAME, model.parent.parent / SPLITS_NAME) if p.is_file()), None)
    if table is None:
        return None
    theirs = read_splits(table).indices(model_fold, slide_ids, case_ids)
    seen = {case_ids[i] for part in (theirs.train, theirs.val) for i in part.tolist()}
    ours = splits.indices(fold, slide_ids, case_ids)
    return sorted({case_ids[i] for i in ours.test.tolist()} & seen)
