"""``wsi-pipe export``: a job's features as other tools read them."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import click

from wsi_pipe.cli import EXIT_FAILED, raise_if_interrupted
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTION
from wsi_pipe.geometry import level_label

__all__ = ["FORMATS", "export"]

FORMATS = ("clam", "trident", "stamp", "slide2vec", "anndata", "zarr")
"""As ``wsi_pipe.interop.EXPORTERS``, whose import takes longer than the help may."""


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="JOB")
@click.option("--to", required=True, type=click.Choice(FORMATS), help="The tool that is to read the files.")
@click.option(
    "-r",
    "--resolution",
    type=RESOLUTION,
    metavar="RES",
    help="Of the features, such as 20x.  [the only one in the bags]",
)
@click.option("-e", "--encoder", metavar="NAME", help="Of the features, or an alias.  [the only one in the bags]")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the export: a new one, or of an earlier export.",
)
@click.option("--allow-random", is_flag=True, help="Export features of random weights too, for tests.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def export(
    job: Path, to: str, resolution: float | None, encoder: str | None, out: Path, allow_random: bool, as_json: bool
) -> int:
    """Write the features of one encoder and resolution of JOB, or of a folder of bags, as another tool's files.

    Files go by slide id; features are float32. Called again, it writes what is new or changed. Slides without such
    features are named, and the exit code is 1 then. docs/interop.md says what each tool reads.

    \b
    wsi-pipe export job --to clam -r 20x -e uni -o clam-features
    wsi-pipe export job --to stamp -r 20x -e uni -o stamp-features
    """
    from wsi_pipe.interop import export_job, plan_export

    def show(done: int, total: int) -> None:
        raise_if_interrupted()
        if sys.stderr.isatty() and not as_json:
            click.echo(f"\rexporting {done}/{total} slides", err=True, nl=done == total)

    level = None if resolution is None else level_label(resolution)
    plan = plan_export(job, to, level, encoder, allow_random=allow_random)
    results = list(export_job(plan, out, progress=show))
    counts = Counter(result.status for result in results)
    incomplete = bool(counts["failed"] or counts["left out"])
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
        return EXIT_FAILED if incomplete else 0
    told = [result for result in results if result.reason]
    if told:
        print_table({"slide": "left", "": "left", "why": "left"}, ([r.slide_id, r.status, r.reason] for r in told))
    shown = ", ".join(f"{counts[status]} {status}" for status in dict.fromkeys(r.status for r in results))
    tiles = sum(result.tiles for result in results)
    click.echo(f"{shown} ({tiles:,} tiles), {plan.encoder} at {plan.level} for {plan.exporter.title}: {out}")
    return EXIT_FAILED if incomplete else 0
