"""``wsi-pipe plan``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import (
    collect_entries,
    extract_options,
    segment_options,
    settings_from,
    slide_options,
    tile_options,
)
from wsi_pipe.errors import OutputError
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["plan"]

SHOWN = 40


@click.command()
@slide_options
@segment_options
@tile_options
@extract_options
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="TOML", help="Settings file.")
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
    default=Path(),
    metavar="JOB",
    help="Where the run would write: is there room on that disk?  [the current folder]",
)
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
    job: Path,
    metadata: Path | None,
    each: Path | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Say what a run over SLIDES would take, and what would fail with which remedy; heavy work is not done.

    Every slide is opened, and none is copied: of one behind a URL that is read from a copy it is said that it needs
    staging. The tissue of a sample is found, and its share stands for the others'. Hours come from reading and encoding
    some tiles of a few slides on this machine. Where the disk of JOB has no room for what a run writes, a warning says
    how much is lacking; with --calibrate 0 that is told only where all encoders are known without loading them. Exit
    code 1 when slides would fail.
    """
    from wsi_pipe.plan import (
        MetadataCache,
        SpaceCount,
        calibrate,
        exact_tiles,
        known_bytes_per_tile,
        spread_sample,
        survey,
        total,
    )

    settings = settings_from(values, None, config)
    passed_over = PassedOver()
    entries = collect_entries(values, passed_over=passed_over)
    by_id = {entry.slide_id: entry for entry in entries}
    room = SpaceCount(job)
    with MetadataCache(metadata) as cache:
        tried = [p for p in survey(spread_sample(entries, sample), settings, cache) if not p.problem and not p.note]
        exact = {p.slide_id: exact_tiles(by_id[p.slide_id], p, settings) for p in tried}
        kept = _share([p for p in exact.values() if not p.problem])
        lines = each.open("w", encoding="utf-8") if each else None
        shown: list[Any] = []

        def see(one: Any) -> None:
            room.see(one)
            if len(shown) < SHOWN:
                shown.append(one)
            if lines:
                lines.write(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n")

        try:
            plans = (exact.get(p.slide_id, p) for p in survey(entries, settings, cache, kept=kept))
            totals = total(plans, see)
        finally:
            if lines:
                lines.close()
    rates = None
    if trial:
        from wsi_pipe.job.run import load_encoders

        works = [by_id[p.slide_id] for p in exact.values() if not p.problem and any(p.tiles.values())]
        rates = calibrate(spread_sample(works, trial), settings, load_encoders(settings))
    tile_bytes = rates.bytes_per_tile if rates else known_bytes_per_tile(settings)
    space, unchecked = None, "not checked: how much encoders give is not known without --calibrate"
    if tile_bytes is not None:
        try:
            space = room.space(totals, tile_bytes)
        except OutputError as error:
            # The plan took hours, perhaps, and is right all the same.
            unchecked = f"not checked: {error.message}"
    if as_json:
        result = dataclasses.asdict(totals) | {"calibration": dataclasses.asdict(rates) if rates else None}
        result["passed_over"] = passed_over.to_json()
        if rates:
            result |= {"hours": rates.hours(totals, workers), "gigabytes": rates.gigabytes(totals), "workers": workers}
        result["space"] = dataclasses.asdict(space) | {"lacking_gb": space.lacking_gb} if space else None
        print_json(result)
    else:
        disk = (
            f"{space.needed_gb:,.3f} GB in all, {space.free_gb:,.1f} GB free at {space.folder}" if space else unchecked
        )
        _show(shown, totals, rates, workers, disk)
    if space is None:
        click.echo(f"warning: room on the disk: {unchecked}", err=True)
    if space and space.lacking_gb:
        there = f", of which {space.held_gb:,.1f} GB are there already" if space.held_gb >= 0.05 else ""
        click.echo(
            f"warning: a run would write about {space.needed_gb:,.1f} GB{there} and the disk of {space.folder} has "
            f"{space.free_gb:,.1f} GB free: {space.lacking_gb:,.1f} GB are lacking; free some space or give a "
            "folder on another disk with --out",
            err=True,
        )
    return EXIT_FAILED if totals.failing else 0


def _share(plans: list[Any]) -> dict[str, float]:
    """By label, how many of the covering tiles hold tissue, over the sample."""
    labels = dict.fromkeys(label for p in plans for label in p.covering)
    covering = {label: sum(p.covering[label] for p in plans) for label in labels}
    return {label: sum(p.tiles[label] for p in plans) / covering[label] for label in labels if covering[label]}


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
        who = f"{workers} worker{'s' if workers > 1 else ''} like this one"
        rows.append(["time", f"{_duration(rates.hours(totals, workers) * 3600)} on {who}"])
        rows.append(["gigabytes", f"{rates.gigabytes(totals):.3f} of bags"])
    rows.append(["disk", disk])
    print_table({"": "left", " ": "left"}, rows)
    if totals.failing:
        click.echo()
        print_table(
            {"will fail": "left", "cause": "left", "remedy": "left"},
            ([p.slide_id, p.problem, p.remedy or ""] for p in totals.failing[:SHOWN]),
        )


def _duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever says something."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"


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
