"""The tissue mask of one slide: kept where it fits, else found or taken as given, and drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipe import __version__
from wsi_pipe.bag import unreachable
from wsi_pipe.config import JobSettings, SegmentSettings
from wsi_pipe.errors import MaskError
from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.geometry import IntPair, TissueMask
from wsi_pipe.job.drawing import SlidePictures, tissue_picture_of
from wsi_pipe.job.fits import Identity, mask_fit, mask_record, segment_fingerprint
from wsi_pipe.job.given import given_mask, how_given, placed_mask, read_given
from wsi_pipe.job.opening import missing_mpp
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepared import StageClock, stale_error
from wsi_pipe.job.private import told
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.overview import read_overview
from wsi_pipe.pictures import Outlines
from wsi_pipe.slides.base import Slide
from wsi_pipe.tissue import (
    GivenMask,
    find_tissue,
    mask_from_geojson,
    mask_to_geojson,
    qupath_origin,
    trace_mask,
)
from wsi_pipe.tissue.frame import MEMBER

__all__ = ["SlideMask", "how_found", "make_mask", "mask_content", "slide_mask", "stored_mask", "stored_mask_content"]

GEOJSON_KEY = MEMBER
"""Where a GeoJSON holds what belongs to the job: programs that edit it drop the key, which shows that it is theirs."""


@dataclass(frozen=True)
class SlideMask:
    """A slide's mask. fingerprint: of the stage that made it; cached: it was there; older: by an earlier version.
    pictures: what is to be drawn of it."""

    mask: TissueMask
    fingerprint: str
    cached: bool = False
    older: bool = False
    pictures: SlidePictures | None = None


def make_mask(
    entry: SlideEntry,
    slide: Slide,
    identity: Identity,
    settings: SegmentSettings,
    job: JobSettings,
    paths: JobPaths,
    clock: StageClock,
) -> SlideMask:
    """The slide's mask: the one that is there where it fits, else the one given, else the tissue that is found.

    Raises MissingMppError, MaskError, StaleWorkError where it was made otherwise, unless ``job.redo``, and OutputError.
    """
    mpp = slide.pyramid.isotropic_mpp
    if mpp is None:
        raise missing_mpp(entry, paths)
    given = read_given(entry)
    how = how_found(entry, slide, settings, given[1] if given else None)
    path = paths.tissue(entry.slide_id)
    data, own = stored_mask(path)
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
            return SlideMask(
                kept,
                str(own["fingerprint"]),
                cached=True,
                older=fit.kind == "older",
                pictures=_left_undrawn(entry, slide, settings, kept, paths),
            )
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
    # Traced once: for the file, and for both pictures.
    outlines = trace_mask(mask.mask)
    own = {
        "fingerprint": stage,
        "slide_id": entry.slide_id,
        "settings": how,
        "made_with": mask_record(mpp, job.reader, __version__),
        "tissue_um2": mask.area_um2(mpp),
    }
    _write_mask(path, mask, slide, own | ({"notes": list(notes)} if notes else {}), outlines)
    clock.notes += notes
    return SlideMask(mask, stage, pictures=tissue_picture_of(entry.slide_id, slide, overview.rgb, mask, outlines))


def _left_undrawn(
    entry: SlideEntry, slide: Slide, settings: SegmentSettings, mask: TissueMask, paths: JobPaths
) -> SlidePictures | None:
    """The pictures of a mask whose run was broken off before they were drawn."""
    if paths.overview_picture(entry.slide_id).is_file() or paths.tissue_picture(entry.slide_id).is_file():
        return None
    return tissue_picture_of(entry.slide_id, slide, read_overview(slide, settings.mpp).rgb, mask)


def how_found(entry: SlideEntry, slide: Slide, settings: SegmentSettings, given_sha256: str | None) -> dict[str, Any]:
    """What a mask depends on beside the slide's file: the settings, or the file that it is given in."""
    how = dict(
        how_given(entry, slide, given_sha256)
        if given_sha256 is not None
        else {"settings": {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}}
    )
    # Which of several pictures of a file is meant, where that is stated.
    return how | {name: value for name in ("scene", "z") if (value := getattr(entry, name)) is not None}


def _write_mask(
    path: Path, mask: TissueMask, slide: Slide, own: Mapping[str, Any], outlines: Outlines | None = None
) -> None:
    """The mask as GeoJSON in QuPath's frame, with what the job says of it."""
    data = mask_to_geojson(mask, origin_l0=qupath_origin(slide.info.bounds_l0), outlines=outlines)
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


def stored_mask(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
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


def mask_content(mask: TissueMask) -> str:
    """SHA-256 over a mask's pixels."""
    return hashlib.sha256(
        np.packbits(mask.mask).tobytes() + repr((mask.mask.shape, mask.scale_l0)).encode()
    ).hexdigest()


def stored_mask_content(path: Path, size_l0: IntPair) -> str:
    """SHA-256 over the pixels of a stored mask, on a slide of this size; "" where it cannot be read."""
    try:
        data, own = stored_mask(path)
        if data is None:
            return ""
        scale = own["scale_l0"]
        return mask_content(mask_from_geojson(data, size_l0, (float(scale[0]), float(scale[1]))))
    except (MaskError, KeyError, TypeError, ValueError, IndexError):
        return ""
