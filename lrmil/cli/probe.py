"""``lrmil probe``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import (
    EXISTING,
    PATH,
    SLIDE_TABLE,
    bag_options,
    estimate,
    level_of,
    print_notes,
    seen_option,
)
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.errors import ConfigError

__all__ = ["probe"]

SHOWN = ("auc", "balanced_accuracy", "accuracy")


@click.command()
@bag_options
@click.option(
    "--labels", type=EXISTING, metavar="CSV", help="Of slides or cases: slide_id, case_id or both, and label."
)
@click.option(
    "--by",
    type=click.Choice(["auto", "slide", "case"]),
    default="auto",
    show_default=True,
    help="What a row of the labels is about.",
)
@click.option("--label-column", metavar="NAME", help="Column that holds the label.  [label]")
@SLIDE_TABLE
@click.option(
    "--level",
    type=click.Choice(["slide", "tile"]),
    default="slide",
    show_default=True,
    help="What is classified: slides by their labels, or tiles by the annotations in the bags.",
)
@click.option("--slide-encoder", metavar="NAME", help="Vectors that wsi-pipe pool put into the bags.  [tiles' mean]")
@click.option(
    "--features", type=EXISTING, metavar="CSV", help="Vectors as a table instead: slide_id, case_id, numbers."
)
@click.option("--spread", is_flag=True, help="Beside the tiles' mean their standard deviation.")
@click.option("--splits", type=EXISTING, metavar="CSV", help="Folds: fold_1, ... with train, val, test.  [made anew]")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, metavar="N", help="How many to make.")
@click.option("--split-seed", type=int, default=0, show_default=True, metavar="SEED", help="Of made folds.")
@click.option(
    "--shots",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 5, 10),
    show_default=True,
    metavar="CASES",
    help="Of each class in few-shot; repeatable.",
)
@click.option(
    "--draws", type=click.IntRange(1), default=10, show_default=True, metavar="N", help="Of shots in each fold."
)
@click.option(
    "--covered",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="With --level tile: of a tile, from which it has an annotation's class.",
)
@click.option("--positive", metavar="CLASS", help="Which of two classes is looked for.  [the second]")
@click.option(
    "--replicates", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="Of the bootstrap."
)
@click.option("--allow-random", is_flag=True, help="Take features of random weights too, for tests.")
@seen_option
@click.option("-o", "--out", type=PATH, metavar="JSON", help="All figures as a file.  [none]")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
def probe(**options: Any) -> None:
    """Say what features tell: linear, nearest neighbours and few-shot prototypes, with intervals by case.

    Features are those of tiles, averaged over each slide; vectors of a slide encoder; or a table. Folds are of whole
    cases, and cases that the encoder has seen are refused.

    \b
    lrmil probe --bags job/bags -r 5x -e uni --labels labels.csv
    lrmil probe --bags job --slide-encoder chief --labels labels.csv
    lrmil probe --bags job --level tile -r 20x
    """
    from lrmil.probe import METHODS
    from lrmil.probe import probe as run
    from lrmil.splits import make_splits, read_splits

    samples = _samples(options)
    print_notes(samples.notes)
    splits = options["splits"]
    table = (
        read_splits(splits) if splits else make_splits(samples.case_labels(), options["folds"], options["split_seed"])
    )
    positive = _place(options["positive"], samples.classes)
    found = run(
        samples,
        table,
        methods=METHODS,
        shots=options["shots"],
        draws=options["draws"],
        positive=positive,
        replicates=options["replicates"],
        allow_seen=options["allow_seen"],
        say=lambda text: click.echo(text, err=True),
    )
    told = {
        "encoder": samples.encoder,
        "level": options["level"],
        "samples": len(samples.labels),
        "cases": len(set(samples.case_ids)),
        "classes": list(samples.classes),
        "features": int(samples.features.shape[1]),
        "folds": list(table.folds),
        "methods": {
            item.name: {
                name: {"value": e.value, "low": e.low, "high": e.high, "reason": e.reason}
                for name, e in item.figures.items()
            }
            for item in found
        },
    }
    plain = _without_nan(told)
    if options["out"] is not None:
        from wsi_pipe.files import write_text_atomically

        write_text_atomically(options["out"], json.dumps(plain, indent=2) + "\n")
    if options["as_json"]:
        print_json(plain)
        return
    what = "tiles" if options["level"] == "tile" else "slides"
    click.echo(
        f"{len(samples.labels):,} {what} of {told['cases']} cases, {len(samples.classes)} classes, "
        f"{told['features']} features of {samples.encoder}"
    )
    rows = [[item.name, *(estimate(item.figures[name]) for name in SHOWN)] for item in found]
    print_table({"probe": "left"} | {name.replace("_", " "): "left" for name in SHOWN}, rows)


def _samples(options: dict[str, Any]) -> Any:
    from lrmil.probe import slide_samples, tile_samples

    level, encoder, random = level_of(options["resolution"]), options["encoder"], options["allow_random"]
    by_tile = options["level"] == "tile"
    for name in ("labels", "slide_encoder", "features", "spread", "label_column", "slide_table"):
        if by_tile and options[name]:
            raise ConfigError(f"--{name.replace('_', '-')} is of slides", remedy="leave it out, or --level tile")
    if by_tile:
        return tile_samples(
            options["bags"], level=level, encoder=encoder, least=options["covered"], allow_random=random
        )
    if options["labels"] is None:
        raise ConfigError("slides are probed by their labels", remedy="give --labels CSV, or say --level tile")
    if options["features"] is not None and options["slide_encoder"]:
        raise ConfigError("--features and --slide-encoder both give vectors", remedy="choose one")
    with tempfile.TemporaryDirectory() as folder:
        return slide_samples(
            options["bags"],
            options["labels"],
            Path(folder) / "store",
            level=level,
            encoder=encoder,
            slide_encoder=options["slide_encoder"],
            table=options["features"],
            spread=options["spread"],
            by=options["by"],
            label_column=options["label_column"],
            slide_table=options["slide_table"],
            allow_random=random,
        )


def _place(name: str | None, classes: tuple[str, ...]) -> int:
    if name is None:
        return 1
    if name not in classes:
        raise ConfigError(f"there is no class {name!r}", remedy=f"the classes are {', '.join(classes)}")
    return classes.index(name)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what is undefined is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
