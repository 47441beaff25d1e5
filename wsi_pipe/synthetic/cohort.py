"""A labelled cohort of synthetic slides on disk."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.errors import ConfigError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.geometry import IntPair
from wsi_pipe.synthetic.chance import generator
from wsi_pipe.synthetic.slide import SyntheticSlide
from wsi_pipe.synthetic.spec import Signal, SlideSpec

__all__ = ["LABELS", "CohortSlide", "make_cohort", "plan_cohort"]

LABELS = ("negative", "positive")
"""Names of the labels 0 and 1 in ``labels.csv``."""


@dataclass(frozen=True)
class CohortSlide:
    """One slide of a cohort. path: where its file is or will be."""

    slide_id: str
    case_id: str
    path: Path
    spec: SlideSpec

    @property
    def label(self) -> str:
        """The name of the slide's label."""
        return LABELS[self.spec.label]


def plan_cohort(
    folder: Path,
    n_slides: int,
    *,
    seed: int = 0,
    signal: Signal = "coarse",
    size_px: IntPair = (2048, 2048),
    mpp: float = 0.5,
    positive_fraction: float = 0.5,
    max_slides_per_case: int = 3,
    **options: Any,
) -> list[CohortSlide]:
    """The slides of a cohort, none of them made yet.

    About half of the cases have one slide, the others up to ``max_slides_per_case``; all slides of a case have its
    label, and the positive slides are ``positive_fraction`` of all to within a case. Labels say nothing of order,
    stain or layout. options: fields of ``SlideSpec`` such as ``strength`` or ``pen``. Raises ConfigError for
    a number of slides below 1, a fraction outside 0 to 1, or an option that ``SlideSpec`` does not have.
    """
    if n_slides < 1 or max_slides_per_case < 1:
        raise ConfigError(f"a cohort of {n_slides} slides, {max_slides_per_case} a case, cannot be made")
    if not 0 <= positive_fraction <= 1:
        raise ConfigError(f"positive_fraction {positive_fraction} must lie between 0 and 1")
    rng = generator(seed, "cohort")
    counts: list[int] = []
    while sum(counts) < n_slides:
        several = max_slides_per_case > 1 and rng.uniform() < 0.5
        wanted = int(rng.integers(2, max_slides_per_case + 1)) if several else 1
        counts.append(min(wanted, n_slides - sum(counts)))
    # Cases in random order, each given the label that is further behind its share.
    labels = [0] * len(counts)
    positive = total = 0
    for case in rng.permutation(len(counts)):
        total += counts[case]
        if positive + counts[case] / 2 < positive_fraction * total:
            labels[case] = 1
            positive += counts[case]
    slides: list[CohortSlide] = []
    digits = max(3, len(str(n_slides)))
    for case, (count, label) in enumerate(zip(counts, labels, strict=True), start=1):
        for number in range(1, count + 1):
            slide_id = f"case{case:0{digits}d}-{number}"
            slide_seed = int(generator(seed, slide_id).integers(1 << 62))
            try:
                spec = SlideSpec(slide_seed, size_px, mpp, label, signal, **options)
            except TypeError as error:
                raise ConfigError(f"a synthetic slide has no such option: {error}") from error
            slides.append(CohortSlide(slide_id, f"case{case:0{digits}d}", folder / f"{slide_id}.tif", spec))
    return slides


def make_cohort(
    folder: Path | str,
    n_slides: int,
    *,
    seed: int = 0,
    signal: Signal = "coarse",
    size_px: IntPair = (2048, 2048),
    mpp: float = 0.5,
    downsamples: Sequence[int] = (1, 4),
    quality: int = 85,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> list[CohortSlide]:
    """Write a cohort of pyramidal slides with ``slides.csv`` and ``labels.csv`` into a folder.

    ``slides.csv`` (slide, slide_id, case_id) is what wsi-pipe reads, ``labels.csv`` (slide_id, case_id, label) what
    lrmil reads. downsamples: the levels, 1 first. quality: of the JPEG tiles. progress: called with (done, all) after
    each slide. options: of ``plan_cohort`` and ``SlideSpec``. Raises ConfigError as ``plan_cohort`` does, OutputError
    when the folder cannot be written.
    """
    from wsi_pipe.slides.write import write_pyramid

    folder = Path(folder)
    slides = plan_cohort(folder, n_slides, seed=seed, signal=signal, size_px=size_px, mpp=mpp, **options)
    for done, item in enumerate(slides, start=1):
        levels = SyntheticSlide(item.spec).levels(downsamples)
        write_pyramid(item.path, levels, mpp=mpp, quality=quality)
        if progress is not None:
            progress(done, len(slides))
    _write_csv(
        folder / "slides.csv",
        [("slide", "slide_id", "case_id"), *((s.path.name, s.slide_id, s.case_id) for s in slides)],
    )
    _write_csv(
        folder / "labels.csv",
        [("slide_id", "case_id", "label"), *((s.slide_id, s.case_id, s.label) for s in slides)],
    )
    return slides


def _write_csv(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(path, text.getvalue())
