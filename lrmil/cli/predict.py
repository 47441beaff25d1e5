"""``lrmil predict``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import ABSTAIN, CASE_FROM, EXISTING, PATH, level_of, number
from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import RunDisplay, print_table
from wsi_pipe.cli.options import RESOLUTION, collect_entries, slide_options
from wsi_pipe.config import JobSettings, load_toml
from wsi_pipe.job.record import load_settings
from wsi_pipe.ownership import refuse_foreign_outputs

__all__ = ["predict"]

OUTPUTS = {
    "predictions.csv": (b"slide_id,case_id,status,predicted",),
    "predictions.json": (b'{\n "model": {',),
    "predictions-cases.csv": (b"case_id,slides,how",),
}
"""By what the files of an earlier call are known."""


@click.command()
@slide_options
@click.option(
    "--model",
    required=True,
    type=EXISTING,
    metavar="FILE|RUN",
    help="model.safetensors of lrmil train, a run, whose folds answer together, a cascade, or "
    "classifier.onnx of lrmil export.",
)
@click.option("--bags", multiple=True, type=EXISTING, metavar="DIR|BAG", help="Bags, instead of SLIDES; repeatable.")
@click.option("-o", "--out", required=True, type=PATH, metavar="DIR", help="Where results go.")
@click.option("-e", "--encoder", metavar="NAME|FILE", help="The model's encoder.  [as the model says, or beside it]")
@click.option("-r", "--resolution", type=RESOLUTION, metavar="RES", help="With --bags that do not state it.")
@CASE_FROM
@click.option("--job", type=PATH, metavar="JOB", help="With SLIDES: where masks and bags go.  [DIR/job]")
@click.option(
    "--config", type=EXISTING, metavar="TOML", help="With SLIDES: settings of segmentation, as JOB/config.toml."
)
@click.option("--name", metavar="NAME", help="The model's name in bags and measurements.  [from the file]")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="Tiles listed a slide.")
@ABSTAIN
@click.option("--attention/--no-attention", default=False, show_default=True, help="Write attention into the bags.")
@click.option("--geojson/--no-geojson", default=False, show_default=True, help="Write tiles for QuPath.")
@click.option("--heatmaps/--no-heatmaps", default=True, show_default=True, help="Write a picture a slide.")
@click.option(
    "--pyramids/--no-pyramids", default=False, show_default=True, help="Write each picture as OME-TIFF for QuPath, too."
)
@click.option("--smooth/--no-smooth", default=False, show_default=True, help="Interpolate pictures between tiles.")
@click.option(
    "--hr-budget",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="With a cascade: HR tiles read of an uncertain slide.  [as calibrated]",
)
@click.option("--device", metavar="DEV", default="auto", show_default=True, help="cpu, cuda:0 or auto.")
def predict(**values: Any) -> int:
    """Classify SLIDES, or bags that exist, with a trained model.

    SLIDES are read at the model's own resolution with the model's own encoder, and at no other. DIR gets
    predictions.csv and predictions.json: calibrated probabilities, class, entropy and top tiles (of another target
    what it says), and how far each slide lies from those of training; predictions-cases.csv where a patient has several
    slides. A run's folds answer together: their mean, and how far they disagree. A bag of another encoder, resolution
    or weights is refused. A classifier.onnx runs without torch.

    \b
    lrmil predict --model model.safetensors archive/ -o out
    lrmil predict --model classifier.onnx archive/ -o out
    lrmil predict --model run archive/ -o out --abstain accuracy=0.95
    lrmil predict --model model.safetensors --bags job/bags -o out --geojson
    """
    from lrmil.cascade.card import is_cascade
    from lrmil.cli.cascade import predict_with_cascade
    from lrmil.experiment.slide_files import write_slide_files
    from lrmil.predictor import load_predictor, write_case_predictions, write_predictions
    from lrmil.predictor.cases import CASE_TABLE_NAME

    if bool(values["bags"]) == bool(values["sources"] or values["manifest"]):
        raise click.UsageError("give SLIDES, or --bags, and not both")
    refuse_foreign_outputs(values["out"], OUTPUTS)
    if is_cascade(values["model"]):
        return predict_with_cascade(values)
    if values["hr_budget"]:
        raise click.UsageError("--hr-budget is for a cascade, see lrmil cascade")
    predictor = load_predictor(values["model"], device=values["device"], name=values["name"])
    if values["abstain"]:
        click.echo(str(predictor.abstain(values["abstain"])), err=True)
    wanted = {name: values[name] for name in ("attention", "geojson", "heatmaps", "pyramids", "smooth")}
    found: list[Any] = []
    place: dict[str, int] = {}
    try:
        results = _from_bags(predictor, values) if values["bags"] else _from_slides(predictor, values, place)
        if values["case_from"]:
            results = map(_of_barcode, results)
        found.extend(write_slide_files(result, predictor, values["out"], **wanted) for result in results)
    except BaseException:
        # An interrupted run keeps what it has found out; one that found nothing leaves no empty tables.
        if found:
            write_predictions(values["out"], found, predictor)
        raise
    write_predictions(values["out"], found, predictor)
    _print(found, () if predictor.card.target_state else predictor.card.classes, values["out"])
    cases = write_case_predictions(values["out"], found, predictor)
    if cases:
        click.echo(f"{cases} cases: {values['out'] / CASE_TABLE_NAME}")
    return EXIT_FAILED if any(p.status == "failed" for p in found) else 0


def _of_barcode(prediction: Any) -> Any:
    """A prediction with the patient of its slide's TCGA barcode, where it has one."""
    from lrmil.sites import tcga_case

    return dataclasses.replace(prediction, case_id=tcga_case(prediction.slide_id) or prediction.case_id)


