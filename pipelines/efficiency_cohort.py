"""Synthetic cohorts with a fixed test part, several classes, and a shift of stain and scanner in the test part."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.augment import HED_FROM_RGB, RGB_FROM_HED
from pipelines.efficiency_settings import PlannedCohort, ShiftSettings
from wsi_pipe.config import fingerprint, to_mapping
from wsi_pipe.files import write_text_atomically
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide

__all__ = ["PlannedSlide", "labelled_cases", "make_slides", "plan_slides", "shifted", "validation_cases"]

DOWNSAMPLES = (1, 4)
PLAIN = ShiftSettings()


@dataclass(frozen=True)
class PlannedSlide:
    """One slide, which is a case of its own. part: "train" or "test". label: its class."""

    slide_id: str
    part: str
    label: int
    spec: SlideSpec
    shift: ShiftSettings


def plan_slides(cohort: PlannedCohort, seed: int) -> list[PlannedSlide]:
    """The slides of a cohort, training part first; in each part classes are as frequent as can be, in random order."""
    slides = []
    for part, count in (("train", cohort.train), ("test", cohort.test)):
        labels = np.arange(count) % len(cohort.classes)
        labels = np.random.default_rng([seed, count, part == "test"]).permutation(labels)
        for number, label in enumerate(labels.tolist(), start=1):
            slide_id = f"{part}{number:04d}"
            # Without a lesion all signals give the same slide.
            signal = cohort.signals[max(label - 1, 0)]
            spec = SlideSpec(
                int(np.random.default_rng([seed, number, part == "test"]).integers(1 << 62)),
                (cohort.size_px, cohort.size_px),
                cohort.mpp,
                int(label > 0),
                signal,  # type: ignore[arg-type]
                strength=cohort.strengths[max(label - 1, 0)],
                tissue_fraction=cohort.tissue_fraction,
                lesion_fraction=cohort.lesion_fraction,
            )
            slides.append(PlannedSlide(slide_id, part, label, spec, cohort.shift if part == "test" else PLAIN))
    return slides


def shifted(rgb: NDArray[np.uint8], shift: ShiftSettings) -> NDArray[np.uint8]:
    """Pixels as another laboratory and scanner show them, uint8 (H, W, 3), without the JPEG quality.

    Stains are scaled in the space of stain densities (Ruifrok and Johnston 2001), the light then by the tint.
    """
    import cv2

    if shift.haematoxylin == 1 and shift.eosin == 1 and shift.tint == (1.0, 1.0, 1.0) and not shift.blur_px:
        return rgb
    density = -np.log((rgb.astype(np.float32) + 1) / 256)
    matrix = (HED_FROM_RGB * np.array([shift.haematoxylin, shift.eosin, 1.0])) @ RGB_FROM_HED
    light = (256 * np.exp(-density @ matrix.astype(np.float32)) - 1) * np.array(shift.tint, np.float32)
    if shift.blur_px:
        light = cv2.GaussianBlur(light, (0, 0), shift.blur_px)
    return np.asarray(np.clip(np.rint(light), 0, 255), np.uint8)


def make_slides(folder: Path, cohort: PlannedCohort, seed: int, *, workers: int = 1) -> list[PlannedSlide]:
    """Write the slides of a cohort with ``slides.csv`` into a folder, unless they are there; the plan.

    workers: processes that draw; more than one are started anew (spawn).
    """
    slides = plan_slides(cohort, seed)
    mark, stamp = folder / "cohort.txt", fingerprint(to_mapping(cohort), seed)
    if mark.is_file() and mark.read_text(encoding="utf-8") == stamp:
        return slides
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"{slide.slide_id}.tif", slide) for slide in slides]
    if workers == 1:
        for job in jobs:
            _write(job)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write, jobs, chunksize=8))
    text = io.StringIO(newline="")
    rows = [("slide", "slide_id", "case_id"), *((f"{s.slide_id}.tif", s.slide_id, s.slide_id) for s in slides)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(folder / "slides.csv", text.getvalue())
    write_text_atomically(mark, stamp)
    return slides


def _write(job: tuple[Path, PlannedSlide]) -> None:
    import cv2

    cv2.setNumThreads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path, slide = job
    source = SyntheticSlide(slide.spec)
    full = shifted(source.region(0, 0, *source.size_px), slide.shift)
    levels: list[Any] = [full]
    for factor in DOWNSAMPLES[1:]:
        size = (full.shape[1] // factor, full.shape[0] // factor)
        levels.append(cv2.resize(full[: size[1] * factor, : size[0] * factor], size, interpolation=cv2.INTER_AREA))
    write_pyramid(path, levels, mpp=slide.spec.mpp, quality=slide.shift.quality)


def labelled_cases(labels: Mapping[str, int], seed: int, draw: int, count: int) -> list[str]:
    """The cases of one draw whose labels are shown: the first ``count`` of an order in which classes take turns.

    labels: of all training cases. Draws of fewer cases are thus part of those of more, and every arm sees the same.
    """
    rng = np.random.default_rng([seed, draw])
    classes = sorted(set(labels.values()))
    piles = [[case for case in sorted(labels) if labels[case] == c] for c in classes]
    for pile in piles:
        rng.shuffle(pile)
    longest = max(map(len, piles))
    order = [pile[i] for i in range(longest) for pile in piles if i < len(pile)]
    return order[:count]


def validation_cases(labelled: list[str], labels: Mapping[str, int], every: int) -> list[str]:
    """Of the labelled cases, in their order, each ``every``-th of a class."""
    met: dict[int, int] = {}
    held = []
    for case in labelled:
        met[labels[case]] = met.get(labels[case], 0) + 1
        if met[labels[case]] % every == 0:
            held.append(case)
    return held
