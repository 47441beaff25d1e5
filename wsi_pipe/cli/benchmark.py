"""``wsi-pipe benchmark``: what low resolution saves, measured on the user's own slides and machine."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import collect_entries, extract_options, settings_from, slide_options, tile_options
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import level_label
from wsi_pipe.ownership import refuse_foreign_outputs

if TYPE_CHECKING:
    from wsi_pipe.benchmark import Assumptions, BenchmarkRecord

__all__ = ["benchmark"]

OUTPUTS = {
    "benchmark.json": (b'"wsi-pipe benchmark"',),
    "benchmark.md": (b"# What low resolution saves",),
    "benchmark.html": (b"wsi-pipe</title>",),
}
"""By what the files of an earlier call are known."""


@click.command()
@slide_options
@tile_options
@extract_options
@click.option("--encoder-lr", metavar="NAME", help="Encoder of the coarsest resolution, such as lr.safetensors.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Passes over every slide.")
@click.option("--compare", type=click.Choice(["openslide"]), multiple=True, help="Also read as peers do: tile by tile.")
@click.option(
    "--cache",
    type=click.Choice(["warm", "cold"]),
    default="warm",
    show_default=True,
    help="Whether the system holds the slides' pages in memory before each pass.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Just the first of the slides.  [all]")
@click.option("--slides-per-year", type=click.IntRange(1), default=10_000, show_default=True, help="Of an archive.")
@click.option("--price-per-hour", type=click.FloatRange(0), default=0.0, metavar="P", help="Of one such machine.  [0]")
@click.option("--price-per-kwh", type=click.FloatRange(0), default=0.0, metavar="P", help="Of electricity.  [0]")
@click.option("--currency", default="EUR", show_default=True, metavar="NAME", help="Of the prices.")
@click.option(
    "--watts-per-core",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Drawn by a busy core: assumed, since it cannot be measured everywhere. A GPU's energy is measured.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="JSON",
    help="Measure nothing: draw an earlier benchmark.json again.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where benchmark.json, .md and .html go.  [benchmark, or beside the file given with --from]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def benchmark(**values: Any) -> int:
    """Measure on SLIDES what high and low resolution cost, stage by stage and end to end.

    Nothing of the measurement is kept but its figures. Several -e on one resolution are set side by side.

    \b
    wsi-pipe benchmark archive/ -e texture -o bench
    wsi-pipe benchmark archive/ -e 20x=timm:vit_base_patch16_224 --encoder-lr lr.safetensors -o bench
    wsi-pipe benchmark --from bench/benchmark.json --slides-per-year 50000 --price-per-hour 3
    """
    from wsi_pipe.benchmark import Assumptions, read_record
    from wsi_pipe.benchmark.render import answers, write_outputs

    assumptions = Assumptions(
        slides=values["slides_per_year"],
        watts_per_core=values["watts_per_core"],
        price_per_hour=values["price_per_hour"],
        price_per_kwh=values["price_per_kwh"],
        currency=values["currency"],
    )
    source: Path | None = values["source"]
    refuse_foreign_outputs(values["out"] or (source.parent if source else Path("benchmark")), OUTPUTS)
    if source is None:
        folder = values["out"] or Path("benchmark")
        record = _measure(values, folder, assumptions)
    else:
        if values["sources"] or values["manifest"]:
            raise ConfigError("slides are given together with --from", remedy="give one or the other")
        record = read_record(source)
        folder = values["out"] or source.parent
    written = write_outputs(folder, record, assumptions)
    if values["as_json"]:
        print_json({**answers(record, assumptions), "files": [str(path) for path in written]})
    else:
        _print(record, assumptions, written)
    return 0


def _measure(values: dict[str, Any], folder: Path, assumptions: Assumptions) -> BenchmarkRecord:
    """Measure; ``benchmark.json`` is written after every round, and all files when something ends it early."""
    from wsi_pipe.benchmark import write_record
    from wsi_pipe.benchmark.measure import run_benchmark
    from wsi_pipe.benchmark.render import write_outputs

    latest: list[BenchmarkRecord] = []

    def save(record: BenchmarkRecord) -> None:
        write_record(folder / "benchmark.json", record)
        latest[:] = [record]

    settings = _with_low_resolution(settings_from(values, None, None), values["encoder_lr"])
    entries = collect_entries({**values, "mask": None, "only": ()})
    quiet = values["as_json"] or messages.level() < 0
    try:
        return run_benchmark(
            entries,
            settings,
            repeats=values["repeats"],
            compare=values["compare"],
            cache=values["cache"],
            command=shlex.join(["wsi-pipe", *sys.argv[1:]]),
            progress=None if quiet else _show,
            save=save,
        )
    except (KeyboardInterrupt, Exception):
        if latest:
            written = write_outputs(folder, latest[0], assumptions)
            rounds = f"{latest[0].repeats} of {values['repeats']} rounds are complete"
            click.echo(f"benchmark: {rounds}, in {', '.join(str(path) for path in written)}", err=True)
        raise


def _with_low_resolution(settings: JobSettings, name: str | None) -> JobSettings:
    """The settings with ``name`` as the encoder of the coarsest level."""
    if name is None:
        return settings
    coarsest = level_label(max(settings.tile.resolutions))
    encoders = {**settings.extract.encoders, coarsest: (name,)}
    return dataclasses.replace(settings, extract=dataclasses.replace(settings.extract, encoders=encoders))


def _show(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[K[{done}/{total}] {what}", nl=done == total, err=True)
    else:
        click.echo(f"[{done}/{total}] {what}", err=True)


def _print(record: BenchmarkRecord, assumptions: Assumptions, written: list[Path]) -> None:
    from wsi_pipe.benchmark.analysis import arm_name, warnings_of
    from wsi_pipe.benchmark.projection import assumptions_in_words, project
    from wsi_pipe.benchmark.render import archive_table, figure, headline, stage_table

    for sentence in headline(record):
        click.echo(sentence)
    for doubt in warnings_of(record):
        click.echo(f"note: {doubt}")
    click.echo()
    if record.archive:
        heading, rows = archive_table(record)
        print_table({name: "right" if i else "left" for i, name in enumerate(heading)}, rows)
        click.echo()
    heading, rows = stage_table(record)
    print_table({name: "right" if i else "left" for i, name in enumerate(heading)}, rows)
    click.echo()
    columns = ("an archive, a year", "hours", "GB read", "GB written", "kWh", assumptions.currency)
    print_table(
        {name: "right" if i else "left" for i, name in enumerate(columns)},
        [
            [
                arm_name(record, p.arm),
                *(figure(v) for v in (p.hours, p.gigabytes_read, p.gigabytes_written, p.kwh, p.cost)),
            ]
            for p in project(record, assumptions)
        ],
    )
    for word in assumptions_in_words(record, assumptions):
        click.echo(f"  {word}")
    click.echo()
    click.echo("written: " + ", ".join(str(path) for path in written))
