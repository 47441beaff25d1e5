"""The file of a cascade: what it promises, and the models of both resolutions, each as the file that training wrote."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrmil.cascade.losses import LOSSES
from lrmil.cascade.scores import SCORES
from lrmil.checkpoint import MODEL_KIND, read_tensors, write_tensors
from lrmil.errors import ModelFileError
from wsi_pipe.seen import Seen

if TYPE_CHECKING:
    import torch

__all__ = ["CASCADE_KIND", "CascadeCard", "is_cascade", "read_cascade_card", "save_cascade", "unpacked"]

CASCADE_KIND = "lrmil.cascade"


@dataclass(frozen=True)
class CascadeCard:
    """What a cascade does and promises.

    classes: of both resolutions' models. score: one of ``SCORES``. threshold: slides whose score is below it are kept
    at low resolution; infinite keeps all, minus infinite none. budget: share of a slide's high-resolution tiles that
    are read. loss, positive: what is lost, see ``lrmil.cascade.losses``. risk, confidence: of the promise; the latter
    is None where it holds in expectation. found: the calibration cases' mean loss. read: their share of slides read at
    high resolution. cases, slides: of the calibration. basis, choice: where it and the score come from, in words.
    seen: who the calibration cases were, as marks. low, high: names of the models, such as "fold_1".
    """

    classes: tuple[str, ...]
    score: str
    threshold: float
    budget: float
    loss: str
    positive: str
    risk: float
    confidence: float | None
    found: float
    read: float
    cases: int
    slides: int
    basis: str
    choice: str
    low: tuple[str, ...]
    high: tuple[str, ...]
    seen: Seen = field(default_factory=Seen)
    lrmil_version: str = ""
    created_utc: str = ""

    @property
    def promise(self) -> str:
        """What is promised, in words."""
        what = {
            "disagree": "says another class than high resolution",
            "error": "is wrong where high resolution is right",
            "miss": f"misses {self.positive} where high resolution finds it",
        }[self.loss]
        of = f"cases of {self.positive}" if self.loss == "miss" else "cases"
        held = "on average" if self.confidence is None else f"with a confidence of {self.confidence:.4g}"
        return f"in at most {100 * self.risk:.4g} % of {of} it {what}, {held}"

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; an infinite threshold as text."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["threshold"] = self.threshold if math.isfinite(self.threshold) else str(self.threshold)
        values |= {name: list(values[name]) for name in ("classes", "low", "high")}
        return values | {"seen": self.seen.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CascadeCard:
        """The inverse of ``to_json``. Raises KeyError, TypeError or ValueError for what it cannot have made."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known |= {name: tuple(map(str, known[name])) for name in ("classes", "low", "high")}
        known |= {"threshold": float(known["threshold"]), "seen": Seen.from_json(known["seen"])}
        card = cls(**known)
        if card.score not in SCORES or card.loss not in LOSSES or math.isnan(card.threshold):
            raise ValueError(f"{card.score}, {card.loss} or {card.threshold} is not known")
        if not (0 < card.budget <= 1 and len(card.classes) > 1 and card.low and card.high):
            raise ValueError("its budget, classes or models make no cascade")
        return card


def save_cascade(path: Path, card: CascadeCard, low: Sequence[Path], high: Sequence[Path]) -> None:
    """Write card and model files into one file. low, high: in the order of the card's names.

    Raises ModelFileError for a model file that cannot be read, OutputError where the cascade cannot be written.
    """
    import torch

    tensors = {}
    for part, names, files in (("low", card.low, low), ("high", card.high, high)):
        for name, file in zip(names, files, strict=True):
            # Each is asked whether it is whole before it is put in.
            read_tensors(file, MODEL_KIND)
            tensors[f"{part}/{name}"] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    write_tensors(path, tensors, CASCADE_KIND, card.to_json(), check=read_cascade_card)


def is_cascade(path: Path) -> bool:
    """Whether a file is a cascade, by its header alone; False for what cannot be read, about which others complain."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="np") as file:
            return bool((file.metadata() or {}).get("format") == CASCADE_KIND)
    except (OSError, SafetensorError):
        return False


def read_cascade_card(path: Path) -> CascadeCard:
    """What a cascade's file says. Raises ModelFileError where it is missing, broken or of another kind."""
    return _whole(path)[0]


def _whole(path: Path) -> tuple[CascadeCard, dict[str, torch.Tensor]]:
    remedy = "fit the cascade again: lrmil cascade fit"
    tensors, values = read_tensors(path, CASCADE_KIND)
    try:
        card = CascadeCard.from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: its card is wrong: {error}", remedy=remedy) from error
    wanted = {f"low/{name}" for name in card.low} | {f"high/{name}" for name in card.high}
    odd = sorted(wanted ^ tensors.keys())
    if odd:
        raise ModelFileError(f"{path}: {odd[0]} is {'missing' if odd[0] in wanted else 'unknown'}", remedy=remedy)
    # Names become files in a folder: they must stay inside it.
    if any(set(name) & set("/\\\0") or name in (".", "..") for name in (*card.low, *card.high)):
        raise ModelFileError(f"{path}: a model's name is no plain name", remedy=remedy)
    return card, tensors


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[CascadeCard, list[Path], list[Path]]]:
    """The card, and the model files of low and high resolution in a folder that goes again.

    Raises ModelFileError as ``read_cascade_card`` does.
    """
    card, tensors = _whole(path)
    with tempfile.TemporaryDirectory(prefix="lrmil-cascade-") as folder:
        found: dict[str, list[Path]] = {}
        for part, names in (("low", card.low), ("high", card.high)):
            for name in names:
                file = Path(folder) / part / name / "model.safetensors"
                file.parent.mkdir(parents=True)
                file.write_bytes(np.asarray(tensors[f"{part}/{name}"]).tobytes())
                found.setdefault(part, []).append(file)
        yield card, found["low"], found["high"]
