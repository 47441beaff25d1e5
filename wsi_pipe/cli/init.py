"""``wsi-pipe init``."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipe import __version__
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import output_error
from wsi_pipe.template import settings_template

__all__ = ["init"]

TITLE = """Settings of wsi-pipe {version}, all at their defaults.
Use it with: wsi-pipe run SLIDES -o JOB --config {name}
What is left out is at its default, which stands in [brackets] with its unit.
Options go before this file, and this file goes before what JOB was made with."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="job.toml")
def init(file: Path) -> None:
    """Write a settings file with every setting, its default, unit and meaning, to be edited.

    FILE is job.toml unless given, - for standard output. A file that is there is never overwritten.

    \b
    wsi-pipe init
    wsi-pipe init colon.toml
    wsi-pipe run archive/ -o job --config colon.toml
    """
    to_output = str(file) == "-"
    text = settings_template(JobSettings(), TITLE.format(version=__version__, name="FILE" if to_output else file.name))
    if to_output:
        click.echo(text, nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{file}: is there already", remedy="give another name: wsi-pipe init FILE") from error
    except OSError as error:
        raise output_error(file, error) from error
    click.echo(f"written  {file}")
