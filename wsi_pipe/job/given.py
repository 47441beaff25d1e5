"""What users give as GeoJSON, masks and annotations: read within limits, and named in what goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsi_pipe.config import SegmentSettings
from wsi_pipe.errors import MaskError
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.base import Slide
from wsi_pipe.tissue import GivenMask, qupath_origin, read_mask

__all__ = [
    "MOST_BYTES",
    "MOST_POINTS",
    "given_mask",
    "how_given",
    "naming_the_file",
    "placed_mask",
    "read_geojson",
    "read_given",
]

MOST_BYTES = 512 << 20
MOST_POINTS = 4_000_000
"""Python holds a point of parsed JSON in some 150 bytes: 600 MB at most. An annotation that fills a slide, traced from
a pixel classifier, has a hundred thousand."""

_EXPORT = "export the annotations from QuPath as GeoJSON"
_FEWER = (
    "export annotations alone, without detections and cells (in QuPath: select them, then File > Export objects as "
    "GeoJSON > Selected objects), or simplify them (Objects > Annotations > Simplify shape)"
)


def read_geojson(path: Path, *, limited: bool = True) -> tuple[Any, str]:
    """Parsed JSON and the SHA-256 of the file's bytes.

    Raises MaskError when the file is not there or not JSON and, if ``limited``, when it is larger than 512 MiB or holds
    more than four million points: both are seen before anything is parsed.
    """
    try:
        size = path.stat().st_size
        if limited and size > MOST_BYTES:
            raise MaskError(f"{path}: {size / 2**20:,.0f} MiB are more than {MOST_BYTES >> 20}", remedy=_FEWER)
        raw = path.read_bytes()
    except OSError as error:
        raise MaskError(f"{path}: {error.strerror or error}", remedy="give a GeoJSON file that can be read") from error
    if raw[:2] == b"\x1f\x8b" or raw[:2] == b"PK":
        raise MaskError(f"{path}: is compressed", remedy="unpack it first")
    # Each point opens a bracket of its own: a count of them bounds what parsing takes.
    points = raw.count(b"[") if limited else 0
    if points > MOST_POINTS:
        raise MaskError(f"{path}: holds some {points:,} points, more than {MOST_POINTS:,}", remedy=_FEWER)
    try:
        return json.loads(raw), hashlib.sha256(raw).hexdigest()
    except RecursionError as error:
        raise MaskError(f"{path}: is nested without end", remedy=_EXPORT) from error
    except ValueError as error:
        raise MaskError(f"{path}: is not JSON ({error})", remedy=_EXPORT) from error


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Errors about what a file holds begin with its name."""
    try:
        yield
    except MaskError as error:
        raise MaskError(f"{path}: {error.message}", remedy=error.remedy) from error


def given_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings) -> GivenMask | None:
    """The mask that is given for a slide, as a file or as classes of its annotations, or None.

    Raises MaskError when it cannot be used.
    """
    given = read_given(entry)
    return placed_mask(entry, slide, settings, given[0]) if given else None


def _given_path(entry: SlideEntry) -> Path | None:
    """The file whose areas are the slide's tissue, if one is given."""
    if entry.mask:
        return Path(entry.mask)
    if entry.tissue_class and not entry.annotations:
        raise MaskError(
            f"tissue is the class {' or '.join(entry.tissue_class)}, but {entry.slide_id} has no annotations",
            remedy="give them with --annotations or in the column annotations, or leave out --tissue-class",
        )
    return Path(entry.annotations) if entry.annotations and entry.tissue_class else None


def read_given(entry: SlideEntry) -> tuple[Any, str] | None:
    """The file that a slide's mask is given in, parsed, and its SHA-256, or None. Raises MaskError."""
    path = _given_path(entry)
    return read_geojson(path) if path else None


def how_given(entry: SlideEntry, slide: Slide, sha256: str) -> dict[str, Any]:
    """What a given mask depends on; no more than its file where nothing else matters."""
    how: dict[str, Any] = {"mask": sha256}
    if entry.tissue_class:
        how["classes"] = list(entry.tissue_class)
    if qupath_origin(slide.info.bounds_l0) != (0, 0):
        how["frame"] = entry.frame or "by the file"
    return how


def placed_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings, data: object) -> GivenMask:
    """The mask in ``data``, which ``read_given`` gave. Raises MaskError when it cannot be used."""
    path, mpp = _given_path(entry), slide.pyramid.isotropic_mpp
    assert path is not None
    assert mpp is not None, "the segment stage refuses slides without a resolution"
    scale = (settings.mpp / mpp[0], settings.mpp / mpp[1])
    with naming_the_file(path):
        given = read_mask(
            data,
            slide.pyramid.size_l0,
            scale,
            bounds_l0=slide.info.bounds_l0,
            frame=entry.frame,
            classes=entry.tissue_class,
        )
    mask = given.mask
    if mask.is_empty and (not mask.empty_reason or mask.empty_reason == "the given mask has no area"):
        mask = dataclasses.replace(mask, empty_reason=f"the mask {path} holds no area")
    return GivenMask(mask, tuple(f"mask: {note}" for note in given.notes))
