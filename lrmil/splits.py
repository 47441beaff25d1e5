"""Which cases train, validate and test in each fold.

The table is a CSV: ``case_id`` or ``slide_id``, then ``fold_1`` to ``fold_k`` with ``train``, ``val``, ``test`` or
nothing in each row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import LeakageError, SplitError
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, find_column, read_table
from wsi_pipe.files import write_text_atomically

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
    "": "",
    "none": "",
    "nan": "",
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
        part_of = dict(zip(self.ids, self.folds[name], strict=True))
        keys = case_ids if self.unit == "case" else slide_ids
        parts = np.array([part_of.get(key, "") for key in keys])
        train, val, test = (np.flatnonzero(parts == part).astype(np.int64) for part in PARTS)
        if not len(train):
            raise SplitError(
                f"{name} has no training bag", remedy=f"check that the {self.unit} ids of splits and bags agree"
            )
        return FoldIndices(train, val, test)

    def unassigned(self, slide_ids: Sequence[str], case_ids: Sequence[str]) -> tuple[str, ...]:
        """Slides whose id or case is not in the table."""
        known = set(self.ids)
        keys = case_ids if self.unit == "case" else slide_ids
        return tuple(slide for slide, key in zip(slide_ids, keys, strict=True) if key not in known)

    def check_leakage(self, slide_ids: Sequence[str], case_ids: Sequence[str]) -> None:
        """Raise LeakageError naming the cases that stand in two parts of a fold."""
        case_of = dict(zip(slide_ids, case_ids, strict=True)) if self.unit == "slide" else {}
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
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f"{self.unit}_id", *self.folds])
        writer.writerows(zip(self.ids, *self.folds.values(), strict=True))
        return out.getvalue()

    def write(self, path: str | Path) -> None:
        """Write the table. Raises OutputError when it cannot be written."""
        write_text_atomically(Path(path), self.to_csv())


def read_splits(path: str | Path) -> SplitTable:
    """Read a split table; see the module for its columns.

    Raises SplitError for a missing column, an unknown part or an id with two rows.
    """
    header, rows = read_table(path, "splits", SplitError)
    slide, case = find_column(header, SLIDE_COLUMNS), find_column(header, CASE_COLUMNS)
    key = slide or case
    if key is None:
        raise SplitError(f"{path} has no column slide_id or case_id", remedy=f"its columns are {', '.join(header)}")
    names = [name for name in header if name.lower().startswith("fold_")]
    if not names:
        raise SplitError(f"{path} has no column fold_1", remedy=f"its columns are {', '.join(header)}")
    ids: list[str] = []
    parts: dict[str, list[Part]] = {name: [] for name in names}
    for line, row in rows:
        if not row[key]:
            raise SplitError(f"{path}, line {line}: {key} is empty")
        ids.append(row[key])
        for name in names:
            if row[name].lower() not in SYNONYMS:
                raise SplitError(f"{path}, line {line}: {row[name]!r} in {name}", remedy="write train, val or test")
            parts[name].append(SYNONYMS[row[name].lower()])
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise SplitError(f"{path}: {twice} has two rows", remedy="give each id one row")
    return SplitTable("slide" if slide else "case", tuple(ids), {n.lower(): tuple(p) for n, p in parts.items()})


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
