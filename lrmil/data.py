"""Labels joined to bags, and batches of whole bags by a budget of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import LabelError
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, find_column, read_table

if TYPE_CHECKING:
    from torch import Tensor

    from lrmil.store import FeatureStore, ResidentStore

__all__ = ["BagBatch", "LabelTable", "batches", "load_labels", "plan_batches", "read_case_labels"]

LABEL_COLUMNS = ("label", "class", "target")
UNLABELLED = -1


class BagBatch(NamedTuple):
    """Whole bags, one after the other; T rows in B bags.

    features: (T, D), the store's type. offsets: int64 (B + 1,). segment: int64 (T,), which of the B bags each row is
    of. labels: int64 (B,). bag_index: int64 (B,), the bags' places in the store. parent: int64 (T,) or None, each
    row's parent within its own bag at the store's parent level.
    """

    features: Tensor
    offsets: Tensor
    segment: Tensor
    labels: Tensor
    bag_index: Tensor
    parent: Tensor | None = None


@dataclass(frozen=True)
class LabelTable:
    """Labels of the bags of a store, and everything that found no partner.

    classes: sorted names, whole numbers by value. labels: int64 (bags,), index into them or -1. case_ids: per bag.
    usable: bags with label and rows. missing: in the table, but no bag. unlabelled: a bag, but not in the table. empty:
    labelled bags without rows, with the reason.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    case_ids: tuple[str, ...]
    usable: NDArray[np.int64]
    missing: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """One line for each kind of slide that is left out, with all names."""
        kinds = [
            ("in the labels but without a bag", self.missing),
            ("without a label", self.unlabelled),
            ("without tiles", self.empty),
        ]
        return [f"{len(names)} {what}: {', '.join(names)}" for what, names in kinds if names]

    def case_labels(self) -> dict[str, str]:
        """Class of each case with a usable bag; a case whose slides differ gets its classes joined by "+"."""
        found: dict[str, set[str]] = {}
        for i in self.usable.tolist():
            found.setdefault(self.case_ids[i], set()).add(self.classes[self.labels[i]])
        return {case: "+".join(sorted(names)) for case, names in found.items()}


def read_cases(path: str | Path) -> dict[str, str]:
    """Case of each slide by a CSV with a slide and a case column; empty where it lacks either.

    A slide's file suffix is ignored, as in labels. Raises LabelError when the file cannot be read.
    """
    header, rows = read_table(path, "label table", LabelError)
    slide, case = find_column(header, SLIDE_COLUMNS), find_column(header, CASE_COLUMNS)
    if slide is None or case is None:
        return {}
    found: dict[str, str] = {}
    for _, row in rows:
        if row[slide] and row[case]:
            found |= {row[slide]: row[case], Path(row[slide]).stem: row[case]}
    return found


def load_labels(
    path: str | Path,
    slide_ids: Sequence[str],
    case_ids: Sequence[str] | None = None,
    *,
    lengths: ArrayLike | None = None,
    by: str = "auto",
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    empty_reasons: Mapping[str, str] | None = None,
) -> LabelTable:
    """Join a label CSV to bags.

    The CSV has a column ``label`` (or ``label_column``), and ``slide_id``, ``case_id`` or both. With a slide column
    labels are by slide, and its case column, if any, overrides the bags' cases; with a case column alone they are by
    case. slide_ids, case_ids, lengths: of the bags. by: "slide", "case" or "auto". classes: in this order instead of
    sorted, as a trained model has them. A slide's file suffix in the CSV is ignored.

    Raises LabelError for a missing column, an empty or unknown label, or one id with two labels; when no bag at all has
    a label; or when fewer than two classes are left.
    """
    header, rows = read_table(path, "label table", LabelError)
    label_name = label_column or find_column(header, LABEL_COLUMNS)
    if label_name is None or label_name not in header:
        raise LabelError(
            f"{path} has no column {label_column or 'label'!r}", remedy=f"its columns are {', '.join(header)}"
        )
    slide_name, case_name = find_column(header, SLIDE_COLUMNS), find_column(header, CASE_COLUMNS)
    by_slide = slide_name is not None if by == "auto" else by == "slide"
    key_name = slide_name if by_slide else case_name
    if key_name is None:
        raise LabelError(
            f"{path} has no column {'slide_id' if by_slide else 'case_id'}",
            remedy=f"its columns are {', '.join(header)}",
        )
    known = set(slide_ids)
    by_key, case_of = _collect(path, rows, key_name, label_name, case_name if by_slide else None, known)
    names = tuple(classes) if classes is not None else tuple(sorted(set(by_key.values()), key=_natural))
    strange = sorted({value for value in by_key.values() if value not in names})
    if strange:
        raise LabelError(f"{path}: class {strange[0]!r} is not one of {', '.join(names)}")
    bag_cases = list(case_ids) if case_ids is not None else list(slide_ids)
    bag_cases = [case_of.get(slide, case) for slide, case in zip(slide_ids, bag_cases, strict=True)]
    keys = list(slide_ids) if by_slide else bag_cases
    labels = np.array([names.index(by_key[k]) if k in by_key else UNLABELLED for k in keys], np.int64)
    sizes = np.ones(len(keys), np.int64) if lengths is None else np.asarray(lengths, np.int64)
    usable = np.flatnonzero((labels != UNLABELLED) & (sizes > 0))
    reasons = empty_reasons or {}
    empty = np.flatnonzero((labels != UNLABELLED) & (sizes == 0)).tolist()
    table = LabelTable(
        names,
        labels,
        tuple(bag_cases),
        usable,
        missing=tuple(sorted(set(by_key) - set(keys))),
        unlabelled=tuple(s for s, label in zip(slide_ids, labels.tolist(), strict=True) if label == UNLABELLED),
        empty=tuple(f"{slide_ids[i]} ({reasons.get(slide_ids[i]) or 'no tiles'})" for i in empty),
    )
    if not len(usable):
        example = f"the table has {next(iter(by_key), 'nothing')!r}, the bags have {next(iter(keys), 'nothing')!r}"
        raise LabelError(f"{path}: no bag has a label", remedy=f"check the ids: {example}")
    if len(names) < 2:
        raise LabelError(f"{path}: all labels are {names[0]!r}", remedy="a classifier needs two classes")
    return table


