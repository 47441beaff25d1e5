"""A trained model, asked about slides and bags."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.api.given import PathLike
from lrmil.checkpoint import ModelCard
from lrmil.experiment import RunFigures
from lrmil.experiment.slide_files import Ground, attention_of
from lrmil.pictures.heatmap import LONGEST_PX
from lrmil.predictor import Predictor, SlidePrediction, find_encoder, load_predictor, predict_slides, read_cards
from wsi_pipe.api.grids import as_label
from wsi_pipe.api.show import card, number
from wsi_pipe.api.slide import Slide
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import SlideError
from wsi_pipe.job.record import load_settings, load_slides
from wsi_pipe.manifest import SlideEntry, collect_slides

__all__ = ["Model", "load"]

BAG_SUFFIXES = (".h5", ".hdf5")
SHOWN = ("auc", "balanced_accuracy", "accuracy")


class Model:
    """A trained model, or the models of a run's folds together: asked about slides or bags.

    card: what its file says; of a run, its first fold's. cards: of every fold. figures: of its test cases, where it was
    trained just now.
    """

    def __init__(self, path: PathLike, *, device: str = "auto", figures: RunFigures | None = None) -> None:
        self.path = Path(path)
        self.device = device
        self.figures = figures
        self.cards: tuple[ModelCard, ...] = tuple(read_cards(self.path))
        self.card = self.cards[0]

    @cached_property
    def predictor(self) -> Predictor:
        """The network, or those of the folds, loaded when it is first asked."""
        return load_predictor(self.path, device=self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Its classes, in the order of the logits."""
        return self.card.classes

    def predict(
        self,
        what: PathLike | Slide | Sequence[PathLike | Slide],
        *,
        encoder: str | None = None,
        resolution: str | float | None = None,
        job: PathLike | None = None,
        settings: JobSettings | None = None,
        reader: str | None = None,
        top_tiles: int = 10,
        abstain: str | None = None,
    ) -> SlidePrediction | list[SlidePrediction]:
        """What the model says of a slide or a bag, or of several, in their order; bags end in .h5 or .hdf5.

        A slide is read at the model's own resolution with the model's own encoder, and at no other. encoder: its name
        or file, where the model does not say it or it lies elsewhere; of a bag that does not state it, too. resolution:
        of such a bag. job: folder where masks and bags of slides go and are found again, by default one that is removed
        afterwards. settings: of segmentation. reader: of slides. abstain: "accuracy=0.95", "coverage=0.8", reached on
        the model's validation slides, or "threshold=0.9": below it ``abstained`` is True.

        Of one slide, what is wrong is raised: SlideError, ModelMismatchError for an encoder, resolution or weights that
        are not the model's, StoreError. Of several, a slide that fails has status "failed" and the reason.
        """
        if abstain is None:
            self.predictor.abstention = None
        else:
            self.predictor.abstain(abstain)
        one = isinstance(what, (str, os.PathLike, Slide))
        given: list[PathLike | Slide] = [what] if isinstance(what, (str, os.PathLike, Slide)) else list(what)
        places = {i: Path(item) for i, item in enumerate(given) if not isinstance(item, Slide) and _is_bag(item)}
        slides = [item for i, item in enumerate(given) if i not in places]
        level = None if resolution is None else as_label(resolution)
        found: dict[int, SlidePrediction] = {}
        if one and places:
            return self.predictor.predict_bag(places[0], level=level, encoder=encoder, top_tiles=top_tiles)
        bags = self.predictor.predict_bags(places.values(), level=level, encoder=encoder, top_tiles=top_tiles)
        found |= dict(zip(places, bags, strict=True))
        if slides:
            rest = [i for i in range(len(given)) if i not in places]
            with _folder(job) as folder:
                entries = _entries(slides, folder)
                of_slides = {
                    prediction.slide_id: prediction
                    for prediction in predict_slides(
                        self.predictor,
                        entries,
                        folder,
                        encoder=find_encoder(self.card, self.path, encoder),
                        base=settings or load_settings(folder) or self.predictor.settings,
                        reader=reader,
                        top_tiles=top_tiles,
                    )
                }
            found |= {i: of_slides[entry.slide_id] for i, entry in zip(rest, entries, strict=True)}
        if one:
            (prediction,) = found.values()
            if prediction.status == "failed":
                raise SlideError(prediction.reason or f"{prediction.slide_id} failed", remedy=prediction.remedy)
            return prediction
        return [found[i] for i in range(len(given))]

    def heatmap(
        self, prediction: SlidePrediction, slide: Slide | None = None, *, smooth: bool = False
    ) -> NDArray[np.uint8] | None:
        """A slide's attention as a share of its maximum, in colour over the stained slide, uint8 (H, W, 3).

        slide: for the picture, by default the file that the bag names, else what its job keeps. smooth: interpolated
        between tiles. None for a model without an attention per tile, and a slide without tiles.
        """
        ground = None
        if slide is not None:
            extent = (float(slide.size[0]), float(slide.size[1]))
            ground = Ground(np.asarray(slide.thumbnail(LONGEST_PX), np.uint8), extent, slide.mpp)
        return attention_of(prediction, ground, smooth=smooth)

    def __repr__(self) -> str:
        several = f"{len(self.cards)} x " if len(self.cards) > 1 else ""
        level = self.card.level or "unstated level"
        return f"<Model {several}{self.card.model.name} of {', '.join(self.classes)}, {level}>"

    def _repr_html_(self) -> str:
        facts: list[tuple[str, object]] = [
            ("file", self.path),
            ("architecture", self.card.model.name),
            ("models", len(self.cards)),
            ("classes", ", ".join(self.classes)),
            ("features", f"{self.card.encoder or 'unnamed'} at {self.card.level or 'an unstated level'}"),
            ("calibration", self.card.calibration),
        ]
        if self.figures is not None:
            fold = self.figures.folds[0]
            facts.append(("judged on", f"{fold.slides} slides of {fold.cases} cases, {self.figures.part}"))
            for name in SHOWN:
                value = fold.estimates[name]
                text = value.reason or f"{number(value.value)} ({number(value.low)} to {number(value.high)})"
                facts.append((name, text))
        return card(f"lrmil model {self.card.model.name}", facts)


