"""``wsi-pipe adopt``: another tool's features as bags of a job."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTION, collect_entries, slide_options

__all__ = ["adopt"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER")
@slide_options
@click.option(
    "--from",
    "tool",
    required=True,
    type=click.Choice(["trident", "clam", "stamp", "slide2vec", "hs2p"]),
    help="The tool whose output FOLDER is.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="JOB", help="Where bags go.")
@click.option("-e", "--encoder", metavar="NAME", help="What made the features.  [as their files say]")
@click.option(
    "-r",
    "--resolution",
    "resolutions",
    type=RESOLUTION,
    multiple=True,
    metavar="RES",
    help="Coarser grids above theirs, such as 5x, for lrmil distill; repeatable.",
)
@click.option(
    "--check",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    metavar="TILES",
    help="Tiles a slide encoded again and compared, where the encoder can load.",
)
@click.option("--device", metavar="DEV", default="auto", show_default=True, help="cpu, cuda:0 or auto, for --check.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def adopt(folder: Path, tool: str, out: Path, **values: Any) -> int:
    """Take features that another tool computed, FOLDER, into the bags of a job, with the slides they are of.

    Coordinates are checked against the slides. Tiles that lie on a grid of this program are taken as they are, others
    are mapped by overlap. Slides are found by the names of the files. lrmil distill learns from the features without
    running their encoder.

    \b
    wsi-pipe adopt trident-out --from trident archive/ -o job -r 5x
    lrmil distill --bags job --teacher uni -r 20x -r 5x --splits splits.csv --fold 1 --out lr.safetensors
    """
    from wsi_pipe.adopt import adopt as adopt_files
    from wsi_pipe.adopt import find_foreign
    from wsi_pipe.config import JobSettings
    from wsi_pipe.geometry import level_label
    from wsi_pipe.ids import Ids
    from wsi_pipe.job import load_settings, open_job

    files = find_foreign(folder, tool, values["encoder"])
    entries = {entry.slide_id: entry for entry in collect_entries(values, out)}
    ids = Ids(entries)
    pairs, lacking = [], []
    for path in files:
        name = ids.match(path.name.partition(".coordinates.")[0] if tool == "hs2p" else path.stem)
        (pairs.append((path, entries[name])) if name is not None else lacking.append(path.stem))
    if not pairs:
        raise click.UsageError(f"no slide is called as a file in {folder}, such as {files[0].stem}")
    settings = dataclasses.replace(load_settings(out) or JobSettings(), reader=values["reader"] or "auto")
    coarser = tuple(values["resolutions"])
    tile = dataclasses.replace(settings.tile, resolutions=coarser or settings.tile.resolutions)
    paths = open_job(out, dataclasses.replace(settings, tile=tile), [entry for _, entry in pairs])
    found = list(
        adopt_files(
            pairs,
            tool,
            paths,
            settings,
            encoder=values["encoder"],
            coarser=coarser,
            check=values["check"],
            device=values["device"],
        )
    )
    failed = [result for result in found if result.status == "failed"]
    if values["as_json"]:
        print_json(
            [
                {name: None if value != value else value for name, value in dataclasses.asdict(result).items()}
                for result in found
            ]
        )
        return EXIT_FAILED if failed or lacking else 0
    rows = []
    for r in found:
        how = "as they are" if r.exact else f"by overlap, {r.covered:.0%} covered"
        checked = "-" if math.isnan(r.checked) else f"{r.checked:.4f}"
        rows.append([r.slide_id, r.status, f"{r.tiles:,}", f"{r.of_tiles:,}", how if r.tiles else "", checked])
    columns = {"slide": "left", "": "left", "tiles": "right", "theirs": "right", "mapped": "left", "cosine": "right"}
    print_table(columns, rows)
    for r in found:
        for text in (*([f"{r.reason}; {r.remedy}" if r.remedy else r.reason] if r.reason else []), *r.notes):
            click.echo(f"{r.slide_id}: {text}", err=True)
    if lacking:
        click.echo(f"without a slide: {', '.join(sorted(lacking))}", err=True)
    levels = f", with grids at {', '.join(map(level_label, coarser))}" if coarser else ""
    click.echo(f"{len(found) - len(failed)} adopted from {tool}, {len(failed)} failed{levels}: {out}")
    return EXIT_FAILED if failed or lacking else 0
