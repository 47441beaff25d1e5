"""How many labels each way to classify needs: learning curves on fresh cohorts, with every control beside them.

    python -m pipelines.label_efficiency pipelines/presets/labels/middle.toml -o out
    python -m pipelines.label_efficiency pipelines/presets/labels/middle.toml -o out --seed 101

The seeds of the cohorts stand in the preset, which is committed before the run; result files name the commit.
``--seed`` runs one cohort alone, so that several may run side by side, and ``--labelled`` one number of labelled cases;
the summary is written as soon as all are there.
Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.efficiency_arms import Parts, arms_at, run_arms
from pipelines.efficiency_cohort import PlannedSlide, labelled_cases, make_slides, validation_cases
from pipelines.efficiency_features import (
    CohortFeatures,
    distil,
    distilled_store,
    extract,
    lr_tiles,
    other_tiles,
    teacher_store,
)
from pipelines.efficiency_results import summarise, write_summary
from pipelines.efficiency_settings import EfficiencySettings, load_efficiency
from pipelines.provenance import provenance
from wsi_pipe.config import fingerprint, to_mapping
from wsi_pipe.encoders import load_encoder
from wsi_pipe.errors import ConfigError, WsiPipeError
from wsi_pipe.files import write_text_atomically

__all__ = ["draw_parts", "main", "run_cohort"]


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def draw_parts(
    slides: Mapping[str, PlannedSlide],
    ids: Sequence[str],
    settings: EfficiencySettings,
    seed: int,
    draw: int,
    count: int,
) -> Parts:
    """The parts of one draw of ``count`` labelled cases; ids: of the stores' rows."""
    labels = {name: slide.label for name, slide in slides.items() if slide.part == "train"}
    shown = labelled_cases(labels, seed, draw, count)
    val = set(validation_cases(shown, labels, settings.validation_every))
    train = set(shown) - val

    def rows(wanted: Callable[[str], bool]) -> NDArray[np.int64]:
        return np.array([i for i, name in enumerate(ids) if wanted(name)], np.int64)

    return Parts(
        rows(train.__contains__),
        rows(val.__contains__),
        rows(lambda name: name in labels and name not in train and name not in val),
        rows(lambda name: slides[name].part == "test"),
    )


def run_cohort(
    settings: EfficiencySettings,
    seed: int,
    out: Path,
    *,
    labelled: int | None = None,
    arms: Sequence[str] | None = None,
    progress: Callable[[str], object] = say,
) -> None:
    """Every draw of one cohort into ``out``, a file each; what is there is kept.

    labelled: draws of this number of labelled cases alone. arms: those of the settings unless given. Raises ConfigError
    where ``out`` holds a cohort of other settings, LeakageError where the student saw a test case,
    and what the stages raise.
    """
    origin = provenance()
    stamp = fingerprint(to_mapping(settings), seed)
    mark = out / "cohort.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["settings"] != stamp:
        raise ConfigError(f"{mark}: is of other settings", remedy="give another --out")
    write_text_atomically(mark, json.dumps({"settings": stamp, "seed": seed, **origin}, indent=1))
    todo = [
        (count, draw)
        for count, draws in zip(settings.labelled, settings.draws, strict=True)
        for draw in range(draws)
        if labelled in (None, count) and not draw_file(out, count, draw).is_file()
    ]
    if not todo:
        return
    progress(f"cohort {seed}: slides")
    slides = {slide.slide_id: slide for slide in make_slides(out / "slides", settings.cohort, seed)}
    progress(f"cohort {seed}: features")
    teacher = load_encoder(settings.teacher, precision="float32")
    bags = extract(settings, out / "slides" / "slides.csv", out / "job", teacher)
    hr = teacher_store(settings, bags, settings.hr, out / "stores" / "hr")
    lr = {settings.tile_px: teacher_store(settings, bags, settings.lr, out / "stores" / "lr")}
    for side in settings.lr_tiles:
        if side != settings.tile_px:
            lr[side] = other_tiles(settings, bags, lr[settings.tile_px], side, teacher)
    cases = [name for name, slide in slides.items() if slide.part == "train"]
    test = [name for name, slide in slides.items() if slide.part == "test"]
    student = distil(settings, bags, cases, out / "student.safetensors", progress)
    tiles = lr_tiles(settings, bags, hr.slide_ids)
    encoder = load_encoder(str(student), device="cpu", precision="float32")
    features = CohortFeatures(hr, lr, distilled_store(encoder, tiles, lr[settings.tile_px], test), student, tiles)
    labels = np.array([slides[name].label for name in hr.slide_ids], np.int64)
    for count, draw in todo:
        progress(f"cohort {seed}: {count} labelled cases, draw {draw + 1}")
        parts = draw_parts(slides, hr.slide_ids, settings, seed, draw, count)
        own = [arm for arm in arms_at(settings, count) if arms is None or arm in arms]
        found = run_arms(features, labels, parts, settings, draw, arms=own)
        write_text_atomically(
            draw_file(out, count, draw),
            json.dumps(
                {
                    "seed": seed,
                    "labelled": count,
                    "draw": draw,
                    "cases": [hr.slide_ids[i] for i in parts.test],
                    "labels": labels[parts.test].tolist(),
                    "labelled_cases": [hr.slide_ids[i] for i in parts.labelled],
                    "arms": found,
                    "origin": origin,
                }
            ),
        )


def draw_file(out: Path, count: int, draw: int) -> Path:
    """Where the predictions of one draw of a cohort lie."""
    return out / "draws" / f"labelled{count:04d}-draw{draw + 1}.json"


def read_draws(settings: EfficiencySettings, out: Path) -> list[dict[str, Any]] | None:
    """The draws of all cohorts, None while some are missing."""
    paths = [
        draw_file(out / f"cohort-{seed}", count, draw)
        for seed in settings.seeds
        for count, draws in zip(settings.labelled, settings.draws, strict=True)
        for draw in range(draws)
    ]
    if not all(path.is_file() for path in paths):
        return None
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print the tables; 2 for the user's mistakes."""
    parser = argparse.ArgumentParser(prog="label_efficiency", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("preset", type=Path, help="TOML settings, such as pipelines/presets/labels/middle.toml")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--seed", type=int, help="run this cohort of the preset alone")
    parser.add_argument("--labelled", type=int, help="run this number of labelled cases of the preset alone")
    given = parser.parse_args(arguments)
    try:
        settings = load_efficiency(given.preset)
        if given.seed is not None and given.seed not in settings.seeds:
            raise ConfigError(f"{given.preset}: has no cohort of the seed {given.seed}, only {settings.seeds}")
        if given.labelled is not None and given.labelled not in settings.labelled:
            raise ConfigError(f"{given.preset}: has no {given.labelled} labelled cases, only {settings.labelled}")
        for seed in settings.seeds if given.seed is None else (given.seed,):
            run_cohort(settings, seed, given.out / f"cohort-{seed}", labelled=given.labelled)
        draws = read_draws(settings, given.out)
        if draws is not None:
            write_summary(given.out, summarise(settings, draws))
    except WsiPipeError as error:
        print(f"label_efficiency: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("label_efficiency: interrupted; run again to go on", file=sys.stderr)
        return 130
    if draws is None:
        print("other draws of the preset are not there yet: no summary", file=sys.stderr)
    else:
        print((given.out / "results.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
