"""The first two stages of one slide: tissue mask and grids, each done only when what is there does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe import __version__
from wsi_pipe.bag import Bag, BagAttrs, BagHeader, BagLevel, TileValues, read_header, unreachable, write_bag
from wsi_pipe.config import CacheSettings, JobSettings, SegmentSettings, TileSettings
from wsi_pipe.errors import BagError, MaskError, MissingMppError, ResolutionError, StaleWorkError
from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.geometry import FloatPair, IntPair, TileGrid, TissueMask
from wsi_pipe.job.annotate import annotate, read_annotations, stored_annotation
from wsi_pipe.job.fingerprints import grid_fingerprint
from wsi_pipe.job.fits import (
    Identity,
    grids_fit,
    grids_record,
    mask_fit,
    mask_record,
    segment_fingerprint,
    shown,
    tile_fingerprint,
)
from wsi_pipe.job.focus import drop_blurred, left_out_notes
from wsi_pipe.job.given import given_mask, how_given, placed_mask, read_given
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.ownership import refuse_other_hdf5
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
from wsi_pipe.stopping import Stop, StopRequested
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

__all__ = [
    "Prepared",
    "StageClock",
    "how_found",
    "laid_attrs",
    "missing_mpp",
    "mpp_notes",
    "open_entry",
    "prepare",
    "slide_mask",
    "stale_error",
    "stored_mask_content",
]

PICTURE_PX = 1024
"""Longest side of the pictures in ``thumbnails/``."""

GEOJSON_KEY = MEMBER
"""Where a GeoJSON holds what belongs to the job: programs that edit it drop the key, which shows that it is theirs."""


class StageClock:
    """Wall seconds by stage of one slide, the stage it is in, whether its mask was valid already, and notes on it.

    Raises StopRequested where a stage would begin after ``stop`` was asked for.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self._stop = stop
        self.seconds: dict[str, float] = {}
        self.cached: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.stage: Stage = "open"

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if self._stop is not None and self._stop.asked:
            raise StopRequested
        self.stage, start = stage, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Prepared:
    """A slide whose grids are known.

    attrs: the root attributes of its bag to be. grids: coarsest first, all that the slide has; asked: labels of those
    that the call is about. cached: stages that were valid already. notes: what is to be said of the slide.
    counts: for the outcome. "tissue_mm2", and where tissue was looked for now "prepare_bytes_fetched": what was read of
    the file until then, its header, what its fingerprint is made of and the overview. annotation: covered fractions by
    level label and class, None where the file of grids holds them.
    """

    entry: SlideEntry
    attrs: BagAttrs
    grids: tuple[TileGrid, ...]
    asked: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    annotation: Mapping[str, Mapping[str, TileValues]] | None = None


def open_entry(entry: SlideEntry, reader: str, cache: CacheSettings | None = None, *, copy: bool = True) -> Slide:
    """The entry's slide, with the entry's scene and z, and its mpp where it gives one or the file states none."""
    check_told(entry)
    slide = _open(entry, entry.mpp, reader, cache, copy)
    if slide.pyramid.mpp is not None or entry.mpp_if_missing is None:
        return slide
    slide.close()
    return _open(entry, entry.mpp_if_missing, reader, cache, copy)


def _open(entry: SlideEntry, mpp: FloatPair | None, reader: str, cache: CacheSettings | None, copy: bool) -> Slide:
    place = cache or CacheSettings()
    return open_slide(
        entry.path,
        reader=reader,
        mpp=mpp,
        scene=entry.scene,
        z=entry.z,
        cache_dir=Path(place.folder) if place.folder else None,
        cache_bytes=int(place.gib * 2**30),
        copy=copy,
    )


MPP_NOTE = 0.02
"""Relative difference from which a file's own resolution beside the one given for slides without is worth a note."""


def mpp_notes(entry: SlideEntry, slide: Slide) -> tuple[str, ...]:
    """What is to be said where a file states another resolution than ``--slide-mpp`` gives to those that state none."""
    given, stated = entry.mpp_if_missing, slide.pyramid.mpp
    if given is None or stated is None or entry.mpp is not None or slide.info.mpp_source == "user":
        return ()
    if all(abs(a - b) <= MPP_NOTE * b for a, b in zip(given, stated, strict=True)):
        return ()
    note = (
        f"the file states {shown(stated)} um/px ({slide.info.mpp_source}), which is kept before the {shown(given)} of "
        "--slide-mpp; --override-mpp takes the latter"
    )
    return (note,)


