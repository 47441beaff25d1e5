"""``wsi-pipe verify`` and ``status``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_notes, print_table

__all__ = ["status", "verify"]


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
            left = sum(item.action == "left" for item in repairs)
            more = f", {left} stale ones left for the next run to bring up to date" if left else ""
            click.echo(f"{len(repairs) - left} files put aside{more}; run again to make what is missing")
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
    click.echo(
        f"{len(findings)} slides checked ({', '.join(f'{n} {s}' for s, n in counts.items())}), {len(wrong)} wrong"
    )
    return EXIT_FAILED if wrong else 0


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(job: Path, as_json: bool) -> int:
    """Show how far JOB is: done, empty, failed, waiting; while a run is at work also its pace and the hours left.

    Exit code 1 when slides failed.
    """
    from wsi_pipe.care import job_status

    state = job_status(job)
    if as_json:
        print_json(dataclasses.asdict(state))
        return EXIT_FAILED if state.failed else 0
    rows = [[name, f"{getattr(state, name):,}"] for name in ("slides", "done", "empty", "failed", "waiting")]
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
    if state.failures:
        click.echo()
        print_table(
            {"failed slide": "left", "stage": "left", "cause": "left", "remedy": "left"},
            ([o.slide_id, o.stage or "", o.reason or "", o.remedy or ""] for o in state.failures),
        )
    return EXIT_FAILED if state.failed else 0
