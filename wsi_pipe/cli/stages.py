"""``wsi-pipe segment``, ``tile``, ``extract``, ``assemble`` and ``run``: each takes slides up to its stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipe.cli import EXIT_FAILED, raise_if_interrupted
from wsi_pipe.cli.display import LogLines, RunDisplay, print_json, print_outcomes
from wsi_pipe.cli.options import (
    extract_options,
    job_option,
    segment_options,
    slide_options,
    tile_options,
    where_options,
)
from wsi_pipe.config import JobSettings, to_mapping
from wsi_pipe.errors import WsiPipeError
from wsi_pipe.job import JobPaths
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome, Stage

if TYPE_CHECKING:
    from wsi_pipe.job.changes import Call
    from wsi_pipe.running import Watch

__all__ = ["assemble", "extract", "run", "segment", "tile"]


def _run_until(
    until: Stage,
    values: dict[str, Any],
    after: Callable[[JobPaths, JobSettings, list[SlideEntry]], int | None] | None = None,
    *,
    report: bool = False,
) -> int:
    """Parse, process, print; the exit code. after: what a run that was not stopped does at its end."""
    from wsi_pipe.running import run_stages

    job: Path = values["job"]
    with contextlib.ExitStack() as stack:
        watch = _shown(values, stack)
        end = run_stages(job, values, until=until, report=report, after=after, watch=watch)
    _print(values["as_json"], end.settings, end.entries, end.outcomes, end.seconds, end.stopped)
    if end.stopped:
        click.echo(f"wsi-pipe: error: {end.stopped}", err=True)
    if end.unwritten:
        click.echo(
            f"wsi-pipe: error: the slides are through, but {end.unwritten}; then write it with: wsi-pipe report {job}",
            err=True,
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
            click.echo(line, err=True)

        def begun(self, call: Call, paths: JobPaths, about: Mapping[str, Any]) -> None:
            self.log = stack.enter_context(LogLines(values["log_json"]))
            for line in begin_lines(call, paths):
                self.say(line)
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


def _print(
    as_json: bool,
    settings: JobSettings,
    entries: list[SlideEntry],
    outcomes: list[SlideOutcome],
    seconds: float,
    stopped: WsiPipeError | None,
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
        print_outcomes(outcomes, seconds)


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
@click.option("--save-tiles", type=click.Choice(["png", "jpg"]), help="Write tiles as images too, to look at.")
@click.option("--save-most", type=click.IntRange(1), default=200, show_default=True, help="At most so many a grid.")
def tile(save_tiles: str | None, save_most: int, **values: Any) -> int:
    """Lay aligned tile grids on SLIDES at every resolution asked for; write them and a picture into JOB.

    Slides that have no mask yet are segmented first.
    """
    if not save_tiles:
        return _run_until("tile", values)

    def save(paths: JobPaths, settings: JobSettings, done: list[SlideEntry]) -> None:
        from wsi_pipe.job.images import save_tile_images

        for entry in done:
            save_tile_images(entry, settings, paths, save_tiles, save_most)

    return _run_until("tile", values, save)


@click.command()
@slide_options
@job_option
@where_options
@segment_options
@tile_options
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
