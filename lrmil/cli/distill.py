"""``lrmil distill``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING
from wsi_pipe.cli import messages
from wsi_pipe.cli.display import print_json, print_table
from wsi_pipe.cli.options import RESOLUTIONS, changes_option_of, flat
from wsi_pipe.errors import ConfigError
from wsi_pipe.override import changed, refuse_twice

__all__ = ["distill"]


@click.command()
@click.option("--bags", type=EXISTING, required=True, metavar="DIR", help="Bags with both resolutions.")
@click.option("--slides", type=EXISTING, metavar="CSV", help="Where the slides lie, if not where the bags say.")
@click.option(
    "--teacher",
    "teachers",
    required=True,
    multiple=True,
    metavar="NAME",
    help="Encoder of the HR tiles; any of wsi-pipe encoders. Several are learned from at once.",
)
@click.option(
    "--student",
    default="copy",
    show_default=True,
    metavar="NAME",
    help="copy (of the teacher), fast or balanced (small networks for processors), or another network.",
)
@click.option(
    "-r",
    "--resolution",
    "resolutions",
    type=RESOLUTIONS,
    multiple=True,
    callback=flat,
    metavar="RES,RES",
    help="HR and LR.  [20x,5x]",
)
@click.option("--splits", type=EXISTING, metavar="CSV", help="Folds, as of lrmil split: one encoder for --fold.")
@click.option("--labels", type=EXISTING, metavar="CSV", help="Whose cases slides are, if not as the bags say.")
@click.option("--fold", metavar="K", help="With --splits: whose training cases the student sees.")
@click.option("--all", "everything", is_flag=True, help="Instead of splits: one encoder, distilled from all slides.")
@click.option(
    "--cases", "cases_file", type=EXISTING, metavar="FILE", help="Instead of splits: the cases to see, an id a line."
)
@click.option("--mil-teacher", type=EXISTING, metavar="FILE", help="Weigh children by this HR model's attention.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The encoder, .safetensors.",
)
@click.option(
    "--targets",
    type=click.Choice(["bags", "compute"]),
    default="bags",
    show_default=True,
    help="Teacher's features and layers: as the bags hold them, or computed now.",
)
@click.option(
    "--targets-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where computed targets go; folds may share it.  [beside --out]",
)
@click.option("--layers", metavar="N,N|none", help="Teacher's blocks to learn; none for the final features.  [0,1,-2]")
@click.option("--layer-variance/--no-layer-variance", default=None, help="Divide each layer by its variance.  [on]")
@click.option("--patch", type=float, help="Weight of the layers' loss.  [1]")
@click.option("--final", type=float, help="Weight of the final features' loss.  [1]")
@click.option("--standardise", type=click.Choice(["auto", "yes", "no"]), help="Each dimension of the targets.  [auto]")
@changes_option_of("warmup=0.1")
@click.option("--epochs", type=click.IntRange(1), help="At most.  [30]")
@click.option("--patience", type=click.IntRange(1), help="Epochs without a better validation loss.  [8]")
@click.option("--batch-size", type=click.IntRange(1), help="LR tiles a step.  [64]")
@click.option("--learning-rate", "--lr", "lr", type=float, help="AdamW's peak.  [3e-4]")
@click.option("--weight-decay", type=float, help="Of AdamW.  [0.05]")
@click.option("--val-fraction", type=float, help="Of the training cases, to stop by.  [0.15]")
@click.option("--stain", type=float, help="Strength of stain augmentation.  [0.1]")
@click.option("--flips/--no-flips", default=None, help="Turn and mirror tiles with their children.  [on]")
@click.option(
    "--jitters", type=click.IntRange(0), metavar="N", help="N more grids of each training slide, moved a little.  [0]"
)
@click.option("--student-px", type=click.IntRange(8), help="Side of the student's input.  [the tiles' own]")
@click.option("--random-teacher", is_flag=True, help="Draw the teacher's weights anew: for tests.")
@click.option("--allow-random", is_flag=True, help="With a --mil-teacher of random features too, for tests.")
@click.option("--random-student", is_flag=True, help="Draw the student's weights anew rather than load them.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of training.  [auto]")
@click.option("--device", metavar="DEV", help="cpu, cuda:0 or auto.  [auto]")
@click.option(
    "--devices",
    metavar="DEV,DEV",
    help="Train on several at once: cuda:0,cuda:1 or auto for all GPUs; torchrun goes too.",
)
@click.option("--seed", type=int, help="Of weights, order and augmentation.  [0]")
@click.option("--cache-mib", type=click.IntRange(0), help="Keep decoded tiles when they fit.  [2048]")
@click.option("--targets-mib", type=click.IntRange(0), help="Targets kept in memory; the rest in files.  [4096]")
@click.option("--threads", type=click.IntRange(1), help="Reading threads.  [all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def distill(**values: Any) -> int:
    """Distil an LR encoder; the file runs in wsi-pipe extract.

    The student starts fresh, trains on one fold's training cases alone (--splits, --fold), on all slides (--all) or on
    the cases named (--cases), and stops by some of these. No labels are needed. The file states who was seen, so that
    no model is judged on them without a word. Run again after an interruption, it goes on where it was.

    \b
    lrmil distill --bags job/bags --teacher uni --all --out lr.safetensors
    lrmil distill --bags job/bags --teacher uni --student timm:vit_small_patch16_224 \\
        -r 20x -r 5x --splits splits.csv --fold 1 --out lr-fold1.safetensors
    wsi-pipe extract slides/ -o job -e 20x=uni -e 5x=lr-fold1.safetensors
    """
    from lrmil.data import read_cases
    from lrmil.distill import DistillRequest, run_distillation
    from lrmil.distill.presets import preset_of
    from lrmil.distill.ranks import speaks, training_devices
    from lrmil.pictures.distill import draw_distillation
    from lrmil.splits import read_splits
    from wsi_pipe.geometry import level_label
    from wsi_pipe.job.private import hidden_slides
    from wsi_pipe.manifest import read_manifest

    if values["device"] and values["devices"]:
        raise ConfigError("--device and --devices are given", remedy="give one of them")
    resolutions = sorted(values["resolutions"] or (0.5, 2.0))
    if len(resolutions) != 2:
        raise ConfigError(f"{len(resolutions)} resolutions are given", remedy="give HR and LR, such as -r 20x -r 5x")
    notes: list[str] = []
    if values["slides"]:
        entries = read_manifest(values["slides"], notes=notes)
    else:
        entries = hidden_slides(values["bags"].parent)
    for note in notes:
        messages.note(note)
    # A manifest without cases makes each slide a case of its own, which is no news.
    cases = {entry.slide_id: entry.case_id for entry in entries if entry.case_id != entry.slide_id}
    cases |= read_cases(values["labels"]) if values["labels"] else {}
    if values["mil_teacher"] and not values["allow_random"]:
        from lrmil.checkpoint import read_card
        from lrmil.errors import RandomFeaturesError

        if read_card(values["mil_teacher"]).weights:
            raise RandomFeaturesError(
                f"{values['mil_teacher']} was trained on features of random weights: its attention means nothing",
                remedy="give another, or say --allow-random for a test",
            )
    chosen = [name for name in ("splits", "everything", "cases_file") if values[name]]
    if len(chosen) != 1 or bool(values["splits"]) != bool(values["fold"]):
        raise ConfigError(
            "whom the student may see is not clear", remedy="give --splits with --fold, or --all, or --cases FILE"
        )
    network, side_px = preset_of(values["student"], values["student_px"])
    request = DistillRequest(
        bags=values["bags"],
        teacher=values["teachers"][0],
        more_teachers=values["teachers"][1:],
        student=network,
        lr=level_label(resolutions[1]),
        hr=level_label(resolutions[0]),
        splits=read_splits(values["splits"]) if values["splits"] else None,
        fold=values["fold"] or "",
        only_cases=_case_ids(values["cases_file"]) if values["cases_file"] else (),
        out=values["out"],
        settings=_settings(values),
        slides={entry.slide_id: entry.path for entry in entries},
        cases=cases,
        mil_teacher=values["mil_teacher"],
        compute=values["targets"] == "compute",
        targets_dir=values["targets_dir"],
        random_teacher=values["random_teacher"],
        random_student=values["random_student"],
        student_px=side_px,
        devices=tuple(training_devices(values["devices"])) if values["devices"] else (),
    )
    result = run_distillation(request, None if values["as_json"] else messages.say)
    if not speaks():
        return 0
    picture = values["out"].with_name(f"{values['out'].stem}.png")
    draw_distillation(picture, result.history, result.baseline)
    if values["as_json"]:
        print_json(
            {
                "path": str(result.path),
                "best_epoch": result.history.best,
                "figures": dict(result.figures),
                "linear_baseline": {k: dataclasses.asdict(v) for k, v in result.baseline.items()},
            }
        )
        return 0
    rows = []
    for name in [key.removesuffix("_cosine") for key in result.figures if key.endswith("_cosine")]:
        base = result.baseline.get(name)
        learned = [f"{result.figures[f'{name}_{what}']:.3f}" for what in ("explained_variance", "cosine")]
        linear = [f"{base.explained_variance:.3f}", f"{base.cosine:.3f}"] if base else ["-", "-"]
        rows.append([name, *learned, *linear])
    if rows:
        columns = {"of HR features": "left", "explained": "right", "cosine": "right"}
        print_table(columns | {"linear: explained": "right", "linear: cosine": "right"}, rows)
    click.echo(f"best epoch {result.history.best}: {result.path}, {picture}")
    return 0


def _case_ids(path: Path) -> tuple[str, ...]:
    """Ids, one a line; blank lines do not count. Raises ConfigError where there is none."""
    try:
        found = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no list of cases: {error}", remedy="write a case id a line") from error
    if not found:
        raise ConfigError(f"{path} names no case", remedy="write a case id a line")
    return found


def _settings(values: Mapping[str, Any]) -> Any:
    from lrmil.distill import DistillSettings

    changes = {f.name: values[f.name] for f in dataclasses.fields(DistillSettings) if values.get(f.name) is not None}
    if "layers" in changes:
        text = changes["layers"]
        try:
            changes["layers"] = () if text == "none" else tuple(int(part) for part in text.split(","))
        except ValueError as error:
            raise ConfigError(f"--layers {text!r} is not a list of numbers", remedy="write 0,1,-2 or none") from error
    refuse_twice(values["changes"], [*changes, *(["learning_rate"] if "lr" in changes else [])])
    return dataclasses.replace(changed(DistillSettings(), values["changes"], example="warmup=0.1"), **changes)
