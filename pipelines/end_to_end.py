"""The student's network trained end to end on LR tiles, by ``lrmil.finetuning``: on slide labels alone, or taught."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.config import LossSettings, ModelSettings
from lrmil.finetuning import FinetuneSettings, HeldTiles, TileClassifier, fit_tiles, load_start, slide_logits
from lrmil.metrics import softmax
from lrmil.trainer.optimise import class_weights
from lrmil.trainer.steps import plain_step, student_step
from lrmil.trainer.targets import TeacherTargets
from pipelines.efficiency_settings import EndToEndSettings

__all__ = ["finetune_settings", "train_end_to_end"]

CPU = torch.device("cpu")


def finetune_settings(head: ModelSettings, settings: EndToEndSettings, seed: int) -> FinetuneSettings:
    """The settings of an experiment as ``lrmil finetune`` has them; every tile of a slide is seen in each step."""
    return FinetuneSettings(
        model=dataclasses.replace(head, dropout=settings.dropout),
        steps=settings.steps,
        max_bags=settings.bags,
        max_tiles=0,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        stain=settings.stain,
        seed=seed,
    )


def train_end_to_end(
    tiles: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    train: Sequence[int],
    test: Sequence[int],
    *,
    classes: Sequence[str],
    student: str | Path,
    head: ModelSettings,
    settings: EndToEndSettings,
    seed: int,
    targets: TeacherTargets | None = None,
    loss: LossSettings | None = None,
) -> NDArray[np.float64]:
    """Probabilities (test, C) of the model after its last step.

    tiles: of each slide, uint8 (N, S, S, 3). labels: (slides,), of which only those of ``train`` are read. student: an
    encoder's name, whose weights are drawn anew, or the file of a distilled one, which are gone on from. Classes weigh
    alike. targets, loss: the teacher's word on the slides of ``train``, and what it weighs; None for labels alone.
    """
    how = finetune_settings(dataclasses.replace(head, classes=len(classes)), settings, seed)
    pixels = HeldTiles(tiles)
    weights = class_weights(labels, np.asarray(train), classes, balanced=True)
    step = plain_step(weights) if targets is None or loss is None else student_step(weights, loss, targets)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        source = load_start(str(student), pixels.side_px, random_weights=not isinstance(student, Path))
        model = TileClassifier(source, how.model, pixels.side_px)
        fit_tiles(model, step, pixels, labels, train, how, device=CPU)
        return softmax(slide_logits(model, pixels, test, device=CPU))
