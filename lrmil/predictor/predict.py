"""From a bag to what a model says of its slide."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard, load_whole
from lrmil.deploy.header import is_classifier
from lrmil.deploy.match import describe
from lrmil.deploy.runtime import OnnxClassifier
from lrmil.errors import BagMismatchError, ModelMismatchError
from lrmil.metrics import softmax
from lrmil.metrics.selective import Abstention, AbstentionRule, choose_threshold
from lrmil.store import BagInfo, inspect_bag
from lrmil.store.formats import read_features, read_places
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.errors import WsiPipeError

if TYPE_CHECKING:
    import torch

    from lrmil.model import MILModel
    from lrmil.ood import Outlying, Reference
    from lrmil.store import ResidentStore

__all__ = ["Answer", "Disagreement", "Predictor", "SlidePrediction", "TopTile"]

TOP_TILES = 10
MPP_TOLERANCE = 1e-6
"""Relative. Bags state the resolution that was asked for, so equal requests are equal numbers but for rounding."""


@dataclass(frozen=True)
class TopTile:
    """A tile with much attention. row: in the bag. x, y: its top-left corner. attention: of 1 for the whole slide."""

    row: int
    x: float
    y: float
    attention: float


@dataclass(frozen=True)
class Disagreement:
    """How far the members of an ensemble agree about a slide.

    probabilities: of each member, by its name, in the order of the classes. sd: by class, the standard deviation of its
    probability over the members (the root of the mean square, divided by their number). mutual_information_nats: the
    entropy of the mean probabilities less the members' mean entropy, 0 where all agree (Houlsby et al., Bayesian active
    learning for classification and preference learning, 2011). vote_share: members whose own likeliest class is the
    predicted one.
    """

    probabilities: Mapping[str, tuple[float, ...]]
    sd: Mapping[str, float]
    mutual_information_nats: float
    vote_share: float

    @classmethod
    def of(cls, names: Sequence[str], probabilities: NDArray[np.float64], classes: Sequence[str]) -> Disagreement:
        """From the members' probabilities (M, C)."""
        mean = probabilities.mean(axis=0)
        within = float(np.mean([entropy(row) for row in probabilities]))
        sd = probabilities.std(axis=0).tolist()
        return cls(
            {name: tuple(row) for name, row in zip(names, probabilities.tolist(), strict=True)},
            dict(zip(classes, sd, strict=True)),
            max(entropy(mean) - within, 0.0),
            float((probabilities.argmax(axis=1) == mean.argmax()).mean()),
        )


@dataclass(frozen=True)
class Answer:
    """What a model says of the tiles of one slide.

    logits, probabilities: float64 (C,), before and after calibration; of an ensemble the logits are the logarithm of
    the mean uncalibrated probabilities. attention: float64 (N,), sums to 1, None where there is none. members: names,
    and probabilities (M, C), of an ensemble's members.
    """

    logits: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    attention: NDArray[np.float64] | None = None
    members: tuple[tuple[str, ...], NDArray[np.float64]] | None = None


@dataclass(frozen=True)
class SlidePrediction:
    """What a model says of one slide.

    status: "done", "empty" (no tiles; reason says why) or "failed" (reason and remedy). probabilities: calibrated, by
    class. entropy_nats: of the probabilities, NaN where there are none. logits: before calibration; of an ensemble, the
    logarithm of the mean uncalibrated probabilities. tiles: rows of the bag. attention: float32 (N,), sums to 1, None
    where the model has none. coords: float64 (N, 2) in coords_unit. top_tiles: highest attention first. disagreement:
    of an ensemble's members, else None. ood: how far the slide lies from the training tiles, None for a model that
    keeps none. abstained: whether the model is not sure enough to answer, None where no threshold was asked for;
    ``predicted`` says what it would have been. said: what another target than a class
    says, as columns of ``predictions.csv``; it then has no probabilities, and ``predicted`` is the first of them.
    """

    slide_id: str
    status: Literal["done", "empty", "failed"]
    case_id: str | None = None
    reason: str | None = None
    remedy: str | None = None
    predicted: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    entropy_nats: float = math.nan
    logits: tuple[float, ...] = ()
    tiles: int = 0
    bag: BagInfo | None = None
    attention: NDArray[np.float32] | None = None
    coords: NDArray[np.float64] | None = None
    top_tiles: tuple[TopTile, ...] = ()
    said: Mapping[str, object] = field(default_factory=dict)
    disagreement: Disagreement | None = None
    ood: Outlying | None = None
    abstained: bool | None = None

    @property
    def confidence(self) -> float:
        """The greatest calibrated probability, NaN where there are none."""
        return max(self.probabilities.values(), default=math.nan)

    @classmethod
    def failure(cls, slide_id: str, error: WsiPipeError) -> SlidePrediction:
        """The prediction of a slide of which nothing can be said."""
        return cls(slide_id, "failed", reason=error.message, remedy=error.remedy)


