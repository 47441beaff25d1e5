"""From a bag to what a model says of its slide."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard, load_model
from lrmil.deploy.header import is_classifier
from lrmil.deploy.match import describe
from lrmil.deploy.runtime import OnnxClassifier
from lrmil.errors import BagMismatchError, ModelMismatchError
from lrmil.metrics import softmax
from lrmil.store import BagInfo, inspect_bag
from lrmil.store.formats import read_features, read_places
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.errors import WsiPipeError

if TYPE_CHECKING:
    import torch

    from lrmil.model import MILModel

__all__ = ["Predictor", "SlidePrediction", "TopTile"]

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
class SlidePrediction:
    """What a model says of one slide.

    status: "done", "empty" (no tiles; reason says why) or "failed" (reason and remedy). probabilities: calibrated, by
    class. entropy_nats: of the probabilities, NaN where there are none. logits: before calibration. tiles: rows of
    the bag. attention: float32 (N,), sums to 1, None where the model has none. coords: float64 (N, 2) in coords_unit.
    tile_size_l0: (x, y). top_tiles: highest attention first.
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

    @classmethod
    def failure(cls, slide_id: str, error: WsiPipeError) -> SlidePrediction:
        """The prediction of a slide of which nothing can be said."""
        return cls(slide_id, "failed", reason=error.message, remedy=error.remedy)


class Predictor:
    """A model ready to be asked.

    card: what its file says. name: of the model in bags and files. sha256: of its file, "" for a model in memory.
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
    ) -> None:
        self.card = card
        self.name = name
        self.sha256 = sha256
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
        if is_classifier(path):
            model = OnnxClassifier.load(path, device=device)
            card, sha256 = model.header.card, model.sha256
        else:
            model, card = load_model(path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if name is None:
            name = f"{card.model.name}-{sha256[:8]}" if path.stem == "model" else path.stem
        return cls(model, card, device=device, name=encoder_slug(name) or "model", sha256=sha256)

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
        logits, scores = self.forward(features)
        if not np.isfinite(logits).all():
            raise ModelMismatchError(f"{info.path}: the model's logits are not finite", remedy="check the features")
        p = self.card.probabilities(logits[None])[0]
        attention = None
        top: tuple[TopTile, ...] = ()
        if scores is not None:
            exact = softmax(scores[None])[0]
            attention = exact.astype(np.float32)
            best = np.argsort(-exact, kind="stable")[:top_tiles]
            top = tuple(TopTile(int(i), float(coords[i, 0]), float(coords[i, 1]), float(exact[i])) for i in best)
        positive = p[p > 0]
        return SlidePrediction(
            info.slide_id,
            "done",
            info.case_id,
            predicted=self.card.classes[int(p.argmax())],
            probabilities=dict(zip(self.card.classes, map(float, p), strict=True)),
            entropy_nats=float(-(positive * np.log(positive)).sum()),
            logits=tuple(map(float, logits)),
            tiles=info.rows,
            bag=info,
            attention=attention,
            coords=coords,
            top_tiles=top,
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
