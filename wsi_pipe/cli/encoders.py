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
@click.option(
    "--robustness",
    "slide",
    type=click.Path(exists=True, path_type=Path),
    metavar="SLIDE",
    help="How far features of this slide's tiles move under stain, blur, JPEG and scale; at --for, or 20x.",
)
@click.option(
    "-e", "--encoder", "names", multiple=True, metavar="NAME", help="With --robustness; repeatable.  [texture]"
)
@click.option(
    "--tiles", type=click.IntRange(2), default=64, show_default=True, metavar="TILES", help="With --robustness."
)
@click.option("--slide-mpp", metavar="MPP", help="With --robustness: um/px of the slide where its file says none.")
@click.option("--random-weights", is_flag=True, help="With --robustness: draw weights, for tests.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def encoders(
    resolution: str | None,
    commercial: bool,
    to_pin: tuple[str, ...],
    to_verify: str | None,
    reference: Path | None,
    record: Path | None,
    slide: Path | None,
    names: tuple[str, ...],
    tiles: int,
    slide_mpp: str | None,
    random_weights: bool,
    as_json: bool,
) -> int:
    """List encoders: dimension, resolution, licence, whether each can load now, and what the others lack."""
    if (reference or record) and not to_verify:
        raise click.UsageError("--reference and --record go with --verify NAME")
    if slide is None and (names or slide_mpp or random_weights):
        raise click.UsageError("--encoder, --slide-mpp and --random-weights go with --robustness SLIDE")
    if slide is not None:
        return _robustness(slide, names or ("texture",), resolution or "20x", tiles, slide_mpp, random_weights, as_json)
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


def _robustness(
    path: Path, names: tuple[str, ...], resolution: str, count: int, mpp: str | None, random: bool, as_json: bool
) -> int:
    import numpy as np

    from wsi_pipe.api.slide import open as open_slide
    from wsi_pipe.asked import parse_mpp
    from wsi_pipe.encoders import load_encoder
    from wsi_pipe.encoders.naming import draws_weights
    from wsi_pipe.encoders.robustness import measure_robustness
    from wsi_pipe.errors import ConfigError

    with open_slide(path, mpp=parse_mpp(mpp)) as slide:
        grid = slide.grids(resolution)[resolution]
        if len(grid) < 2:
            raise ConfigError(
                f"{path}: has {len(grid)} tiles at {resolution}, and two are needed", remedy="give a finer --for"
            )
        rows = np.unique(np.linspace(0, len(grid) - 1, min(count, len(grid))).astype(int))
        tiles = np.concatenate([batch.pixels for batch in grid.tiles(rows=rows)])
    told = {}
    for name in names:
        encoder = load_encoder(name, random_weights=random and draws_weights(name))
        told[encoder.info.name] = measure_robustness(encoder, tiles)
    if as_json:
        print_json({name: [dataclasses.asdict(item) for item in found] for name, found in told.items()})
        return 0
    click.echo(f"{len(tiles)} tiles of {path.name} at {resolution}; cosine before and after: mean, 5th percentile")
    changes = [item.change for item in next(iter(told.values()))]
    rows_of = [
        [change, *(f"{found[place].cosine:.3f}, {found[place].low:.3f}" for found in told.values())]
        for place, change in enumerate(changes)
    ]
    print_table({"change": "left"} | dict.fromkeys(told, "right"), rows_of)
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