class Predictor:
    """A model ready to be asked.

    card: what its file says. name: of the model in bags and files. sha256: of its file, "" for a model in memory.
    reference: the training tiles, where the file keeps them. path: its file. abstention: set by ``abstain``.
    classifier: the exported file that it runs, without torch, else None.
    """

    def __init__(
        self,
        model: MILModel | OnnxClassifier,
        card: ModelCard,
        *,
        device: str = "auto",
        name: str = "model",
        sha256: str = "",
        reference: Reference | None = None,
        path: Path | None = None,
    ) -> None:
        self.card = card
        self.name = name
        self.sha256 = sha256
        self.reference = reference
        self.path = path
        self.abstention: Abstention | None = None
        self.classifier = model if isinstance(model, OnnxClassifier) else None
        if not isinstance(model, OnnxClassifier):
            from lrmil.trainer import choose_device

            self.device: torch.device = choose_device(device)
            self.model: MILModel = model.to(self.device).eval()

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", name: str | None = None) -> Predictor:
        """A predictor from a model file, or from an exported classifier (``.onnx``), which runs without torch.

        name: by default the file's stem; files called "model", as training writes them, get architecture and hash.
        Raises ModelFileError when the file is missing or broken, SettingsError when the device is not there,
        EncoderError when onnxruntime has no kernels for a classifier's precision.
        """
        path = Path(path)
        model: MILModel | OnnxClassifier
        reference = None
        if is_classifier(path):
            model = OnnxClassifier.load(path, device=device)
            card, sha256 = model.header.card, model.sha256
        else:
            model, card, reference = load_whole(path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if name is None:
            name = f"{card.model.name}-{sha256[:8]}" if path.stem == "model" else path.stem
        name = encoder_slug(name) or "model"
        return cls(model, card, device=device, name=name, sha256=sha256, reference=reference, path=path)

    @property
    def members(self) -> tuple[Predictor, ...]:
        """The models that are asked: those of an ensemble, else this one."""
        return (self,)

    @property
    def keeps_tiles(self) -> bool:
        """Whether it can tell how far a slide lies from its training tiles."""
        return self.reference is not None

    def abstain(self, rule: AbstentionRule | str) -> Abstention:
        """Answer no more slides below a confidence that reaches the rule on the validation slides that the files keep.

        rule: "accuracy=0.95", "coverage=0.8" or "threshold=0.9", or one made of it. Raises FiguresError when nothing
        reaches it, or the files keep no validation slides.
        """
        rule = AbstentionRule.parse(rule) if isinstance(rule, str) else rule
        kept = [member.card.validation for member in self.members]
        confidence = [value for one in kept for value in one.get("confidence", ())]
        correct = [bool(value) for one in kept for value in one.get("correct", ())]
        self.abstention = choose_threshold(confidence, correct, rule)
        return self.abstention

    def answer(self, features: NDArray[np.floating[Any]]) -> Answer:
        """What the model says of one slide's features (T, D), T at least 1."""
        logits, scores = self.forward(features)
        attention = None if scores is None else softmax(scores[None])[0]
        return Answer(logits, self._probabilities(logits[None])[0], attention)

    def _probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Calibrated probabilities (N, C) of logits (N, C); (N, 0) where the model's target is no plain class."""
        return np.zeros((len(logits), 0)) if self.card.target_state else self.card.probabilities(logits)

    def outlying(self, features: NDArray[np.floating[Any]]) -> Outlying | None:
        """How far features (T, D) lie from the training tiles; None for a model that keeps none."""
        if self.reference is None:
            return None
        import torch

        from lrmil.ood import outlying

        return outlying(
            self.reference.distance(torch.from_numpy(features).to(self.device)),
            self.card.validation.get("distance", ()),
        )

    def answers(
        self, store: ResidentStore, indices: NDArray[np.int64], *, token_budget: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits and calibrated probabilities, float64 (len(indices), C) each, of bags of a store."""
        from lrmil.trainer import bag_logits

        logits = bag_logits(self.model, store, indices, token_budget=token_budget).double().numpy()
        return logits, self._probabilities(logits)

    @property
    def settings(self) -> JobSettings:
        """Settings of tissue and tiles where nobody gives others: an exported classifier's own, else the defaults."""
        return JobSettings() if self.classifier is None else self.classifier.header.settings()

    def find(self, path: str | Path, *, level: str | None = None, encoder: str | None = None) -> BagInfo:
        """The features in a bag that the model was trained on.

        level, encoder: the user's word for what a bag of another tool does not state. Raises ModelMismatchError, naming
        the bag, when encoder, weights, level, tile size or dimension are others than in training; StoreError when
        the file is no bag.
        """
        card = self.card
        own = {"level": level or card.level or None, "encoder": encoder or card.encoder or None}
        try:
            info = inspect_bag(path, **own, weights_sha256=card.weights_sha256)
        except BagMismatchError as error:
            message = f"{error.message} (the model was trained on {describe(card)})"
            raise ModelMismatchError(message, remedy=error.remedy) from error
        self.check(info)
        return info

    def check(self, info: BagInfo) -> None:
        """Raise ModelMismatchError when a bag's features are not of the kind that the model was trained on."""
        card = self.card
        facts: list[tuple[str, object, object]] = []
        if card.weights_sha256:
            facts.append(("encoder weights", info.weights_sha256[:12], card.weights_sha256[:12]))
        elif card.encoder:
            facts.append(("encoder", slug_asked_for(info.encoder), slug_asked_for(card.encoder)))
        if card.level:
            facts.append(("level", info.level, card.level))
        if card.tile_px is not None:
            facts.append(("tile size in px", info.tile_px, card.tile_px))
        if info.rows:
            facts.append(("feature dimension", info.dim, card.model.in_dim))
        for what, found, wanted in facts:
            if found != wanted:
                raise ModelMismatchError(
                    f"{info.path}: {what} {found if found not in ('', None) else 'not stated'}"
                    f"{f' ({info.encoder})' if what == 'encoder weights' and info.encoder else ''}, "
                    f"but the model was trained on {wanted} ({describe(card)})",
                    remedy=f"make bags with {describe(card)}, or choose another model",
                )
        if (
            card.mpp is not None
            and info.mpp is not None
            and not math.isclose(info.mpp, card.mpp, rel_tol=MPP_TOLERANCE)
        ):
            raise ModelMismatchError(
                f"{info.path}: tiles of {info.mpp:g} um/px, but the model was trained on {card.mpp:g} um/px",
                remedy=f"make bags with {describe(card)}, or choose another model",
            )

    def predict_bag(
        self, path: str | Path, *, level: str | None = None, encoder: str | None = None, top_tiles: int = TOP_TILES
    ) -> SlidePrediction:
        """What the model says of one bag; status "empty" for a bag without tiles. Raises as ``find`` does."""
        info = self.find(path, level=level, encoder=encoder)
        empty = SlidePrediction(info.slide_id, "empty", info.case_id, bag=info)
        if not info.rows:
            return dataclasses.replace(empty, reason=info.empty_reason or "no tiles")
        features = read_features(info)
        coords, _ = read_places(info)
        return self._predict(features, info, coords, top_tiles)

    def forward(self, features: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Logits (C,) and attention logits (T,), None where the model has none, of one bag's features (T, D)."""
        if self.classifier is not None:
            return self.classifier.forward(features)
        import torch

        with torch.inference_mode():
            values = torch.from_numpy(features).to(self.device)
            offsets = torch.tensor([0, len(features)], dtype=torch.int64, device=self.device)
            output = self.model(values, offsets)
            scores = output.attention_logits
            return (
                output.logits[0].double().cpu().numpy(),
                None if scores is None else scores.double().cpu().numpy(),
            )

    def _predict(
        self, features: NDArray[np.floating[Any]], info: BagInfo, coords: NDArray[np.float64], top_tiles: int
    ) -> SlidePrediction:
        answer = self.answer(features)
        logits, p = answer.logits, answer.probabilities
        if not np.isfinite(logits).all():
            raise ModelMismatchError(f"{info.path}: the model's logits are not finite", remedy="check the features")
        said: Mapping[str, object] = {}
        if self.card.target_state:
            said = {name: values[0] for name, values in self.card.target.said(logits[None]).items()}
        attention = None
        top: tuple[TopTile, ...] = ()
        if answer.attention is not None:
            exact = answer.attention
            attention = exact.astype(np.float32)
            best = np.argsort(-exact, kind="stable")[:top_tiles]
            top = tuple(TopTile(int(i), float(coords[i, 0]), float(coords[i, 1]), float(exact[i])) for i in best)
        return SlidePrediction(
            info.slide_id,
            "done",
            info.case_id,
            predicted=_shown(next(iter(said.values()))) if said else self.card.classes[int(p.argmax())],
            probabilities={} if said else dict(zip(self.card.classes, map(float, p), strict=True)),
            entropy_nats=math.nan if said else entropy(p),
            said=said,
            logits=tuple(map(float, logits)),
            tiles=info.rows,
            bag=info,
            attention=attention,
            coords=coords,
            top_tiles=top,
            disagreement=None if answer.members is None else Disagreement.of(*answer.members, self.card.classes),
            ood=self.outlying(features),
            abstained=None if self.abstention is None or said else self.abstention.abstains(float(p.max())),
        )

    def predict_bags(
        self,
        paths: Iterable[str | Path],
        *,
        level: str | None = None,
        encoder: str | None = None,
        top_tiles: int = TOP_TILES,
    ) -> Iterator[SlidePrediction]:
        """One prediction a bag, in order; a bag that is refused or broken gives status "failed" and stops nothing."""
        for path in paths:
            try:
                yield self.predict_bag(path, level=level, encoder=encoder, top_tiles=top_tiles)
            except WsiPipeError as error:
                yield SlidePrediction.failure(Path(path).stem, error)


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Of probabilities (C,), in nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def _shown(value: object) -> str:
    """A decision as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
