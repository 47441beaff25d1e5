"""``wsi-pipe verify`` and ``status``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_failures, print_json, print_notes, print_table
from wsi_pipe.cli.options import RESOLUTIONS, flat, parse_encoders
from wsi_pipe.geometry import level_label

if TYPE_CHECKING:
    from wsi_pipe.care import JobStatus

__all__ = ["prune", "status", "verify"]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True), metavar="JOB|BAG...")
@click.option("--repair", is_flag=True, help="Move what is broken or foreign into JOB/quarantine, to be made anew.")
@click.option(
    "--no-sources", is_flag=True, help="Look at bags only, not at the slides and encoder files that they were made of."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(paths: tuple[Path, ...], repair: bool, no_sources: bool, as_json: bool) -> int:
    """Check every bag of a job directory, or single bags; exit code 1 when something is wrong.

    Checked: the schema, shapes and types, finite features, tiles inside their parents, attention, links, and of a job
    that mask, grids and features belong together, and that local slides and encoder files are those that the bags were
    made of. A bag whose slide or encoder was replaced is stale: the next run makes what does not fit any more. Slides
    that are there but cannot be opened are named, and are not held against their bags.
    """
    from wsi_pipe.care import quarantine_of, repair_job, verify_bags, verify_job

    if repair:
        repairs = [item for path in paths for item in repair_job(path, sources=not no_sources)]
        if as_json:
            print_json([dataclasses.asdict(item) for item in repairs])
        else:
            for item in repairs:
                done = f"moved to {item.moved_to}" if item.moved_to else item.action
                click.echo(f"{item.path}: {'; '.join(item.problems)}: {done}")
            count = Counter[str](item.action for item in repairs)
            kept = {
                "left": "stale ones left for the next run, or for run --redo, to bring up to date",
                "not ours": "that are not this job's left",
                "unseen": "that cannot be looked at left as they are",
            }
            more = "".join(f", {count[action]} {words}" for action, words in kept.items() if count[action])
            aside = count["moved"] + count["deleted"]
            click.echo(f"{aside} files put aside{more}; run again to make what is missing")
            for path in paths:
                held = quarantine_of(path)
                if held.files:
                    click.echo(
                        f"{held.folder} holds {held.files} files, {held.size_bytes / 1e6:,.1f} MB; nothing reads them: "
                        "delete the folder when you need them no more"
                    )
        return EXIT_FAILED if repairs else 0
    bags = [path for path in paths if path.is_file()]
    findings = [*verify_bags(bags)]
    for folder in (path for path in paths if path.is_dir()):
        inside = sorted(folder.glob("*.h5"))
        findings += verify_bags(inside) if inside else verify_job(folder, sources=not no_sources)
    wrong = [finding for finding in findings if finding.problems]
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
        return EXIT_FAILED if wrong else 0
    for finding in wrong:
        print_table({finding.slide_id: "left", finding.status: "left"}, ([finding.path, p] for p in finding.problems))
    for finding in findings:
        for remark in finding.remarks:
            click.echo(f"{finding.slide_id}: {remark}")
    counts = {status: sum(f.status == status for f in findings) for status in dict.fromkeys(f.status for f in findings)}
    unseen = sum(finding.unseen for finding in findings)
    click.echo(
        f"{len(findings)} slides checked ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{len(wrong) - unseen} wrong" + (f", {unseen} cannot be looked at" if unseen else "")
    )
    return EXIT_FAILED if wrong else 0


SHOWN = 40


def _show_resolutions(state: JobStatus, each: bool) -> None:
    """Every slide's um per pixel of a small job; of a large one how many have which, and those that stand alone."""
    click.echo()
    outliers = set(state.mpp_outliers)
    if each or state.slides <= SHOWN:
        rows = [
            [
                item.slide_id,
                "unknown" if item.mpp is None else "x".join(f"{v:.4g}" for v in dict.fromkeys(item.mpp)),
                item.source or "none",
                "stands alone in this job" if item.slide_id in outliers else "",
            ]
            for item in state.resolutions
        ]
        print_table({"slide": "left", "um/px": "left", "from": "left", " ": "left"}, rows)
        return
    groups = Counter(
        ("unknown" if item.mpp is None else f"{item.mpp[0]:.2g}", item.source or "none") for item in state.resolutions
    )
    print_table(
        {"um/px, about": "left", "from": "left", "slides": "right"},
        ([mpp, source, f"{count:,}"] for (mpp, source), count in groups.most_common(SHOWN)),
    )
    for item in state.resolutions:
        if item.slide_id in outliers and item.mpp is not None:
            click.echo(f"{item.slide_id}: {item.mpp[0]:.4g} um/px ({item.source}) stands alone in this job")


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="JOB")
@click.option("--each", is_flag=True, help="Show every slide's resolution, also of a large job.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(job: Path, each: bool, as_json: bool) -> int:
    """Show how far JOB is: done, empty, failed, stale, waiting; while a run is at work also pace and hours left.

    Stale is finished work that does not fit the job's settings or the slide's file any more. Also shown: each slide's
    um per pixel and who states it, and what an earlier version or random weights made. Exit code 1 when slides failed.
    """
    from wsi_pipe.care import job_status

    state = job_status(job)
    if as_json:
        print_json(dataclasses.asdict(state))
        return EXIT_FAILED if state.failed else 0
    rows = [[name, f"{getattr(state, name):,}"] for name in ("slides", "done", "empty", "failed", "stale", "waiting")]
    if state.half_done:
        rows.append(["half done", f"{state.half_done:,}, which the next run continues"])
    if state.older:
        makers = ", ".join(dict.fromkeys(state.made_by.values()))
        rows.append(["of an earlier version", f"{state.older:,}, made by {makers}; kept, --redo makes them anew"])
    if state.random:
        rows.append(["random weights", f"{state.random:,} slides hold features that mean nothing"])
    if state.run is None:
        rows.append(["run", "none at work"])
    else:
        rows.append(
            ["run", f"process {state.run.get('pid')} on {state.run.get('host')} since {state.run.get('started_utc')}"]
        )
        if state.slides_per_hour is not None and state.hours_left is not None:
            rows.append(["pace", f"{state.slides_per_hour:,.0f} slides/h, {state.hours_left:.1f} h left"])
        if state.unchanged_in_run:
            rows.append(["unchanged", f"{state.unchanged_in_run:,} slides were right already"])
    print_table({"": "left", " ": "left"}, rows)
    print_notes(state.noted)
    _show_resolutions(state, each)
    if state.why_stale:
        click.echo()
        stale = list(state.why_stale.items())
        print_table({"stale slide": "left", "why": "left"}, ([slide_id, why] for slide_id, why in stale[:SHOWN]))
        click.echo("--redo makes them anew; nothing is, and nothing is lost, without it")
    print_failures(state.failures)
    return EXIT_FAILED if state.failed else 0


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="JOB")
@click.option(
    "-e",
    "--encoder",
    "encoders",
    multiple=True,
    metavar="[RES=]NAME",
    help="Features of this encoder, at all resolutions or at one; repeatable.",
)
@click.option(
    "-r",
    "--resolution",
    "resolutions",
    type=RESOLUTIONS,
    multiple=True,
    callback=flat,
    metavar="RES,RES",
    help="Whole resolutions; repeatable.",
)
@click.option("--random", is_flag=True, help="All features of random weights.")
@click.option("--yes", is_flag=True, help="Do it; without, what would go is listed and nothing is done.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prune(
    job: Path, encoders: tuple[str, ...], resolutions: tuple[float, ...], random: bool, yes: bool, as_json: bool
) -> int:
    """Take features or whole resolutions out of JOB: its bags, grids and settings. Nothing else ever does.

    \b
    wsi-pipe prune job -e uni              list what would go
    wsi-pipe prune job -e uni --yes        do it
    wsi-pipe prune job -r 10x --yes
    """
    from wsi_pipe.care import Wish, prune_job, prune_list

    if not (encoders or resolutions or random):
        raise click.UsageError("say what is to go: --encoder, --resolution or --random")
    named = tuple((label, name) for label, names in parse_encoders(encoders).items() for name in names)
    wish = Wish(named, tuple(level_label(mpp) for mpp in resolutions), random)
    found = prune_job(job, wish) if yes else prune_list(job, wish)
    wrong = [item for item in found if item.problem]
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return EXIT_FAILED if wrong else 0
    places: Counter[str] = Counter()
    for item in found:
        if not item.problem:
            places.update(item.features)
            places.update(f"{label} (grid)" for label in item.levels)
    print_table({"goes": "left", "slides": "right"}, ([place, f"{count:,}"] for place, count in sorted(places.items())))
    for item in wrong:
        click.echo(f"{item.slide_id}: {item.problem}", err=True)
    size = sum(item.size_bytes for item in found if not item.problem) / 1e6
    many = f"{len(found) - len(wrong):,} slides, about {size:,.1f} MB"
    click.echo(f"{many}: gone" if yes else f"{many}: nothing was done; --yes does it")
    return EXIT_FAILED if wrong else 0
