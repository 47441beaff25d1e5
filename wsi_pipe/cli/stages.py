"""``wsi-pipe segment``, ``tile``, ``extract``, ``assemble`` and ``run``: each takes slides up to its stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipe import __version__
from wsi_pipe.cli import EXIT_FAILED, messages, raise_if_interrupted
from wsi_pipe.cli.display import LogLines, RunDisplay, print_json, print_outcomes
from wsi_pipe.cli.options import (
    collect_entries,
    extract_options,
    job_option,
    primary_option,
    segment_options,
    settings_from,
    slide_options,
    tile_options,
    where_from,
    where_options,
)
from wsi_pipe.config import JobSettings, to_mapping
from wsi_pipe.cores import available_cores
from wsi_pipe.errors import ConfigError, EncoderError, JobError, OutputError, WorkerError, WsiPipeError
from wsi_pipe.files import remove_partial_files
from wsi_pipe.job import JobPaths, open_job, read_outcomes, utc_now, write_failures
from wsi_pipe.job.left_out import note_passed_over
from wsi_pipe.job.private import job_salt, told
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.masking import has_secret
from wsi_pipe.outcome import SlideOutcome, Stage
from wsi_pipe.override import flattened
from wsi_pipe.slides.passed_over import PassedOver

if TYPE_CHECKING:
    from wsi_pipe.execute import Where
    from wsi_pipe.job.changes import Change

__all__ = ["assemble", "extract", "run", "segment", "tile"]

REPORT = "report.html"
REPORTED_AT_ONCE = 1000
"""Slides of a job whose report is brought up to date where the run is interrupted."""
TELL_S = 1.0
"""How often at most a run that resumes says how many slides it found valid."""


def _run_until(
    until: Stage,
    values: dict[str, Any],
    after: Callable[[JobPaths, JobSettings, list[SlideEntry]], int] | None = None,
    *,
    report: bool = False,
) -> int:
    """Parse, process, print; the exit code. after: what a run that was not stopped does at its end; how many slides
    failed in it."""
    from wsi_pipe.job.changes import call_of, note_changes, refuse_stale
    from wsi_pipe.job.dispatch import check_folder, dispatch
    from wsi_pipe.job.index import compact
    from wsi_pipe.job.lock import hold_job
    from wsi_pipe.job.replaced import file_weights, other_weights, refuse_unfit
    from wsi_pipe.job.run import load_encoders
    from wsi_pipe.plan import bytes_per_tile, refuse_bad_encoders, refuse_lack_of_room

    job: Path = values["job"]
    _look_at_folder(job)
    settings = settings_from(values, job, values["config"])
    where = where_from(values)
    if values["salt"] and not settings.anonymise:
        raise ConfigError("--salt needs --anonymise", remedy="give both, or leave out --salt")
    salt = job_salt(job, values["salt"]) if settings.anonymise else None
    passed_over = PassedOver()
    entries = collect_entries(values, job, passed_over, salt=salt)
    call = call_of(job, settings, entries, part=bool(values["only"] or values["limit"]))
    if not settings.redo:
        refuse_unfit(job, call)
    settings, entries = call.settings, call.entries
    encoders = None
    if until in ("extract", "assemble"):
        # What is wrong with encoders or room stops here, before any work; other processes load their own encoders.
        refuse_bad_encoders(settings, fetch=where.scheduler is None and not where.here)
        if where.here:
            encoders = load_encoders(settings)
        if not settings.redo:
            hashes = {name: encoder.info.weights_sha256 for name, encoder in (encoders or {}).items()}
            refuse_stale(job, other_weights(job, call, hashes.get if encoders else file_weights()))
        dims = {name: encoder.info.dim for name, encoder in encoders.items()} if encoders else None
        refuse_lack_of_room(entries, settings, job, bytes_per_tile(settings, dims) if dims else None)
    outcomes: list[SlideOutcome] = []
    start = time.perf_counter()
    stopped: WsiPipeError | None = None
    unwritten: OutputError | None = None
    unchanged, told_at, failed_after = 0, start, 0
    about = {"started_utc": utc_now(), "slides": len(entries), "until": until}
    with hold_job(job, about) as tell, LogLines(values["log_json"]) as log:
        paths = open_job(job, call.stored, entries, salt=salt)
        note_changes(paths, call.changes)
        _show_changes(call.changes, paths)
        _tell_settings(settings, paths, where)
        if values["sources"] and not settings.anonymise:
            # The names of files that were passed over name people as slides' do.
            note_passed_over(paths, passed_over)
        _tell_secrets(entries, paths)
        compact(paths)
        # Of a run that was killed: nobody else writes here now.
        remove_partial_files(job, paths.written)
        log.event("start", **about)
        with RunDisplay(len(entries), quiet=values["as_json"] or values["log_json"] == "-") as display:
            results = dispatch(
                entries,
                settings,
                paths,
                where,
                until=until,
                encoders=encoders,
                keep_features=values.get("keep_features", True),
                progress=display.progress,
            )
            try:
                for outcome in results:
                    raise_if_interrupted()
                    outcomes.append(outcome)
                    display.finished(outcome)
                    unchanged += outcome.nothing_new
                    if outcome.nothing_new and time.perf_counter() - told_at > TELL_S:
                        told_at = time.perf_counter()
                        tell(unchanged=unchanged)
                    log.event("slide", **outcome.to_json())
                tell(unchanged=unchanged)
            except (JobError, EncoderError) as error:
                stopped = error
            except KeyboardInterrupt:
                # Ends workers and reading threads now, not when the garbage collector comes by.
                results.close()
                remove_partial_files(job, paths.written)
                with contextlib.suppress(OutputError):
                    check_folder(paths)
                    # The report of a large job takes longer than who ends a run waits.
                    _write_end(paths, call.stored, report and len(entries) <= REPORTED_AT_ONCE)
                raise
            finally:
                results.close()
        if any(outcome.error in ("TaskTimeoutError", "WorkerError") for outcome in outcomes):
            # Processes that were ended may have left files half-written.
            remove_partial_files(job, paths.written)
        if stopped:
            # Where the folder cannot be written, the error that says so is already on its way.
            with contextlib.suppress(OutputError):
                check_folder(paths)
                _write_end(paths, call.stored, report)
        else:
            try:
                _write_end(paths, call.stored, report)
            except OutputError as error:
                # The slides are done all the same, and are told of.
                unwritten = error
            if after:
                done = {outcome.slide_id for outcome in outcomes if outcome.status == "done"}
                failed_after = after(paths, settings, [entry for entry in entries if entry.slide_id in done])
        log.event("end", seconds=time.perf_counter() - start, stopped=str(stopped) if stopped else None)
    if stopped and not outcomes and isinstance(stopped, (EncoderError, WorkerError)):
        # No encoder, or no scheduler: nothing could be done.
        raise stopped
    written = {"report": paths.root / REPORT} if report and not unwritten else {}
    _print(values["as_json"], settings, entries, outcomes, time.perf_counter() - start, stopped, written)
    if stopped:
        messages.error("wsi-pipe", str(stopped))
    if unwritten:
        messages.error(
            "wsi-pipe", f"the slides are through, but {unwritten}; then write it with: wsi-pipe report {job}"
        )
    failed = failed_after or any(outcome.status == "failed" for outcome in outcomes)
    return EXIT_FAILED if stopped or unwritten or failed else 0


def _look_at_folder(job: Path) -> None:
    """Refuse a folder that holds files and is no job, before anything is read or written in it."""
    from wsi_pipe.job.ownership import claim_job

    foreign = claim_job(job, make=False)
    if foreign:
        shown = ", ".join(str(path) for path in foreign[:5]) + (f" and {len(foreign) - 5} more" if foreign[5:] else "")
        messages.note(
            f"{job} was made by an earlier version and is marked as a job now; of what lies in it, this program did "
            f"not make {shown}: left as it is"
        )


def _tell_settings(settings: JobSettings, paths: JobPaths, where: Where) -> None:
    """With -v: what the run does, as far as it is not as always."""
    if messages.level() <= 0:
        return
    place = where.scheduler or (f"{where.workers} processes" if where.workers > 1 else "this process")
    messages.more(f"wsi-pipe {__version__}, job {paths.root}, in {place}, {available_cores()} cores")
    usual = flattened(JobSettings())
    for key, value in flattened(settings).items():
        if value != usual.get(key):
            messages.more(f"  {key} = {value}")


def _tell_secrets(entries: list[SlideEntry], paths: JobPaths) -> None:
    count = sum(has_secret(entry.path) for entry in entries)
    if count:
        messages.warning(
            f"{count} URLs hold a password or a token: they are kept in {paths.identities}, for you alone, to go on "
            "with; everywhere else they are masked"
        )


MOST_SHOWN = 20


def _show_changes(changes: Sequence[Change], paths: JobPaths) -> None:
    """What becomes another by this call, old -> new, before the work."""
    moved = [change for change in changes if change.what == "path"]
    others = [change for change in changes if change.what != "path"]
    for change in others[:MOST_SHOWN]:
        click.echo(f"changed: {change}", err=True)
    if len(others) > MOST_SHOWN:
        click.echo(f"changed: {len(others) - MOST_SHOWN:,} more values, see {paths.changes}", err=True)
    if moved:
        click.echo(f"moved: {len(moved):,} slides, such as {moved[0]}", err=True)


def _write_end(paths: JobPaths, settings: JobSettings, report: bool) -> None:
    """What is written at the end of a run, also of one that was stopped: failures.csv, and the report."""
    write_failures(paths)
    if report:
        from wsi_pipe.report import write_report

        write_report(paths.root, list(read_outcomes(paths.root).values()), settings)


def _print(
    as_json: bool,
    settings: JobSettings,
    entries: list[SlideEntry],
    outcomes: list[SlideOutcome],
    seconds: float,
    stopped: WsiPipeError | None,
    written: Mapping[str, Path],
) -> None:
    if as_json:
        print_json(
            {
                "settings": to_mapping(settings),
                "slides": len(entries),
                "seconds": seconds,
                "error": str(stopped) if stopped else None,
                "outcomes": [outcome.to_json() for outcome in outcomes],
            }
        )
    else:
        print_outcomes(outcomes, seconds, {what: path for what, path in written.items() if path.is_file()})


@click.command()
@slide_options
@job_option
@where_options
@segment_options
def segment(**values: Any) -> int:
    """Find tissue on SLIDES; write a GeoJSON mask and a picture of each into JOB.

    Masks lie in JOB/tissue, in level-0 pixels, as QuPath opens them. Give an edited one back with --mask, or in the
    column mask of a CSV.
    """
    return _run_until("segment", values)


@click.command()
@slide_options
@job_option
@where_options
@segment_options
@tile_options
@primary_option
@click.option(
    "--save-tiles",
    type=click.Choice(["jpg", "png", "webp", "shards"]),
    help="Write tiles as images too, a file each, or in tar shards that WebDataset reads.",
)
@click.option("--save-most", type=click.IntRange(1), metavar="N", help="With --save-tiles: at most N a grid.  [all]")
@click.option("--shard-size", type=click.IntRange(1), metavar="N", help="Tiles a shard.  [10000]")
@click.option("--shard-images", type=click.Choice(["jpg", "png", "webp"]), help="Form of the images in shards.  [jpg]")
@click.option("--image-quality", type=click.IntRange(1, 100), help="Of JPEG and WebP.  [90]")
def tile(
    save_tiles: str | None,
    save_most: int | None,
    shard_size: int | None,
    shard_images: str | None,
    image_quality: int | None,
    **values: Any,
) -> int:
    """Lay aligned tile grids on SLIDES at every resolution asked for; write them and a picture into JOB.

    Slides that have no mask yet are segmented first.
    """
    if save_tiles is None and (save_most or shard_size or shard_images or image_quality):
        raise click.UsageError("--save-most, --shard-size, --shard-images and --image-quality need --save-tiles")
    if save_tiles != "shards" and (shard_size or shard_images):
        raise click.UsageError("--shard-size and --shard-images need --save-tiles shards")
    if not save_tiles:
        return _run_until("tile", values)

    def save(paths: JobPaths, settings: JobSettings, done: list[SlideEntry]) -> int:
        from wsi_pipe.job.images import TileImages, save_tile_images

        shards = save_tiles == "shards"
        how = TileImages(
            (shard_images or "jpg") if shards else str(save_tiles),
            image_quality or 90,
            save_most,
            (shard_size or 10_000) if shards else None,
        )
        failed = 0
        for entry in done:
            raise_if_interrupted()
            try:
                counts = save_tile_images(entry, settings, paths, how, check=raise_if_interrupted)
            except OutputError:
                raise
            except WsiPipeError as error:
                click.echo(f"{entry.slide_id}: its tiles are not saved: {told(entry, str(error))}", err=True)
                failed += 1
                continue
            saved = ", ".join(f"{count:,} at {label}" for label, count in counts.items() if count)
            click.echo(f"{entry.slide_id}: tiles saved: {saved or 'all were there'}", err=True)
        return failed

    return _run_until("tile", values, save)


@click.command()
@slide_options
@job_option
@where_options
@segment_options
@tile_options
@primary_option
@extract_options
def extract(**values: Any) -> int:
    """Compute the features of all tiles of SLIDES into JOB/features.

    Slides without mask or grids get them first; features that JOB has already are not computed again.
    """
    return _run_until("extract", values)


@click.command()
@slide_options
@job_option
@where_options
@segment_options
@tile_options
@primary_option
@extract_options
@click.option("--keep-features", is_flag=True, help="Keep JOB/features once the bags hold them.")
def assemble(**values: Any) -> int:
    """Put grids and features together: one verified HDF5 bag a slide in JOB/bags.

    Whatever is missing of the earlier stages is done first.
    """
    return _run_until("assemble", values)


@click.command()
@slide_options
@job_option
@where_options
@segment_options
@tile_options
@primary_option
@extract_options
@click.option("--keep-features", is_flag=True, help="Keep JOB/features once the bags hold them.")
@click.option("--report/--no-report", default=True, show_default=True, help="Write JOB/report.html.")
def run(report: bool, **values: Any) -> int:
    """Segment, tile, extract and assemble SLIDES into JOB.

    Run again, it does only what is missing, and adds: encoders and resolutions that are left out stay as they are.
    A change that would make finished work stale ends the call before any work, unless --redo says to make it anew.

    \b
    wsi-pipe run archive/ -o job
    wsi-pipe run archive/ -o job -r 20x -r 5x -e 20x=uni -e 5x=lr.safetensors
    """
    return _run_until("assemble", values, report=report)
