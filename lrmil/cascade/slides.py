"""Slides to a cascade's word in one go: all at low resolution, the uncertain ones at high, and there a part of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.cascade.predict import CascadePrediction, CascadePredictor, Cost
from lrmil.errors import ModelMismatchError
from lrmil.predictor import SlidePrediction
from lrmil.predictor.slides import job_settings, load_matching_encoder
from lrmil.store.formats import read_features
from lrmil.subsets import chosen_rows
from wsi_pipe.config import JobSettings, TileSettings
from wsi_pipe.errors import MaskError, WsiPipeError

if TYPE_CHECKING:
    from wsi_pipe.encoders.base import Encoder
    from wsi_pipe.geometry import TileGrid
    from wsi_pipe.job import JobPaths
    from wsi_pipe.manifest import SlideEntry
    from wsi_pipe.outcome import SlideOutcome

__all__ = ["predict_slides"]


def predict_slides(
    cascade: CascadePredictor,
    entries: Sequence[SlideEntry],
    job: Path,
    *,
    encoders: tuple[str, str],
    base: JobSettings | None = None,
    reader: str | None = None,
    progress: Callable[[str, str, int], None] | None = None,
    finished: Callable[[SlideOutcome], object] | None = None,
) -> Iterator[CascadePrediction]:
    """Segment, tile and encode slides at low resolution into ``job``; read the uncertain ones at high resolution.

    Of those only tiles below the low-resolution tiles with most attention are read, within the budget; their features
    are not kept. encoders: of low and high resolution, from ``find_encoder``. base: settings of segmentation, tiling
    and hardware. reader: of slides. progress, finished: as of ``lrmil.predictor.predict_slides``. A slide that fails
    gives a prediction with status "failed" and stops none; one that fails at high resolution alone, too, since the word
    of low resolution is not to be trusted there. Raises ModelMismatchError before the first slide where an encoder is
    not its model's.
    """
    from wsi_pipe.job import open_job
    from wsi_pipe.job.run import process

    settings = job_settings(cascade.low[0].card, encoders[0], base or JobSettings())
    settings = dataclasses.replace(settings, reader=reader or settings.reader)
    fine = job_settings(cascade.high[0].card, encoders[1], settings)
    loaded = load_matching_encoder(cascade.low[0], settings)
    closer = _Closer(cascade, settings, fine, load_matching_encoder(cascade.high[0], fine))
    paths = open_job(job, settings, list(entries))
    by_id = {entry.slide_id: entry for entry in entries}
    for outcome in process(entries, settings, paths, encoders=loaded, progress=progress):
        if finished is not None:
            finished(outcome)
        entry = by_id[outcome.slide_id]
        try:
            yield _one(cascade, closer, entry, outcome, paths)
        except WsiPipeError as error:
            failure = SlidePrediction.failure(outcome.slide_id, error)
            yield CascadePrediction.of(dataclasses.replace(failure, case_id=entry.case_id))


def _one(
    cascade: CascadePredictor, closer: _Closer, entry: SlideEntry, outcome: SlideOutcome, paths: JobPaths
) -> CascadePrediction:
    if outcome.status == "failed":
        failed = SlidePrediction(entry.slide_id, "failed", entry.case_id, reason=outcome.reason, remedy=outcome.remedy)
        return CascadePrediction.of(failed)
    start = time.perf_counter()
    info = cascade.low[0].find(paths.bag(entry.slide_id))
    if not info.rows:
        empty = SlidePrediction(info.slide_id, "empty", info.case_id, reason=info.empty_reason or "no tiles")
        return CascadePrediction.of(empty)
    found, attention = cascade.look(info.slide_id, info.case_id, torch.from_numpy(read_features(info)))
    own = time.perf_counter() - start
    counts = outcome.counts
    low = Cost(
        info.rows,
        info.rows,
        int(counts.get("blocks_decoded", 0)),
        int(counts.get("bytes_fetched", 0) + counts.get("prepare_bytes_fetched", 0)),
        own + sum(outcome.seconds.values()),
    )
    found = dataclasses.replace(found, low=low)
    return found if attention is None else closer.look(entry, found, attention, paths)


@dataclasses.dataclass(frozen=True)
class _Closer:
    """Who looks at a slide at high resolution. low, fine: settings of either resolution alone."""

    cascade: CascadePredictor
    low: JobSettings
    fine: JobSettings
    encoders: Mapping[str, Encoder]

    def look(
        self, entry: SlideEntry, found: CascadePrediction, attention: NDArray[np.float64], paths: JobPaths
    ) -> CascadePrediction:
        start = time.perf_counter()
        grid, parents, laid = self._grid(entry, paths)
        bag_cells = self._cells(paths.bag(entry.slide_id))
        rows = chosen_rows(_by_cell(attention, bag_cells, laid.cells), parents, self.cascade.budget)
        if not len(rows):
            return self.cascade.unread(found, "it has no tile there")
        features, counts = self._features(entry, grid.take(rows))
        settled = self.cascade.settle(found, features, len(grid))
        cost = Cost(
            len(rows),
            len(grid),
            int(counts.get("blocks_decoded", 0)),
            int(counts.get("bytes_fetched", 0)),
            time.perf_counter() - start,
        )
        return dataclasses.replace(settled, high=cost)

    def _grid(self, entry: SlideEntry, paths: JobPaths) -> tuple[TileGrid, NDArray[np.int32], TileGrid]:
        """The fine grid, each tile's row in the coarse one, and the coarse one, on the mask that the job has."""
        from wsi_pipe.job.alone import FoundTissue, lay_grids
        from wsi_pipe.job.masks import stored_mask
        from wsi_pipe.job.opening import open_entry
        from wsi_pipe.manifest import settings_of
        from wsi_pipe.tissue import mask_from_geojson

        tile: TileSettings = dataclasses.replace(
            self.low.tile, resolutions=(*self.low.tile.resolutions, *self.fine.tile.resolutions)
        )
        segment, tile = settings_of(entry, self.low.segment, tile)
        path = paths.tissue(entry.slide_id)
        data, own = stored_mask(path)
        if data is None:
            raise MaskError(f"{path}: the mask is gone", remedy="run it again")
        slide = open_entry(entry, self.low.reader, self.low.cache)
        try:
            scale = own["scale_l0"]
            mask = mask_from_geojson(data, slide.pyramid.size_l0, (float(scale[0]), float(scale[1])))
            grids = lay_grids(entry, slide, FoundTissue(mask, segment, str(own["fingerprint"])), tile).grids
        finally:
            slide.close()
        laid = {grid.label: grid for grid in grids}
        coarse, fine = laid[self.cascade.low[0].card.level], laid[self.cascade.high[0].card.level]
        assert fine.parent is not None
        return fine, fine.parent, coarse

    def _cells(self, bag: Path) -> NDArray[np.int32]:
        from wsi_pipe.bag import read_header
        from wsi_pipe.job.guard import read_guarded

        level = self.cascade.low[0].card.level
        (grid,) = (grid for grid in read_guarded(read_header, bag).grids if grid.label == level)
        return grid.cells

    def _features(self, entry: SlideEntry, grid: TileGrid) -> tuple[torch.Tensor, Mapping[str, float]]:
        from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, extract_features
        from wsi_pipe.job.opening import open_entry

        extract = self.fine.extract
        (name,) = self.encoders

        def opened() -> Any:
            return open_entry(entry, self.fine.reader, self.fine.cache)

        computing = extract_features(
            [ExtractItem(entry.slide_id, opened, [grid], {grid.label: (name,)})],
            self.encoders,
            batch_size=extract.batch_size,
            read_threads=extract.read_threads,
            memory_bytes=extract.memory_mib << 20,
            dtype=extract.dtype,
        )
        with closing(computing):
            results = list(computing)
        for result in results:
            if isinstance(result, SlideFailure):
                raise result.error
        (computed,) = (result for result in results if isinstance(result, SlideFeatures))
        (values,) = computed.features[grid.label].values()
        return torch.from_numpy(np.asarray(values)), computed.counts


def _by_cell(
    attention: NDArray[np.float64], cells: NDArray[np.int32], wanted: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Attention of tiles in the order of ``wanted`` cells; 0 for cells that the bag lacks.

    Raises ModelMismatchError where no cell is in both.
    """
    place = {cell: i for i, cell in enumerate(map(tuple, cells.tolist()))}
    rows = [place.get(cell, -1) for cell in map(tuple, wanted.tolist())]
    if max(rows, default=-1) < 0:
        raise ModelMismatchError("the grids of both resolutions do not lie above each other", remedy="run it again")
    return np.array([attention[row] if row >= 0 else 0.0 for row in rows])
