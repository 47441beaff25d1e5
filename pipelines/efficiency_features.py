"""Features and tiles of a cohort: bags of the teacher, tiles in memory, and the distilled features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.distill import DistillRequest, run_distillation
from lrmil.experiment.baselines import random_rows
from lrmil.experiment.cohort import open_features
from lrmil.leaks import Judged, check_encoder
from lrmil.store import FeatureStore, StoreMeta
from pipelines.efficiency_settings import EfficiencySettings
from wsi_pipe.bag import read_attrs, read_grids
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import JobError
from wsi_pipe.execute import Where
from wsi_pipe.job import open_job, utc_now
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.job.lock import hold_job
from wsi_pipe.manifest import read_manifest
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

__all__ = [
    "CohortFeatures",
    "distil",
    "distilled_store",
    "extract",
    "lr_tiles",
    "other_tiles",
    "teacher_store",
    "thinned",
]


@dataclass(frozen=True)
class CohortFeatures:
    """Stores of a cohort, all with the same slides in the same order.

    hr: the teacher's features, with parents in the LR grid. lr: by side of the tiles. distilled: of the student, whose
    file is ``student``. tiles: uint8 (N, S, S, 3) of each slide's LR grid.
    """

    hr: FeatureStore
    lr: Mapping[int, FeatureStore]
    distilled: FeatureStore
    student: Path
    tiles: Sequence[NDArray[np.uint8]]

    def __post_init__(self) -> None:
        ids = self.hr.slide_ids
        for store in (*self.lr.values(), self.distilled):
            if store.slide_ids != ids:
                raise JobError("the stores of a cohort hold different slides")
        if any((store.lengths < 1).any() for store in (self.hr, *self.lr.values(), self.distilled)):
            raise JobError("a slide of the cohort has no tiles", remedy="give a larger size_px or tissue_fraction")


def extract(settings: EfficiencySettings, slides: Path, out: Path, teacher: Encoder) -> Path:
    """Bags of the teacher at both levels, made by a job of ``wsi-pipe run``; their folder."""
    entries = read_manifest(slides)
    job = JobSettings(
        tile=TileSettings(resolutions=(settings.hr_mpp, settings.lr_mpp), tile_px=settings.tile_px),
        extract=ExtractSettings(encoders={"*": (settings.teacher,)}, precision="float32"),
    )
    paths = open_job(out, job, entries)
    with hold_job(out, {"started_utc": utc_now(), "until": "extract"}):
        results = dispatch(entries, job, paths, Where(), encoders={settings.teacher: teacher})
        failed = [outcome for outcome in results if outcome.status == "failed"]
    if failed:
        raise JobError(f"{len(failed)} slides failed, first {failed[0].slide_id}: {failed[0].reason}")
    return out / "bags"


def other_tiles(
    settings: EfficiencySettings, bags: Path, like: FeatureStore, side: int, teacher: Encoder
) -> FeatureStore:
    """The teacher's features on LR tiles of another side, on the same tissue by the same rules as a job's."""
    wanted = TileSettings(resolutions=(settings.lr_mpp,), tile_px=side)
    arrays = []
    for slide_id in like.slide_ids:
        attrs = read_attrs(bags / f"{slide_id}.h5")
        slide = open_slide(attrs.slide_path, mpp=attrs.mpp_l0)
        try:
            overview = read_overview(slide, threads=1)
            mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0)
            (grid,) = plan_grids(slide.pyramid, mask, wanted)
            tiles = np.empty((len(grid), side, side, 3), np.uint8)
            for batch in stream_tiles(slide, grid, threads=1):
                tiles[batch.index] = batch.pixels
        finally:
            slide.close()
        arrays.append(np.asarray(teacher.encode(tiles), np.float32))
    meta = StoreMeta(like.meta.encoder, like.meta.weights_sha256, like.meta.level, like.meta.mpp, side)
    return FeatureStore.from_arrays(arrays, like.slide_ids, case_ids=like.case_ids, meta=meta)


def teacher_store(settings: EfficiencySettings, bags: Path, level: str, folder: Path) -> FeatureStore:
    """The teacher's features at a level."""
    return open_features(
        bags,
        level=level,
        encoder=settings.teacher,
        store_dir=folder,
        parent_level=settings.lr if level == settings.hr else None,
    )


def lr_tiles(settings: EfficiencySettings, bags: Path, slide_ids: Sequence[str]) -> list[NDArray[np.uint8]]:
    """The LR tiles of each slide, in the order of its bag."""
    found = []
    for slide_id in slide_ids:
        bag = bags / f"{slide_id}.h5"
        attrs = read_attrs(bag)
        grid = next(grid for grid in read_grids(bag) if grid.label == settings.lr)
        out = np.empty((len(grid), settings.tile_px, settings.tile_px, 3), np.uint8)
        slide = open_slide(attrs.slide_path, mpp=attrs.mpp_l0)
        try:
            for batch in stream_tiles(slide, grid, threads=1):
                out[batch.index] = batch.pixels
        finally:
            slide.close()
        found.append(out)
    return found


def distil(
    settings: EfficiencySettings, bags: Path, cases: Sequence[str], out: Path, say: Callable[[str], object]
) -> Path:
    """The student distilled on the slides of ``cases``, whose labels it does not see; kept where it is there."""
    if not out.is_file():
        request = DistillRequest(
            bags=bags,
            teacher=settings.teacher,
            student=settings.student,
            lr=settings.lr,
            hr=settings.hr,
            out=out,
            only_cases=tuple(cases),
            settings=settings.distill,
            random_student=True,
        )
        run_distillation(request, say)
    return out


def distilled_store(
    encoder: Encoder,
    tiles: Sequence[NDArray[np.uint8]],
    like: FeatureStore,
    test: Sequence[str],
) -> FeatureStore:
    """Features of the student on all slides of ``like``.

    Raises LeakageError when the student's own file says that it saw a case of ``test``.
    """
    held = [i for i, case in enumerate(like.case_ids) if case in set(test)]
    marks = [like.records[i].slide_fingerprint for i in held]
    cases = [like.case_ids[i] for i in held]
    saw = tuple(encoder.info.seen.part_of(case, mark) for case, mark in zip(cases, marks, strict=True))
    check_encoder(encoder.info.name, Judged(tuple(like.slide_ids[i] for i in held), tuple(cases), tuple(marks), saw))
    arrays = [np.asarray(encoder.encode(part), np.float32) for part in tiles]
    meta = StoreMeta(encoder.info.name, encoder.info.weights_sha256, like.meta.level, like.meta.mpp, like.meta.tile_px)
    return FeatureStore.from_arrays(arrays, like.slide_ids, case_ids=like.case_ids, meta=meta)


def thinned(hr: FeatureStore, budget: NDArray[np.int64], seed: int) -> FeatureStore:
    """As many random HR tiles of each slide as ``budget`` says: as many as LR has."""
    chosen = random_rows(hr.lengths.tolist(), budget.tolist(), seed)
    arrays = [np.asarray(hr.bag(i)[rows], np.float32) for i, rows in enumerate(chosen)]
    return FeatureStore.from_arrays(arrays, hr.slide_ids, case_ids=hr.case_ids, meta=hr.meta)
