"""``wsi-pipe encoders``."""

from __future__ import annotations

import dataclasses

import click

from wsi_pipe.cli.display import print_json, print_table

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
    columns = {
        "encoder": "left",
        "dim": "right",
        "input": "right",
        "um/px": "right",
        "licence": "left",
        "loads now, or needs": "left",
    }
    print_table(
        columns,
        (
            [
                item.name,
                str(item.dim),
                f"{item.input_px} px" if item.input_px else "any",
                f"{item.mpp:g}" if item.mpp else "any",
                item.licence,
                "yes" if item.loads else item.lacks,
            ]
            for item in found
        ),
    )
    click.echo("\nalso timm:MODEL, timm:MODEL@FILE, NAME@FILE, and the path of an LR encoder (.safetensors)")
