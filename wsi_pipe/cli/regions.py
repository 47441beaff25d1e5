"""The options of what is drawn on slides: masks, annotations, their classes, and from where their coordinates count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from wsi_pipe.errors import ConfigError
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.tissue.frame import FRAMES

__all__ = ["region_options", "with_regions"]

F = TypeVar("F", bound=Callable[..., Any])

ENDINGS = (".geojson", ".json")
NONE = "none"
"""What takes away what an earlier run was given."""


def region_options(function: F) -> F:
    """--mask, --annotations, --tissue-class and --frame."""
    options = [
        click.option(
            "--mask",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="GEOJSON",
            help="Use this mask (level-0 pixels, as QuPath exports it) in place of finding tissue; for one slide.",
        ),
        click.option(
            "--annotations",
            type=click.Path(path_type=Path),
            metavar="GEOJSON|DIR",
            help="Annotated regions, as QuPath exports them: each tile gets the fraction that each class covers. A "
            "file for one slide, or a folder with <slide_id>.geojson of each; none takes them away.",
        ),
        click.option(
            "--tissue-class",
            "tissue_class",
            multiple=True,
            metavar="CLASS",
            help="Use the regions of this class, of --annotations or --mask, in place of finding tissue; repeatable; "
            "none to find it again.",
        ),
        click.option(
            "--frame",
            type=click.Choice(FRAMES),
            help="From where coordinates in masks and annotations that do not say count: the corner of the whole image "
            "or of the scan's bounds, to which QuPath crops SCN and MIRAX slides.  [where they fit, else qupath]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def with_regions(entries: Sequence[SlideEntry], values: Mapping[str, Any]) -> list[SlideEntry]:
    """Slides with what these options say; the cells of a slide list go first.

    Raises ConfigError when a file is given for several slides, or a folder holds none for any of them.
    """
    found = list(entries)
    if values.get("mask"):
        if len(found) != 1:
            raise ConfigError(
                f"--mask is for one slide, {len(found)} are given", remedy="use the column mask of a CSV (--slides)"
            )
        found = [found[0].stating(mask=str(values["mask"].absolute()))]
    annotations: Path | None = values.get("annotations")
    if annotations is not None and str(annotations) == NONE and not annotations.exists():
        found = [entry.stating(annotations=None) for entry in found]
    elif annotations is not None:
        found = _annotated(found, annotations)
    classes = tuple(dict.fromkeys(name.strip() for name in values.get("tissue_class") or () if name.strip()))
    if classes == (NONE,):
        found = [entry.stating(tissue_class=()) for entry in found]
    elif classes:
        found = [entry.stating(tissue_class=classes) for entry in found]
        if not any(entry.annotations or entry.mask for entry in found):
            raise ConfigError("--tissue-class is given, but no annotations", remedy="give --annotations or --mask")
    if values.get("frame"):
        found = [e if "frame" in e.stated else e.stating(frame=values["frame"]) for e in found]
    return found


def _annotated(entries: Sequence[SlideEntry], where: Path) -> list[SlideEntry]:
    if not where.is_dir():
        if len(entries) != 1:
            raise ConfigError(
                f"--annotations {where} is one file for {len(entries)} slides",
                remedy="give a folder with <slide_id>.geojson of each, or use the column annotations of a CSV",
            )
        return [entries[0].stating(annotations=str(where.absolute()))]
    files = {path.stem: path for path in sorted(where.iterdir(), reverse=True) if path.suffix.lower() in ENDINGS}
    found = [
        entry.stating(annotations=str(files[entry.slide_id].absolute())) if entry.slide_id in files else entry
        for entry in entries
    ]
    lacking = [entry.slide_id for entry in found if not entry.annotations]
    if len(lacking) == len(found):
        raise ConfigError(
            f"--annotations {where}: holds no file for any of the {len(found)} slides",
            remedy=f"name them by the slides' ids, such as {found[0].slide_id}.geojson",
        )
    spare = sorted(set(files) - {entry.slide_id for entry in entries})
    for what, names in (("slides without a file in it", lacking), ("files of no slide given", spare)):
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            click.echo(f"--annotations {where}: {len(names):,} {what}: {', '.join(names[:5])}{more}", err=True)
    return found
