"""``lrmil cascade``, and ``lrmil predict`` with a cascade's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING, PATH, SLIDE_TABLE, number, pack_progress, print_notes, seen_option
from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table

__all__ = ["cascade", "predict_with_cascade"]

SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
BUDGET = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.argument("action", type=click.Choice(["fit"]))
@click.option("--lr", required=True, type=EXISTING, metavar="RUN", help="Run of low resolution, of lrmil train.")
@click.option("--hr", required=True, type=EXISTING, metavar="RUN", help="Run of high resolution on the same splits.")
@click.option("--risk", required=True, type=SHARE, metavar="SHARE", help="What may be lost against always reading HR.")
@click.option(
    "--loss",
    type=click.Choice(["disagree", "error", "miss"]),
    default="disagree",
    show_default=True,
    help="Another class than HR; wrong where HR is right; a positive not found that HR finds.",
)
@click.option("--positive", metavar="CLASS", help="The class not to be missed.  [the second]")
@click.option(
    "--confidence", type=SHARE, metavar="SHARE", help="Keep the risk with this confidence.  [keep it on average]"
)
@click.option(
    "--score",
    type=click.Choice(["auto", "margin", "entropy", "disagreement"]),
    default="auto",
    show_default=True,
    help="How unsure low resolution is; auto chooses on cases put aside.",
)
@click.option(
    "--hr-budget",
    type=BUDGET,
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="HR tiles read of an uncertain slide: those below the LR tiles with most attention.",
)
@click.option("--bags", type=EXISTING, metavar="DIR", help="Bags to calibrate on.  [the runs' test cases of each fold]")
@click.option("--labels", type=EXISTING, metavar="CSV", help="With --bags: their labels.")
@click.option("--label-column", metavar="NAME", help="With --labels: column of the label.  [label]")
@SLIDE_TABLE
@click.option("-o", "--out", required=True, type=PATH, metavar="FILE", help="Where the cascade goes (.safetensors).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of which cases choose the score.")
@click.option("--device", metavar="DEV", default="auto", show_default=True, help="cpu, cuda:0 or auto.")
@seen_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cascade(**values: Any) -> int:
    """Fit a cascade: low resolution for every slide, high resolution where it is unsure.

    The threshold is set on cases that the models have not seen, so that the cascade loses at most --risk against
    reading every slide at high resolution. FILE holds the models of both runs: lrmil predict --model FILE uses it.

    \b
    lrmil cascade fit --lr runs/5x --hr runs/20x --risk 0.05 -o cascade.safetensors
    lrmil cascade fit --lr runs/5x --hr runs/20x --risk 0.02 --loss error --confidence 0.9 -o cascade.safetensors
    """
    from lrmil.cascade.evidence import out_of_fold, run_models
    from lrmil.cascade.fitting import fit_cascade, write_cascade

    def say(text: str) -> None:
        click.echo(text, err=True)

    given = [name for name in ("bags", "labels") if values[name]]
    if len(given) == 1:
        raise click.UsageError("--bags and --labels go together")
    models = run_models(values["lr"]), run_models(values["hr"])
    if given:
        evidence = _own_cases(values, *models, say)
    else:
        evidence = out_of_fold(
            values["lr"], values["hr"], budget=values["hr_budget"], allow_seen=values["allow_seen"], say=say
        )
    fit = fit_cascade(
        evidence,
        values["risk"],
        loss=values["loss"],
        confidence=values["confidence"],
        score=values["score"],
        positive=values["positive"],
        seed=values["seed"],
    )
    card = write_cascade(values["out"], fit, evidence, models[0].files, models[1].files)
    if values["as_json"]:
        shown = {name: value for name, value in card.to_json().items() if name != "seen"}
        print_json(shown | {"promise": card.promise})
        return 0
    ends = {math.inf: "every slide", -math.inf: "no slide"}
    limit = ends.get(card.threshold, f"slides with a {card.score} below {card.threshold:.4g}")
    rows = [
        ["cases", f"{card.cases:,}"],
        ["lost", f"{100 * card.found:.3g} %"],
        ["slides read at high resolution", f"{100 * card.read:.3g} %"],
    ]
    print_table({"": "left", "of the calibration": "right"}, rows)
    click.echo(f"promise: {card.promise}")
    click.echo(f"score: {card.choice}")
    click.echo(f"low resolution decides {limit}; calibrated on {card.basis}: {values['out']}")
    return 0


def _own_cases(values: dict[str, Any], lr: Any, hr: Any, say: Any) -> Any:
    """Both runs' models asked about slides of their own."""
    from lrmil.cascade.evidence import as_predictors, on_bags
    from lrmil.experiment import load_cohort
    from lrmil.experiment.cohort import open_features

    low, high = (as_predictors(models, values["device"]) for models in (lr, hr))
    stores = []
    for models, parent in ((low, None), (high, low[0].card.level)):
        card = models[0].card
        stores.append(
            open_features(
                values["bags"],
                level=card.level or None,
                encoder=card.encoder or None,
                store_dir=values["out"].with_suffix("") / f"store-{card.level}",
                parent_level=parent,
                weights_sha256=card.weights_sha256,
                progress=pack_progress(),
            )
        )
    cohort = load_cohort(
        stores[0],
        values["labels"],
        label_column=values["label_column"],
        classes=low[0].card.classes,
        slide_table=values["slide_table"],
    )
    print_notes(cohort.notes())
    budget, allow = values["hr_budget"], values["allow_seen"]
    return on_bags(low, high, cohort, stores[1], budget=budget, allow_seen=allow, say=say)


