"""``wsi-pipe info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTIONS, collect_entries, flat, slide_options
from wsi_pipe.config import TileSettings
from wsi_pipe.geometry import level_label
from wsi_pipe.slides.codecs.fastjpeg import jpeg_decoder_name

__all__ = ["info"]

SHOWN = 12


@click.command()
@slide_options
@click.option(
    "-r",
    "--resolution",
    "resolutions",
    type=RESOLUTIONS,
    multiple=True,
    callback=flat,
    metavar="RES,RES",
    help="Count tiles here.  [20x,5x]",
)
@click.option("--tile-px", type=click.IntRange(8), default=256, show_default=True, help="Side of a tile in pixels.")
@click.option("--properties", is_flag=True, help="With --json: all metadata of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(resolutions: tuple[float, ...], tile_px: int, properties: bool, as_json: bool, **values: Any) -> int:
    """Show what SLIDES are: vendor, reader and why, size, levels, mpp and its source, tiles that cover the slide.

    Of bags (.h5) among them: their slide, grids, and features with the weights that made them.
    """
    from wsi_pipe.job.describe import describe_bag, describe_slide

    settings = TileSettings(resolutions=resolutions or TileSettings().resolutions, tile_px=tile_px)
    bags = [describe_bag(Path(source)) for source in values["sources"] if _is_bag(source)]
    values["sources"] = [source for source in values["sources"] if not _is_bag(source)]
    entries = collect_entries(values) if values["sources"] or values["manifest"] or not bags else []
    found = [describe_slide(entry, settings, values["reader"] or "auto", properties=properties) for entry in entries]
    if as_json:
        print_json([*found, *bags])
    else:
        for bag in bags:
            _show_bag(bag)
        labels = [level_label(mpp) for mpp in sorted(settings.resolutions)]
        columns = {"slide": "left", "vendor": "left", "reader": "left", "size": "right", "levels": "left"}
        columns |= {"mpp": "left", "from": "left"} | {f"tiles {label}": "right" for label in labels}
        opened = [item for item in found if "error" not in item]
        if opened:
            print_table(columns, (_row(item, labels) for item in opened))
        for item in found:
            if "error" in item:
                click.echo(f"{item['slide_id']}: {item['error']}", err=True)
            else:
                click.echo(f"{item['slide_id']}: read by {item['reader']}: {item['reader_reason']}")
                for note in item["notes"]:
                    click.echo(f"{item['slide_id']}: {note}")
                if item["personal"]:
                    click.echo(f"{item['slide_id']}: personal: {_personal(item['personal'])}")
        if opened:
            click.echo(f"JPEG tiles are decoded by {jpeg_decoder_name()}")
    return EXIT_FAILED if any("error" in item for item in [*found, *bags]) else 0


def _is_bag(source: str) -> bool:
    return source.lower().endswith((".h5", ".hdf5")) and Path(source).is_file()


def _show_bag(bag: dict[str, Any]) -> None:
    if "error" in bag:
        click.echo(bag["error"], err=True)
        return
    reason = f" ({bag['empty_reason']})" if bag["empty_reason"] else ""
    click.echo(
        f"{bag['bag']}: bag of {bag['slide_id']} (case {bag['case_id']}), {bag['status']}{reason}, "
        f"{bag['mpp'][0]:.4g} um/px ({bag['mpp_source']}), made by wsi-pipe {bag['wsi_pipe_version']}"
    )
    for label, level in bag["levels"].items():
        click.echo(f"  {label}: {level['tiles']:,} tiles of {level['tile_px']} px")
        for slug, item in level["features"].items():
            weights = "random weights" if item["weights"] == "random" else f"weights {item['weights'][:12]}"
            what = f"{item['dim']} features ({item['precision']}) of {item['encoder']}"
            click.echo(f"  {label}/{slug}: {weights}, {what}")


def _personal(items: list[dict[str, str]]) -> str:
    """What names a person or a date in a line, the pictures last."""
    told = [f"{i['name']} {i['value']}" if i["value"] else f"{i['name']} picture" for i in items[:SHOWN]]
    more = f" and {len(items) - SHOWN} more (--json)" if len(items) > SHOWN else ""
    return "; ".join(told) + more


def _row(item: dict[str, Any], labels: list[str]) -> list[str]:
    mpp = item["mpp"]
    shown = "unknown" if mpp is None else f"{mpp[0]:.4g}" if mpp[0] == mpp[1] else f"{mpp[0]:.4g} x {mpp[1]:.4g}"
    levels = ", ".join(f"{level['downsample'][0]:g}" for level in item["levels"])
    row = [item["slide_id"], item["vendor"], item["reader"], f"{item['width']:,} x {item['height']:,}", levels]
    tiles = (item["tiles"].get(label) for label in labels)
    return [*row, shown, item["mpp_source"], *("-" if n is None else f"{n:,}" for n in tiles)]
