"""``wsi-pipe encoders``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table

if TYPE_CHECKING:
    from wsi_pipe.encoders.listing import EncoderListing

__all__ = ["encoders"]


@click.command()
@click.option("--for", "resolution", metavar="RES", help="Rank by how well each suits a resolution, such as 2um or 5x.")
@click.option("--commercial", is_flag=True, help="Only those whose licence is known to allow commercial use.")
@click.option(
    "--pin", "to_pin", multiple=True, metavar="NAME", help="Accept the newest weights of an encoder; say what moved."
)
@click.option(
    "--verify", "to_verify", metavar="NAME", help="Check the weights that are here: keys, shapes, dimension, features."
)
@click.option(
    "--reference",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --verify: features to compare with.",
)
@click.option(
    "--record", type=click.Path(dir_okay=False, path_type=Path), help="With --verify: write features as a reference."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def encoders(
    resolution: str | None,
    commercial: bool,
    to_pin: tuple[str, ...],
    to_verify: str | None,
    reference: Path | None,
    record: Path | None,
    as_json: bool,
) -> int:
    """List encoders: dimension, resolution, licence, whether each can load now, and what the others lack."""
    if (reference or record) and not to_verify:
        raise click.UsageError("--reference and --record go with --verify NAME")
    if to_pin:
        return _pin(to_pin, as_json)
    if to_verify:
        return _verify(to_verify, reference, record, as_json)
    from wsi_pipe.encoders import list_encoders
    from wsi_pipe.encoders.listing import ranked
    from wsi_pipe.geometry import parse_resolution

    found = list_encoders()
    left_out = 0
    if commercial:
        left_out = sum(not item.commercial for item in found)
        found = [item for item in found if item.commercial]
    if resolution is not None:
        found = ranked(found, parse_resolution(resolution))
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return 0
    _table(found, ranks=resolution is not None)
    click.echo("\nalso timm:MODEL, timm:MODEL@FILE, NAME@FILE, and the path of an LR encoder (.safetensors)")
    if any(not item.verified for item in found):
        click.echo(
            "* not every fact of it could be checked: wsi-pipe encoders --verify NAME checks the weights you have"
        )
    if left_out:
        click.echo(f"{left_out} more have a licence that forbids commercial use, or has terms of its own")
    return 0


def _table(found: list[EncoderListing], *, ranks: bool) -> None:
    columns = {
        "encoder": "left",
        "dim": "right",
        "M par.": "right",
        "input": "right",
        "um/px": "right",
        **({"fit": "left"} if ranks else {}),
        "licence": "left",
        "loads now, or needs": "left",
    }
    print_table(
        columns,
        (
            [
                item.name + ("" if item.verified else " *"),
                str(item.dim),
                str(item.parameters or ""),
                f"{item.input_px} px" if item.input_px else "any",
                _range(item),
                *([item.fit] if ranks else []),
                item.licence,
                "yes" if item.loads else item.lacks,
            ]
            for item in found
        ),
    )


def _range(item: EncoderListing) -> str:
    if item.mpp_range is None:
        return "any" if item.input_px is None else "?"
    finest, coarsest = item.mpp_range
    return f"{finest:g}" if finest == coarsest else f"{finest:g}-{coarsest:g}"


def _pin(names: tuple[str, ...], as_json: bool) -> int:
    from wsi_pipe.encoders.pinning import pin_encoder

    done = [pin_encoder(name) for name in names]
    if as_json:
        print_json([dataclasses.asdict(item) | {"moved": item.moved} for item in done])
        return 0
    for item in done:
        said = f"{item.name}: revision {item.now.revision or 'unknown'}, SHA-256 {item.now.sha256}"
        if item.moved and item.before is not None:
            said += f"; moved from revision {item.before.revision or 'unknown'}, SHA-256 {item.before.sha256}"
        click.echo(said)
    return 0


def _verify(name: str, reference: Path | None, record: Path | None, as_json: bool) -> int:
    from wsi_pipe.encoders.verifying import LEAST_COSINE, verify_encoder, write_reference

    found = verify_encoder(name, reference=reference)
    if record is not None:
        write_reference(record, found)
    if as_json:
        told = ("name", "file", "sha256", "revision", "dim", "cosine", "agrees")
        print_json({key: getattr(found, key) for key in told})
    else:
        click.echo(f"{found.name}: every key and shape of {found.file or 'it'} fits; {found.dim} features")
        click.echo(f"SHA-256 {found.sha256}" + (f", revision {found.revision}" if found.revision else ""))
        if found.cosine is not None:
            verdict = "agree" if found.agrees else "DIFFER"
            click.echo(
                f"features {verdict}: cosine {found.cosine:.5f} to the reference, at least {LEAST_COSINE} wanted"
            )
    return 0 if found.agrees else EXIT_FAILED
