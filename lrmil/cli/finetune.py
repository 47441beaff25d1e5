"""``lrmil finetune``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import (
    EXISTING,
    PATH,
    label_options,
    level_of,
    positive_options,
    print_notes,
    seen_option,
)
from lrmil.cli.training import merged_settings, print_run, split_options, splits_of, teacher_of, teacher_options
from lrmil.config import ATTENTION_MODELS
from lrmil.tables import parse_renames
from wsi_pipe.cli import messages
from wsi_pipe.cli.options import RESOLUTION, changes_option_of

__all__ = ["finetune"]


@click.command()
@click.option("--bags", required=True, type=EXISTING, metavar="DIR", help="A job of wsi-pipe run, or its bags.")
@click.option("--slides", type=EXISTING, metavar="CSV", help="Where the slides lie, if not where the bags say.")
@click.option(
    "-r",
    "--resolution",
    type=RESOLUTION,
    metavar="RES",
    help="Level of the tiles.  [the encoder's own, else the bags' primary one]",
)
@click.option(
    "-e",
    "--encoder",
    required=True,
    metavar="FILE|NAME",
    help="Encoder to begin with: a file of lrmil distill, or any network of wsi-pipe encoders.",
)
@click.option("--random-weights", is_flag=True, help="Draw the weights of a named encoder anew.")
@label_options
@click.option("-o", "--out", required=True, type=PATH, metavar="RUN", help="Folder of the run; run again, it goes on.")
@split_options
@click.option("--config", type=EXISTING, metavar="TOML", help="Settings, such as RUN/fold_1/finetune.toml.")
@changes_option_of("model.attention_dim=32")
@click.option(
    "--model", "model_name", type=click.Choice(ATTENTION_MODELS), help="Architecture of the classifier.  [gated-abmil]"
)
@click.option("--hidden", "model_hidden", type=click.IntRange(1), help="Width of its projection.  [128]")
@click.option("--dropout", "model_dropout", type=float, help="In the projection.  [0.25]")
@click.option("--steps", type=click.IntRange(1), help="Gradient steps in all.  [150]")
@click.option("--max-bags", type=click.IntRange(1), help="Slides a step.  [8]")
@click.option("--max-tiles", type=click.IntRange(0), help="Of one slide in a step, 0 for all.  [64]")
@click.option("--learning-rate", type=float, help="AdamW's peak.  [1e-3]")
@click.option("--weight-decay", type=float, help="Of AdamW.  [0.05]")
@click.option("--clip-norm", type=float, help="Of the gradient, 0 for none.  [1]")
@click.option("--class-weights", type=click.Choice(["balanced", "none"]), help="Of the labels' loss.  [balanced]")
@click.option("--stain", type=float, help="Strength of stain augmentation.  [0.1]")
@click.option("--flips/--no-flips", default=None, help="Turn and mirror tiles.  [on]")
@click.option("--seed", type=click.IntRange(0), help="Of weights, order and augmentation.  [0]")
@click.option("--device", metavar="DEV", help="cpu, cuda:0 or auto.  [auto]")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of training.  [auto]")
@click.option("--cache-mib", type=click.IntRange(0), help="Keep decoded tiles when they fit.  [2048]")
@click.option("--threads", type=click.IntRange(0), help="Reading threads, 0 for all cores.  [0]")
@teacher_options
@click.option(
    "--unlabelled/--labelled-only",
    default=True,
    help="With a teacher: learn its word on slides without a label too.  [on]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the teacher's packed features.",
)
@click.option("--replicates", type=click.IntRange(10), default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--allow-random", is_flag=True, help="With a teacher of random features too, for tests.")
@positive_options
@seen_option
def finetune(**values: Any) -> int:
    """Train an LR encoder further, together with its classifier, on labelled slides and a teacher's word.

    Stage 2 with the encoder not frozen, for few labels and many slides. With --teacher, a run of lrmil train on HR
    features, slides without a label learn from it too. All labelled training slides are learned from, for a fixed
    number of steps; validation cases calibrate and choose nothing else.

    Each fold's folder in RUN gets the encoder, RUN-fold_1.safetensors, which runs in wsi-pipe extract,
    model.safetensors for lrmil predict, predictions.csv, metrics.csv, figures.json and pictures.

    \b
    lrmil finetune --bags job/bags --labels labels.csv -e lr-fold1.safetensors --teacher runs/hr \\
        --splits splits.csv --fold 1 -o runs/tuned
    lrmil predict --model runs/tuned/fold_1/model.safetensors new/ -o out
    """
    from lrmil.experiment import load_cohort
    from lrmil.finetuning import (
        FinetuneRequest,
        FinetuneSettings,
        cohort_notes,
        finetune_folds,
        load_finetune_settings,
        load_start,
        open_tiles,
        places_of,
        seen_by,
    )

    out: Path = values["out"]
    base = load_finetune_settings(values["config"]) if values["config"] else FinetuneSettings()
    settings = merged_settings(base, values, "model.attention_dim=32")
    places, notes = places_of(values["bags"], values["slides"])
    for note in notes:
        messages.note(note)
    info = load_start(values["encoder"], 224, random_weights=values["random_weights"]).info
    tiles = open_tiles(values["bags"], level_of(values["resolution"]), places, info)
    cohort = load_cohort(
        tiles.store,
        values["labels"],
        by=values["labels_by"],
        renames=parse_renames(values["renames"]),
        case_from=values["case_from"],
        label_column=values["label_column"],
        slide_table=values["slide_table"],
        site_column=values["site_column"],
    )
    cohort = seen_by(info, cohort)
    splits = splits_of(values, cohort, out)
    print_notes(cohort_notes(cohort, splits, learned=values["unlabelled"] and bool(values["teacher"])))
    folds = [splits.fold_name(fold) for fold in values["folds"]] or list(splits.folds)
    teacher, hr_store = teacher_of(values, folds, out, tiles.store.meta.level)
    results = finetune_folds(
        FinetuneRequest(
            cohort,
            tiles,
            splits,
            folds,
            settings,
            out,
            values["encoder"],
            random_weights=values["random_weights"],
            teacher=teacher,
            hr_store=hr_store,
            unlabelled=values["unlabelled"],
            allow_seen=values["allow_seen"],
        ),
        progress=_show(settings.steps),
        say=lambda text: click.echo(text, err=True),
    )
    print_run(out, {p.part for result in results.values() for p in result.predictions}, values)
    for name, result in results.items():
        click.echo(f"{name}: {result.encoder}, {result.model}")
    return 0


def _show(steps: int) -> Any:
    def show(fold: str, row: Mapping[str, float | None]) -> None:
        messages.say(f"{fold} step {int(row['step'] or 0)}/{steps}: loss {row['train_loss']:.4f}")

    return show
