"""A cascade at work: low resolution for every slide, high resolution for those that it is unsure of."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.cascade.card import CascadeCard, unpacked
from lrmil.cascade.evidence import mean_attention, probabilities_of
from lrmil.cascade.scores import uncertainty
from lrmil.errors import ModelFileError
from lrmil.ood import Outlying, together
from lrmil.predictor import Predictor, SlidePrediction
from lrmil.store.formats import read_features, read_places
from lrmil.subsets import chosen_rows
from wsi_pipe.errors import WsiPipeError

__all__ = ["CascadePrediction", "CascadePredictor", "Cost"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """What was read of a slide at one resolution.

    tiles: read; of_tiles: that there are. blocks: native blocks decoded, bytes: read of the file; None where features
    came from a bag. seconds: wall time.
    """

    tiles: int = 0
    of_tiles: int = 0
    blocks: int | None = None
    bytes: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class CascadePrediction:
    """What a cascade says of one slide.

    status, reason, remedy: as of SlidePrediction. resolution: whose word this is, "low" or "high". level: its label.
    probabilities: calibrated, by class. score: of uncertainty, at low resolution. low_probabilities: by class.
    low, high: what was read. ood: how far the slide's low-resolution tiles lie from those of the training, None where
    the models keep none. notes: what is to be known of the decision.
    """

    slide_id: str
    status: Literal["done", "empty", "failed"]
    case_id: str | None = None
    reason: str | None = None
    remedy: str | None = None
    predicted: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    resolution: Literal["low", "high", ""] = ""
    level: str = ""
    score: float = math.nan
    low_probabilities: Mapping[str, float] = field(default_factory=dict)
    low: Cost = Cost()
    high: Cost = Cost()
    ood: Outlying | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, prediction: SlidePrediction) -> CascadePrediction:
        """Of a slide about which nothing can be said."""
        p = prediction
        return cls(p.slide_id, p.status, p.case_id, p.reason, p.remedy)


class CascadePredictor:
    """A cascade ready to be asked. card: what its file says. budget: share of the high-resolution tiles that are read.

    low, high: the models. name, sha256: of the file.
    """

    def __init__(
        self,
        card: CascadeCard,
        low: Sequence[Predictor],
        high: Sequence[Predictor],
        *,
        budget: float | None = None,
        name: str = "cascade",
        sha256: str = "",
    ) -> None:
        self.card = card
        self.low = tuple(low)
        self.high = tuple(high)
        self.budget = card.budget if budget is None else budget
        self.name = name
        self.sha256 = sha256
        for what, models in (("low", self.low), ("high", self.high)):
            kinds = {(m.card.level, m.card.encoder, m.card.model.in_dim, m.card.classes) for m in models}
            if len(kinds) != 1 or models[0].card.classes != card.classes:
                raise ModelFileError(
                    f"{name}: its models of {what} resolution differ in level, encoder or classes",
                    remedy="fit the cascade on two runs, each of one encoder and resolution",
                )

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", budget: float | None = None) -> CascadePredictor:
        """From its file. budget: in place of the one that it was calibrated with. Raises ModelFileError."""
        path = Path(path)
        with unpacked(path) as (card, low, high):
            parts = [
                [Predictor.load(file, device=device, name=file.parent.name) for file in own] for own in (low, high)
            ]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(card, *parts, budget=budget, name=path.stem, sha256=digest)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of every decision."""
        if self.budget == self.card.budget:
            return ()
        return (f"reads {self.budget:g} of the tiles, calibrated at {self.card.budget:g}: the promise does not hold",)

    def look(
        self, slide_id: str, case_id: str | None, features: torch.Tensor
    ) -> tuple[CascadePrediction, Array | None]:
        """The word of low resolution, and its attention where high resolution is to be asked, else None.

        features: (L, D) of all low-resolution tiles.
        """
        start = time.perf_counter()
        members = np.stack([probabilities_of(model, features) for model in self.low])
        score = float(uncertainty(members[:, None])[self.card.score][0])
        ask = not score < self.card.threshold
        attention = None
        if ask:
            whole = np.full(len(features), 1 / len(features))
            attention = whole if self.budget == 1 else mean_attention(self.low, features)
        rows = features.cpu().numpy()
        far = [one for model in self.low if (one := model.outlying(rows)) is not None]
        ood = together(far) if far else None
        strange = (f"{ood.note}: the promise does not reach that far",) if ood is not None and ood.beyond else ()
        p = members.mean(axis=0)
        named = dict(zip(self.card.classes, map(float, p), strict=True))
        found = CascadePrediction(
            slide_id,
            "done",
            case_id,
            predicted=self.card.classes[int(p.argmax())],
            probabilities=named,
            resolution="low",
            level=self.low[0].card.level,
            score=score,
            low_probabilities=named,
            low=Cost(len(features), len(features), seconds=time.perf_counter() - start),
            ood=ood,
            notes=(*self.notes, *strange),
        )
        return found, attention

    def settle(self, found: CascadePrediction, features: torch.Tensor, of_tiles: int) -> CascadePrediction:
        """The word of high resolution in place of that of low. features: (M, D) of the tiles read, of ``of_tiles``."""
        start = time.perf_counter()
        p = np.mean([probabilities_of(model, features) for model in self.high], axis=0)
        return replace(
            found,
            predicted=self.card.classes[int(p.argmax())],
            probabilities=dict(zip(self.card.classes, map(float, p), strict=True)),
            resolution="high",
            level=self.high[0].card.level,
            high=Cost(len(features), of_tiles, seconds=time.perf_counter() - start),
        )

    def predict_bag(self, path: str | Path) -> CascadePrediction:
        """What the cascade says of a bag with both resolutions; features of tiles that it would not read are not used.

        Raises ModelMismatchError when a level, encoder or its weights are others than in training, StoreError when the
        file is no bag.
        """
        start = time.perf_counter()
        info = self.low[0].find(path)
        if not info.rows:
            empty = SlidePrediction(info.slide_id, "empty", info.case_id, reason=info.empty_reason or "no tiles")
            return CascadePrediction.of(empty)
        features = torch.from_numpy(read_features(info))
        found, attention = self.look(info.slide_id, info.case_id, features)
        found = replace(found, low=replace(found.low, seconds=time.perf_counter() - start))
        if attention is None:
            return found
        start = time.perf_counter()
        fine = self.high[0].find(path)
        _, parents = read_places(fine, info.level)
        assert parents is not None
        rows = chosen_rows(attention, parents, self.budget)
        if not len(rows):
            return self.unread(found, "no high-resolution tile lies below its low-resolution ones")
        found = self.settle(found, torch.from_numpy(read_features(fine)[rows]), fine.rows)
        return replace(found, high=replace(found.high, seconds=time.perf_counter() - start))

    def unread(self, found: CascadePrediction, why: str) -> CascadePrediction:
        """The word of low resolution where high resolution was to be asked and could not be."""
        return replace(found, notes=(*found.notes, f"not read at high resolution: {why}; the promise does not hold"))

    def predict_bags(self, paths: Iterable[str | Path]) -> Iterator[CascadePrediction]:
        """One prediction a bag, in order; a bag that is refused or broken gives status "failed" and stops nothing."""
        for path in paths:
            try:
                yield self.predict_bag(path)
            except WsiPipeError as error:
                yield CascadePrediction.of(SlidePrediction.failure(Path(path).stem, error))
