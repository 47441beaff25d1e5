"""Bags' tiles joined to labels: which slides there are, where their tiles lie, and whom the encoder has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import BagMismatchError
from lrmil.experiment.cohort import Cohort
from lrmil.finetuning.tiles import TileSlide
from lrmil.splits import FoldIndices, SplitTable
from lrmil.store import BagRecord, FeatureStore, StoreMeta, check_readable, find_bags
from wsi_pipe.bag import read_attrs, read_grids
from wsi_pipe.encoders.base import EncoderInfo, check_grid
from wsi_pipe.errors import BagError
from wsi_pipe.geometry import TileGrid
from wsi_pipe.ids import joined
from wsi_pipe.job.private import hidden_slides
from wsi_pipe.manifest import read_manifest

__all__ = ["FoldTiles", "TileBags", "cohort_notes", "fold_tiles", "open_tiles", "places_of", "seen_by"]


@dataclass(frozen=True)
class TileBags:
    """The tiles of bags at one level.

    store: the bags as a store without features, rows standing for tiles; its meta names level and tile size. slides:
    where the tiles lie, in the store's order. grid: of one slide, for the size of its tiles.
    """

    store: FeatureStore
    slides: tuple[TileSlide, ...]
    grid: TileGrid


def open_tiles(
    bags: Path | Sequence[Path], level: str | None, slides: Mapping[str, str], info: EncoderInfo
) -> TileBags:
    """Grids of bags at a level, by default the encoder's own, else the bags' primary one.

    slides: slide id -> file, where a bag's own path no longer holds. info: of the encoder that is to see the tiles.
    Raises StoreError where there are no bags or HDF5 loops or crashes on one, BagError for a bag without the level,
    BagMismatchError where bags differ in tile size, ResolutionError where the encoder was made for other tiles.
    """
    paths = [path for path in find_bags(bags) if path.suffix in (".h5", ".hdf5")]
    if not paths:
        raise BagMismatchError("no bag says where its tiles lie", remedy="give JOB/bags of wsi-pipe run")
    records, found, lengths = [], [], []
    coords: list[NDArray[np.float64]] = []
    first: tuple[Path, TileGrid] | None = None
    attrs = {}
    for path in paths:
        check_readable(path)
        attrs[path] = read_attrs(path)
    places = joined(slides, [own.slide_id for own in attrs.values()])
    for path, own in attrs.items():
        grid = _grid(path, level or _level_of(info, path) or own.primary_level)
        check_grid(info, grid)
        first = first or (path, grid)
        if (grid.label, grid.spec.size_px) != (first[1].label, first[1].spec.size_px):
            raise BagMismatchError(
                f"{path}: tiles of {grid.spec.size_px} px at {grid.label}, but {first[0]} has tiles of "
                f"{first[1].spec.size_px} px at {first[1].label}",
                remedy="use bags of one resolution and tile size: -r",
            )
        where = places.get(own.slide_id, own.slide_path)
        found.append(TileSlide(own.slide_id, where, own.mpp_l0, grid, own.scene, own.z))
        lengths.append(len(grid))
        coords.append(np.asarray(grid.coords, np.float64))
        records.append(
            BagRecord(
                own.slide_id,
                own.case_id,
                str(path),
                "wsi-pipe",
                own.fingerprint_tile,
                (float(grid.tile_size_l0[0]), float(grid.tile_size_l0[1])),
                empty_reason=own.empty_reason or (None if len(grid) else "no tiles"),
                slide_fingerprint=own.slide_fingerprint,
            )
        )
    assert first is not None
    spec = first[1].spec
    meta = StoreMeta(info.name, info.weights_sha256, first[1].label, spec.mpp, spec.size_px)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    nothing = np.zeros((int(offsets[-1]), 0), np.float32)
    store = FeatureStore(
        nothing, offsets, records, dtype="float32", meta=meta, coords=np.concatenate(coords).reshape(-1, 2)
    )
    return TileBags(store, tuple(found), first[1])


def places_of(bags: Path | Sequence[Path], slides: Path | None) -> tuple[dict[str, str], list[str]]:
    """Slide id -> file by a slide list, by default the job's own where ``bags`` are a job's; and notes on the list.

    Raises ManifestError for a list that cannot be read.
    """
    notes: list[str] = []
    if slides is not None:
        entries = read_manifest(slides, notes=notes)
    elif isinstance(bags, Path) and bags.is_dir():
        entries = [entry for folder in (bags, bags.parent) for entry in hidden_slides(folder)]
    else:
        entries = []
    return {entry.slide_id: entry.path for entry in entries}, notes


def _grid(path: Path, label: str) -> TileGrid:
    grids = {grid.label: grid for grid in read_grids(path)}
    if label not in grids:
        raise BagError(f"{path}: has no level {label}", remedy=f"its levels are {', '.join(grids)}: choose with -r")
    return grids[label]


def _level_of(info: EncoderInfo, path: Path) -> str | None:
    """The level that the encoder was made for, where the bag has it."""
    if not info.mpp_required or info.mpp is None:
        return None
    near = [grid for grid in read_grids(path) if abs(grid.spec.mpp - info.mpp) <= 0.025 * info.mpp]
    return near[0].label if near else None


def seen_by(info: EncoderInfo, cohort: Cohort) -> Cohort:
    """The cohort with what the encoder's file says of having seen its slides, by the cases that the labels give."""
    records = [
        dataclasses.replace(record, encoder_saw=info.seen.part_of(case, record.slide_fingerprint))
        for record, case in zip(cohort.store.records, cohort.table.case_ids, strict=True)
    ]
    store = cohort.store
    again = FeatureStore(store.flat, store.offsets, records, dtype=store.dtype, meta=store.meta, coords=store.coords)
    return dataclasses.replace(cohort, store=again)


