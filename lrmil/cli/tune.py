"""``lrmil tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING, PATH, bag_options, label_options, level_of, pack_progress, print_notes
from lrmil.config import CHOICES, MONITORS
from lrmil.tables import parse_renames
from wsi_pipe.cli.display import print_table
from wsi_pipe.cli.options import changes_option_of

__all__ = ["tune"]


@click.command()
@bag_options
@label_options
@click.option("-o", "--out", required=True, type=PATH, metavar="DIR", help="Where settings and trials go.")
@click.option("--splits", required=True, type=EXISTING, metavar="CSV", help="Folds, as of lrmil split.")
@click.option("--fold", "folds", multiple=True, metavar="K", help="This fold only; repeatable.  [all]")
@click.option(
    "--search",
    multiple=True,
    metavar="KEY=VALUES",
    help="A setting to search and what it may be: model.hidden=64,128 or learning_rate=1e-4..1e-2:log; repeatable.  "
    "[learning rate, weight decay, dropout, width]",
)
@click.option("--config", type=EXISTING, metavar="TOML", help="Settings to start from.  [the defaults of lrmil train]")
@click.option("--model", type=click.Choice(CHOICES), help="Of the settings to start from.  [auto]")
@changes_option_of("epochs=20")
@click.option(
    "--method",
    type=click.Choice(["random", "halving"]),
    default="random",
    show_default=True,
    help="Every trial on all inner folds, or the better half on each further one.",
)
@click.option(
    "--trials", type=click.IntRange(2), metavar="N", default=20, show_default=True, help="Sets of settings to try."
)
@click.option("--inner-folds", type=click.IntRange(2), metavar="N", default=3, show_default=True, help="Of each trial.")
@click.option("--metric", type=click.Choice(MONITORS), default="loss", show_default=True, help="What chooses.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of draws and inner folds.")
@click.option("--cost", is_flag=True, help="Say what it would cost, from the first training, and end there.")
@click.option("--device", metavar="DEV", help="cpu, cuda:0 or auto.  [auto]")
@click.option("--store", type=PATH, metavar="DIR", help="Where features are packed.  [DIR/store]")
@click.option("--allow-random", is_flag=True, help="On features of random weights too, for tests.")
def tune(**values: Any) -> int:
    """Choose settings by search inside the training cases of each fold; DIR/fold_K.toml is for lrmil train --config.

    Validation and test cases of a fold are never read. The cost is said after the first training, before the others.
    Run again, it goes on where it was. lrmil train refuses the settings for folds that test cases they were chosen on.

    \b
    lrmil tune --bags job/bags --labels labels.csv -r 5x -e uni --splits splits.csv --fold 1 -o tuned
    lrmil train --bags job/bags --labels labels.csv -r 5x -e uni --splits splits.csv --fold 1 \\
        --config tuned/fold_1.toml -o run
    """
    from lrmil.experiment.cohort import load_cohort, open_features
    from lrmil.experiment.search_space import SearchSpace
    from lrmil.experiment.tune import TuneSettings, tune_fold
    from lrmil.splits import read_splits

    out: Path = values["out"]
    space = SearchSpace.of(_base(values), values["search"])
    settings = TuneSettings(**{name: values[name] for name in ("method", "trials", "inner_folds", "metric", "seed")})
    store = open_features(
        values["bags"],
        level=level_of(values["resolution"]),
        encoder=values["encoder"],
        store_dir=values["store"] or out / "store",
        allow_random=values["allow_random"],
        progress=pack_progress(),
    )
    cohort = load_cohort(
        store,
        values["labels"],
        by=values["labels_by"],
        renames=parse_renames(values["renames"]),
        case_from=values["case_from"],
        label_column=values["label_column"],
        slide_table=values["slide_table"],
    )
    splits = read_splits(values["splits"])
    print_notes(cohort.notes(splits))
    rows = []
    for fold in [splits.fold_name(fold) for fold in values["folds"]] or list(splits.folds):
        result = tune_fold(
            cohort,
            splits,
            fold,
            space,
            settings,
            out,
            cost_only=values["cost"],
            say=lambda text: click.echo(text, err=True),
        )
        if result.best is not None:
            chosen = " ".join(result.best.changes) or "as they were"
            rows.append([fold, f"{result.best.mean:.4f}", f"{result.first.mean:.4f}", chosen, str(result.toml)])
    if rows:
        name = values["metric"]
        columns = {"fold": "left", f"inner {name}": "right", "as it was": "right", "settings": "left", "file": "left"}
        print_table(columns, rows)
        click.echo("the inner figures chose: judge the settings on the test cases, by lrmil train")
    return 0


def _base(values: dict[str, Any]) -> Any:
    """The settings to start from, without a teacher. Raises ConfigError when one is refused."""
    from lrmil.cli.train import settings_from

    own = {"config": values["config"], "changes": values["changes"], "seeds": (), "teacher": None, "targets": ()}
    losses = {f"loss_{name}": None for name in ("bag", "soft", "hard")}
    return settings_from({**own, **losses, "model_name": values["model"], "device": values["device"]})
