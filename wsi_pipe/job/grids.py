"""The grids of one slide: kept where they fit, else laid, written with what is drawn on the slide, and drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from wsi_pipe import __version__
from wsi_pipe.bag import Bag, BagAttrs, BagHeader, BagLevel, TileValues, write_bag
from wsi_pipe.config import JobSettings, TileSettings
from wsi_pipe.errors import ResolutionError, StaleWorkError
from wsi_pipe.geometry import FloatPair, TileGrid, TissueMask
from wsi_pipe.job.annotate import annotate, read_annotations, stored_annotation
from wsi_pipe.job.drawing import SlidePictures, grid_picture_of
from wsi_pipe.job.fingerprints import grid_fingerprint
from wsi_pipe.job.fits import Identity, grids_fit, grids_record, tile_fingerprint
from wsi_pipe.job.focus import drop_blurred, left_out_notes
from wsi_pipe.job.masks import SlideMask, mask_content
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepared import Prepared, StageClock, stale_error
from wsi_pipe.job.private import told
from wsi_pipe.job.record import utc_now
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import Bounds, Region, qupath_origin

__all__ = ["as_it_would_be", "laid_attrs", "make_grids", "store_grids"]


def make_grids(
    entry: SlideEntry,
    slide: Slide,
    identity: Identity,
    mask: SlideMask,
    before: BagHeader | None,
    settings: TileSettings,
    job: JobSettings,
    paths: JobPaths,
    clock: StageClock,
    *,
    into_bag: bool = False,
) -> Prepared:
    """The slide with its grids: those that are there where they fit, with the resolutions that are asked for added.

    before: what the slide has. into_bag: a bag follows, which holds the grids: a file of their own is written only
    where there is one, which must not fall behind, or where they took reading all tiles. Raises StaleWorkError where
    they were laid otherwise, unless ``redo``; ResolutionError, MaskError for annotations, OutputError.
    """
    redo = job.redo
    content = mask_content(mask.mask)
    path = paths.tiles(entry.slide_id)
    own_file = not into_bag or bool(settings.min_sharpness) or path.is_file()
    counts = {"tissue_mm2": mask.mask.area_um2(_mpp(slide)) / 1e6}
    asked = tuple(spec.label for spec in settings.specs)
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    grids, attrs = _kept_grids(entry, before, mask, content, settings, redo)
    if attrs is not None and job.primary is not None:
        attrs = _with_primary(attrs, grids, job.primary)
    if attrs is None or before is None:
        if before is not None:
            # Resolutions that this call does not ask for stay; those that it asks for are added.
            settings = _with_held(settings, before)
        grids = plan_grids(slide.pyramid, mask.mask, settings)
        left_out = ""
        if settings.min_sharpness:
            grids, left_out = drop_blurred(slide, grids, settings.min_sharpness)
        attrs = laid_attrs(entry, slide, identity, grids, mask.mask, mask.fingerprint, settings, left_out)
        attrs = _with_primary(attrs, grids, job.primary)
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
            if own_file and not attrs.annotation and (attrs != before.attrs or not path.is_file()):
                write_bag(path, Bag(attrs, tuple(BagLevel(grid) for grid in grids)))
            if (path.is_file() or not own_file) and attrs.annotation == before.attrs.annotation:
                clock.notes += (*left_out_notes(attrs.left_out), *(str(note) for note in about.get("notes") or ()))
                if attrs == before.attrs or not attrs.annotation:
                    clock.pictures = _undrawn(entry, slide, mask, grids, paths)
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
    clock.pictures = grid_picture_of(entry.slide_id, slide, mask.mask, grids, regions, mask.pictures, paths)
    prepared = Prepared(entry, attrs, grids, asked, (), counts, annotation=values, stored=own_file)
    if own_file:
        store_grids(prepared, paths)
    return prepared


def store_grids(prepared: Prepared, paths: JobPaths) -> None:
    """Write grids, and what is drawn on the slide, to a file of their own. Raises OutputError when that fails."""
    values = prepared.annotation or {}
    levels = tuple(BagLevel(grid, annotation=values.get(grid.label, {})) for grid in prepared.grids)
    write_bag(paths.tiles(prepared.entry.slide_id), Bag(prepared.attrs, levels))


def _undrawn(
    entry: SlideEntry, slide: Slide, mask: SlideMask, grids: Sequence[TileGrid], paths: JobPaths
) -> SlidePictures | None:
    """The pictures of a slide whose run was broken off before they were drawn."""
    if mask.pictures is None or paths.grid_picture(entry.slide_id).is_file():
        return mask.pictures
    return grid_picture_of(entry.slide_id, slide, mask.mask, grids, (), mask.pictures, paths)


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
    entry: SlideEntry, before: BagHeader | None, mask: SlideMask, content: str, settings: TileSettings, redo: bool
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
    content = mask_content(mask)
    bounds = slide.info.bounds_l0 or (0, 0, *slide.pyramid.size_l0)
    return dataclasses.replace(
        _attrs(entry, slide, grids, SlideMask(mask, mask_fingerprint), settings, bounds),
        left_out=left_out,
        fingerprint_tile=tile_fingerprint(mask_fingerprint, content, settings),
        made_with=grids_record(content, settings, identity, __version__),
    )


def _attrs(
    entry: SlideEntry,
    slide: Slide,
    grids: Sequence[TileGrid],
    mask: SlideMask,
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


def _with_primary(attrs: BagAttrs, grids: Sequence[TileGrid], label: str | None) -> BagAttrs:
    """The attributes with the level called ``label`` as the primary one, where there is such a level."""
    return dataclasses.replace(attrs, primary_level=label) if label in {g.label for g in grids} and label else attrs


def _empty_reason(mask: TissueMask, grids: Sequence[TileGrid], settings: TileSettings) -> str:
    if any(len(grid) for grid in grids):
        return ""
    if mask.empty_reason:
        return mask.empty_reason
    sharp = f" and a sharpness of {settings.min_sharpness:g} (--min-sharpness)" if settings.min_sharpness else ""
    return f"no tile has a tissue fraction of {settings.min_tissue:g} or more{sharp}"


def as_it_would_be(entry: SlideEntry, slide: Slide, mask: SlideMask, settings: TileSettings) -> Prepared:
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