def prepare(
    entry: SlideEntry,
    settings: JobSettings,
    paths: JobPaths,
    clock: StageClock,
    *,
    tile: bool = True,
) -> Prepared:
    """Segment and tile one slide, as far as that is not done yet. Without ``tile`` the mask is all that is written.

    What an earlier version made of the same slide with the same settings stays as it is. What was made otherwise is
    made anew with ``settings.redo`` and refused without.

    Raises any SlideError, MaskError or OutputError of the two stages, and StaleWorkError; ``clock.stage`` tells where.
    """
    segment_settings, tile_settings = settings_of(entry, settings.segment, settings.tile)
    with clock("open"):
        refuse_other_hdf5(paths.tiles(entry.slide_id), paths.bag(entry.slide_id))
        slide = open_entry(entry, settings.reader, settings.cache)
        clock.notes = tuple(told(entry, note) for note in slide.info.notes)
    try:
        before = _stored_grids(entry, paths)
        identity = Identity(slide, entry.path)
        with clock("segment"):
            if before is not None and not identity.knows(before.attrs) and not settings.redo:
                raise _replaced(entry, before.attrs)
            found = _segment(entry, slide, identity, segment_settings, settings, paths, clock)
        clock.notes += tuple(share_notes(found.mask, slide.pyramid.size_l0))
        if found.cached:
            clock.cached = ("segment",)
        with clock("tile" if tile else "segment"):
            if tile:
                prepared = _tile(entry, slide, identity, found, before, tile_settings, settings.redo, paths, clock)
            else:
                prepared = _as_it_would_be(entry, slide, found, tile_settings)
        if not found.cached:
            prepared.counts["prepare_bytes_fetched"] = float(slide.stats.bytes_fetched)
        notes = mpp_notes(entry, slide)
    finally:
        slide.close()
    return dataclasses.replace(prepared, cached=(*clock.cached, *prepared.cached), notes=(*notes, *prepared.notes))


def _stored_grids(entry: SlideEntry, paths: JobPaths) -> BagHeader | None:
    """The grids that the slide has, without features: from their own file, else from its bag."""
    for path in (paths.tiles(entry.slide_id), paths.bag(entry.slide_id)):
        try:
            header = read_guarded(read_header, path)
        except BagError:
            continue
        if header.attrs.slide_id == entry.slide_id:
            return header
    return None


def _replaced(entry: SlideEntry, made_of: BagAttrs) -> StaleWorkError:
    where = "" if made_of.slide_path in ("", entry.shown_path) else f" ({made_of.slide_path})"
    return StaleWorkError(
        f"{entry.path}: is another file than the one that the finished work of {entry.slide_id} was made of{where}",
        remedy=f"put that file back, or give this one an id of its own in a slide list, or make {entry.slide_id} anew: "
        f"--redo --only {entry.slide_id}",
    )


def stale_error(entry: SlideEntry, what: str, why: Sequence[str]) -> StaleWorkError:
    """The error for finished work of a slide that was made otherwise than is wanted now."""
    return StaleWorkError(
        f"{entry.slide_id}: {what} {'were' if what.endswith('s') else 'was'} made otherwise: {'; '.join(why)}",
        remedy="--redo makes it anew here, another -o keeps both; with the settings of before it stays as it is",
    )


@dataclass(frozen=True)
class _Mask:
    """A slide's mask. fingerprint: of the stage that made it; cached: it was there; older: by an earlier version."""

    mask: TissueMask
    fingerprint: str
    cached: bool = False
    older: bool = False


