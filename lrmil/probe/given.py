"""Features and labels of a probe: a vector a slide, or tiles that annotations name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.data import LabelTable
from lrmil.errors import LabelError, StoreError
from lrmil.experiment.cohort import load_cohort, open_features
from lrmil.leaks import Judged
from lrmil.store import BagRecord, FeatureStore, StoreMeta
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, read
from wsi_pipe.bag import read_level, read_slide_vectors
from wsi_pipe.errors import BagError
from wsi_pipe.interop.export import bags_of, choose_features

__all__ = ["OTHER", "Samples", "slide_samples", "tile_samples"]

OTHER = "other"
"""The class of tiles that no annotation covers."""


@dataclass(frozen=True)
class Samples:
    """What is classified: slides, or tiles.

    features: float32 (n, D). labels: int64 (n,), into ``classes``. slide_ids, case_ids: of each. judged: of each slide,
    for the question whether the encoder has seen it. notes: what is left out.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    encoder: str
    judged: Judged
    notes: tuple[str, ...] = ()

    def case_labels(self) -> dict[str, str]:
        """Class of each case, that of most of its samples; of equals the first by name."""
        counts: dict[str, NDArray[np.int64]] = {}
        for case, label in zip(self.case_ids, self.labels.tolist(), strict=True):
            counts.setdefault(case, np.zeros(len(self.classes), np.int64))[label] += 1
        return {case: self.classes[int(found.argmax())] for case, found in counts.items()}


def slide_samples(
    bags: Path,
    labels: Path,
    store_dir: Path,
    *,
    level: str | None = None,
    encoder: str | None = None,
    slide_encoder: str | None = None,
    table: Path | None = None,
    spread: bool = False,
    by: str = "auto",
    label_column: str | None = None,
    slide_table: Path | None = None,
    allow_random: bool = False,
) -> Samples:
    """A vector a slide, with its label.

    One of: ``slide_encoder``, the name of vectors that ``wsi-pipe pool`` put into the bags; ``table``, a CSV of them
    with ``slide_id``, ``case_id`` and a column a number; else the mean of the tiles' features, with ``spread`` their
    standard deviation too, from any bags that training reads. store_dir: where those are packed.

    Raises StoreError for vectors that are not there or differ in width, LabelError as ``load_labels`` does.
    """
    if table is not None:
        store = _table_store(table)
    elif slide_encoder is not None:
        store = _vector_store(bags, slide_encoder)
    else:
        packed = open_features(bags, level=level, encoder=encoder, store_dir=store_dir, allow_random=allow_random)
        store = _means(packed, spread)
    cohort = load_cohort(store, labels, by=by, label_column=label_column, slide_table=slide_table)
    return _of_cohort(store, cohort.table, cohort.notes())


def _of_cohort(store: FeatureStore, table: LabelTable, notes: Sequence[str]) -> Samples:
    rows = table.usable.tolist()
    records = [store.records[i] for i in rows]
    cases = tuple(table.case_ids[i] for i in rows)
    return Samples(
        np.stack([np.asarray(store.bag(i)[0], np.float32) for i in rows]),
        table.labels[table.usable],
        table.classes,
        tuple(record.slide_id for record in records),
        cases,
        store.meta.encoder,
        _judged(records, cases),
        tuple(notes),
    )


def _judged(records: Sequence[BagRecord], cases: Sequence[str]) -> Judged:
    return Judged(
        tuple(record.slide_id for record in records),
        tuple(cases),
        tuple(record.slide_fingerprint for record in records),
        tuple(record.encoder_saw for record in records),
    )


def _store(vectors: Sequence[NDArray[np.float32]], records: Sequence[BagRecord], encoder: str) -> FeatureStore:
    """A store of one row a bag; bags of no row stay without."""
    widths = {vector.shape[-1] for vector in vectors}
    if len(widths) != 1:
        raise StoreError(f"vectors differ in width: {sorted(widths)}", remedy="make them with one slide encoder")
    rows = [np.atleast_2d(vector) for vector in vectors]
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in rows])]).astype(np.int64)
    flat = np.concatenate(rows).astype(np.float32)
    return FeatureStore(flat, offsets, records, dtype="float32", meta=StoreMeta(encoder=encoder))


def _means(store: FeatureStore, spread: bool) -> FeatureStore:
    vectors = []
    for place in range(len(store)):
        tiles = np.asarray(store.bag(place), np.float64)
        if not len(tiles):
            vectors.append(np.zeros((0, store.dim * (2 if spread else 1)), np.float32))
            continue
        parts = [tiles.mean(axis=0), *([tiles.std(axis=0)] if spread else [])]
        vectors.append(np.concatenate(parts).astype(np.float32)[None])
    return _store(vectors, store.records, store.meta.encoder)