def load(path: PathLike, *, device: str = "auto") -> Model:
    """A model from its file, ``model.safetensors`` of a run or ``.onnx`` of ``lrmil export``, or the folds of a
    run together, from its folder.

    Raises ModelFileError when a file is missing or broken, ModelMismatchError when the folds have other classes, or
    features of other encoders.
    """
    return Model(path, device=device)


def _is_bag(what: PathLike) -> bool:
    return str(os.fspath(what)).lower().endswith(BAG_SUFFIXES)


@contextmanager
def _folder(job: PathLike | None) -> Iterator[Path]:
    """The job's folder, or one that is removed afterwards."""
    if job is not None:
        yield Path(job)
        return
    with tempfile.TemporaryDirectory(prefix="lrmil-predict-") as made:
        yield Path(made)


def _entries(slides: Sequence[PathLike | Slide], job: Path) -> list[SlideEntry]:
    """The slides as a job lists them, in their order. Raises SlideError for a path that holds several."""
    held = load_slides(job)
    paths = [os.fspath(item) for item in slides if not isinstance(item, Slide)]
    listed: Iterator[SlideEntry] = iter(collect_slides(paths, job=held) if paths else ())
    entries = [item.source.entry if isinstance(item, Slide) else next(listed, None) for item in slides]
    if next(listed, None) is not None or None in entries:
        raise SlideError("a slide is given twice, or a folder or list among slides", remedy="give each slide once")
    return [entry for entry in entries if entry is not None]
