"""Labels joined to bags, and batches of whole bags by a budget of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import LabelError
from lrmil.tables import CASE_COLUMNS, LABEL_COLUMNS, SLIDE_COLUMNS, read, renamed, whole_number
from wsi_pipe.ids import Ids, id_of, same_name, table_ids
from wsi_pipe.tables import Table, is_missing

if TYPE_CHECKING:
    from torch import Tensor

    from lrmil.store import FeatureStore, ResidentStore

__all__ = ["BagBatch", "LabelTable", "batches", "cases_by_table", "load_labels", "plan_batches", "read_case_labels"]

UNLABELLED = -1


class BagBatch(NamedTuple):
    """Whole bags, one after the other; T rows in B bags.

    features: (T, D), the store's type. offsets: int64 (B + 1,). segment: int64 (T,), which of the B bags each row is
    of. labels: int64 (B,) classes, or float32 (B, W) of a target (see ``lrmil.targets``). bag_index: int64 (B,), the
    bags' places in the store. parent: int64 (T,) or None, each row's parent within its own bag at the store's parent
    level. rows: int64 (T,), which row of its bag in the store each is, where a batch holds some of a bag's rows; None
    where it holds all, in their order.
    """

    features: Tensor
    offsets: Tensor
    segment: Tensor
    labels: Tensor
    bag_index: Tensor
    parent: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class LabelTable:
    """Labels of the bags of a store, and everything that found no partner.

    classes: sorted names, whole numbers by value. labels: int64 (bags,), index into them or -1. case_ids: per bag.
    usable: bags with label and rows. missing: in the table, but no bag. unlabelled: a bag, but not in the table or with
    a label that is empty, NA or NaN there. empty: labelled bags without rows, with the reason. remarks: how the table
    was read, where that is not plain.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    case_ids: tuple[str, ...]
    usable: NDArray[np.int64]
    missing: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """One line for each kind of slide that is left out, with all names."""
        kinds = [
            ("in the labels but without a bag", self.missing),
            ("without a label", self.unlabelled),
            ("without tiles", self.empty),
        ]
        return [*self.remarks, *(f"{len(names)} {what}: {', '.join(names)}" for what, names in kinds if names)]

    def case_labels(self) -> dict[str, str]:
        """Class of each case with a usable bag; a case whose slides differ gets its classes joined by "+"."""
        found: dict[str, set[str]] = {}
        for i in self.usable.tolist():
            found.setdefault(self.case_ids[i], set()).add(self.classes[self.labels[i]])
        return {case: "+".join(sorted(names)) for case, names in found.items()}


def read_cases(path: str | Path) -> dict[str, str]:
    """Case of each slide by a CSV with a slide and a case column; empty where it lacks either.

    A slide's file suffix is ignored, as in labels; ``Ids`` of the keys tells which of them a bag is. Raises LabelError
    when the file cannot be read.
    """
    table = read(path, "label table", LabelError)
    slide, case = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    if slide is None or case is None:
        return {}
    rows = [cells for _, cells in table.rows if not (is_missing(cells[slide]) or is_missing(cells[case]))]
    names = table_ids([cells[slide] for cells in rows])
    found: dict[str, str] = {}
    for cells, name in zip(rows, names, strict=True):
        found |= {cells[slide]: same_name(cells[case]), name: same_name(cells[case])}
    return found


