"""The first two stages of one slide: tissue mask and grids, each done only when what is there does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe import __version__
from wsi_pipe.bag import Bag, BagAttrs, BagLevel, read_header, write_bag
from wsi_pipe.config import CacheSettings, JobSettings, SegmentSettings, TileSettings, fingerprint
from wsi_pipe.errors import BagError, MaskError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.geometry import FloatPair, TileGrid, TissueMask
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.record import utc_now
from wsi_pipe.manifest import SlideEntry, settings_of
from wsi_pipe.outcome import Stage
from wsi_pipe.overview import Overview, read_overview
from wsi_pipe.pictures import thumbnail_with_contours, thumbnail_with_grids, write_image
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.slides.metadata import missing_mpp_error
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue, mask_from_geojson, mask_to_geojson

__all__ = ["Prepared", "StageClock", "open_entry", "prepare", "slide_mask"]

SEGMENT_VERSION = 1
TILE_VERSION = 1
"""Raised when a change to a stage changes its results, so that what older versions made counts as stale."""

PICTURE_PX = 1024
"""Longest side of the pictures in ``thumbnails/``."""

GEOJSON_KEY = "wsi_pipe"
"""Where a GeoJSON holds what belongs to the job: programs that edit it drop the key, which shows that it is theirs."""


class StageClock:
    """Wall seconds by stage of one slide, the stage it is in, whether its mask was valid already, and notes on it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cached: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.stage: Stage = "open"

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        self.stage, start = stage, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Prepared:
    """A slide whose grids are known.

    attrs: the root attributes of its bag to be. grids: coarsest first. cached: stages that were valid already.
    counts: for the outcome. "tissue_mm2", and where tissue was looked for now "prepare_bytes_fetched": what was read of
    the file until then, its header, what its fingerprint is made of and the overview.
    """

    entry: SlideEntry
    attrs: BagAttrs
    grids: tuple[TileGrid, ...]
    cached: tuple[str, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)


def open_entry(entry: SlideEntry, reader: str, cache: CacheSettings | None = None, *, copy: bool = True) -> Slide:
    """The entry's slide, with the entry's mpp, scene and z where it gives them; see ``open_slide``."""
    place = cache or CacheSettings()
    return open_slide(
        entry.path,
        reader=reader,
        mpp=entry.mpp,
        scene=entry.scene,
        z=entry.z,
        cache_dir=Path(place.folder) if place.folder else None,
        cache_bytes=int(place.gib * 2**30),
        copy=copy,
    )


def prepare(
    entry: SlideEntry,
    settings: JobSettings,
    paths: JobPaths,
    clock: StageClock,
    *,
    tile: bool = True,
) -> Prepared | None:
    """Segment and tile one slide, as far as that is not done yet; None when only the mask was asked for.

    Raises any SlideError, MaskError or OutputError of the two stages; ``clock.stage`` tells where.
    """
    segment_settings, tile_settings = settings_of(entry, settings.segment, settings.tile)
    with clock("open"):
        slide = open_entry(entry, settings.reader, settings.cache)
        clock.notes = slide.info.notes
    try:
        with clock("segment"):
            mask, segment_fingerprint, segment_cached = _segment(entry, slide, segment_settings, settings, paths)
        if segment_cached:
            clock.cached = ("segment",)
        if not tile:
            return None
        with clock("tile"):
            prepared = _tile(entry, slide, mask, segment_fingerprint, tile_settings, paths)
        if not segment_cached:
            prepared.counts["prepare_bytes_fetched"] = float(slide.stats.bytes_fetched)
    finally:
        slide.close()
    return dataclasses.replace(prepared, cached=(*clock.cached, *prepared.cached))


def _segment(
    entry: SlideEntry, slide: Slide, settings: SegmentSettings, job: JobSettings, paths: JobPaths
) -> tuple[TissueMask, str, bool]:
    """The slide's mask, the stage's fingerprint, and whether it was there already."""
    mpp = slide.pyramid.isotropic_mpp
    if mpp is None:
        raise missing_mpp_error(entry.path)
    given = _read_mask(Path(entry.mask)) if entry.mask else None
    how = {"mask": given[1]} if given else {"settings": _plain_settings(settings)}
    stage = fingerprint("segment", SEGMENT_VERSION, slide.info.fingerprint, mpp, job.reader, how)
    path = paths.tissue(entry.slide_id)
    stored = _stored_mask(path, slide, stage)
    if stored is not None:
        return stored, stage, True
    overview = read_overview(slide, settings.mpp)
    mask = _mask(entry, slide, settings, overview, given[0] if given else None)
    data = dict(mask_to_geojson(mask))
    data[GEOJSON_KEY] = {
        **data.get(GEOJSON_KEY, {}),
        "fingerprint": stage,
        "slide_id": entry.slide_id,
        "settings": how,
        "tissue_um2": mask.area_um2(mpp),
    }
    _draw_tissue(entry, overview, mask, paths)
    write_text_atomically(path, json.dumps(data))
    return mask, stage, False


def slide_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings) -> TissueMask:
    """The mask that a run would make, without a job: the one given for the slide, else the tissue that is found.

    Raises MaskError for a given mask that cannot be used, MissingMppError, SlideReadError.
    """
    given = _read_mask(Path(entry.mask))[0] if entry.mask else None
    return _mask(entry, slide, settings, read_overview(slide, settings.mpp), given)


def _mask(
    entry: SlideEntry, slide: Slide, settings: SegmentSettings, overview: Overview, given: dict[str, Any] | None
) -> TissueMask:
    if given is None:
        return find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings)
    mpp = _mpp(slide)
    mask = mask_from_geojson(given, slide.pyramid.size_l0, (settings.mpp / mpp[0], settings.mpp / mpp[1]))
    if mask.is_empty and not mask.empty_reason:
        mask = dataclasses.replace(mask, empty_reason=f"the mask {entry.mask} holds no area")
    return mask


