"""``wsi-pipe encoders``."""

from __future__ import annotations

import dataclasses

import click

from wsi_pipe.cli.display import print_json

__all__ = ["encoders"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def encoders(as_json: bool) -> None:
    """List encoders: dimension, resolution, licence, whether each can load now, and what the others lack."""
    from wsi_pipe.encoders import list_encoders

    found = list_encoders()
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return
    raise SystemExit(0)
