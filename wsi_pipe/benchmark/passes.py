"""One pass of one arm over one slide: stage after stage, or end to end as ``wsi-pipe run`` works."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe import __version__
from wsi_pipe.bag import Bag, BagAttrs, BagLevel, Features, write_bag
from wsi_pipe.benchmark.meters import (
    Gpu,
    Meter,
    PeakMemory,
    available_cores,
    drop_cache,
    give_back_memory,
    io_read_bytes,
)
from wsi_pipe.benchmark.peer import read_singly
from wsi_pipe.benchmark.records import END_TO_END, STAGED, ArchivePass, Arm, Measurement, SlideFacts, Spent
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import Encoder, LayeredEncoder, LayerFeatures
from wsi_pipe.errors import ConfigError, in_words
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job import open_job
from wsi_pipe.job.given import given_mask
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.run import process
from wsi_pipe.manifest import SlideEntry, is_url, settings_of
from wsi_pipe.overview import read_overview
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import StreamStats, stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

__all__ = ["Passes", "now_utc"]

CHUNK_BYTES = 768 << 20
"""Tiles that are read before they are encoded, in the passes that take one stage after the other."""


def now_utc() -> str:
    """The time now, ISO 8601 in UTC to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class _Stages:
    """Seconds by stage of one pass; a stage that comes again adds up."""

    spent: dict[str, Spent] = field(default_factory=dict)

    def add(self, stage: str, more: Spent) -> None:
        before = self.spent.get(stage, Spent(0.0, 0.0))
        self.spent[stage] = Spent(before.wall_s + more.wall_s, before.cpu_s + more.cpu_s)


