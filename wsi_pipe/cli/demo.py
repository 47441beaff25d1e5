"""``wsi-pipe demo``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from wsi_pipe.errors import ConfigError
from wsi_pipe.ownership import claim_folder

__all__ = ["demo"]


@click.command()
@click.option(
    "-o",
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("wsi-demo"),
    show_default=True,
    help="Folder to make.",
)
@click.option(
    "--slides",
    # With fewer, four folds may not have a case of each label to test.
    type=click.IntRange(22),
    default=24,
    show_default=True,
    help="How many slides.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the cohort.")
@click.option("--preprocess-only", is_flag=True, help="Stop after the bags; train nothing.")
def demo(folder: Path, slides: int, seed: int, preprocess_only: bool) -> int:
    """Make a small labelled cohort of synthetic slides and take it through every command.

    Needs no network and no weights. Opens nothing; tells you which pages and pictures to look at.
    """
    from wsi_pipe.demo import demo_steps, make_demo_cohort, run_step

    if (folder / "slides").exists():
        raise ConfigError(f"{folder} holds a demo already", remedy="delete it, or give another folder with --out")
    claim_folder(folder, ".wsi-pipe-demo", "a demo")
    start = time.monotonic()
    click.secho(f"\nMaking {slides} synthetic H&E-like slides in {folder}/slides", bold=True)
    with click.progressbar(length=slides, label="slides") as bar:
        make_demo_cohort(folder, slides, seed, lambda done, all_: bar.update(done - bar.pos))
    for step in demo_steps(folder):
        if preprocess_only and step.program == "lrmil":
            break
        click.secho(f"\n{step.why}", bold=True)
        click.secho(f"$ {step.shown}", fg="cyan")
        run_step(step)
    click.secho(f"\nDone in {time.monotonic() - start:.0f} s. Look at:", bold=True)
    places = {
        folder / "job" / "report.html": "tissue, grids, tiles and timings of every slide, in a browser",
        folder / "job" / "bags": "one HDF5 bag a slide",
        folder / "lr-fold1.png": "how the 5x encoder learned what the 20x encoder knows",
        folder / "runs" / "5x": "the classifier that reads 5x alone, its curves and figures (the teacher: runs/20x)",
        folder / "predictions": "probabilities and heatmaps",
    }
    for path, what in places.items():
        if path.exists():
            click.echo(f"  {path}: {what}")
    return 0