def _segment(
    entry: SlideEntry,
    slide: Slide,
    identity: Identity,
    settings: SegmentSettings,
    job: JobSettings,
    paths: JobPaths,
    clock: StageClock,
) -> _Mask:
    mpp = slide.pyramid.isotropic_mpp
    if mpp is None:
        raise missing_mpp(entry, paths)
    given = read_given(entry)
    how = how_found(entry, slide, settings, given[1] if given else None)
    path = paths.tissue(entry.slide_id)
    data, own = _stored_mask(path)
    if data is not None:
        fit = mask_fit(own, identity, mpp, job.reader, how, settings)
        if fit.kind == "other" and not job.redo:
            raise stale_error(entry, "its tissue mask", fit.why)
        kept = _usable_mask(data, own, slide) if fit.kind == "same" or not (job.redo or fit.kind == "other") else None
        if kept is not None:
            clock.notes += tuple(str(note) for note in own.get("notes") or ())
            if "frame" not in own and qupath_origin(slide.info.bounds_l0) != (0, 0):
                # Of a version that counted from the whole image, where QuPath does not.
                _write_mask(path, kept, slide, own)
            return _Mask(kept, str(own["fingerprint"]), cached=True, older=fit.kind == "older")
    stage = segment_fingerprint(identity.now, mpp, job.reader, how)
    overview = read_overview(slide, settings.mpp)
    if given is None:
        found = GivenMask(find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings), ())
    else:
        found = placed_mask(entry, slide, settings, given[0])
    # The file of the mask is handed on with the job, as outcomes are.
    mask, notes = found.mask, tuple(told(entry, note) for note in found.notes)
    if entry.hides and mask.empty_reason:
        mask = dataclasses.replace(mask, empty_reason=told(entry, mask.empty_reason))
    _draw_tissue(entry, overview, mask, paths)
    own = {
        "fingerprint": stage,
        "slide_id": entry.slide_id,
        "settings": how,
        "made_with": mask_record(mpp, job.reader, __version__),
        "tissue_um2": mask.area_um2(mpp),
    }
    _write_mask(path, mask, slide, own | ({"notes": list(notes)} if notes else {}))
    clock.notes += notes
    return _Mask(mask, stage)


def how_found(entry: SlideEntry, slide: Slide, settings: SegmentSettings, given_sha256: str | None) -> dict[str, Any]:
    """What a mask depends on beside the slide's file: the settings, or the file that it is given in."""
    how = dict(
        how_given(entry, slide, given_sha256)
        if given_sha256 is not None
        else {"settings": {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}}
    )
    # Which of several pictures of a file is meant, where that is stated.
    return how | {name: value for name in ("scene", "z") if (value := getattr(entry, name)) is not None}


def _write_mask(path: Path, mask: TissueMask, slide: Slide, own: Mapping[str, Any]) -> None:
    """The mask as GeoJSON in QuPath's frame, with what the job says of it."""
    data = mask_to_geojson(mask, origin_l0=qupath_origin(slide.info.bounds_l0))
    data[GEOJSON_KEY] = {**own, **{k: v for k, v in data[GEOJSON_KEY].items() if k != "settings"}}
    write_text_atomically(path, json.dumps(data))


def missing_mpp(entry: SlideEntry, paths: JobPaths | None = None) -> MissingMppError:
    """The error for a slide without a resolution, with a remedy that changes nothing of other slides."""
    error = missing_mpp_error(entry.path)
    row = _row_of(paths.slides, entry.slide_id) if paths else None
    where = (
        f"row {row} of {paths.slides}" if paths and row else f"the row of {entry.slide_id} in a slide list (--slides)"
    )
    return MissingMppError(
        error.message,
        remedy=f"write its um per level-0 pixel into the column mpp of {where}, which changes this slide alone; "
        "--slide-mpp X serves every slide that states none",
    )


def _row_of(slides: Path, slide_id: str) -> int | None:
    """The line of a job's slide list that holds a slide, as an editor counts."""
    try:
        state = slides.stat()
        return _rows(slides, state.st_mtime_ns, state.st_size).get(slide_id)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=1)
def _rows(slides: Path, mtime_ns: int, size: int) -> dict[str, int]:
    import csv

    with slides.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        return {row.get("slide_id") or "": reader.line_num for row in reader}


def slide_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings) -> TissueMask:
    """The mask that a run would make, without a job: the one given for the slide, else the tissue that is found.

    Raises MaskError for a given mask that cannot be used, MissingMppError, SlideReadError.
    """
    given = given_mask(entry, slide, settings)
    if given is not None:
        return given.mask
    overview = read_overview(slide, settings.mpp)
    return find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings)


