"""``lrmil export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING
from wsi_pipe.cli import messages
from wsi_pipe.cli.display import print_json
from wsi_pipe.errors import ConfigError

__all__ = ["export"]


@click.command()
@click.option("--model", required=True, type=EXISTING, metavar="RUN|FILE", help="A run of one model, or its file.")
@click.option("-e", "--encoder", metavar="NAME|FILE", help="The model's encoder.  [as the model says, or beside it]")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The classifier, .onnx.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the encoder; bfloat16 runs where onnxruntime has kernels for it.",
)
@click.option("--quantise", type=click.Choice(["int8"]), help="Calibrate the encoder in int8 on tiles of training.")
@click.option(
    "--bags",
    type=EXISTING,
    metavar="JOB",
    help="Job of the training bags: its settings of tissue go into the file, its slides calibrate.",
)
@click.option("--slides", type=EXISTING, metavar="CSV", help="Where the slides lie, if not where the bags say.")
@click.option("--labels", type=EXISTING, metavar="CSV", help="Whose cases slides are, if not as the bags say.")
@click.option(
    "--calibration-tiles", type=click.IntRange(8), default=256, show_default=True, help="Of training, for int8."
)
@click.option(
    "--most-change",
    type=click.FloatRange(0, min_open=True),
    default=0.25,
    show_default=True,
    help="Of a calibrated logit on the validation slides, by int8; above it nothing is written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(**values: Any) -> int:
    """Write a trained model and its encoder as one ONNX file that lrmil predict runs without torch.

    It holds normalisation, encoder, MIL head, calibration, classes, tile size and resolution, settings of tissue, and
    the marks of the cases that were seen. Before it is written its logits are compared with torch's.

    \b
    lrmil export --model run --bags job -o classifier.onnx
    lrmil export --model run --bags job --quantise int8 -o classifier-int8.onnx
    lrmil predict --model classifier.onnx archive/ -o out
    """
    from lrmil.checkpoint import read_card
    from lrmil.data import read_cases
    from lrmil.deploy.export import ExportRequest, export_classifier, model_file
    from lrmil.predictor import find_encoder
    from wsi_pipe.job.private import hidden_slides
    from wsi_pipe.job.record import load_settings
    from wsi_pipe.manifest import read_manifest

    if values["quantise"] and values["precision"] != "float32":
        raise ConfigError("--quantise and --precision are given", remedy="give one of them")
    model, bags = model_file(values["model"]), values["bags"]
    job = None if bags is None else bags if (bags / "bags").is_dir() else bags.parent
    entries = read_manifest(values["slides"]) if values["slides"] else hidden_slides(job) if job else []
    cases = {entry.slide_id: entry.case_id for entry in entries if entry.case_id != entry.slide_id}
    cases |= read_cases(values["labels"]) if values["labels"] else {}
    request = ExportRequest(
        model=model,
        encoder=find_encoder(read_card(model), model, values["encoder"]),
        out=values["out"],
        precision=values["quantise"] or values["precision"],
        bags=bags,
        slides={entry.slide_id: entry.path for entry in entries},
        cases=cases,
        settings=load_settings(job) if job else None,
        tiles=values["calibration_tiles"],
        most_change=values["most_change"],
    )
    header = export_classifier(request, None if values["as_json"] else messages.say)
    size = values["out"].stat().st_size
    if values["as_json"]:
        facts = {"path": str(values["out"]), "bytes": size, "precision": header.encoder.precision}
        print_json(facts | {"accepted_mpp": header.accepted_mpp, "quantisation": dict(header.quantisation)})
        return 0
    if found := header.quantisation:
        click.echo(
            f"int8 against float32 on {found['judged_slides']} slides (part {found['judged_part']}): calibrated logits "
            f"change by {found['mean_logit_change']:.3g} on average and {found['largest_logit_change']:.3g} at most, "
            f"probabilities by {found['largest_probability_change']:.3g} at most, "
            f"{found['other_classes']} get another class"
        )
    click.echo(f"{header.encoder.precision}, {size / 1e6:.1f} MB: {values['out']}")
    return 0