class Passes:
    """What all passes share."""

    def __init__(
        self, settings: JobSettings, encoders: Mapping[str, Encoder], gpu: Gpu, cache: str, scratch: Path
    ) -> None:
        self.settings, self.encoders, self.gpu, self.cache, self.scratch = settings, encoders, gpu, cache, scratch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="benchmark-encode")

    def survey(
        self, entries: Sequence[SlideEntry], arms: Sequence[Arm]
    ) -> tuple[list[SlideFacts], dict[str, str], list[SlideEntry]]:
        """Look at every slide, and run each encoder once so that nothing is paid for in the first pass."""
        facts: list[SlideFacts] = []
        skipped: dict[str, str] = {}
        usable: list[SlideEntry] = []
        for entry in entries:
            try:
                for arm in arms:
                    with closing(open_entry(entry, arm.reader)) as slide:
                        grid, tissue_mm2 = self._grid(slide, entry, arm, _Stages())
                        if not len(grid):
                            raise ConfigError(f"no tile at {arm.label}: nothing to measure")
                        if arm is arms[0]:
                            facts.append(_facts(slide, entry, tissue_mm2))
                    if not usable:
                        self._warm_up(entry, arm, grid)
            except Exception as error:
                # As in a run, an error that nobody foresaw is its slide's own.
                skipped[entry.slide_id] = in_words(error)[0]
                facts = [fact for fact in facts if fact.slide_id != entry.slide_id]
                continue
            usable.append(entry)
            if self.cache == "warm" and not is_url(entry.path):
                _read_through(Path(entry.path))
        if not usable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            raise ConfigError(f"no slide can be measured ({reasons})", remedy="give slides with tissue")
        return facts, skipped, usable

    def _warm_up(self, entry: SlideEntry, arm: Arm, grid: TileGrid) -> None:
        few = _part(grid, slice(0, arm.batch_size))
        with closing(open_entry(entry, arm.reader)) as slide:
            for tiles in self._batches(slide, few, arm, StreamStats()):
                self._worker.submit(self._encode_all, [tiles], self.encoders[arm.encoder]).result()

    def _before(self, entry: SlideEntry) -> None:
        if self.cache == "cold" and not is_url(entry.path):
            drop_cache(Path(entry.path))

    def _settings(self, arm: Arm) -> JobSettings:
        tile = dataclasses.replace(self.settings.tile, resolutions=(arm.mpp,))
        extract = dataclasses.replace(self.settings.extract, encoders={"*": (arm.encoder,)})
        return dataclasses.replace(self.settings, tile=tile, extract=extract, reader=arm.reader)

    def _grid(self, slide: Slide, entry: SlideEntry, arm: Arm, stages: _Stages) -> tuple[TileGrid, float]:
        """The arm's grid, and tissue in mm2; segmentation and planning are added to ``stages``."""
        own = self._settings(arm)
        segment, tile = settings_of(entry, own.segment, own.tile)
        meter = Meter()
        overview = read_overview(slide, segment.mpp)
        given = given_mask(entry, slide, segment)
        if given is not None:
            mask = given.mask
        else:
            mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, segment)
        stages.add("segment", meter.spent())
        meter = Meter()
        grid = plan_grids(slide.pyramid, mask, tile)[0]
        stages.add("plan", meter.spent())
        mpp = slide.pyramid.isotropic_mpp
        return grid, mask.area_um2(mpp) / 1e6 if mpp else 0.0

    def _batches(self, slide: Slide, grid: TileGrid, arm: Arm, stats: StreamStats) -> Iterator[NDArray[np.uint8]]:
        threads = self.settings.extract.read_threads or available_cores()
        if arm.method == "openslide":
            yield from read_singly(slide, grid, arm.batch_size, threads)
            return
        # The engine gives half its budget to the reader; so does this.
        memory = (self.settings.extract.memory_mib << 20) // 2
        for batch in stream_tiles(
            slide, grid, batch_size=arm.batch_size, threads=threads, memory_bytes=memory, stats=stats
        ):
            yield batch.pixels

    def staged(self, entry: SlideEntry, arm: Arm) -> Measurement:
        """One stage after the other. Tiles are read by the chunk, then encoded, so that neither disturbs the other."""
        self._before(entry)
        stages, stats, io = _Stages(), StreamStats(), io_read_bytes()
        whole = Meter()
        with self.gpu.watch() as gpu:
            meter = Meter()
            slide = open_entry(entry, arm.reader)
            stages.add("open", meter.spent())
            try:
                opened = slide.stats.bytes_fetched
                grid, _ = self._grid(slide, entry, arm, stages)
                blocks, overview = slide.stats.blocks_decoded, slide.stats.bytes_fetched - opened
                features = []
                per_chunk = max(CHUNK_BYTES // (3 * arm.size_px**2) // arm.batch_size, 1) * arm.batch_size
                for first in range(0, len(grid), per_chunk):
                    chunk = _part(grid, slice(first, first + per_chunk))
                    features += self._encode(self._read(slide, chunk, arm, stats, stages), arm, stages)
                blocks, fetched = slide.stats.blocks_decoded - blocks, slide.stats.bytes_fetched - opened
                bag = self._bag(slide, entry, arm, grid, np.concatenate(features))
                path = self.scratch / "staged" / f"{entry.slide_id}.h5"
                meter = Meter()
                write_bag(path, bag)
                stages.add("write", meter.spent())
            finally:
                slide.close()
        spent = whole.spent()
        written = path.stat().st_size
        path.unlink()
        return Measurement(
            slide=entry.slide_id,
            arm=arm.id,
            repeat=0,
            order=0,
            kind=STAGED,
            wall_s=spent.wall_s,
            cpu_s=spent.cpu_s,
            stages=stages.spent,
            tiles=len(grid),
            native_tiles=blocks,
            bytes_read=fetched,
            bytes_written=written,
            io_read_bytes=_since(io),
            gpu=gpu[0] if gpu else None,
            overview_bytes_read=overview,
        )

    def _read(
        self, slide: Slide, grid: TileGrid, arm: Arm, stats: StreamStats, stages: _Stages
    ) -> list[NDArray[np.uint8]]:
        before = _thread_seconds(stats)
        meter = Meter()
        batches = list(self._batches(slide, grid, arm, stats))
        spent = meter.spent()
        if arm.method == "openslide":
            stages.add("read", spent)
            return batches
        for stage, part in _divide(spent, before, _thread_seconds(stats)).items():
            stages.add(stage, part)
        return batches

    def _encode(self, batches: list[NDArray[np.uint8]], arm: Arm, stages: _Stages) -> list[NDArray[np.float32]]:
        transfer = self._transfer(batches, arm)
        meter = Meter()
        # As in the engine, not in the main thread: OpenMP gives that one a team that waits by spinning, which on a
        # machine with other work costs several times the processor time.
        features = self._worker.submit(self._encode_all, batches, self.encoders[arm.encoder]).result()
        spent = meter.spent()
        if transfer is not None:
            stages.add("transfer", transfer)
        stages.add("encode", spent)
        return features

    def _encode_all(self, batches: list[NDArray[np.uint8]], encoder: Encoder) -> list[NDArray[np.float32]]:
        """Features of batches, with as many under way at once as the encoder likes."""
        ahead = max(int(getattr(encoder, "in_flight", 1)), 1)
        pending: deque[Any] = deque()
        features: list[Any] = []
        for tiles in batches:
            pending.append(self._submit(encoder, tiles))
            while len(pending) >= ahead:
                features.append(pending.popleft().result())
        features += [p.result() for p in pending]
        self.gpu.wait()
        return [f.features if isinstance(f, LayerFeatures) else f for f in features]

    def _submit(self, encoder: Encoder, tiles: NDArray[np.uint8]) -> Any:
        layers = self.settings.extract.layers
        if not layers:
            return encoder.submit(tiles)
        if not isinstance(encoder, LayeredEncoder):
            raise ConfigError(f"encoder {encoder.info.name} has no blocks to take layers from")
        return encoder.submit_layers(tiles, layers)

    def _transfer(self, batches: list[NDArray[np.uint8]], arm: Arm) -> Spent | None:
        """Copying the same tiles to the device and doing nothing with them; None where there is no device."""
        if not arm.device.startswith("cuda"):
            return None
        import torch

        meter = Meter()
        devices = arm.device.split(",")
        for i, tiles in enumerate(batches):
            torch.from_numpy(tiles).pin_memory().to(devices[i % len(devices)], non_blocking=True)
        self.gpu.wait()
        return meter.spent()

    def end_to_end(self, entry: SlideEntry, arm: Arm) -> Measurement:
        """The slide through ``process``, from nothing to its bag, in a job of its own."""
        self._before(entry)
        settings = self._settings(arm)
        root = self.scratch / "job"
        # What a pass that failed has left belongs to other settings.
        shutil.rmtree(root, ignore_errors=True)
        paths = open_job(root, settings, [entry])
        give_back_memory()
        io, peak = io_read_bytes(), PeakMemory()
        with self.gpu.watch() as gpu:
            meter = Meter()
            outcome = next(iter(process([entry], settings, paths, encoders={arm.encoder: self.encoders[arm.encoder]})))
            spent = meter.spent()
        memory = peak.bytes()
        if outcome.status != "done":
            raise ConfigError(f"{entry.path}: {outcome.reason}", remedy=outcome.remedy)
        written = paths.bag(entry.slide_id).stat().st_size
        shutil.rmtree(root)
        return Measurement(
            slide=entry.slide_id,
            arm=arm.id,
            repeat=0,
            order=0,
            kind=END_TO_END,
            wall_s=spent.wall_s,
            cpu_s=spent.cpu_s,
            stages={stage: Spent(float(value), 0.0) for stage, value in outcome.seconds.items()},
            tiles=int(outcome.tiles[arm.label]),
            native_tiles=int(outcome.counts.get("blocks_decoded", 0)),
            bytes_read=sum(int(outcome.counts.get(key, 0)) for key in ("prepare_bytes_fetched", "bytes_fetched")),
            bytes_written=written,
            io_read_bytes=_since(io),
            peak_memory_bytes=memory,
            gpu=gpu[0] if gpu else None,
            peak_memory_growth_bytes=max(memory - peak.start_bytes, 0),
        )

    def archive(self, entries: Sequence[SlideEntry], arm: Arm) -> ArchivePass | None:
        """All slides through ``process`` in one job, from nothing to their bags; None where one of them fails."""
        for entry in entries:
            self._before(entry)
        settings = self._settings(arm)
        root = self.scratch / "archive"
        shutil.rmtree(root, ignore_errors=True)
        paths = open_job(root, settings, list(entries))
        give_back_memory()
        with self.gpu.watch() as gpu:
            meter = Meter()
            outcomes = list(process(entries, settings, paths, encoders={arm.encoder: self.encoders[arm.encoder]}))
            spent = meter.spent()
        shutil.rmtree(root)
        if any(outcome.status != "done" for outcome in outcomes):
            return None
        tiles = sum(int(outcome.tiles[arm.label]) for outcome in outcomes)
        return ArchivePass(arm.id, 0, spent.wall_s, spent.cpu_s, len(outcomes), tiles, gpu[0] if gpu else None)

    def _bag(self, slide: Slide, entry: SlideEntry, arm: Arm, grid: TileGrid, values: NDArray[np.float32]) -> Bag:
        """The bag that ``run`` would write, with nothing in the fields that say where it comes from."""
        info, encoder = slide.info, self.encoders[arm.encoder].info
        mpp = slide.pyramid.isotropic_mpp
        assert mpp is not None, "the grid could not have been laid"
        stored = values.astype(self.settings.extract.dtype)
        attrs = BagAttrs(
            slide_id=entry.slide_id,
            case_id=entry.case_id,
            slide_path=entry.shown_path,
            slide_fingerprint=info.fingerprint,
            width_l0=slide.pyramid.size_l0[0],
            height_l0=slide.pyramid.size_l0[1],
            mpp_l0=mpp,
            mpp_source=info.mpp_source,
            vendor=info.vendor,
            reader=info.reader,
            icc="",
            wsi_pipe_version=__version__,
            created_utc=now_utc(),
            status="done",
            empty_reason="",
            fingerprint_segment="",
            fingerprint_tile="",
            primary_level=grid.label,
            primary_encoder=encoder.slug,
            scene=entry.scene,
            z=entry.z,
        )
        features = Features(
            encoder=encoder.name,
            values=stored,
            weights_sha256=encoder.weights_sha256,
            licence=encoder.licence,
            precision=encoder.precision,
            transform="{}",
            fingerprint="",
        )
        return Bag(attrs, (BagLevel(grid, {encoder.slug: features}),))


def _divide(
    spent: Spent, before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> dict[str, Spent]:
    """Reading, divided: processor time as the reading threads counted it, the rest of the process's is ``handle``.

    Threads read at the same time, so their wall seconds add up to more than the clock's: the clock's are divided in
    proportion to the threads'; for ``handle`` its processor time stands in.
    """
    threads = {s: (after[s][0] - before[s][0], after[s][1] - before[s][1]) for s in after}
    handle = max(spent.cpu_s - math.fsum(cpu for _, cpu in threads.values()), 0.0)
    weights = {**{stage: wall for stage, (wall, _) in threads.items()}, "handle": handle}
    whole = math.fsum(weights.values()) or 1.0
    cpu = {**{stage: c for stage, (_, c) in threads.items()}, "handle": handle}
    return {stage: Spent(spent.wall_s * weights[stage] / whole, cpu[stage]) for stage in weights}


def _thread_seconds(stats: StreamStats) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of a stream's threads by stage; copying belongs to resampling."""
    return {
        "fetch": (stats.fetch_s, stats.fetch_cpu_s),
        "decode": (stats.decode_s, stats.decode_cpu_s),
        "resample": (stats.resample_s + stats.copy_s, stats.resample_cpu_s + stats.copy_cpu_s),
    }


def _part(grid: TileGrid, rows: slice) -> TileGrid:
    parent = None if grid.parent is None else grid.parent[rows]
    return dataclasses.replace(grid, cells=grid.cells[rows], tissue=grid.tissue[rows], parent=parent)


def _since(before: int | None) -> int | None:
    now = io_read_bytes()
    return None if before is None or now is None else now - before


def _read_through(path: Path) -> None:
    """Read a slide's files once, so that the system holds their pages."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as handle:
            while handle.read(1 << 24):
                pass


def _facts(slide: Slide, entry: SlideEntry, tissue_mm2: float) -> SlideFacts:
    path = Path(entry.path)
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    size = 0 if is_url(entry.path) else sum(p.stat().st_size for p in files)
    mpp = slide.pyramid.isotropic_mpp
    return SlideFacts(
        slide_id=entry.slide_id,
        path=entry.shown_path,
        bytes=size,
        width_l0=slide.pyramid.size_l0[0],
        height_l0=slide.pyramid.size_l0[1],
        mpp=mpp[0] if mpp else 0.0,
        vendor=slide.info.vendor,
        reader=slide.info.reader,
        tissue_mm2=tissue_mm2,
    )
