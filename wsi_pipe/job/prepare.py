"""The first two stages of one slide: tissue mask and grids, each done only when what is there does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe import __version__
from wsi_pipe.bag import Bag, BagAttrs, BagLevel, TileValues, read_header, write_bag
from wsi_pipe.config import CacheSettings, JobSettings, SegmentSettings, TileSettings, fingerprint, to_mapping
from wsi_pipe.errors import BagError, MaskError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.geometry import FloatPair, TileGrid, TissueMask
from wsi_pipe.job.annotate import annotate, read_annotations, stored_annotation
from wsi_pipe.job.focus import drop_blurred, left_out_notes
from wsi_pipe.job.given import given_mask, how_given, placed_mask, read_geojson, read_given
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.private import check_told, told
from wsi_pipe.job.record import utc_now
from wsi_pipe.manifest import SlideEntry, settings_of
from wsi_pipe.outcome import Stage
from wsi_pipe.overview import Overview, read_overview
from wsi_pipe.pictures import thumbnail_with_contours, thumbnail_with_grids, write_image
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.slides.metadata import missing_mpp_error
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import (
    Bounds,
    GivenMask,
    Region,
    find_tissue,
    mask_from_geojson,
    mask_to_geojson,
    qupath_origin,
    share_notes,
)
from wsi_pipe.tissue.frame import MEMBER

__all__ = ["Prepared", "StageClock", "open_entry", "prepare", "slide_mask"]

SEGMENT_VERSION = 2
TILE_VERSION = 1
"""Raised when a change to a stage changes its results, so that what older versions made counts as stale."""

PICTURE_PX = 1024
"""Longest side of the pictures in ``thumbnails/``."""

GEOJSON_KEY = MEMBER
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
    the file until then, its header, what its fingerprint is made of and the overview. annotation: covered fractions by
    level label and class, None where the file of grids holds them.
    """

    entry: SlideEntry
    attrs: BagAttrs
    grids: tuple[TileGrid, ...]
    cached: tuple[str, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)
    annotation: Mapping[str, Mapping[str, TileValues]] | None = None


def open_entry(entry: SlideEntry, reader: str, cache: CacheSettings | None = None, *, copy: bool = True) -> Slide:
    """The entry's slide, with the entry's mpp, scene and z where it gives them; see ``open_slide``."""
    check_told(entry)
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
        clock.notes = tuple(told(entry, note) for note in slide.info.notes)
    try:
        with clock("segment"):
            mask, segment_fingerprint, segment_cached = _segment(entry, slide, segment_settings, settings, paths, clock)
        clock.notes += tuple(share_notes(mask, slide.pyramid.size_l0))
        if segment_cached:
            clock.cached = ("segment",)
        if not tile:
            return None
        with clock("tile"):
            prepared = _tile(entry, slide, mask, segment_fingerprint, tile_settings, paths, clock)
        if not segment_cached:
            prepared.counts["prepare_bytes_fetched"] = float(slide.stats.bytes_fetched)
    finally:
        slide.close()
    return dataclasses.replace(prepared, cached=(*clock.cached, *prepared.cached))


def _segment(
    entry: SlideEntry, slide: Slide, settings: SegmentSettings, job: JobSettings, paths: JobPaths, clock: StageClock
) -> tuple[TissueMask, str, bool]:
    """The slide's mask, the stage's fingerprint, and whether it was there already."""
    mpp = slide.pyramid.isotropic_mpp
    if mpp is None:
        raise missing_mpp_error(entry.path)
    given = read_given(entry)
    how = how_given(entry, slide, given[1]) if given else {"settings": _plain_settings(settings)}
    stage = fingerprint("segment", SEGMENT_VERSION, slide.info.fingerprint, mpp, job.reader, how)
    path = paths.tissue(entry.slide_id)
    stored = _stored_mask(path, slide, stage)
    if stored is not None:
        mask, own = stored
        clock.notes += tuple(str(note) for note in own.get("notes") or ())
        if "frame" not in own and qupath_origin(slide.info.bounds_l0) != (0, 0):
            # Of a version that counted from the whole image, where QuPath does not.
            _write_mask(path, mask, slide, own)
        return mask, stage, True
    overview = read_overview(slide, settings.mpp)
    if given is None:
        found = GivenMask(find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings), ())
    else:
        found = placed_mask(entry, slide, settings, given[0])
    mask, notes = found.mask, found.notes
    _draw_tissue(entry, overview, mask, paths)
    own = {"fingerprint": stage, "slide_id": entry.slide_id, "settings": how, "tissue_um2": mask.area_um2(mpp)}
    _write_mask(path, mask, slide, own | ({"notes": list(notes)} if notes else {}))
    clock.notes += notes
    return mask, stage, False