def cohort_notes(cohort: Cohort, splits: SplitTable, *, learned: bool) -> list[str]:
    """As ``Cohort.notes``. learned: slides without a label are learned from, so that they are not left out."""
    if not learned:
        return cohort.notes(splits)
    unlabelled = f"left out: {len(cohort.table.unlabelled)} without a label"
    return [note for note in cohort.notes(splits) if not note.startswith(unlabelled)]


@dataclass(frozen=True)
class FoldTiles:
    """Slides of one fold. split: labelled ones, with tiles. hidden: slides without a label that may be learned from."""

    split: FoldIndices
    hidden: NDArray[np.int64]


def fold_tiles(cohort: Cohort, splits: SplitTable, name: str, *, unlabelled: bool) -> FoldTiles:
    """A fold's slides. unlabelled: take those without a label too: of the training part, and those that the splits do
    not name, unless their case or file stands in the validation or test part.

    Raises SplitError or LeakageError as SplitTable does.
    """
    split = cohort.fold(splits, name)
    nobody = np.zeros(0, np.int64)
    if not unlabelled:
        return FoldTiles(split, nobody)
    store, cases = cohort.store, cohort.table.case_ids
    parts = splits.indices(name, store.slide_ids, cases)
    held = [*parts.val.tolist(), *parts.test.tolist()]
    held_cases = {cases[i] for i in held}
    held_files = {store.records[i].slide_fingerprint for i in held} - {""}
    unnamed = set(splits.unassigned(store.slide_ids, cases))
    train = set(parts.train.tolist())
    hidden = [
        i
        for i, (slide, record) in enumerate(zip(store.slide_ids, store.records, strict=True))
        if cohort.table.labels[i] < 0
        and store.lengths[i] > 0
        and (i in train or slide in unnamed)
        and cases[i] not in held_cases
        and record.slide_fingerprint not in held_files
    ]
    return FoldTiles(split, np.array(hidden, np.int64))
