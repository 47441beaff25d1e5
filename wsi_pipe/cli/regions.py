"""The options of what is drawn on slides: masks, annotations, their classes, and from where their coordinates count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wsi_pipe.tissue.frame import FRAMES

__all__ = ["region_options"]

F = TypeVar("F", bound=Callable[..., Any])


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
