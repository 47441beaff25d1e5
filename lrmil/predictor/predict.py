"""From a bag to what a model says of its slide."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard, load_model
from lrmil.errors import BagMismatchError, ModelMismatchError
from lrmil.metrics import softmax
from lrmil.model import MILModel
from lrmil.store import BagInfo, inspect_bag
from lrmil.store.formats import read_features, read_places
from lrmil.trainer import choose_device
from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.errors import WsiPipeError

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
    tile_size_l0: (x, y). top_tiles: highest attention first. said: what another target than a class says, as columns of
    ``predictions.csv``; it then has no probabilities, and ``predicted`` is the first of them.
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

    @classmethod
    def failure(cls, slide_id: str, error: WsiPipeError) -> SlidePrediction:
        """The prediction of a slide of which nothing can be said."""
        return cls(slide_id, "failed", reason=error.message, remedy=error.remedy)


class Predictor:
    """A model ready to be asked.

    card: what its file says. name: of the model in bags and files. sha256: of its file, "" for a model in memory.
    """

    def __init__(
        self, model: MILModel, card: ModelCard, *, device: str = "auto", name: str = "model", sha256: str = ""
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        self.card = card
        self.name = name
        self.sha256 = sha256

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", name: str | None = None) -> Predictor:
        """A predictor from a model file.

        name: by default the file's stem; files called "model", as training writes them, get architecture and hash.
        Raises ModelFileError when the file is missing or broken, SettingsError when the device is not there.
        """
        path = Path(path)
        model, card = load_model(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if name is None:
            name = f"{card.model.name}-{sha256[:8]}" if path.stem == "model" else path.stem
        return cls(model, card, device=device, name=encoder_slug(name) or "model", sha256=sha256)

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
        features = torch.from_numpy(read_features(info)).to(self.device)
        coords, _ = read_places(info)
        return self._predict(features, info, coords, top_tiles)

    @torch.inference_mode()
    def _predict(
        self, features: torch.Tensor, info: BagInfo, coords: NDArray[np.float64], top_tiles: int
    ) -> SlidePrediction:
        offsets = torch.tensor([0, len(features)], dtype=torch.int64, device=self.device)
        output = self.model(features, offsets)
        logits = output.logits[0].double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise ModelMismatchError(f"{info.path}: the model's logits are not finite", remedy="check the features")
        said: Mapping[str, object] = {}
        p = np.zeros(0)
        if self.card.target_state:
            said = {name: values[0] for name, values in self.card.target.said(logits[None]).items()}
        else:
            p = self.card.probabilities(logits[None])[0]
        attention = None
        top: tuple[TopTile, ...] = ()
        if output.attention_logits is not None:
            exact = softmax(output.attention_logits.double().cpu().numpy()[None])[0]
            attention = exact.astype(np.float32)
            best = np.argsort(-exact, kind="stable")[:top_tiles]
            top = tuple(TopTile(int(i), float(coords[i, 0]), float(coords[i, 1]), float(exact[i])) for i in best)
        positive = p[p > 0]
        return SlidePrediction(
            info.slide_id,
            "done",
            info.case_id,
            predicted=_shown(next(iter(said.values()))) if said else self.card.classes[int(p.argmax())],
            probabilities={} if said else dict(zip(self.card.classes, map(float, p), strict=True)),
            entropy_nats=math.nan if said else float(-(positive * np.log(positive)).sum()),
            said=said,
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


def _shown(value: object) -> str:
    """A decision as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(card: ModelCard) -> str:
    """The features that a model was trained on, in words."""
    encoder = Path(card.encoder).name if card.encoder.endswith(".safetensors") else card.encoder
    weights = f" (weights {card.weights_sha256[:12]})" if card.weights_sha256 else ""
    tiles = f" of {card.tile_px} px" if card.tile_px is not None else ""
    return f"{encoder or 'an unnamed encoder'}{weights} at {card.level or 'an unstated level'}{tiles}"