def _write_mask(path: Path, mask: TissueMask, slide: Slide, own: Mapping[str, Any]) -> None:
    """The mask as GeoJSON in QuPath's frame, with what the job says of it."""
    data = mask_to_geojson(mask, origin_l0=qupath_origin(slide.info.bounds_l0))
    data[GEOJSON_KEY] = {**own, **{k: v for k, v in data[GEOJSON_KEY].items() if k != "settings"}}
    write_text_atomically(path, json.dumps(data))


def slide_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings) -> TissueMask:
    """The mask that a run would make, without a job: the one given for the slide, else the tissue that is found.

    Raises MaskError for a given mask that cannot be used, MissingMppError, SlideReadError.
    """
    given = given_mask(entry, slide, settings)
    if given is not None:
        return given.mask
    overview = read_overview(slide, settings.mpp)
    return find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings)


def _plain_tile_settings(settings: TileSettings) -> dict[str, Any]:
    """What a grid hangs on; what was not asked for is left out, so that grids of earlier versions stay valid."""
    plain = to_mapping(settings)
    if not plain["min_sharpness"]:
        del plain["min_sharpness"]
    return plain


def _plain_settings(settings: SegmentSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def _stored_mask(path: Path, slide: Slide, stage: str) -> tuple[TissueMask, dict[str, Any]] | None:
    """The mask of an earlier run where its fingerprint fits, and what the job says of it.

    Raises MaskError when another program changed the file: edits are the user's work and are not written over.
    """
    if not path.is_file():
        return None
    try:
        data, _ = read_geojson(path, limited=False)
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
        return mask_from_geojson(data, slide.pyramid.size_l0, (float(scale[0]), float(scale[1]))), own
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
    entry: SlideEntry,
    slide: Slide,
    mask: TissueMask,
    segment: str,
    settings: TileSettings,
    paths: JobPaths,
    clock: StageClock,
) -> Prepared:
    content = hashlib.sha256(np.packbits(mask.mask).tobytes() + repr((mask.mask.shape, mask.scale_l0)).encode())
    stage = fingerprint("tile", TILE_VERSION, segment, content.hexdigest(), _plain_tile_settings(settings))
    path = paths.tiles(entry.slide_id)
    counts = {"tissue_mm2": mask.area_um2(_mpp(slide)) / 1e6}
    annotations = read_annotations(entry, slide, stage)
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    laid = _laid(entry, stage, path)
    if laid is not None:
        attrs, grids = laid
        if attrs.bounds_l0 is None and qupath_origin(bounds) != (0, 0):
            attrs = dataclasses.replace(attrs, bounds_l0=bounds)
        about = stored_annotation(attrs.annotation)
        if about.get("fingerprint") == (annotations.fingerprint if annotations else None):
            clock.notes += (*left_out_notes(attrs.left_out), *(str(note) for note in about.get("notes") or ()))
            return Prepared(entry, attrs, grids, ("tile",), counts)
        attrs = dataclasses.replace(attrs, created_utc=utc_now(), annotation="")
    else:
        grids = plan_grids(slide.pyramid, mask, settings)
        left_out = ""
        if settings.min_sharpness:
            grids, left_out = drop_blurred(slide, grids, settings.min_sharpness)
        attrs = dataclasses.replace(
            _attrs(entry, slide, grids, mask, settings, segment, stage, bounds), left_out=left_out
        )
    clock.notes += tuple(left_out_notes(attrs.left_out))
    values: dict[str, dict[str, TileValues]] = {}
    regions: list[Region] = []
    if annotations is not None:
        values, regions, text = annotate(annotations, entry.frame, slide, grids)
        text = _told_annotation(entry, text)
        attrs = dataclasses.replace(attrs, annotation=text)
        clock.notes += tuple(stored_annotation(text)["notes"])
    levels = tuple(BagLevel(grid, annotation=values.get(grid.label, {})) for grid in grids)
    write_bag(path, Bag(attrs, levels))
    _draw_grids(entry, slide, grids, mask, paths, regions)
    return Prepared(entry, attrs, grids, (), counts, values)


