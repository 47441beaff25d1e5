"""``wsi-pipe segment``, ``tile``, ``extract``, ``assemble`` and ``run``: each takes slides up to its stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipe import __version__
from wsi_pipe.cli import EXIT_FAILED, messages, raise_if_interrupted
from wsi_pipe.cli.display import LogLines, RunDisplay, print_json, print_outcomes
from wsi_pipe.cli.options import (
    extract_options,
    job_option,
    primary_option,
    segment_options,
    settled,
    slide_options,
    tell,
    tile_options,
    where_options,
)
from wsi_pipe.config import JobSettings, to_mapping
from wsi_pipe.cores import available_cores
from wsi_pipe.errors import OutputError, WsiPipeError
from wsi_pipe.job import JobPaths
from wsi_pipe.job.private import told
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome, Stage
from wsi_pipe.override import flattened

if TYPE_CHECKING:
    from wsi_pipe.execute import Where
    from wsi_pipe.job.changes import Call
    from wsi_pipe.running import Watch

__all__ = ["assemble", "extract", "run", "segment", "tile"]

REPORT = "report.html"


def _run_until(
    until: Stage,
    values: dict[str, Any],
    after: Callable[[JobPaths, JobSettings, list[SlideEntry]], int | None] | None = None,
    *,
    report: bool = False,
) -> int:
    """Parse, process, print; the exit code. after: what a run that was not stopped does at its end; how many slides
    failed in it."""
    from wsi_pipe.running import run_stages

    job: Path = values["job"]
    values = settled(values)
    with contextlib.ExitStack() as stack:
        watch = _shown(values, stack)
        end = run_stages(job, values, until=until, report=report, after=after, watch=watch)
    written = {"report": job / REPORT} if report and not end.unwritten else {}
    _print(values["as_json"], end.settings, end.entries, end.outcomes, end.seconds, end.stopped, written)
    if end.stopped:
        messages.error("wsi-pipe", str(end.stopped))
    if end.unwritten:
        messages.error(
            "wsi-pipe", f"the slides are through, but {end.unwritten}; then write it with: wsi-pipe report {job}"
        )
    failed = end.failed_after or any(outcome.status == "failed" for outcome in end.outcomes)
    return EXIT_FAILED if end.stopped or end.unwritten or failed else 0


def _shown(values: dict[str, Any], stack: contextlib.ExitStack) -> Watch:
    """Shows a run on the terminal and in the log; what it opens is closed by ``stack``."""
    from wsi_pipe.running import Watch, begin_lines

    quiet = values["as_json"] or values["log_json"] == "-"

    class Shown(Watch):
        log = LogLines(None)
        display = RunDisplay(0, quiet=True)

        def say(self, line: str) -> None:
            tell(line)

        def begun(self, call: Call, paths: JobPaths, where: Where, about: Mapping[str, Any]) -> None:
            self.log = stack.enter_context(LogLines(values["log_json"]))
            for line in begin_lines(call, paths):
                self.say(line)
            _tell_settings(call.settings, paths, where)
            self.log.event("start", **about)

        @contextlib.contextmanager
        def working(self, slides: int) -> Iterator[Callable[[str, str, int], None]]:
            with RunDisplay(slides, quiet=quiet) as self.display:
                yield self.display.progress

        def finished(self, outcome: SlideOutcome) -> None:
            raise_if_interrupted()
            self.display.finished(outcome)
            self.log.event("slide", **outcome.to_json())

        def ended(self, seconds: float, stopped: WsiPipeError | None) -> None:
            self.log.event("end", seconds=seconds, stopped=str(stopped) if stopped else None)

    return Shown()


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
@click.option("--image-quality", type=click.IntRange(1, 100), metavar="QUALITY", help="Of JPEG and WebP.  [90]")
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