def predict_with_cascade(values: dict[str, Any]) -> int:
    """``lrmil predict`` where the model is a cascade's file."""
    from lrmil.cascade.outputs import summary, write_cascade_predictions
    from lrmil.cascade.predict import CascadePredictor
    from lrmil.store import find_bags

    predictor = CascadePredictor.load(values["model"], device=values["device"], budget=values["hr_budget"])
    found: list[Any] = []
    try:
        if values["bags"]:
            paths = find_bags(list(values["bags"]), values["encoder"] or predictor.low[0].card.encoder or None)
            found.extend(predictor.predict_bags(paths))
        else:
            found.extend(_from_slides(predictor, values))
    finally:
        # An interrupted run keeps what it has found out; one that found nothing leaves no empty tables.
        if found:
            write_cascade_predictions(values["out"], found, predictor)
    classes = predictor.card.classes
    rows = []
    for p in found:
        numbers = [number(p.probabilities[c]) if p.probabilities else "-" for c in classes]
        own = [p.level or "-", number(p.score), f"{p.high.tiles:,}"]
        rows.append([p.slide_id, p.predicted or p.status, *numbers, *own])
    columns = {"slide": "left", "class": "left"} | {f"p({c})": "right" for c in classes}
    print_table(columns | {"decided at": "left", predictor.card.score: "right", "HR tiles": "right"}, rows)
    for p in found:
        if p.reason:
            click.echo(f"{p.slide_id}: {p.status}: {p.reason}" + (f"; {p.remedy}" if p.remedy else ""), err=True)
        for note in p.notes:
            click.echo(f"{p.slide_id}: {note}", err=True)
    click.echo(f"{summary(found)}: {values['out']}")
    click.echo(f"promise: {predictor.card.promise}, for slides like those of the calibration")
    return EXIT_FAILED if any(p.status == "failed" for p in found) else 0


def _from_slides(predictor: Any, values: dict[str, Any]) -> Any:
    from lrmil.cascade.slides import predict_slides
    from lrmil.predictor import find_encoder
    from wsi_pipe.cli.display import RunDisplay
    from wsi_pipe.cli.options import collect_entries
    from wsi_pipe.config import JobSettings, load_toml
    from wsi_pipe.job.record import load_settings

    job: Path = values["job"] or values["out"] / "job"
    entries = collect_entries(values, job)
    names = [find_encoder(part[0].card, values["model"], None) for part in (predictor.low, predictor.high)]
    base = load_toml(JobSettings, values["config"]) if values["config"] else load_settings(job) or JobSettings()
    with RunDisplay(len(entries)) as display:
        yield from predict_slides(
            predictor,
            entries,
            job,
            encoders=(names[0], names[1]),
            base=base,
            reader=values["reader"],
            progress=display.progress,
            finished=display.finished,
        )
