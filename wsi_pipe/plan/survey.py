"""Every slide of a list: whether it can be done, and how many tiles it has or is likely to have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from wsi_pipe.config import JobSettings, TileSettings
from wsi_pipe.errors import MaskError, MissingMppError, WsiPipeError, in_words
from wsi_pipe.geometry import FloatPair, Pyramid, TissueMask
from wsi_pipe.job.masks import slide_mask, stored_mask
from wsi_pipe.job.opening import missing_mpp, open_entry
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry, settings_of
from wsi_pipe.plan.metadata import NEEDS_STAGING, MetadataCache, SlideFacts, opened_how, slide_facts
from wsi_pipe.tiling import plan_grids

__all__ = ["PlanTotals", "SlidePlan", "exact_tiles", "spread_sample", "survey", "total"]

DEFAULT_KEPT = 0.3
"""Share of a slide's tiles that hold tissue, where no slide was looked at: about what biopsies and resections have."""


@dataclass(frozen=True)
class SlidePlan:
    """What a run would make of one slide.

    problem, remedy: why it will fail, or None. covering: by label, tiles that cover the whole slide. tiles: by label,
    tiles with tissue: counted where ``counted``, else estimated. note: NEEDS_STAGING where neither can be told without
    copying the slide.
    """

    slide_id: str
    path: str
    problem: str | None = None
    remedy: str | None = None
    mpp: FloatPair | None = None
    mpp_source: str = "none"
    vendor: str = ""
    covering: Mapping[str, int] = field(default_factory=dict)
    tiles: Mapping[str, int] = field(default_factory=dict)
    counted: bool = False
    empty_reason: str | None = None
    note: str = ""


def spread_sample(entries: Sequence[SlideEntry], most: int) -> list[SlideEntry]:
    """At most ``most`` entries, evenly spread over the list."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(i)] for i in np.linspace(0, len(entries) - 1, most)] if most else []


def survey(
    entries: Iterable[SlideEntry],
    settings: JobSettings,
    cache: MetadataCache,
    *,
    kept: Mapping[str, float] | None = None,
    describe: Callable[[SlideEntry, str], SlideFacts] | None = None,
    job: JobPaths | None = None,
) -> Iterator[SlidePlan]:
    """The plan of each slide from its metadata alone, one after the other, in bounded memory; no slide is copied.

    describe: ``slide_facts`` by default. job: the job that there is, whose masks may have been edited.
    kept: by label, the share of covering tiles that hold tissue, as ``exact_tiles`` of a sample gives it.
    """
    look = describe or partial(slide_facts, cache=settings.cache)
    for entry in entries:
        how = opened_how(entry, settings.reader)
        facts = cache.get(entry.path, how)
        if facts is None:
            facts = look(entry, settings.reader)
            cache.put(entry.path, how, facts)
        found = _plan(entry, facts, settings, kept or {})
        if job is not None and not found.problem:
            try:
                stored_mask(job.tissue(entry.slide_id))
            except MaskError as error:
                found = dataclasses.replace(found, problem=error.message, remedy=error.remedy)
        yield found


def _plan(entry: SlideEntry, facts: SlideFacts, settings: JobSettings, kept: Mapping[str, float]) -> SlidePlan:
    # In the order of open_entry: what is given for the slide, what its file states, what is given for those without.
    given = entry.mpp or (entry.mpp_if_missing if facts.mpp is None else None)
    base = SlidePlan(
        slide_id=entry.slide_id,
        path=entry.shown_path,
        mpp=given or facts.mpp,
        mpp_source="user" if given else facts.mpp_source,
        vendor=facts.vendor,
        note=facts.note,
    )
    if facts.error:
        return dataclasses.replace(base, problem=facts.error, remedy=facts.remedy)
    if entry.mask and not Path(entry.mask).is_file():
        return dataclasses.replace(base, problem=f"its mask {entry.mask} is not there", remedy="check the column mask")
    if facts.note:
        return base
    try:
        _, tile = settings_of(entry, settings.segment, settings.tile)
        covering = _covering(facts.pyramid(given), tile)
    except MissingMppError:
        error = missing_mpp(entry)
        return dataclasses.replace(base, problem=error.message, remedy=error.remedy)
    except WsiPipeError as error:
        return dataclasses.replace(base, problem=error.message, remedy=error.remedy)
    tiles = {label: math.ceil(count * kept.get(label, DEFAULT_KEPT)) for label, count in covering.items()}
    return dataclasses.replace(base, covering=covering, tiles=tiles)


def _covering(pyramid: Pyramid, settings: TileSettings) -> dict[str, int]:
    """Tiles that cover the whole slide, by label. Raises MissingMppError or ResolutionError as laying grids does."""
    width, height = pyramid.size_l0
    return {
        label: math.ceil(width / stride[0]) * math.ceil(height / stride[1])
        for label, stride in _strides(pyramid.mpp, settings)
    }


@lru_cache(maxsize=4096)
def _strides(mpp: FloatPair | None, settings: TileSettings) -> tuple[tuple[str, FloatPair], ...]:
    """Label and stride of each grid on any slide of this resolution; an archive has few resolutions."""
    pixel = Pyramid.from_sizes([(1, 1)], mpp)
    return tuple(
        (g.label, g.stride_l0) for g in plan_grids(pixel, TissueMask(np.zeros((1, 1), bool), (1.0, 1.0)), settings)
    )


def exact_tiles(entry: SlideEntry, plan: SlidePlan, settings: JobSettings) -> SlidePlan:
    """The plan with its tiles counted: the slide's tissue is found, as a run would, and nothing is written.

    A slide that needs staging is not copied, and its plan stays as it is.
    """
    if plan.note == NEEDS_STAGING:
        return plan
    segment, tile = settings_of(entry, settings.segment, settings.tile)
    try:
        slide = open_entry(entry, settings.reader, settings.cache, copy=False)
        try:
            mask = slide_mask(entry, slide, segment)
            grids = plan_grids(slide.pyramid, mask, tile)
        finally:
            slide.close()
    except Exception as error:
        # As a run does: an error that nobody foresaw is its slide's own.
        reason, remedy = in_words(error)
        return dataclasses.replace(plan, problem=reason, remedy=remedy, tiles={})
    return dataclasses.replace(
        plan, tiles={grid.label: len(grid) for grid in grids}, counted=True, empty_reason=mask.empty_reason
    )


@dataclass
class PlanTotals:
    """Sums over all slides. failing: their plans, all of them. staging: slides that need staging and have no tiles."""

    slides: int = 0
    tiles: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    empty: int = 0
    staging: int = 0
    failing: list[SlidePlan] = field(default_factory=list)


def total(plans: Iterable[SlidePlan], each: Callable[[SlidePlan], object] | None = None) -> PlanTotals:
    """Add plans up as they come; ``each`` sees every one, and none is kept but those that fail."""
    sums = PlanTotals()
    for plan in plans:
        sums.slides += 1
        sums.counted += plan.counted
        sums.empty += plan.counted and not any(plan.tiles.values())
        sums.staging += plan.note == NEEDS_STAGING and not plan.problem
        if plan.problem:
            sums.failing.append(plan)
        for label, count in plan.tiles.items():
            sums.tiles[label] = sums.tiles.get(label, 0) + count
        if each:
            each(plan)
    return sums
