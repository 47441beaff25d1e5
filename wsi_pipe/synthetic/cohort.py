"""A labelled cohort of synthetic slides on disk."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal as signals
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.cores import CORES_VARIABLE, core_shares
from wsi_pipe.errors import ConfigError, WorkerError
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
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> list[CohortSlide]:
    """Write a cohort of pyramidal slides with ``slides.csv`` and ``labels.csv`` into a folder.

    ``slides.csv`` (slide, slide_id, case_id) is what wsi-pipe reads, ``labels.csv`` (slide_id, case_id, label) what
    lrmil reads. downsamples: the levels, 1 first. quality: of the JPEG tiles. workers: processes that draw, each one
    slide at a time; the files are the same whatever their number. More than one are started anew (spawn), so a script
    that asks for them must keep its work below ``if __name__ == "__main__"``. progress: called with (done, all) after
    each slide. options: of ``plan_cohort`` and ``SlideSpec``.

    Raises ConfigError as ``plan_cohort`` does and for workers below 1, OutputError when the folder cannot be written,
    WorkerError when a process dies.
    """
    if workers < 1:
        raise ConfigError(f"{workers} processes cannot draw slides", remedy="give workers of 1 or more")
    folder = Path(folder)
    slides = plan_cohort(folder, n_slides, seed=seed, signal=signal, size_px=size_px, mpp=mpp, **options)
    for done, _ in enumerate(_written(slides, tuple(downsamples), mpp, quality, min(workers, len(slides))), start=1):
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


def _written(
    slides: Sequence[CohortSlide], downsamples: Sequence[int], mpp: float, quality: int, workers: int
) -> Iterator[None]:
    """Write every slide, one item for each that is there, in any order."""
    if workers == 1:
        for slide in slides:
            _write_slide(slide, downsamples, mpp, quality)
            yield
        return
    cores = core_shares(workers)[-1]
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(cores,))
    try:
        for future in as_completed([pool.submit(_write_slide, slide, downsamples, mpp, quality) for slide in slides]):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process that draws slides died",
            remedy='keep the work of a script below if __name__ == "__main__", or give workers=1; if memory ran out, '
            "give fewer, and look in the system log",
        ) from error
    finally:
        # After an error or an interruption the slides that are being drawn are the last.
        pool.shutdown(cancel_futures=True)


def _start_worker(cores: int) -> None:
    import cv2

    # Ctrl-C reaches every process of the terminal; it is the parent who ends the work.
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    os.environ[CORES_VARIABLE] = str(cores)
    cv2.setNumThreads(cores)


def _write_slide(slide: CohortSlide, downsamples: Sequence[int], mpp: float, quality: int) -> None:
    from wsi_pipe.slides.writing.write import write_pyramid

    write_pyramid(slide.path, SyntheticSlide(slide.spec).levels(downsamples), mpp=mpp, quality=quality)


def _write_csv(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(path, text.getvalue())
