"""``wsi-pipe report``: the page of a job, again."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipe.cli.display import print_json
from wsi_pipe.errors import ConfigError
from wsi_pipe.job import load_settings, read_outcomes

__all__ = ["report"]


@click.command()
@click.argument("job", type=click.Path(path_type=Path, file_okay=False))
@click.option("--title", metavar="WORDS", help="Heading of the page.  [the folder's name]")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def report(job: Path, title: str | None, as_json: bool) -> None:
    """Write JOB/report.html, .csv and .json from the outcomes so far, and print the figures.

    ``wsi-pipe run`` does so at its end; this is for a job that is still under way or was made in parts.
    """
    from wsi_pipe.report import summarise, summary_table, write_report

    settings = load_settings(job)
    if settings is None:
        raise ConfigError(f"{job}: is not a job (no config.toml)", remedy="give the folder that was given to run --out")
    outcomes = list(read_outcomes(job).values())
    page = write_report(job, outcomes, settings, title=title)
    if as_json:
        print_json(summarise(outcomes))
    else:
        click.echo(summary_table(outcomes))
        click.echo(f"written  {page}")
