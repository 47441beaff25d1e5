"""``lrmil experiment``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import EXISTING, PATH
from wsi_pipe.cli.options import changes_option_of
from wsi_pipe.errors import ConfigError

__all__ = ["experiment"]


@click.command()
@click.argument("preset")
@click.option("-o", "--out", required=True, type=PATH, metavar="DIR", help="Folder of the experiment.")
@click.option("--slides", type=EXISTING, metavar="CSV", help="Slides, as wsi-pipe takes them.  [a synthetic cohort]")
@click.option("--labels", type=EXISTING, metavar="CSV", help="With --slides: labels, as lrmil train takes them.")
@click.option("--splits", type=EXISTING, metavar="CSV", help="Folds, as of lrmil split.  [made anew]")
@changes_option_of("distill.epochs=8")
@click.option("--signal", metavar="NAME", help="Of the synthetic cohort, over the preset's.")
@click.option("--ablation", metavar="K", help="Leave out the losses one by one on this fold too.")
def experiment(preset: str, out: Path, **values: Any) -> int:
    """The whole LRMIL experiment by a PRESET: features once, every fold of every arm, figures, cost, one table.

    PRESET is a name (paper, paper-small, cpu, cpu-small, gpu-full) or a TOML file. Run again, it goes on where it was:
    every stage keeps what is done and still fits the settings.

    \b
    lrmil experiment paper -o out --slides slides.csv --labels labels.csv
    lrmil experiment cpu -o out --signal middle --set cohort.slides=60
    """
    from lrmil.experiment.presets import find_preset
    from lrmil.experiment.settings import cohort_changes, load_experiment
    from lrmil.experiment.whole import Experiment
    from lrmil.splits import read_splits
    from wsi_pipe.cores import available_cores

    changes, signal = values["changes"], values["signal"]
    idle = [f"--set {change}" for change in cohort_changes(changes)] + ([f"--signal {signal}"] if signal else [])
    if values["slides"] and idle:
        raise ConfigError(
            f"{', '.join(idle)}: is about the synthetic cohort, which --slides stands in for",
            remedy="leave out the one or the other",
        )
    settings = load_experiment(find_preset(preset), changes)
    if signal:
        settings = dataclasses.replace(settings, cohort=dataclasses.replace(settings.cohort, signal=signal))
    splits = read_splits(values["splits"]) if values["splits"] else None
    whole = Experiment(settings, out, values["slides"], values["labels"], splits, workers=available_cores())
    whole.run(ablation=values["ablation"], progress=lambda text: click.echo(text, err=True))
    click.echo((out / "results.md").read_text(encoding="utf-8"))
    return 0
