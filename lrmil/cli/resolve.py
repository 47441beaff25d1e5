"""``lrmil resolve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING, PATH, SLIDE_TABLE, number, pack_progress, seen_option
from lrmil.config import CHOICES
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTION

__all__ = ["resolve"]


@click.command()
@click.option("--bags", required=True, type=EXISTING, metavar="JOB", help="A job, or a folder of its bags.")
@click.option("--labels", required=True, type=EXISTING, metavar="CSV", help="Columns slide_id or case_id, and label.")
@click.option("--label-column", metavar="NAME", help="Column that holds the label.  [label]")
@SLIDE_TABLE
@click.option(
    "-r",
    "--resolution",
    "resolutions",
    type=RESOLUTION,
    multiple=True,
    required=True,
    metavar="RES",
    help="To be compared, such as 20x; repeatable; the finest is the measure.",
)
@click.option(
    "-e",
    "--encoder",
    "encoders",
    multiple=True,
    metavar="[RES=]NAME",
    help="At all, or at one.  [the bags' primary one]",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.03,
    show_default=True,
    metavar="AUC",
    help="What a resolution may lose and still be enough.",
)
@click.option(
    "-o", "--out", required=True, type=PATH, metavar="DIR", help="Where runs and result go; it goes on there."
)
@click.option("--splits", type=EXISTING, metavar="CSV", help="Folds that test each case once.  [made anew]")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="How many to make.")
@click.option(
    "--model",
    "models",
    type=click.Choice(CHOICES),
    multiple=True,
    default=("auto", "linear"),
    show_default=True,
    help="At every resolution; the first decides, others are controls.",
)
@click.option("--positive", metavar="CLASS", help="Which of two classes is looked for.  [the second]")
@click.option("--epochs", type=click.IntRange(1), help="At most.  [50; few cases: 60]")
@click.option("--device", metavar="DEV", default="auto", show_default=True, help="cpu, cuda:0 or auto.")
@click.option("--allow-random", is_flag=True, help="Features of random weights too, for tests.")
@seen_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def resolve(**values: Any) -> int:
    """Which resolution do I need? The same cases, folds and models at each, and what each costs.

    Says in words whether a coarser resolution is enough, the finest is needed, or there are too few cases to say, and
    about how many would do. DIR gets audit.json, audit.png and the runs.

    \b
    lrmil resolve --bags job --labels labels.csv -r 20x -r 10x -r 5x --margin 0.03 -o audit
    """
    import dataclasses

    from lrmil.config import TrainSettings
    from lrmil.resolve import audit
    from lrmil.resolve.audit import find_arms
    from lrmil.splits import read_splits

    settings = TrainSettings(device=values["device"])
    if values["epochs"]:
        settings = dataclasses.replace(settings, epochs=values["epochs"])
    out: Path = values["out"]
    result = audit(
        values["bags"],
        values["labels"],
        find_arms(values["bags"], values["resolutions"], values["encoders"]),
        out,
        margin=values["margin"],
        models=values["models"],
        settings=settings,
        splits=read_splits(values["splits"]) if values["splits"] else None,
        folds=values["folds"],
        positive=values["positive"],
        label_column=values["label_column"],
        slide_table=values["slide_table"],
        allow_seen=values["allow_seen"],
        allow_random=values["allow_random"],
        say=lambda text: click.echo(text, err=True),
        packing=pack_progress(),
    )
    if values["as_json"]:
        print_json(result.to_json())
        return 0
    rows = []
    for own in result.models:
        for c in own.comparisons:
            cost = result.costs.get(c.name)
            rows.append(
                [
                    own.model,
                    c.name,
                    _with_interval(c.auc, c.low_auc, c.high_auc),
                    "" if c.state == "reference" else _with_interval(c.difference, c.low, c.high),
                    {"reference": "the measure", "loses": "loses more"}.get(c.state, c.state),
                    f"{cost.seconds:.3g}" if cost else "-",
                    f"{cost.tiles:,.0f}" if cost else "-",
                ]
            )
    columns = {"model": "left", "at": "left", "AUC (95 %)": "left", "less the finest": "left", "": "left"}
    print_table(columns | {"s a slide": "right", "tiles": "right"}, rows)
    click.echo(f"{result.slides} slides of {result.cases} cases, {out}")
    click.echo(result.verdict)
    return 0


def _with_interval(value: float, low: float, high: float) -> str:
    return number(value) if low != low else f"{number(value)} ({number(low)} to {number(high)})"
