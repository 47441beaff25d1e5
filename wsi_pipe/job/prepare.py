"""The first two stages of one slide: tissue mask and grids, each done only when what is there does not fit."""

from __future__ import annotations

import dataclasses

from wsi_pipe.bag import BagAttrs, BagHeader, read_header
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import BagError, StaleWorkError
from wsi_pipe.job.fits import Identity
from wsi_pipe.job.grids import as_it_would_be, make_grids
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.masks import make_mask
from wsi_pipe.job.opening import mpp_notes, open_entry
from wsi_pipe.job.ownership import refuse_other_hdf5
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepared import Prepared, StageClock
from wsi_pipe.job.private import told
from wsi_pipe.manifest import SlideEntry, settings_of
from wsi_pipe.tissue import share_notes

__all__ = ["prepare"]


def prepare(
    entry: SlideEntry,
    settings: JobSettings,
    paths: JobPaths,
    clock: StageClock,
    *,
    tile: bool = True,
    into_bag: bool = False,
) -> Prepared:
    """Segment and tile one slide, as far as that is not done yet. Without ``tile`` the mask is all that is written.

    into_bag: the grids go into a bag, as in ``make_grids``. Pictures are the caller's to draw: ``clock.pictures``.

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
            found = make_mask(entry, slide, identity, segment_settings, settings, paths, clock)
        clock.pictures = found.pictures
        clock.notes += tuple(share_notes(found.mask, slide.pyramid.size_l0))
        if found.cached:
            clock.cached = ("segment",)
        with clock("tile" if tile else "segment"):
            if tile:
                prepared = make_grids(
                    entry, slide, identity, found, before, tile_settings, settings, paths, clock, into_bag=into_bag
                )
            else:
                prepared = as_it_would_be(entry, slide, found, tile_settings)
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