def _stored_mask(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The mask of an earlier run, and what it says of itself; None where there is none that can be read.

    Raises MaskError when another program changed the file: edits are the user's work and are not written over.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, {}
    except OSError as error:
        # Nothing is known of it: what may be the user's edits is not made again.
        raise unreachable(path, error) or output_error(path, error) from error
    try:
        data: Any = json.loads(raw)
    except (ValueError, RecursionError):
        if f'"{GEOJSON_KEY}"'.encode() in raw or not raw.strip(b"\0 \n"):
            return None, {}
        # Not JSON, and nothing in it says that it is ours.
        data = None
    own = data.get(GEOJSON_KEY) if isinstance(data, dict) else None
    if not isinstance(own, dict):
        raise MaskError(
            f"{path}: was changed by another program",
            remedy="move it elsewhere and give it with --mask or in the column mask of a CSV, or delete it",
        )
    return data, own


def _usable_mask(data: dict[str, Any], own: dict[str, Any], slide: Slide) -> TissueMask | None:
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
    entry: SlideEntry,
    slide: Slide,
    identity: Identity,
    mask: _Mask,
    before: BagHeader | None,
    settings: TileSettings,
    redo: bool,
    paths: JobPaths,
    clock: StageClock,
) -> Prepared:
    content = _content_of(mask.mask)
    path = paths.tiles(entry.slide_id)
    counts = {"tissue_mm2": mask.mask.area_um2(_mpp(slide)) / 1e6}
    asked = tuple(spec.label for spec in settings.specs)
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    grids, attrs = _kept_grids(entry, before, mask, content, settings, redo)
    if attrs is None or before is None:
        if before is not None:
            # Resolutions that this call does not ask for stay; those that it asks for are added.
            settings = _with_held(settings, before)
        grids = plan_grids(slide.pyramid, mask.mask, settings)
        left_out = ""
        if settings.min_sharpness:
            grids, left_out = drop_blurred(slide, grids, settings.min_sharpness)
        attrs = laid_attrs(entry, slide, identity, grids, mask.mask, mask.fingerprint, settings, left_out)
        if before is not None and not redo:
            _refuse_moved_tiles(entry, before, grids)
            attrs = dataclasses.replace(attrs, slide_fingerprint=before.attrs.slide_fingerprint)
        annotations = read_annotations(entry, slide, attrs.fingerprint_tile)
    else:
        if attrs.bounds_l0 is None and qupath_origin(bounds) != (0, 0):
            attrs = dataclasses.replace(attrs, bounds_l0=bounds)
        annotations = read_annotations(entry, slide, attrs.fingerprint_tile)
        about = stored_annotation(attrs.annotation)
        if about.get("fingerprint") == (annotations.fingerprint if annotations else None):
            if not attrs.annotation and (attrs != before.attrs or not path.is_file()):
                write_bag(path, Bag(attrs, tuple(BagLevel(grid) for grid in grids)))
            if path.is_file() and attrs.annotation == before.attrs.annotation:
                clock.notes += (*left_out_notes(attrs.left_out), *(str(note) for note in about.get("notes") or ()))
                if attrs == before.attrs or not attrs.annotation:
                    return Prepared(entry, attrs, grids, asked, ("tile",), counts)
        attrs = dataclasses.replace(attrs, created_utc=utc_now(), annotation="")
    clock.notes += tuple(left_out_notes(attrs.left_out))
    values: dict[str, dict[str, TileValues]] = {}
    regions: list[Region] = []
    if annotations is not None:
        values, regions, text = annotate(annotations, entry.frame, slide, grids)
        text = _told_annotation(entry, text)
        attrs = dataclasses.replace(attrs, annotation=text)
        clock.notes += tuple(note for note in stored_annotation(text)["notes"] if note not in clock.notes)
    write_bag(path, Bag(attrs, tuple(BagLevel(grid, annotation=values.get(grid.label, {})) for grid in grids)))
    _draw_grids(entry, slide, grids, mask.mask, paths, regions)
    return Prepared(entry, attrs, grids, asked, (), counts, annotation=values)


def _told_annotation(entry: SlideEntry, text: str) -> str:
    """What a bag keeps of its annotations, without the names that the entry hides."""
    if not entry.hides:
        return text
    about = json.loads(text)
    return json.dumps(about | {"notes": [told(entry, str(note)) for note in about.get("notes") or ()]})


def _with_held(settings: TileSettings, before: BagHeader) -> TileSettings:
    held = {grid.spec.mpp for grid in before.grids}
    return dataclasses.replace(settings, resolutions=tuple(sorted(held | set(settings.resolutions))))


def _kept_grids(
    entry: SlideEntry, before: BagHeader | None, mask: _Mask, content: str, settings: TileSettings, redo: bool
) -> tuple[tuple[TileGrid, ...], BagAttrs | None]:
    """The grids that are there where they hold all that is asked for, with their attributes; None where they do not.

    Raises StaleWorkError where they were laid otherwise, unless ``redo``.
    """
    if before is None:
        return (), None
    fit = grids_fit(before.attrs, before.grids, mask.fingerprint, content, settings, mask_is_older=mask.older)
    if fit.kind == "other" and not redo:
        raise stale_error(entry, "its grids", fit.why)
    fits = fit.kind == "same" or (fit.kind == "older" and not redo)
    if fits and {grid.spec.mpp for grid in before.grids} >= set(settings.resolutions):
        return before.grids, _relabelled(before.attrs, entry)
    return (), None