def _natural(name: str) -> tuple[int, int, str]:
    """Whole numbers by value, before all other names by letter."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _collect(
    path: str | Path,
    rows: Sequence[tuple[int, dict[str, str]]],
    key_name: str,
    label_name: str,
    case_name: str | None,
    known: set[str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Label of each id, and case of each slide where the table has one."""
    labels: dict[str, str] = {}
    cases: dict[str, str] = {}
    for line, row in rows:
        key, value = row[key_name], row[label_name]
        if not key:
            raise LabelError(f"{path}, line {line}: {key_name} is empty")
        if not value:
            raise LabelError(f"{path}, line {line}: {key} has no {label_name}", remedy="fill it in or drop the row")
        if key not in known and Path(key).stem in known:  # "slide.svs" where the bag is "slide"
            key = Path(key).stem
        if labels.setdefault(key, value) != value:
            raise LabelError(f"{path}, line {line}: {key} is labelled {labels[key]!r} and {value!r}")
        if case_name is not None and row[case_name] and cases.setdefault(key, row[case_name]) != row[case_name]:
            raise LabelError(f"{path}, line {line}: {key} is of case {cases[key]!r} and {row[case_name]!r}")
    return labels, cases


def read_case_labels(path: str | Path, *, label_column: str | None = None) -> dict[str, str]:
    """Class of each case in a label CSV, whether or not there are bags; see ``load_labels`` for its columns.

    A slide without a case is its own case. Raises LabelError as ``load_labels`` does.
    """
    header, rows = read_table(path, "label table", LabelError)
    key = find_column(header, SLIDE_COLUMNS) or find_column(header, CASE_COLUMNS)
    ids = list(dict.fromkeys(row[key] for _, row in rows)) if key else []
    return load_labels(path, ids, label_column=label_column).case_labels()


def plan_batches(
    lengths: NDArray[np.int64],
    indices: Sequence[int] | NDArray[np.int64],
    *,
    token_budget: int,
    shuffle_seed: int | None,
    max_bags: int | None = None,
) -> list[NDArray[np.int64]]:
    """Bags of each batch: in order, or shuffled by the seed, each filled up to ``token_budget`` rows.

    A bag larger than the budget is a batch of its own. max_bags: no batch has more. Bags without rows raise ValueError:
    the caller has named and left them out. The same arguments give the same batches.
    """
    order = np.asarray(indices, np.int64)
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    sizes = lengths[order]
    if len(order) and sizes.min() < 1:
        raise ValueError(f"bag {int(order[sizes.argmin()])} has no rows: leave it out")
    plan: list[NDArray[np.int64]] = []
    first, total = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > first and (total + size > token_budget or (max_bags is not None and i - first >= max_bags)):
            plan.append(order[first:i])
            first, total = i, 0
        total += size
    if first < len(order):
        plan.append(order[first:])
    return plan


def batches(
    store: FeatureStore | ResidentStore,
    labels: ArrayLike,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    token_budget: int,
    shuffle_seed: int | None,
    max_bags: int | None = None,
) -> Iterator[BagBatch]:
    """Batches of the bags ``indices``; see plan_batches for how they are filled.

    store: a resident one, or a plain one, which then stays mapped on the CPU. labels: int (bags,) over the whole store.
    """
    import torch

    from lrmil.store import FeatureStore, ResidentStore

    resident = ResidentStore.of(store, "cpu", place="mapped") if isinstance(store, FeatureStore) else store
    targets = torch.as_tensor(np.asarray(labels, np.int64))
    plan = plan_batches(
        resident.lengths, indices, token_budget=token_budget, shuffle_seed=shuffle_seed, max_bags=max_bags
    )

    def make(chosen: NDArray[np.int64]) -> BagBatch:
        rows = resident.gather(chosen)
        bag_index = torch.from_numpy(chosen)
        return BagBatch(
            rows.features,
            rows.offsets,
            rows.segment,
            targets[bag_index].to(resident.device),
            bag_index.to(resident.device),
            rows.parent,
        )

    # One batch ahead: on a GPU its copy runs while the current one is computed.
    ahead = make(plan[0]) if plan else None
    for following in [*plan[1:], None]:
        current = ahead
        ahead = make(following) if following is not None and resident.device.type == "cuda" else None
        if current is not None:
            yield current
        if following is not None and ahead is None:
            ahead = make(following)
