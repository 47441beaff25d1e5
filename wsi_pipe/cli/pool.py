"""``wsi-pipe pool``: one vector a slide."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from wsi_pipe.cli import EXIT_FAILED, raise_if_interrupted
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTION
from wsi_pipe.geometry import level_label

__all__ = ["pool"]


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="JOB")
@click.option(
    "--slide-encoder",
    required=True,
    metavar="NAME",
    help="Such as mean, mean-spread, top-attention, chief, feather; docs/encoders.md lists them.",
)
@click.option(
    "-r",
    "--resolution",
    type=RESOLUTION,
    metavar="RES",
    help="Of the tile features, such as 5x.  [the only one in the bags]",
)
@click.option("-e", "--encoder", metavar="NAME", help="Of the tile features.  [what the slide encoder needs]")
@click.option("--attention", metavar="NAME", help="With top-attention: whose attention in the bags.")
@click.option(
    "--top", type=click.IntRange(1), metavar="TILES", default=25, show_default=True, help="With top-attention: tiles."
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Weights of the slide encoder.  [the cache, or the hub]",
)
@click.option("--name", metavar="NAME", help="Of the vector in the bags.  [the slide encoder's]")
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CSV",
    help="The vectors of all slides.  [JOB/slide-NAME.csv]",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that the makers of a slide encoder ship.")
@click.option("--allow-random", is_flag=True, help="Take features of random weights too, for tests.")
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="For the slide encoder.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def pool(
    job: Path,
    slide_encoder: str,
    resolution: float | None,
    encoder: str | None,
    attention: str | None,
    top: int,
    weights: Path | None,
    name: str | None,
    table: Path | None,
    trust_remote_code: bool,
    allow_random: bool,
    device: str,
    as_json: bool,
) -> int:
    """Make one vector a slide of the tile features of JOB, or of a folder of bags.

    It stands in each bag as /slide/NAME, and all of them in one table. Called again, it does what is new or changed.
    Slides without such features are named, and the exit code is 1 then.

    \b
    wsi-pipe pool job --slide-encoder mean -r 5x -e uni
    wsi-pipe pool job --slide-encoder chief --weights CHIEF_pretraining.pth
    """
    from wsi_pipe.pooling import pool_job, write_slide_table

    def show(done: int, total: int) -> None:
        raise_if_interrupted()
        if sys.stderr.isatty() and not as_json:
            click.echo(f"\rpooling {done}/{total} slides", err=True, nl=done == total)

    results = list(
        pool_job(
            job,
            slide_encoder,
            level=None if resolution is None else level_label(resolution),
            encoder=encoder,
            name=name,
            attention=attention,
            top=top,
            weights=weights,
            trust_remote_code=trust_remote_code,
            allow_random=allow_random,
            device=device,
            progress=show,
        )
    )
    out = table or job / f"slide-{name or slide_encoder}.csv"
    rows = write_slide_table(out, results)
    counts = Counter(item.status for item in results)
    incomplete = bool(counts["failed"] or counts["left out"])
    if as_json:
        told = ("slide_id", "case_id", "status", "reason", "tiles")
        print_json([{key: getattr(item, key) for key in told} for item in results])
        return EXIT_FAILED if incomplete else 0
    bad = [item for item in results if item.reason]
    if bad:
        print_table({"slide": "left", "": "left", "why": "left"}, ([i.slide_id, i.status, i.reason] for i in bad))
    shown = ", ".join(f"{counts[status]} {status}" for status in dict.fromkeys(item.status for item in results))
    click.echo(f"{shown}; {rows} vectors of {slide_encoder}: {out}")
    return EXIT_FAILED if incomplete else 0