def _told_annotation(entry: SlideEntry, text: str) -> str:
    """What a bag keeps of its annotations, without the names that the entry hides."""
    if not entry.hides:
        return text
    about = json.loads(text)
    return json.dumps(about | {"notes": [told(entry, str(note)) for note in about.get("notes") or ()]})


def _laid(entry: SlideEntry, stage: str, path: Path) -> tuple[BagAttrs, tuple[TileGrid, ...]] | None:
    """The grids of an earlier run where they fit, with the attributes of their file."""
    try:
        header = read_guarded(read_header, path)
    except BagError:
        return None
    attrs = header.attrs
    fits = attrs.fingerprint_tile == stage and attrs.case_id == entry.case_id and attrs.slide_path == entry.shown_path
    return (attrs, header.grids) if fits else None


def _attrs(
    entry: SlideEntry,
    slide: Slide,
    grids: tuple[TileGrid, ...],
    mask: TissueMask,
    settings: TileSettings,
    segment: str,
    stage: str,
    bounds: Bounds,
) -> BagAttrs:
    tiles = sum(len(grid) for grid in grids)
    reason = "" if tiles else mask.empty_reason or f"no tile has a tissue fraction of {settings.min_tissue:g} or more"
    if reason and settings.min_sharpness and not mask.empty_reason:
        reason += f" and a sharpness of {settings.min_sharpness:g} (--min-sharpness)"
    info = slide.info
    return BagAttrs(
        slide_id=entry.slide_id,
        case_id=entry.case_id,
        slide_path=entry.shown_path,
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
        empty_reason=told(entry, reason),
        fingerprint_segment=segment,
        fingerprint_tile=stage,
        primary_level=grids[0].label,
        scene=entry.scene,
        z=entry.z,
        bounds_l0=bounds,
    )


def _mpp(slide: Slide) -> FloatPair:
    mpp = slide.pyramid.isotropic_mpp
    assert mpp is not None, "the segment stage refuses slides without a resolution"
    return mpp


def _draw_grids(
    entry: SlideEntry,
    slide: Slide,
    grids: tuple[TileGrid, ...],
    mask: TissueMask,
    paths: JobPaths,
    regions: Sequence[Region],
) -> None:
    import cv2

    stored = cv2.imread(str(paths.overview_picture(entry.slide_id)), cv2.IMREAD_COLOR)
    rgb = read_overview(slide).rgb if stored is None else np.asarray(cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), np.uint8)
    scale_l0 = (slide.pyramid.size_l0[0] / rgb.shape[1], slide.pyramid.size_l0[1] / rgb.shape[0])
    mpp = _mpp(slide)
    um_per_px = (scale_l0[0] * mpp[0], scale_l0[1] * mpp[1])
    picture = thumbnail_with_grids(
        rgb, scale_l0, grids, mask=mask, um_per_px=um_per_px, title=entry.slide_id, regions=regions
    )
    write_image(paths.grid_picture(entry.slide_id), picture)