def _from_bags(predictor: Any, values: dict[str, Any]) -> Iterator[Any]:
    from lrmil.store import find_bags

    level = level_of(values["resolution"])
    paths = find_bags(list(values["bags"]), values["encoder"] or predictor.card.encoder or None)
    yield from predictor.predict_bags(paths, level=level, encoder=values["encoder"], top_tiles=values["top"])


def _from_slides(predictor: Any, values: dict[str, Any], place: dict[str, int]) -> Iterator[Any]:
    """The predictions as they come; place: gets each slide's place in the list."""
    from lrmil.predictor import find_encoder, predict_slides

    job = values["job"] or values["out"] / "job"
    entries = collect_entries(values, job)
    place |= {entry.slide_id: i for i, entry in enumerate(entries)}
    encoder = find_encoder(predictor.card, values["model"], values["encoder"])
    # A job that is there keeps its settings of segmentation; an exported classifier brings those of its training.
    base = load_toml(JobSettings, values["config"]) if values["config"] else load_settings(job)
    with RunDisplay(len(entries)) as display:
        yield from predict_slides(
            predictor,
            entries,
            job,
            encoder=encoder,
            base=base or predictor.settings,
            reader=values["reader"],
            top_tiles=values["top"],
            progress=display.progress,
            finished=display.finished,
        )


def _print(found: list[Any], classes: tuple[str, ...], out: Path) -> None:
    rows = []
    for p in found:
        numbers = [number(p.probabilities[c]) if p.probabilities else "-" for c in classes]
        said = f"({p.predicted})" if p.abstained else p.predicted or p.status
        rows.append([p.slide_id, said, *numbers, number(p.entropy_nats), f"{p.tiles:,}"])
    columns = {"slide": "left", "class": "left"} | {f"p({c})": "right" for c in classes}
    print_table(columns | {"entropy (nats)": "right", "tiles": "right"}, rows)
    for p in found:
        if p.ood is not None and p.ood.beyond:
            click.echo(f"{p.slide_id}: {p.ood.note}", err=True)
        if p.reason:
            click.echo(f"{p.slide_id}: {p.status}: {p.reason}" + (f"; {p.remedy}" if p.remedy else ""), err=True)
    ends = Counter(p.status for p in found)
    silent = sum(bool(p.abstained) for p in found)
    without = f", {silent} without an answer (in brackets: what it would be)" if silent else ""
    click.echo(f"{', '.join(f'{n} {status}' for status, n in ends.items()) or 'nothing'}{without}: {out}")
