"""Bags and labels, joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.data import LabelTable, cases_by_table, load_labels
from lrmil.errors import LabelError, RandomFeaturesError
from lrmil.sites import Confounding, Sites, confounding, read_sites, tcga_case
from lrmil.splits import FoldIndices, SplitTable
from lrmil.store import FeatureStore, find_bags, inspect_bag, pack_bags
from lrmil.store.dtypes import StoreDtype
from lrmil.store.joined import join_cases
from lrmil.targets import Target, TargetTable, load_targets, parse_targets
from lrmil.targets.cases import table_by_case
from wsi_pipe.encoders.random_id import is_random

__all__ = ["Cohort", "load_cohort", "open_features"]


@dataclass(frozen=True)
class Cohort:
    """A store, the labels of its bags, and the sites of their cases as far as they are known. remarks: on the table
    that told the bags' cases, where one did. unit: what a bag is, a slide or a case; of cases, slides: the store
    with one bag a slide, and members: the places there of each case's."""

    store: FeatureStore
    table: LabelTable
    sites: Sites = field(default_factory=Sites)
    remarks: tuple[str, ...] = ()
    unit: str = "slide"
    slides: FeatureStore | None = None
    members: tuple[NDArray[np.int64], ...] = ()

    def fold(self, splits: SplitTable, name: str) -> FoldIndices:
        """A fold's usable bags: labelled, and with tiles. Raises SplitError or LeakageError as SplitTable does."""
        parts = splits.indices(name, self.store.slide_ids, self.table.case_ids)
        usable = set(self.table.usable.tolist())
        kept = (
            np.array([i for i in part.tolist() if i in usable], np.int64)
            for part in (parts.train, parts.val, parts.test)
        )
        return FoldIndices(*kept)

    def confounding(self, splits: SplitTable | None = None) -> Confounding | None:
        """How labels and sites hang together; None where no site is known."""
        return confounding(self.table.case_labels(), self.sites, splits)

    def notes(self, splits: SplitTable | None = None) -> list[str]:
        """One line for each kind of slide that is left out, with all names, one where no cases are known, and what
        labels and sites have to do with each other."""
        notes = [*self.remarks, *(f"left out: {note}" for note in self.table.notes())]
        if splits is not None:
            usable = self.table.usable.tolist()
            slides = [self.store.slide_ids[i] for i in usable]
            stray = splits.unassigned(slides, [self.table.case_ids[i] for i in usable])
            if stray:
                notes.append(f"left out: {len(stray)} not in the splits: {', '.join(stray)}")
        if self.unit == "slide" and self.table.case_ids == self.store.slide_ids:
            notes.append("no case ids are known: every slide counts as a case of its own")
        if self.store.placeless:
            notes.append(f"{self.store.placeless} bags hold no coordinates: no heat map can be drawn of them")
        if self.sites.torn:
            notes.append(f"without a site, since they are given two: {', '.join(self.sites.torn)}")
        told = self.confounding(splits)
        return [*notes, *(told.notes() if told else [])]