def _plain_settings(settings: SegmentSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def _read_mask(path: Path) -> tuple[dict[str, Any], str]:
    """A GeoJSON and the SHA-256 of its bytes. Raises MaskError when it is not there or not JSON."""
    try:
        raw = path.read_bytes()
        return json.loads(raw), hashlib.sha256(raw).hexdigest()
    except OSError as error:
        raise MaskError(f"{path}: {error.strerror or error}", remedy="give a GeoJSON file that can be read") from error
    except ValueError as error:
        raise MaskError(
            f"{path}: is not JSON ({error})", remedy="export the annotations from QuPath as GeoJSON"
        ) from error


def _stored_mask(path: Path, slide: Slide, stage: str) -> TissueMask | None:
    """The mask of an earlier run where its fingerprint fits.

    Raises MaskError when another program changed the file: edits are the user's work and are not written over.
    """
    if not path.is_file():
        return None
    try:
        data, _ = _read_mask(path)
    except MaskError:
        return None
    own = data.get(GEOJSON_KEY) if isinstance(data, dict) else None
    if not isinstance(own, dict):
        raise MaskError(
            f"{path}: was changed by another program",
            remedy="move it elsewhere and give it with --mask or in the column mask of a CSV, or delete it",
        )
    if own.get("fingerprint") != stage:
        return None
    try:
        scale = own["scale_l0"]
        return mask_from_geojson(data, slide.pyramid.size_l0, (float(scale[0]), float(scale[1])))
    except (MaskError, KeyError, TypeError, ValueError, IndexError):
        return None


def _draw_tissue(entry: SlideEntry, overview: Overview, mask: TissueMask, paths: JobPaths) -> None:
    write_image(paths.overview_picture(entry.slide_id), _shrunk(overview.rgb))
    picture = thumbnail_with_contours(overview.rgb, mask, um_per_px=overview.um_per_px, title=entry.slide_id)
    write_image(paths.tissue_picture(entry.slide_id), picture)


def _shrunk(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    longest = max(rgb.shape[:2])
    if longest <= PICTURE_PX:
        return rgb
    factor = PICTURE_PX / longest
    size = (max(round(rgb.shape[1] * factor), 1), max(round(rgb.shape[0] * factor), 1))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _tile(
    entry: SlideEntry, slide: Slide, mask: TissueMask, segment: str, settings: TileSettings, paths: JobPaths
) -> Prepared:
    content = hashlib.sha256(np.packbits(mask.mask).tobytes() + repr((mask.mask.shape, mask.scale_l0)).encode())
    stage = fingerprint("tile", TILE_VERSION, segment, content.hexdigest(), settings)
    path = paths.tiles(entry.slide_id)
    counts = {"tissue_mm2": mask.area_um2(_mpp(slide)) / 1e6}
    try:
        header = read_guarded(read_header, path)
        attrs = header.attrs
        if attrs.fingerprint_tile == stage and attrs.case_id == entry.case_id and attrs.slide_path == entry.path:
            return Prepared(entry, attrs, header.grids, ("tile",), counts)
    except BagError:
        pass
    grids = plan_grids(slide.pyramid, mask, settings)
    tiles = sum(len(grid) for grid in grids)
    reason = "" if tiles else mask.empty_reason or f"no tile has a tissue fraction of {settings.min_tissue:g} or more"
    info = slide.info
    attrs = BagAttrs(
        slide_id=entry.slide_id,
        case_id=entry.case_id,
        slide_path=entry.path,
        slide_fingerprint=info.fingerprint,
        width_l0=slide.pyramid.size_l0[0],
        height_l0=slide.pyramid.size_l0[1],
        mpp_l0=slide.pyramid.mpp or _mpp(slide),
        mpp_source=info.mpp_source,
        vendor=info.vendor,
        reader=info.reader,
        icc=hashlib.sha256(info.icc).hexdigest() if info.icc else "",
        wsi_pipe_version=__version__,
        created_utc=utc_now(),
        status="done" if tiles else "empty",
        empty_reason=reason,
        fingerprint_segment=segment,
        fingerprint_tile=stage,
        primary_level=grids[0].label,
        scene=entry.scene,
        z=entry.z,
    )
    write_bag(path, Bag(attrs, tuple(BagLevel(grid) for grid in grids)))
    _draw_grids(entry, slide, grids, mask, paths)
    return Prepared(entry, attrs, grids, (), counts)


def _mpp(slide: Slide) -> FloatPair:
    mpp = slide.pyramid.isotropic_mpp
    assert mpp is not None, "the segment stage refuses slides without a resolution"
    return mpp


def _draw_grids(
    entry: SlideEntry, slide: Slide, grids: tuple[TileGrid, ...], mask: TissueMask, paths: JobPaths
) -> None:
    import cv2

    stored = cv2.imread(str(paths.overview_picture(entry.slide_id)), cv2.IMREAD_COLOR)
    rgb = read_overview(slide).rgb if stored is None else np.asarray(cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), np.uint8)
    scale_l0 = (slide.pyramid.size_l0[0] / rgb.shape[1], slide.pyramid.size_l0[1] / rgb.shape[0])
    mpp = _mpp(slide)
    um_per_px = (scale_l0[0] * mpp[0], scale_l0[1] * mpp[1])
    picture = thumbnail_with_grids(rgb, scale_l0, grids, mask=mask, um_per_px=um_per_px, title=entry.slide_id)
    write_image(paths.grid_picture(entry.slide_id), picture)