def cases_by_table(
    path: str | Path, slide_ids: Sequence[str], case_ids: Sequence[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Case of each bag by a slide table, where it names the bag, else ``case_ids``; and what is to be said of both.

    Raises LabelError when the table has no slide or no case column, or names none of the bags.
    """
    known = read_cases(path)
    if not known:
        raise LabelError(
            f"{path}: lacks a column of slides or of cases",
            remedy="name them slide_id or FILENAME, and case_id or PATIENT",
        )
    ids = Ids(known)
    found = [ids.match(slide) for slide in slide_ids]
    strange = [slide for slide, name in zip(slide_ids, found, strict=True) if name is None]
    if len(strange) == len(slide_ids):
        raise LabelError(
            f"{path}: names none of the {len(slide_ids)} bags, such as {slide_ids[0]}",
            remedy=f"it names, for one, {next(iter(known))}",
        )
    cases = [own if name is None else known[name] for own, name in zip(case_ids, found, strict=True)]
    bags = Ids(slide_ids)
    absent = sorted({id_of(name) for name in known if bags.match(name) is None})
    notes = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (
            (f"in {path} but without a bag", absent),
            (f"not in {path}; their cases are those of the bags", strange),
        )
        if names
    ]
    return cases, tuple(notes)


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
    renames: Mapping[str, str] | None = None,
) -> LabelTable:
    """Join a label CSV to bags.

    The CSV has a column ``label`` (or ``label_column``), and ``slide_id``, ``case_id`` or both. With a slide column
    labels are by slide, and its case column, if any, overrides the bags' cases; with a case column alone they are by
    case. slide_ids, case_ids, lengths: of the bags. by: "slide", "case" or "auto". classes: in this order instead of
    sorted, as a trained model has them. Which bag a row means is told by ``wsi_pipe.ids``: a slide's file suffix, its
    folder and the form of its accents do not count. A label that is empty, NA or NaN is missing; whole numbers are one
    class with or without ``.0``. renames: values of the table that mean another.

    Raises LabelError for a missing column, an unknown label, or one id with two labels; when no bag at all has a label;
    or when fewer than two classes are left.
    """
    table = read(path, "label table", LabelError, *LABEL_COLUMNS, *([label_column] if label_column else []))
    label_place = table.find(label_column) if label_column else table.find(*LABEL_COLUMNS)
    if label_place is None:
        raise LabelError(
            f"{path} has no column {label_column or 'label'!r}", remedy=f"its columns are {', '.join(table.columns)}"
        )
    slide_place, case_place = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    by_slide = slide_place is not None if by == "auto" else by == "slide"
    key_place = slide_place if by_slide else case_place
    if key_place is None:
        raise LabelError(
            f"{path} has no column {'slide_id' if by_slide else 'case_id'}",
            remedy=f"its columns are {', '.join(table.columns)}",
        )
    own_cases = [same_name(case) for case in case_ids] if case_ids is not None else list(slide_ids)
    by_key, case_of = _collect(
        table,
        key_place,
        label_place,
        case_place if by_slide else None,
        slide_ids if by_slide else own_cases,
        renames or {},
    )
    by_key = _one_spelling(by_key, classes)
    names = tuple(classes) if classes is not None else tuple(sorted(set(by_key.values()), key=_natural))
    strange = sorted({value for value in by_key.values() if value not in names})
    if strange:
        raise LabelError(
            f"{path}: class {strange[0]!r} is not one of {', '.join(names)}",
            remedy="give the table that the model was trained for, or train with this one",
        )
    bag_cases = [case_of.get(slide, case) for slide, case in zip(slide_ids, own_cases, strict=True)]
    keys = list(slide_ids) if by_slide else bag_cases
    labels = np.array([names.index(by_key[k]) if k in by_key else UNLABELLED for k in keys], np.int64)
    sizes = np.ones(len(keys), np.int64) if lengths is None else np.asarray(lengths, np.int64)
    usable = np.flatnonzero((labels != UNLABELLED) & (sizes > 0))
    reasons = empty_reasons or {}
    empty = np.flatnonzero((labels != UNLABELLED) & (sizes == 0)).tolist()
    found = LabelTable(
        names,
        labels,
        tuple(bag_cases),
        usable,
        missing=tuple(sorted(set(by_key) - set(keys))),
        unlabelled=tuple(s for s, label in zip(slide_ids, labels.tolist(), strict=True) if label == UNLABELLED),
        empty=tuple(f"{slide_ids[i]} ({reasons.get(slide_ids[i]) or 'no tiles'})" for i in empty),
        remarks=table.notes,
    )
    if not len(usable):
        example = f"the table has {next(iter(by_key), 'nothing')!r}, the bags have {next(iter(keys), 'nothing')!r}"
        raise LabelError(f"{path}: no bag has a label", remedy=f"check the ids: {example}")
    if len(names) < 2:
        raise LabelError(f"{path}: all labels are {names[0]!r}", remedy="a classifier needs two classes")
    return found


def _one_spelling(labels: dict[str, str], classes: Sequence[str] | None) -> dict[str, str]:
    """Labels with whole numbers written as such, or as the classes of a model write them."""
    if classes is not None:
        spelt = {whole_number(same_name(name)): name for name in classes}
        return {
            key: value if value in classes else spelt.get(whole_number(value), value) for key, value in labels.items()
        }
    plain = {value: whole_number(value) for value in set(labels.values())}
    # Grades such as 3.0 and 3.5 are no whole numbers, and keep their digits.
    if not all(short.lstrip("+-").isdecimal() for short in plain.values()):
        return labels
    return {key: plain[value] for key, value in labels.items()}


def _natural(name: str) -> tuple[int, int, str]:
    """Whole numbers by value, before all other names by letter."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _collect(
    table: Table,
    key_place: int,
    label_place: int,
    case_place: int | None,
    known: Sequence[str],
    renames: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Label of each id, and case of each slide where the table has one. Raises LabelError for what contradicts."""
    key_name, label_name = table.columns[key_place], table.columns[label_place]
    ids = Ids(known)
    names = table_ids([cells[key_place] for _, cells in table.rows])
    labels: dict[str, str] = {}
    cases: dict[str, str] = {}
    seen: dict[str, int] = {}
    for (row, cells), name in zip(table.rows, names, strict=True):
        if is_missing(cells[key_place]):
            raise LabelError(
                f"{table.where(row)}: {key_name} is {'empty' if not cells[key_place] else repr(cells[key_place])}",
                remedy="write the id, or delete the row",
            )
        key, value = ids.match(cells[key_place]) or name, renamed(same_name(cells[label_place]), renames)
        first = seen.setdefault(key, row)
        if not is_missing(value) and whole_number(labels.setdefault(key, value)) != whole_number(value):
            raise LabelError(
                f"{table.where(row)}: {key} is labelled {labels[key]!r} and {value!r} (column {label_name}, "
                f"rows {first} and {row})",
                remedy="give each slide one label; a file suffix does not make two of one",
            )
        case = "" if case_place is None or is_missing(cells[case_place]) else same_name(cells[case_place])
        if case and cases.setdefault(key, case) != case:
            raise LabelError(
                f"{table.where(row)}: {key} is of case {cases[key]!r} and {case!r} (rows {first} and {row})",
                remedy="give each slide one case",
            )
    return labels, cases


def read_case_labels(
    path: str | Path, *, label_column: str | None = None, renames: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Class of each case in a label table, whether or not there are bags; see ``load_labels`` for its columns.

    A slide without a case is its own case. Raises LabelError as ``load_labels`` does.
    """
    table = read(path, "label table", LabelError, *LABEL_COLUMNS)
    place = table.find(*SLIDE_COLUMNS)
    if place is None:
        place = table.find(*CASE_COLUMNS)
    ids = table_ids([cells[place] for _, cells in table.rows]) if place is not None else []
    return load_labels(path, list(dict.fromkeys(ids)), label_column=label_column, renames=renames).case_labels()


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

    store: a resident one, or a plain one, which then stays mapped on the CPU. labels: int (bags,), or
    float (bags, W) of a target, over the whole store.
    """
    import torch

    from lrmil.store import FeatureStore, ResidentStore

    resident = ResidentStore.of(store, "cpu", place="mapped") if isinstance(store, FeatureStore) else store
    truth = np.asarray(labels)
    # Classes are whole numbers; the truth of other targets is rows of numbers.
    targets = torch.as_tensor(truth.astype(np.int64) if truth.ndim == 1 else truth.astype(np.float32))
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