def laid_attrs(
    entry: SlideEntry,
    slide: Slide,
    identity: Identity,
    grids: Sequence[TileGrid],
    mask: TissueMask,
    mask_fingerprint: str,
    settings: TileSettings,
    left_out: str = "",
) -> BagAttrs:
    """The root attributes of a bag with grids that were laid just now, by ``settings`` on ``mask``.

    left_out: JSON text on tiles that were left out as blurred, see ``BagAttrs``.
    """
    content = _content_of(mask)
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    return dataclasses.replace(
        _attrs(entry, slide, grids, _Mask(mask, mask_fingerprint), settings, bounds),
        left_out=left_out,
        fingerprint_tile=tile_fingerprint(mask_fingerprint, content, settings),
        made_with=grids_record(content, settings, identity, __version__),
    )


def _attrs(
    entry: SlideEntry,
    slide: Slide,
    grids: Sequence[TileGrid],
    mask: _Mask,
    settings: TileSettings,
    bounds: Bounds,
) -> BagAttrs:
    reason = _empty_reason(mask.mask, grids, settings)
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
        status="empty" if reason else "done",
        empty_reason=told(entry, reason),
        fingerprint_segment=mask.fingerprint,
        fingerprint_tile="",
        primary_level=grids[0].label if grids else "",
        scene=entry.scene,
        z=entry.z,
        bounds_l0=bounds,
    )


def _content_of(mask: TissueMask) -> str:
    """SHA-256 over a mask's pixels."""
    return hashlib.sha256(
        np.packbits(mask.mask).tobytes() + repr((mask.mask.shape, mask.scale_l0)).encode()
    ).hexdigest()


def stored_mask_content(path: Path, size_l0: IntPair) -> str:
    """SHA-256 over the pixels of a stored mask, on a slide of this size; "" where it cannot be read."""
    try:
        data, own = _stored_mask(path)
        if data is None:
            return ""
        scale = own["scale_l0"]
        return _content_of(mask_from_geojson(data, size_l0, (float(scale[0]), float(scale[1]))))
    except (MaskError, KeyError, TypeError, ValueError, IndexError):
        return ""


def _empty_reason(mask: TissueMask, grids: Sequence[TileGrid], settings: TileSettings) -> str:
    if any(len(grid) for grid in grids):
        return ""
    if mask.empty_reason:
        return mask.empty_reason
    sharp = f" and a sharpness of {settings.min_sharpness:g} (--min-sharpness)" if settings.min_sharpness else ""
    return f"no tile has a tissue fraction of {settings.min_tissue:g} or more{sharp}"


def _as_it_would_be(entry: SlideEntry, slide: Slide, mask: _Mask, settings: TileSettings) -> Prepared:
    """The slide with grids that are laid to see whether it is empty, as a run would find it, and are not stored."""
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    try:
        attrs = _attrs(entry, slide, plan_grids(slide.pyramid, mask.mask, settings), mask, settings, bounds)
    except ResolutionError:
        # Of no concern to a mask.
        reason = mask.mask.empty_reason or ""
        attrs = _attrs(entry, slide, (), mask, settings, bounds)
        attrs = dataclasses.replace(attrs, status="empty" if reason else "done", empty_reason=reason)
    return Prepared(entry, attrs, (), counts={"tissue_mm2": mask.mask.area_um2(_mpp(slide)) / 1e6})


def _relabelled(attrs: BagAttrs, entry: SlideEntry) -> BagAttrs:
    """The attributes with the slide's place and case of now: slides move, and cases are corrected."""
    return dataclasses.replace(attrs, case_id=entry.case_id, slide_path=entry.shown_path, primary_encoder="")


def _refuse_moved_tiles(entry: SlideEntry, before: BagHeader, grids: Sequence[TileGrid]) -> None:
    """Raise StaleWorkError where grids that are there would come to lie otherwise, as beside a resolution that is no
    power of two finer, or in another version: their features would be lost."""
    laid = {grid.label: grid_fingerprint("", grid) for grid in grids}
    moved = [grid.label for grid in before.grids if laid.get(grid.label) != grid_fingerprint("", grid)]
    if moved:
        added = ", ".join(label for label in laid if label not in {grid.label for grid in before.grids})
        error = stale_error(entry, "its grids", (f"{', '.join(moved)} would be laid anew to fit {added}",))
        # The job's settings name the new one by now.
        options = " ".join(f"-r {label}" for label in added.split(", "))
        raise StaleWorkError(error.message, remedy=f"{error.remedy}: wsi-pipe prune {options} takes it out of them")


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
