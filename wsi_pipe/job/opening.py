"""Opening the slides of a job: which scan, and at which resolution of whom."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from wsi_pipe.config import CacheSettings
from wsi_pipe.errors import MissingMppError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.job.fits import shown
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.private import check_told
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.slides.metadata import missing_mpp_error

__all__ = ["missing_mpp", "mpp_notes", "open_entry"]


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
