"""``wsi-pipe view``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_pipe.cli.options import collect_entries, slide_options
from wsi_pipe.cli.signals import was_terminated
from wsi_pipe.errors import ConfigError, ManifestError

__all__ = ["view"]


@click.command()
@slide_options
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=0,
    help="Port on this machine's loopback.  [any that is free]",
)
@click.option("--open", "browser", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--export",
    "exported",
    metavar="ID",
    help="Write the slide of this id into one page, up to 5x and 15 MB, instead of serving.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="HTML",
    help="With --export: the file.  [ID.html]",
)
def view(port: int, browser: bool, exported: str | None, out: Path | None, **values: Any) -> None:
    """Look at the slides of a JOB, or at SLIDES, in the browser.

    Give the folder of a job to see outlines, grids, attention and other values of tiles on its slides. The page is
    served to this machine alone, under an address that is new each time, and changes nothing. Ctrl-C ends it.
    """
    from wsi_pipe.job import load_settings
    from wsi_pipe.view import Catalogue, serve, write_single_page

    sources = values["sources"]
    job = Path(sources[0]) if len(sources) == 1 and not values["manifest"] else None
    if job is not None and job.is_dir() and load_settings(job) is not None:
        catalogue = Catalogue.of_job(job)
    else:
        catalogue = Catalogue.of_slides(collect_entries(values))
    if not catalogue.slides:
        raise ManifestError(f"{sources[0]}: the job holds no slides", remedy="give a job that was run, or slides")
    if exported is None:
        if out is not None:
            raise ConfigError("--out needs --export", remedy="name the slide to export")
        click.echo(f"{len(catalogue.slides)} slides; Ctrl-C ends the viewer", err=True)
        try:
            serve(catalogue, port=port, browser=browser, tell=click.echo)
        except KeyboardInterrupt as error:
            # Ctrl-C is how a viewer ends: nothing was left half done.
            if was_terminated(error):
                raise
        return
    numbers = [i for i, listed in enumerate(catalogue.slides) if listed.entry.slide_id == exported]
    if not numbers:
        raise ManifestError(f"no slide has the id {exported}", remedy="see wsi-pipe info or status for ids")
    path = out or Path(f"{exported}.html")
    made = write_single_page(catalogue, numbers[0], path)
    finest = f"up to {made['mpp']:.2g} um/px" if made["mpp"] else "resolution not known"
    click.echo(f"written  {path}  ({made['bytes'] / 1e6:.1f} MB, {finest}, JPEG quality {made['quality']})")
