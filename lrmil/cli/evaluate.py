"""``lrmil evaluate`` and ``lrmil compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import (
    ABSTAIN,
    CASE_FROM,
    EXISTING,
    MAP,
    PATH,
    SHOWN,
    SLIDE_TABLE,
    TARGET,
    level_of,
    number,
    pack_progress,
    positive_options,
    print_figures,
    print_notes,
    seen_option,
)
from lrmil.tables import parse_renames
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTION
from wsi_pipe.errors import ConfigError

__all__ = ["compare", "evaluate"]

PART = click.Choice(["test", "val"])


@click.command()
@click.argument("run", required=False, type=EXISTING)
@click.option("--part", type=PART, default="test", show_default=True, help="Of a run's predictions.")
@click.option(
    "--model",
    type=EXISTING,
    metavar="FILE|RUN",
    help="Instead of a run: this model, or a run's folds together, on other bags.",
)
@click.option("--bags", type=EXISTING, metavar="DIR", help="With --model: bags or a store.")
@click.option("--labels", type=EXISTING, metavar="CSV", help="With --model: labels of the bags.")
@click.option("--label-column", metavar="NAME", help="With --model.  [label]")
@MAP
@SLIDE_TABLE
@CASE_FROM
@TARGET
@click.option("--splits", type=EXISTING, metavar="CSV", help="With --model: only the test part of --fold.")
@click.option("--fold", metavar="K", help="With --splits.  [1]")
@click.option("-r", "--resolution", type=RESOLUTION, metavar="RES", help="With --model: where bags do not state it.")
@click.option("-e", "--encoder", metavar="NAME", help="With --model: where bags do not state it.")
@click.option("-o", "--out", type=PATH, metavar="DIR", help="With --model: where predictions and figures go.")
@click.option("--device", metavar="DEV", default="auto", show_default=True, help="cpu, cuda:0 or auto.")
@click.option("--replicates", type=click.IntRange(10), default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@positive_options
@ABSTAIN
@seen_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(run: Path | None, as_json: bool, **values: Any) -> int:
    """Figures with 95 % intervals by case, and pictures: of RUN's predictions, or of a model on other labelled bags.

    \b
    lrmil evaluate run
    lrmil evaluate run --abstain coverage=0.8
    lrmil evaluate --model run/fold_1/model.safetensors --bags other/bags --labels other.csv -o external
    """
    from lrmil.experiment import evaluate_run

    if (run is None) == (values["model"] is None):
        raise click.UsageError("give a RUN, or --model with --bags, --labels and --out")
    if run is not None:
        result = evaluate_run(
            run,
            part=values["part"],
            positive=values["positive"],
            at_sensitivity=values["at_sensitivity"],
            replicates=values["replicates"],
            seed=values["seed"],
            abstain=values["abstain"],
        )
    else:
        result = _evaluate_model(values)
    if as_json:
        print_json(result.to_json())
    else:
        print_figures(result)
    return 0


def _evaluate_model(values: dict[str, Any]) -> Any:
    from lrmil.experiment import evaluate_model, load_cohort
    from lrmil.experiment.cohort import open_features
    from lrmil.predictor import read_cards
    from lrmil.splits import read_splits

    lacking = [f"--{name}" for name in ("bags", "labels", "out") if not values[name]]
    if lacking:
        raise click.UsageError(f"--model needs {', '.join(lacking)} too")
    if values["at_sensitivity"]:
        raise ConfigError(
            "--at-sensitivity needs validation slides of the model's own run", remedy="give RUN instead of --model"
        )
    if values["fold"] and not values["splits"]:
        raise ConfigError("--fold needs --splits", remedy="add --splits CSV")
    card = read_cards(values["model"])[0]
    store = open_features(
        values["bags"],
        level=level_of(values["resolution"]) or card.level or None,
        encoder=values["encoder"] or card.encoder or None,
        store_dir=values["out"] / "store",
        weights_sha256=card.weights_sha256,
        progress=pack_progress(),
    )
    cohort = load_cohort(
        store,
        values["labels"],
        label_column=values["label_column"],
        classes=card.classes,
        slide_table=values["slide_table"],
        targets=values["targets"] or card.training.get("targets", ()),
        like=card.target if card.target_state else None,
        renames=parse_renames(values["renames"]),
        case_from=values["case_from"],
        unit=str(card.training.get("unit", "slide")),
    )
    splits = read_splits(values["splits"]) if values["splits"] else None
    print_notes(cohort.notes(splits))
    fold = "" if splits is None else splits.fold_name(values["fold"] or 1)
    indices = None if splits is None else cohort.fold(splits, fold).test
    return evaluate_model(
        values["model"],
        cohort,
        values["out"],
        abstain=values["abstain"],
        indices=indices,
        splits=None if splits is None else (splits, fold),
        positive=values["positive"],
        allow_seen=values["allow_seen"],
        say=lambda text: click.echo(text, err=True),
        device=values["device"],
        replicates=values["replicates"],
        seed=values["seed"],
    )


@click.command()
@click.argument("run_a", type=EXISTING)
@click.argument("run_b", type=EXISTING)
@click.option("--part", type=PART, default="test", show_default=True, help="Of the runs' predictions.")
@click.option("--replicates", type=click.IntRange(10), default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--positive", metavar="CLASS", help="Which of two classes is looked for.  [the second]")
@seen_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    run_a: Path,
    run_b: Path,
    part: str,
    replicates: int,
    seed: int,
    positive: str | None,
    allow_seen: bool,
    as_json: bool,
) -> int:
    """Compare RUN_A with RUN_B on the same slides: differences, intervals by case, and DeLong's test of the AUCs."""
    from lrmil.experiment import compare_runs

    result = compare_runs(
        run_a,
        run_b,
        part=part,
        positive=positive,
        replicates=replicates,
        seed=seed,
        allow_seen=allow_seen,
        say=lambda text: click.echo(text, err=True),
    )
    if as_json:
        print_json(result.to_json())
        return 0
    rows = []
    for name in [name for name in SHOWN if name in result.differences] or list(result.differences):
        d = result.differences[name]
        interval = d.reason or f"{number(d.low)} to {number(d.high)}"
        rows.append([name, number(d.a), number(d.b), number(d.value), interval, number(d.p, 4)])
    columns = {"figure": "left", "A": "right", "B": "right", "A - B": "right", "95 % by case": "left", "p": "right"}
    print_table(columns, rows)
    tests = dict(result.delong) | ({"mean over folds": result.delong_mean} if result.delong_mean else {})
    for name, test in tests.items():
        if len(result.folds) == 1 and name == "mean over folds":
            continue
        text = f"p {number(test.p, 4)}, 95 % {number(test.low)} to {number(test.high)}"
        text += f" ({test.reason})" if test.reason else ""
        click.echo(
            f"DeLong, {name}: AUC {number(test.auc[0])} - {number(test.auc[1])} = {number(test.difference)}, {text}"
        )
    click.echo(f"{result.slides} slides, {len(result.folds)} fold(s), part {part}; A {run_a}, B {run_b}")
    return 0