def open_features(
    bags: Path | Sequence[Path],
    *,
    level: str | None,
    encoder: str | None,
    store_dir: Path,
    dtype: StoreDtype = "float16",
    parent_level: str | None = None,
    weights_sha256: str = "",
    allow_random: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> FeatureStore:
    """The store that ``bags`` is, or the one packed from the bags into ``store_dir`` (reused where it fits).

    Raises RandomFeaturesError for features of random weights unless ``allow_random``, before anything is packed.
    """
    if isinstance(bags, Path) and (bags / "store.json").is_file():
        store = FeatureStore.open(bags)
        store.verify()
        if not allow_random:
            _refuse_random(str(bags), store.meta.encoder, store.meta.weights_sha256)
        return store
    if not allow_random:
        # All bags of a store have one encoder's weights, which packing checks: the first speaks for all.
        first = inspect_bag(find_bags(bags, encoder)[0], level, encoder, weights_sha256=weights_sha256)
        _refuse_random(first.path, first.encoder, first.weights_sha256)
    return pack_bags(
        bags,
        level,
        encoder,
        store_dir,
        dtype,
        parent_level=parent_level,
        weights_sha256=weights_sha256,
        progress=progress,
    )


def _refuse_random(where: str, encoder: str, weights_sha256: str) -> None:
    if is_random(encoder, weights_sha256):
        raise RandomFeaturesError(
            f"{where}: features of {encoder} were made with random weights: a model of them would mean nothing",
            remedy="make them with real weights, name another encoder (--encoder), or say --allow-random for a test",
        )


def load_cohort(
    store: FeatureStore,
    labels: Path,
    *,
    by: str = "auto",
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    slide_table: Path | None = None,
    site_column: str | None = None,
    targets: Sequence[str] = (),
    like: Target | None = None,
    renames: Mapping[str, str] | None = None,
    case_from: str | None = None,
    unit: str = "slide",
) -> Cohort:
    """Join a label CSV to a store. Raises LabelError as ``load_labels`` and ``read_sites`` do.

    slide_table: a CSV or workbook that tells which slide is whose, as STAMP's with ``PATIENT`` and ``FILENAME``; it
    goes before the cases that bags state. site_column: that says where cases come from, see ``lrmil.sites.read_sites``.
    targets: what to predict in place of classes, each ``NAME:KIND``; like: the target of a trained model, whose levels
    stand. renames: values of the labels that mean another. case_from: "tcga" takes the patient from the barcode of each
    slide that has one. unit: "case" makes one bag of all slides of a case.
    """
    cases, remarks = cases_of(store, slide_table, case_from)
    reasons = {record.slide_id: record.empty_reason or "no tiles" for record in store.records}
    common: dict[str, Any] = {"lengths": store.lengths, "by": by, "empty_reasons": reasons, "renames": renames}
    # Bags without a case of their own are given their slide's name by the store, so the table may override them.
    table: LabelTable
    if targets:
        table = load_targets(labels, store.slide_ids, cases, parse_targets(targets), like=like, **common)
    else:
        table = load_labels(labels, store.slide_ids, cases, label_column=label_column, classes=classes, **common)
    own_slides: FeatureStore | None = None
    members: list[NDArray[np.int64]] = []
    if unit == "case":
        own_slides = store
        store, members = join_cases(store, table.case_ids)
        table = table_by_case(table, members, store.slide_ids, store.lengths)
        several = sum(len(own) > 1 for own in members)
        remarks = (*remarks, f"{len(members)} cases as one bag each, {several} of them of several slides")
    if isinstance(table, TargetTable):
        remarks = (*remarks, *table.counts())
    sites = read_sites(labels, store.slide_ids, table.case_ids, column=site_column)
    return Cohort(store, table, sites, remarks, unit, own_slides, tuple(members))


def cases_of(
    store: FeatureStore, slide_table: Path | None = None, case_from: str | None = None
) -> tuple[Sequence[str], tuple[str, ...]]:
    """Case of each bag, and what is to be said of it; see ``load_cohort``. Raises LabelError where nothing fits."""
    cases: Sequence[str] = store.case_ids
    remarks: tuple[str, ...] = ()
    if slide_table is not None:
        cases, remarks = cases_by_table(slide_table, store.slide_ids, store.case_ids)
    if case_from is None:
        return cases, remarks
    found = [tcga_case(slide) for slide in store.slide_ids]
    strange = [slide for slide, case in zip(store.slide_ids, found, strict=True) if not case]
    if len(strange) == len(found):
        raise LabelError(
            f"no slide is called by a TCGA barcode, such as {strange[0]}", remedy="leave out --case-from tcga"
        )
    if strange:
        remarks = (*remarks, f"without a TCGA barcode, of the case that their bags state: {', '.join(strange)}")
    return [barcode or own for barcode, own in zip(found, cases, strict=True)], remarks
