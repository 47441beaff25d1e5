"""What would end a run before its first tile: one place, which ``run`` and ``plan`` both ask."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.availability import check_encoder, fetch_weights
from wsi_pipe.encoders.naming import check_slugs, slug_of
from wsi_pipe.errors import OutputError, WsiPipeError
from wsi_pipe.files import output_error
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.plan.metadata import MetadataCache
from wsi_pipe.plan.space import Space, SpaceCount, known_bytes_per_tile
from wsi_pipe.plan.survey import PlanTotals, SlidePlan, exact_tiles, spread_sample, survey, total

__all__ = [
    "encoder_problems",
    "kept_share",
    "lack_of_room",
    "refuse_bad_encoders",
    "refuse_lack_of_room",
    "refuse_read_only",
]

SAMPLE = 20
LOOKED_AT = 3


def encoder_problems(settings: JobSettings) -> list[WsiPipeError]:
    """What is wrong with the encoders that are asked for, as far as it shows without loading them.

    A name that nobody has, two of one name in bags, a file that is not there, an LR encoder at a resolution or on tiles
    that it was not made for, weights that are neither here nor to be had.
    """
    found: list[WsiPipeError] = []
    extract, specs = settings.extract, settings.tile.specs
    names = dict.fromkeys(name for spec in specs for name in extract.encoders_of(spec.label))
    try:
        check_slugs((name, slug_of(name)) for name in names)
    except WsiPipeError as error:
        found.append(error)
    for name in names:
        at = [spec for spec in specs if name in extract.encoders_of(spec.label)]
        try:
            check_encoder(name, at, settings.tile.mpp_tolerance, random_weights=extract.random_weights)
        except WsiPipeError as error:
            found.append(error)
    return found


def refuse_bad_encoders(settings: JobSettings, *, fetch: bool = False) -> None:
    """Raise the first of ``encoder_problems``. fetch: download what is to be had now, so that no worker needs to."""
    for error in encoder_problems(settings):
        raise error
    if fetch and not settings.extract.random_weights:
        for label in (spec.label for spec in settings.tile.specs):
            for name in settings.extract.encoders_of(label):
                fetch_weights(name)


def lack_of_room(space: Space) -> OutputError | None:
    """The error that ends a run whose job does not fit on its disk; None where it does."""
    if not space.lacking_gb:
        return None
    there = f", of which {space.held_gb:,.1f} GB are there already" if space.held_gb >= 0.05 else ""
    return OutputError(
        f"a run would write about {_gb(space.needed_gb)} GB{there} and the disk of {space.folder} has "
        f"{_gb(space.free_gb)} GB free: {_gb(space.lacking_gb)} GB are lacking",
        remedy="free some space or give a folder on another disk with --out",
    )


def _gb(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.05 else f"{value:.3f}"


def refuse_lack_of_room(
    entries: Sequence[SlideEntry],
    settings: JobSettings,
    job: Path,
    tile_bytes: Mapping[str, int] | None = None,
) -> None:
    """Raise OutputError where the slides that have no bag yet do not fit on the disk of the job.

    A few of them stand for all; where it looks tight, the tissue of some is found, as a plan does. tile_bytes: of a
    tile in a bag, by label, where the encoders are known. A disk so small that a run fills it while one looks on is
    left to the run, which stops there and says so.
    """
    tile_bytes = tile_bytes or known_bytes_per_tile(settings)
    bags = JobPaths(job)
    waiting = [entry for entry in entries if not os.path.isfile(bags.bag(entry.slide_id))]
    there = job.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not waiting or tile_bytes is None or shutil.disk_usage(there).total <= SMALL_DISK_BYTES:
        return
    sample = spread_sample(waiting, SAMPLE)
    with MetadataCache() as cache:
        plans = [p for p in survey(sample, settings, cache) if not p.problem]
    if not plans or not lack_of_room(_space_of_all(plans, len(waiting), job, tile_bytes)):
        return
    by_id = {entry.slide_id: entry for entry in sample}
    seen = {p.slide_id: exact_tiles(by_id[p.slide_id], p, settings) for p in plans[:: max(len(plans) // LOOKED_AT, 1)]}
    kept = kept_share(seen.values())
    with MetadataCache() as cache:
        plans = [seen.get(p.slide_id, p) for p in survey(sample, settings, cache, kept=kept) if not p.problem]
    if error := lack_of_room(_space_of_all(plans, len(waiting), job, tile_bytes)):
        raise error


def refuse_read_only(job: Path) -> None:
    """Raise OutputError where the folder of a job, or the one that it would be made in, cannot be written."""
    there = job.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
        code = errno.EROFS if read_only else errno.EACCES if not os.access(there, os.W_OK | os.X_OK) else 0
    except OSError as error:
        code = error.errno or errno.EIO
    if code:
        raise output_error(job, OSError(code, os.strerror(code)))


SMALL_DISK_BYTES = 256 << 20


def _space_of_all(plans: Sequence[SlidePlan], count: int, job: Path, tile_bytes: Mapping[str, int]) -> Space:
    sums: PlanTotals = total(plans)
    share = count / len(plans)
    tiles = {label: round(number * share) for label, number in sums.tiles.items()}
    return SpaceCount(job).space(PlanTotals(slides=count, tiles=tiles), tile_bytes)


def kept_share(plans: Iterable[SlidePlan]) -> dict[str, float]:
    """By label, how many of the covering tiles hold tissue."""
    covering: dict[str, int] = {}
    tiles: dict[str, int] = {}
    for plan in plans:
        for label, number in plan.covering.items() if not plan.problem else ():
            covering[label] = covering.get(label, 0) + number
            tiles[label] = tiles.get(label, 0) + plan.tiles[label]
    return {label: tiles[label] / number for label, number in covering.items() if number}
