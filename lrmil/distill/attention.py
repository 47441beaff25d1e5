"""Which children matter: the attention of a MIL teacher of HR tiles, from the same fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lrmil.checkpoint import ModelCard, load_model
from lrmil.config import ATTENTION_MODELS
from lrmil.distill.request import DistillRequest
from lrmil.distill.selection import Selection
from lrmil.distill.targets import DistillSlide, attention_weights
from lrmil.distill.teachers import Teacher
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.leaks import check_model
from lrmil.model import MILModel
from wsi_pipe.seen import Seen

__all__ = ["Attention", "open_attention"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """A MIL teacher, read once. teacher: which of the teachers made the features that it was trained on."""

    path: Path
    model: MILModel
    card: ModelCard
    teacher: int

    @property
    def saw(self) -> Seen:
        """Whom it learned from: a student learns from them through it. Whom it was stopped by counts in its own fold
        alone."""
        return self.card.seen.only("train")

    def weigh(self, taught: Sequence[Sequence[DistillSlide]]) -> list[list[DistillSlide]]:
        """Slides, teacher by teacher, whose children weigh as the model attends to them in the whole slide.

        Raises SettingsError when it has no attention per tile.
        """
        weights = []
        with torch.inference_mode():
            for slide in taught[self.teacher]:
                features = torch.from_numpy(np.array(slide.final, np.float32))
                output = self.model(features, torch.tensor([0, len(features)]))
                if output.attention_logits is None:
                    raise SettingsError(f"{self.path}: has no attention per tile", remedy="give an attention model")
                attention = output.attention_logits.float().softmax(0).numpy()
                weights.append(attention_weights(slide.children, attention))
        return [
            [dataclasses.replace(slide, weights=own) for slide, own in zip(slides, weights, strict=True)]
            for slides in taught
        ]


def open_attention(request: DistillRequest, selection: Selection, teachers: Sequence[Teacher]) -> Attention | None:
    """The MIL teacher of a request, checked; None where there is none.

    Raises LeakageError when it saw a case of the fold's test part, or may have, BagMismatchError when it is one of
    another fold or of other features, SettingsError when it has no attention.
    """
    path = request.mil_teacher
    if path is None:
        return None
    model, card = load_model(path)
    if card.model.name not in ATTENTION_MODELS:
        raise SettingsError(
            f"{path}: a {card.model.name} model has no attention to weigh tiles by",
            remedy="train it with --model gated-abmil, or leave out --mil-teacher: children then weigh alike",
        )
    names = [teacher.encoder.info.name for teacher in teachers]
    number = names.index(card.encoder) if card.encoder in names else 0
    info = teachers[number].encoder.info
    wanted = {"fold": selection.name, "level": request.hr, "encoder": info.name}
    found = {"fold": card.fold, "level": card.level, "encoder": card.encoder}
    for name, value in wanted.items():
        if found[name] and found[name] != value:
            raise BagMismatchError(
                f"{path}: is a model of {name} {found[name]}, not of {value}",
                remedy="give the HR teacher that was trained on this very fold",
            )
    if card.weights_sha256 and card.weights_sha256 != info.weights_sha256:
        raise BagMismatchError(
            f"{path}: was trained on features of other weights of {card.encoder} than the teacher's",
            remedy="train it on these bags, or give the teacher that made its features",
        )
    check_model(
        card,
        path,
        selection.held_out,
        what="MIL teacher",
        remedy="give the HR teacher that lrmil train made of this very fold, with the same splits",
        splits=None if request.splits is None else (request.splits, selection.name),
        identities=selection.identities,
    )
    return Attention(path, model, card, number)
