"""The models of a run's folds, asked together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import MODEL_NAME, ModelCard
from lrmil.deploy.header import model_card
from lrmil.deploy.match import describe
from lrmil.errors import ModelFileError, ModelMismatchError
from lrmil.predictor.predict import Answer, Predictor
from wsi_pipe.encoders.base import encoder_slug

if TYPE_CHECKING:
    from lrmil.ood import Outlying
    from lrmil.store import ResidentStore


__all__ = ["EnsemblePredictor", "load_predictor", "model_files", "read_cards"]


class EnsemblePredictor(Predictor):
    """Several models of the same features and classes: the mean of their calibrated probabilities.

    A slide's features are read once for all. Attention is the mean of the members' that have one.
    """

    def __init__(self, members: Sequence[Predictor], *, name: str | None = None, path: Path | None = None) -> None:
        """Raises ModelMismatchError, naming two files, where members do not agree about features or classes."""
        first = members[0]
        check_agreement([(str(member.path or member.name), member.card) for member in members])
        digest = hashlib.sha256("".join(member.sha256 for member in members).encode()).hexdigest()
        own = name or f"{first.card.model.name}-x{len(members)}-{digest[:8]}"
        self.device = first.device
        self.model = first.model
        self.classifier = None
        self.card = first.card
        self.name = encoder_slug(own) or "model"
        self.sha256 = digest
        self.reference = first.reference
        self.path = path
        self.abstention = None
        self._members = tuple(members)

    @property
    def members(self) -> tuple[Predictor, ...]:
        return self._members

    @property
    def member_names(self) -> tuple[str, ...]:
        """The members' names: the folders of their files."""
        return tuple(member.path.parent.name if member.path else member.name for member in self._members)

    @property
    def keeps_tiles(self) -> bool:
        return any(member.keeps_tiles for member in self._members)

    def answer(self, features: NDArray[np.floating[Any]]) -> Answer:
        found = [member.answer(features) for member in self._members]
        each = np.stack([one.probabilities for one in found])
        maps = [one.attention for one in found if one.attention is not None]
        logits = _joint_logits(np.stack([one.logits for one in found])[:, None])[0]
        attention = np.mean(maps, axis=0) if maps else None
        return Answer(logits, each.mean(axis=0), attention, (self.member_names, each))

    def outlying(self, features: NDArray[np.floating[Any]]) -> Outlying | None:
        found = [one for member in self._members if (one := member.outlying(features)) is not None]
        if not found:
            return None
        from lrmil.ood import together

        return together(found)

    def answers(
        self, store: ResidentStore, indices: NDArray[np.int64], *, token_budget: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        found = [member.answers(store, indices, token_budget=token_budget) for member in self._members]
        logits = _joint_logits(np.stack([logits for logits, _ in found]))
        return logits, np.mean([probabilities for _, probabilities in found], axis=0)


def _joint_logits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of the mean over members of the softmax: (M, N, C) -> (N, C)."""
    logs = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    return np.asarray(np.logaddexp.reduce(logs, axis=0) - np.log(len(logits)))


def check_agreement(members: Sequence[tuple[str, ModelCard]]) -> None:
    """Raise ModelMismatchError where models, each a name and its card, were not trained on the same kind of features or
    tell other classes apart."""
    (first, card), *others = members
    for name, one in members if others else ():
        if one.target_state:
            raise ModelMismatchError(
                f"{name} predicts {one.target.kind}, of which folds are no ensemble yet: each has constants of its own",
                remedy="give one fold's model.safetensors",
            )
    for name, other in others:
        facts = [
            ("the classes", ", ".join(other.classes), ", ".join(card.classes), other.classes == card.classes),
            ("features", describe(other), describe(card), _kind(other) == _kind(card)),
        ]
        for what, found, wanted, same in facts:
            if not same:
                raise ModelMismatchError(
                    f"{name} knows {what} {found}, but {first} {wanted}: they are no ensemble",
                    remedy="give one fold's model.safetensors, or a run whose folds share encoder and classes",
                )


def _kind(card: ModelCard) -> tuple[object, ...]:
    encoder = card.weights_sha256 or card.encoder
    return (encoder, card.level, card.mpp, card.tile_px, card.model.in_dim)


def model_files(path: str | Path) -> list[Path]:
    """The model file that ``path`` is, or those of the run that it is: its folds in their order, or its own.

    Raises ModelFileError where there are none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*/{MODEL_NAME}"), key=lambda file: (len(file.parent.name), file.parent.name))
    found = found or [file for file in [path / MODEL_NAME] if file.is_file()]
    if not found:
        raise ModelFileError(
            f"{path} holds no {MODEL_NAME}, neither itself nor in folders of folds",
            remedy="give a model file, or the --out folder of lrmil train",
        )
    return found


def read_cards(path: str | Path) -> list[ModelCard]:
    """The cards of the model, or of the models of a run. Raises ModelFileError, and ModelMismatchError where the models
    of a run are no ensemble."""
    files = model_files(path)
    cards = [model_card(file) for file in files]
    check_agreement(list(zip(map(str, files), cards, strict=True)))
    return cards


def load_predictor(path: str | Path, *, device: str = "auto", name: str | None = None) -> Predictor:
    """A predictor from a model file, or, from the folder of a run, the ensemble of its folds.

    Raises ModelFileError when a file is missing or broken, ModelMismatchError when the folds were not trained on the
    same kind of features and classes, SettingsError when the device is not there.
    """
    files = model_files(path)
    if len(files) == 1:
        return Predictor.load(files[0], device=device, name=name)
    read_cards(path)
    members = [Predictor.load(file, device=device) for file in files]
    return EnsemblePredictor(members, name=name, path=Path(path))
