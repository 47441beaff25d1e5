"""Slides to predictions in one go: the pipeline at the model's own resolution with the model's own encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrmil.checkpoint import ModelCard
from lrmil.deploy.header import is_classifier
from lrmil.deploy.match import describe, refuse_other_encoder
from lrmil.errors import ModelMismatchError
from lrmil.predictor.predict import TOP_TILES, Predictor, SlidePrediction
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError, EncoderError, WsiPipeError
from wsi_pipe.files import file_sha256

if TYPE_CHECKING:
    from wsi_pipe.encoders.base import Encoder
    from wsi_pipe.manifest import SlideEntry
    from wsi_pipe.outcome import SlideOutcome

__all__ = ["find_encoder", "predict_slides"]


def find_encoder(card: ModelCard, model_path: Path, given: str | None = None) -> str:
    """The name or file of the encoder that a model needs: the one given, else as the card has it.

    model_path: the model's file, or the folder of a run. An encoder's file is looked for where it was in training and
    beside the model, and is the one whose content the card names. An exported classifier holds its
    own. Raises ModelMismatchError when it is at neither place, or the card names none, ConfigError when another is
    given for a classifier.
    """
    if is_classifier(model_path):
        if given:
            raise ConfigError(f"{model_path} holds its own encoder", remedy="leave out --encoder")
        return card.encoder
    name = given or card.encoder
    if not name:
        raise ModelMismatchError(
            f"{model_path} does not name its encoder", remedy="give it: --encoder NAME, or predict from bags: --bags"
        )
    if given or not name.endswith(".safetensors") or name.startswith("timm:"):
        return name
    beside = [model_path, model_path.parent] if model_path.is_dir() else [model_path.parent]
    there = [path for path in (Path(name), *(folder / Path(name).name for folder in beside)) if path.is_file()]
    # Another file of that name may lie at one of the places; where no content is the one, loading tells.
    same = [path for path in there if len(there) > 1 and file_sha256(path) == card.weights_sha256]
    for path in (*same, *there):
        return str(path)
    raise ModelMismatchError(
        f"the encoder of {model_path}, {Path(name).name}, is neither in {Path(name).absolute().parent}, as the model "
        "says, nor beside it",
        remedy="put it there, or give it: --encoder FILE",
    )


def job_settings(card: ModelCard, encoder: str, base: JobSettings) -> JobSettings:
    """``base`` at the model's one resolution, tile size and encoder.

    Raises ModelMismatchError when the card does not state resolution and tile size.
    """
    if card.mpp is None or card.tile_px is None:
        raise ModelMismatchError(
            f"the model was trained on {describe(card)} without a stated um/px, so no tiles can be cut for it",
            remedy="make bags with the tool it was trained with and give them: --bags",
        )
    tile = dataclasses.replace(base.tile, resolutions=(card.mpp,), tile_px=card.tile_px)
    extract = dataclasses.replace(base.extract, encoders={"*": (encoder,)}, layers=())
    return dataclasses.replace(base, tile=tile, extract=extract)


def load_matching_encoder(predictor: Predictor, settings: JobSettings) -> dict[str, Encoder]:
    """The encoder, checked against the model before any slide is read.

    Raises ModelMismatchError when its weights or dimension are others than in training; EncoderError when it cannot be
    had.
    """
    from wsi_pipe.job.run import load_encoders

    classifier = predictor.classifier
    if classifier is not None:
        own, asked = classifier.encoder(), settings.extract.precision
        if asked not in ("auto", own.info.precision):
            raise EncoderError(
                f"the classifier computes in {own.info.precision}, and {asked} is asked for",
                remedy=f"leave extract.precision at auto, or export the model in {asked}",
            )
        return {own.info.name: own}
    encoders = load_encoders(settings)
    for name, encoder in encoders.items():
        refuse_other_encoder(predictor.card, encoder.info, name)
    return encoders


def predict_slides(
    predictor: Predictor,
    entries: Sequence[SlideEntry],
    job: Path,
    *,
    encoder: str,
    base: JobSettings | None = None,
    reader: str | None = None,
    top_tiles: int = TOP_TILES,
    progress: Callable[[str, str, int], None] | None = None,
    finished: Callable[[SlideOutcome], object] | None = None,
) -> Iterator[SlidePrediction]:
    """Segment, tile and encode slides at the model's resolution into ``job``, and predict each as its bag is done.

    Nothing is read or computed at any other resolution. What ``job`` holds already and fits is not done again.
    encoder: from ``find_encoder``. base: settings of segmentation, tiling and hardware. reader: of slides, before that
    of ``base``. progress: as of ``wsi_pipe.job.run.process``; finished: called with each slide's outcome, before its
    prediction. A slide that fails gives a prediction with status "failed". Raises ModelMismatchError before the first
    slide when the encoder is not the model's; OutputError or DeviceError when the job cannot go on.
    """
    from wsi_pipe.job import open_job
    from wsi_pipe.job.run import process

    settings = job_settings(predictor.card, encoder, base or JobSettings())
    settings = dataclasses.replace(settings, reader=reader or settings.reader)
    encoders = load_matching_encoder(predictor, settings)
    paths = open_job(job, settings, list(entries))
    cases = {entry.slide_id: entry.case_id for entry in entries}
    for outcome in process(entries, settings, paths, encoders=encoders, progress=progress):
        if finished is not None:
            finished(outcome)
        if outcome.status == "failed":
            yield SlidePrediction(
                outcome.slide_id, "failed", cases[outcome.slide_id], reason=outcome.reason, remedy=outcome.remedy
            )
            continue
        try:
            yield predictor.predict_bag(paths.bag(outcome.slide_id), top_tiles=top_tiles)
        except WsiPipeError as error:
            yield SlidePrediction.failure(outcome.slide_id, error)