def _vector_store(root: Path, name: str) -> FeatureStore:
    vectors, records = [], []
    makers: set[tuple[str, str, str]] = set()
    known: set[str] = set()
    for slide_id, path in bags_of(root)[0].items():
        held = read_slide_vectors(path)
        known |= set(held)
        if name not in held:
            continue
        vector = held[name]
        makers.add((vector.slide_encoder, vector.level, vector.encoder))
        attrs = _attrs(path)
        vectors.append(vector.values[None])
        records.append(
            BagRecord(slide_id, attrs[0] or None, str(path), slide_fingerprint=attrs[1], encoder_saw=vector.encoder_saw)
        )
    if not vectors:
        raise StoreError(
            f"{root}: no bag holds a vector called {name!r}",
            remedy=f"make them with wsi-pipe pool; what there is: {', '.join(sorted(known)) or 'none'}",
        )
    if len(makers) > 1:
        raise StoreError(
            f"{root}: vectors called {name!r} were made in different ways: {'; '.join(map(', '.join, sorted(makers)))}",
            remedy="make them again with wsi-pipe pool",
        )
    return _store(vectors, records, f"{name} of {next(iter(makers))[2]}")


def _attrs(path: Path) -> tuple[str, str]:
    from wsi_pipe.bag import read_attrs

    attrs = read_attrs(path)
    return attrs.case_id, attrs.slide_fingerprint


def _table_store(path: Path) -> FeatureStore:
    table = read(path, "table of vectors", LabelError, "f0")
    slide, case = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    if slide is None:
        raise LabelError(f"{path} has no column slide_id", remedy=f"its columns are {', '.join(table.columns)}")
    numbers = [place for place in range(len(table.columns)) if place not in (slide, case)]
    vectors, records = [], []
    for row, cells in table.rows:
        try:
            vector = np.array([float(cells[place]) for place in numbers], np.float32)
        except ValueError as error:
            raise LabelError(
                f"{table.where(row)}: {error}", remedy="give numbers beside slide_id and case_id"
            ) from error
        if not (len(vector) and np.isfinite(vector).all()):
            raise LabelError(f"{table.where(row)}: holds no numbers, or NaN", remedy="give a number in each column")
        vectors.append(vector[None])
        records.append(BagRecord(cells[slide], cells[case] if case is not None else None, str(path)))
    if not vectors:
        raise LabelError(f"{path} has no rows")
    return _store(vectors, records, path.stem)


def tile_samples(
    root: Path,
    *,
    level: str | None = None,
    encoder: str | None = None,
    least: float = 0.5,
    most: int = 200,
    seed: int = 0,
    allow_random: bool = False,
) -> Samples:
    """Tiles of this project's bags, by the class of annotation that covers most of each.

    A tile has a class where at least ``least`` of it is covered, ``OTHER`` where nothing of it is, and is left out in
    between. most: of each class of each slide, drawn by the seed.

    Raises ConfigError where the choice of features is not clear, LabelError where fewer than two classes are left.
    """
    chosen = choose_features(root, level, encoder, allow_random=allow_random)
    rng = np.random.default_rng(seed)
    found: list[tuple[NDArray[np.float32], str, str, str]] = []
    records, cases, notes = [], [], [f"{slide}: left out, {why}" for slide, why in chosen.absent.items()]
    for slide_id, path in chosen.bags.items():
        try:
            view = read_level(path, chosen.level, chosen.slug)
        except BagError as error:
            notes.append(f"{slide_id}: left out, {error.message}")
            continue
        if not view.annotation:
            notes.append(f"{slide_id}: left out, its bag has no annotations")
            continue
        case = view.attrs.case_id or slide_id
        records.append(
            BagRecord(slide_id, case, str(path), slide_fingerprint=view.attrs.slide_fingerprint,
                      encoder_saw=view.encoder_saw)
        )  # fmt: skip
        cases.append(case)
        names = sorted(view.annotation)
        covers = np.stack([view.annotation[name] for name in names], axis=1)
        top = covers.argmax(axis=1)
        groups = {name: np.flatnonzero((top == k) & (covers[:, k] >= least)) for k, name in enumerate(names)}
        groups[OTHER] = np.flatnonzero(covers.max(axis=1) == 0)
        for name, rows in groups.items():
            kept = np.sort(rng.permutation(rows)[:most])
            found += [(np.asarray(view.features[row], np.float32), name, slide_id, case) for row in kept.tolist()]
    classes = tuple(sorted({item[1] for item in found}))
    if len(classes) < 2:
        raise LabelError(
            f"{root}: the annotations name tiles of {len(classes)} classes, and a probe needs two",
            remedy="run wsi-pipe with --annotations, or give labels of slides (--labels)",
        )
    return Samples(
        np.stack([item[0] for item in found]),
        np.array([classes.index(item[1]) for item in found], np.int64),
        classes,
        tuple(item[2] for item in found),
        tuple(item[3] for item in found),
        chosen.encoder,
        _judged(records, cases),
        tuple(notes),
    )
