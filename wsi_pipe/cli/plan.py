"""``wsi-pipe plan``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from wsi_pipe.cli import EXIT_FAILED, messages
from wsi_pipe.cli.display import print_failures, print_json, print_table
from wsi_pipe.cli.options import (
    changes_option,
    collect_entries,
    extract_options,
    part_options,
    segment_options,
    settings_from,
    slide_options,
    tile_options,
)
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import NotOursError, OutputError, StaleWorkError, WsiPipeError
from wsi_pipe.job import JobPaths
from wsi_pipe.job.changes import duration
from wsi_pipe.job.private import job_salt
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["plan"]

SHOWN = 40


@click.command()
@slide_options
@segment_options
@tile_options
@extract_options
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="TOML", help="Settings file.")
@changes_option
@click.option(
    "--sample", type=click.IntRange(0), default=20, show_default=True, help="Find the tissue of so many slides."
)
@click.option("--calibrate", "trial", type=click.IntRange(0), default=2, show_default=True, help="Time so many slides.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Workers to reckon with.")
@click.option(
    "-o",
    "--out",
    "job",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="JOB",
    help="Where the run would write: is there room on that disk, what is there already, and with which settings?  "
    "[the current folder, as a new job]",
)
@click.option("--redo", is_flag=True, help="As of run: make finished work anew where it is stale.")
@part_options
@click.option("--metadata", type=click.Path(path_type=Path, dir_okay=False), help="Keep what slides are in this file.")
@click.option(
    "--each",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write every slide's plan as JSON lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    config: Path | None,
    sample: int,
    trial: int,
    workers: int,
    job: Path | None,
    redo: bool,
    metadata: Path | None,
    each: Path | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Say what a run over SLIDES would take, and what would fail with which remedy; heavy work is not done.

    Every slide is opened, and none is copied: of one behind a URL that is read from a copy it is said that it needs
    staging. The tissue of a sample is found, and its share stands for the others'. Hours come from reading and encoding
    some tiles of a few slides on this machine. Where the disk of JOB has no room for what a run writes, a warning says
    how much is lacking; with --calibrate 0 that is told only where all encoders are known without loading them. What
    would end the run before its first tile (an encoder that is not to be had, finished work that would be stale, no
    room) is said, and tiles are counted all the same. Exit code 1 when a run would stop, or slides would fail.
    """
    from wsi_pipe.job.changes import call_of, refuse_stale
    from wsi_pipe.job.ownership import claim_job, is_job, refuse_foreign
    from wsi_pipe.job.replaced import file_weights, other_weights, refuse_unfit
    from wsi_pipe.plan import (
        MetadataCache,
        SpaceCount,
        calibrate,
        encoder_problems,
        exact_tiles,
        kept_share,
        known_bytes_per_tile,
        lack_of_room,
        refuse_read_only,
        spread_sample,
        survey,
        total,
    )

    problems: list[WsiPipeError] = []
    held = job
    if job is not None:
        with _noted(problems):
            claim_job(job, make=False)
        # What lies in a folder of others is none of ours.
        held = job if not problems and is_job(job) else None
        with _noted(problems):
            refuse_read_only(job)
    settings = settings_from({**values, "redo": redo}, held, config)
    passed_over = PassedOver()
    salt = job_salt(held) if held is not None and settings.anonymise else None
    entries = collect_entries(values, held, passed_over, salt=salt)
    if held is not None:
        call = call_of(held, settings, entries, part=bool(values["only"] or values["limit"]))
        settings, entries = call.settings, call.entries
    missing = encoder_problems(settings)
    # In the order in which a run would come upon them.
    if held is not None and not redo:
        with _noted(problems):
            refuse_unfit(held, call)
    problems += missing
    if held is not None and not redo and not missing:
        with _noted(problems):
            refuse_stale(held, other_weights(held, call, file_weights()))
    if held is not None:
        with _noted(problems):
            refuse_foreign(JobPaths(held), (entry.slide_id for entry in entries))
    by_id = {entry.slide_id: entry for entry in entries}
    room = SpaceCount(job or Path())
    with MetadataCache(metadata) as cache:
        look = partial(survey, settings=settings, cache=cache, job=JobPaths(held) if held is not None else None)
        tried = [p for p in look(spread_sample(entries, sample)) if not p.problem and not p.note]
        exact = {p.slide_id: exact_tiles(by_id[p.slide_id], p, settings) for p in tried}
        kept = kept_share(exact.values())
        lines = each.open("w", encoding="utf-8") if each else None
        shown: list[Any] = []

        def see(one: Any) -> None:
            room.see(one)
            if len(shown) < SHOWN:
                shown.append(one)
            if lines:
                lines.write(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n")

        try:
            plans = (exact.get(p.slide_id, p) for p in look(entries, kept=kept))
            totals = total(plans, see)
        finally:
            if lines:
                lines.close()
    rates = None
    if trial and not missing:
        from wsi_pipe.job.run import load_encoders

        works = [by_id[p.slide_id] for p in exact.values() if not p.problem and any(p.tiles.values())]
        rates = calibrate(spread_sample(works, trial), settings, load_encoders(settings))
    tile_bytes = rates.bytes_per_tile if rates else known_bytes_per_tile(settings)
    notes = [] if missing else _downloads(settings)
    space, unchecked = None, "not checked: how much encoders give is not known without --calibrate"
    if tile_bytes is not None:
        try:
            space = room.space(totals, tile_bytes)
        except OutputError as error:
            # The plan took hours, perhaps, and is right all the same.
            unchecked = f"not checked: {error.message}"
    if space is not None and (lacking := lack_of_room(space)):
        problems.append(lacking)
    if as_json:
        result = dataclasses.asdict(totals) | {"calibration": dataclasses.asdict(rates) if rates else None}
        result["passed_over"] = passed_over.to_json()
        if rates:
            result |= {"hours": rates.hours(totals, workers), "gigabytes": rates.gigabytes(totals), "workers": workers}
        result["stops"] = [str(error) for error in problems]
        result["notes"] = notes
        result["space"] = dataclasses.asdict(space) | {"lacking_gb": space.lacking_gb} if space else None
        print_json(result)
    else:
        disk = (
            f"{space.needed_gb:,.3f} GB in all, {space.free_gb:,.1f} GB free at {space.folder}" if space else unchecked
        )
        _show(shown, totals, rates, workers, disk)
    if space is None:
        messages.warning(f"room on the disk: {unchecked}")
    for note in notes:
        messages.note(note)
    for problem in problems:
        click.echo(f"a run would stop before its first tile: {problem}", err=True)
    return EXIT_FAILED if totals.failing or problems else 0


@contextlib.contextmanager
def _noted(problems: list[WsiPipeError]) -> Iterator[None]:
    try:
        yield
    except (StaleWorkError, NotOursError, OutputError) as error:
        problems.append(error)


def _downloads(settings: JobSettings) -> list[str]:
    from wsi_pipe.encoders.availability import to_download

    if settings.extract.random_weights:
        return []
    names = dict.fromkeys(n for spec in settings.tile.specs for n in settings.extract.encoders_of(spec.label))
    pages = {name: to_download(name) for name in names}
    return [f"weights of encoder {name} will be downloaded from {page} first" for name, page in pages.items() if page]


def _show(shown: list[Any], totals: Any, rates: Any, workers: int, disk: str) -> None:
    labels = list(totals.tiles)
    columns = {"slide": "left", "mpp": "left", "from": "left"} | {f"tiles {label}": "right" for label in labels}
    print_table(columns | {" ": "left"}, (_row(p, labels) for p in shown))
    if totals.slides > len(shown):
        click.echo(f"... and {totals.slides - len(shown):,} more (--each FILE writes them all)")
    click.echo()
    empty = f"{totals.empty:,} of {totals.counted:,} looked at are empty"
    rows = [["slides", f"{totals.slides:,}: {len(totals.failing):,} will fail, {empty}"]]
    if totals.staging:
        rows.append(
            ["needs staging", f"{totals.staging:,}, copied before they are read: not in tiles, time and gigabytes"]
        )
    rows += [[f"tiles at {label}", f"{count:,}"] for label, count in totals.tiles.items()]
    if rates and rates.slides:
        each = ", ".join(f"{1 / s:,.0f} tiles/s at {label}" for label, s in rates.tile_s.items() if s)
        rows.append(
            ["measured", f"{rates.slide_s:.2f} s a slide before its tiles; {each} ({rates.tiles:,} tiles tried)"]
        )
        who = "1 worker" if workers == 1 else f"{workers} workers that share {rates.cores} cores"
        rows.append(["time", f"{duration(rates.hours(totals, workers) * 3600)} on {who}"])
        rows.append(["gigabytes", f"{rates.gigabytes(totals):.3f} of bags"])
    rows.append(["disk", disk])
    print_table({"": "left", " ": "left"}, rows)
    # A share that is not mounted fails a whole archive, and is one cause.
    failing = [
        SlideOutcome(p.slide_id, "failed", reason=p.problem, remedy=p.remedy, path=p.path) for p in totals.failing
    ]
    print_failures(failing, verb="will fail", others="--each FILE writes them all")


def _row(p: Any, labels: list[str]) -> list[str]:
    mpp = "unknown" if p.mpp is None else f"{p.mpp[0]:.4g}"
    note = (
        "fails"
        if p.problem
        else p.note
        if p.note
        else (f"empty: {p.empty_reason}" if p.empty_reason else "")
        if p.counted
        else "estimated"
    )
    return [
        p.slide_id,
        mpp,
        p.mpp_source,
        *(f"{p.tiles[label]:,}" if label in p.tiles else "-" for label in labels),
        note,
    ]
