"""Models and training states as one ``.safetensors`` file with JSON metadata; nothing is ever pickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.config import ModelSettings
from lrmil.errors import ModelFileError
from lrmil.metrics import softmax
from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.encoders.tensor_file import tensors_sha256, write_tensor_file
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import atomic_path, parse_json
from wsi_pipe.seen import Seen

if TYPE_CHECKING:
    from torch import Tensor

    from lrmil.model import MILModel
    from lrmil.ood import Reference
    from lrmil.targets import Target

__all__ = [
    "MODEL_KIND",
    "MODEL_NAME",
    "ModelCard",
    "load_model",
    "load_whole",
    "no_nan",
    "optimizer_tensors",
    "read_card",
    "read_tensors",
    "restore_optimizer",
    "save_model",
    "write_tensors",
]

MODEL_KIND = "lrmil.model"
MODEL_NAME = "model.safetensors"
"""What training calls a model's file."""
REFERENCE = "reference."
"""What the names of the tensors of ``lrmil.ood`` begin with."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelCard:
    """What a model file says beside its weights.

    model: the architecture. classes: names in the order of the logits. encoder, weights_sha256: of the features that it
    was trained on. weights: "random" where those features were made with random weights, so that nothing the model says
    means anything, else "". level, mpp, tile_px: of their tiles; empty or None where the bags stated nothing.
    temperature, bias: probabilities are the softmax of logits / temperature + bias (no bias: none is added).
    calibration: where these two come from, in words. training: the settings, as they were asked for. choice: what was
    chosen inside the training cases, "said" in words, with the figures that it rests on. metrics: figures, NaN allowed;
    fold: which one. features_sha256: content hash of the training store. teacher: name and hash of a student's teacher,
    for the record only, since predicting needs no teacher. seen: cases and slides of training and validation, as marks.
    allowed: overlaps that a user has let pass, in words. sites: how labels and sites of the cohort hang together, see
    ``lrmil.sites.Confounding``. data: slides, cases, tiles and slides by class of each part. validation: of the slides
    of the validation part, without their names: "confidence" (the greatest calibrated probability) and "correct" (1 or
    0), in the order of the confidence, and "distance" from the training tiles (``lrmil.ood``), in its own order.
    target_state: the target with its constants, as ``lrmil.targets`` writes it, and ``classes`` are then the names of
    the outputs; empty where the model tells the classes of a label column.
    """

    model: ModelSettings
    classes: tuple[str, ...]
    encoder: str = ""
    weights_sha256: str = ""
    level: str = ""
    mpp: float | None = None
    tile_px: int | None = None
    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    calibration: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    fold: str | None = None
    features_sha256: str = ""
    teacher: Mapping[str, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    allowed: tuple[str, ...] = ()
    lrmil_version: str = ""
    created_utc: str = ""
    weights: str = ""
    sites: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Sequence[float]] = field(default_factory=dict)
    target_state: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target_state and self.target.outputs != self.classes:
            raise ConfigError("the card's target has other outputs than its model")
        if len(self.classes) != self.model.classes:
            raise ConfigError(f"{len(self.classes)} class names for a model of {self.model.classes} classes")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature {self.temperature} must be above 0 and finite")
        if self.bias and not (len(self.bias) == len(self.classes) and all(map(math.isfinite, self.bias))):
            raise ConfigError(f"the bias {self.bias} must be a finite number for each of {len(self.classes)} classes")

    @property
    def target(self) -> Target:
        """What the model says of a bag."""
        from lrmil.targets import Classification, target_from_json

        if self.target_state:
            return target_from_json(self.target_state)
        return Classification(
            classes=self.classes, temperature=self.temperature, bias=self.bias, method=self.calibration or "none"
        )

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Calibrated probabilities, float64 (N, C), of logits (N, C)."""
        return softmax(logits, self.temperature, self.bias)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; NaN and infinite metrics become null."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["model"] = to_mapping(self.model)
        values["classes"] = list(self.classes)
        values["bias"] = list(self.bias)
        values["seen"] = self.seen.to_json()
        values["allowed"] = list(self.allowed)
        values["target_state"] = dict(self.target_state)
        return cast(dict[str, Any], no_nan(values))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelCard:
        """The inverse of ``to_json``; null metrics come back as NaN, unknown keys of later versions are ignored.

        Raises ConfigError for a missing key or a value that does not fit.
        """
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        for name in ("model", "classes"):
            if name not in known:
                raise ConfigError(f"the card lacks {name!r}")
        known["model"] = from_mapping(ModelSettings, known["model"], "model")
        known["classes"] = tuple(map(str, known["classes"]))
        known["seen"] = Seen.from_json(known.get("seen"))
        known["allowed"] = tuple(map(str, known.get("allowed") or ()))
        known["bias"] = tuple(map(float, known.get("bias") or ()))
        metrics = known.get("metrics") or {}
        known["metrics"] = {str(name): math.nan if v is None else float(v) for name, v in metrics.items()}
        told = known.get("validation") or {}
        known["validation"] = {str(name): tuple(map(float, values)) for name, values in told.items()}
        return cls(**known)


def save_model(path: Path, module: MILModel, card: ModelCard, reference: Reference | None = None) -> None:
    """Write a model's weights and card so that ``path`` holds all of it or what it held before.

    reference: the training tiles, by which new slides are told from them. The file is read back before it takes its
    place. Raises OutputError when it cannot be written.
    """
    kept = {} if reference is None else {REFERENCE + name: value for name, value in reference.tensors().items()}
    write_tensors(path, module.state_dict() | kept, MODEL_KIND, card.to_json(), check=load_model)


def load_model(path: Path) -> tuple[MILModel, ModelCard]:
    """A model in evaluation mode on the CPU, and its card. Raises ModelFileError as ``load_whole`` does."""
    module, card, _ = load_whole(path)
    return module, card


def load_whole(path: Path) -> tuple[MILModel, ModelCard, Reference | None]:
    """A model in evaluation mode on the CPU, its card, and its training tiles, None in files that keep none.

    The global random state is not touched. Raises ModelFileError when the file is missing, truncated, of another kind
    or version, or when its weights do not fit its architecture or are not finite.
    """
    # Here and not above: the card of a classifier that runs without torch is made by this module too.
    import torch

    from lrmil.model import build_model, widest_weight

    tensors, values = read_tensors(path, MODEL_KIND)
    card = _card(path, values)
    kept = {name.removeprefix(REFERENCE): tensors.pop(name) for name in list(tensors) if name.startswith(REFERENCE)}
    try:
        name, wanted_shape = widest_weight(card.model)
    except ConfigError as error:
        raise ModelFileError(f"{path}: its card is wrong: {error.message}", remedy=_REMEDY) from error
    found_shape = tuple(tensors.get(name, torch.empty(0)).shape)
    if found_shape != wanted_shape:
        # Before anything is allocated, however large the header claims the model to be.
        raise ModelFileError(f"{path}: {name} has the shape {found_shape} instead of {wanted_shape}", remedy=_REMEDY)
    with torch.random.fork_rng(devices=[]):
        module = build_model(card.model)
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {unknown[0]}"
        raise ModelFileError(f"{path}: {what}, so it is no {card.model.name} model", remedy=_REMEDY)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
            raise ModelFileError(f"{path}: {name} has the shape {shapes}", remedy=_REMEDY)
        if not tensor.isfinite().all():
            raise ModelFileError(f"{path}: {name} is not finite", remedy="train the model again")
    module.load_state_dict(tensors)
    return module.eval(), card, _reference(path, kept, card.model.in_dim)


def _reference(path: Path, tensors: Mapping[str, Tensor], dim: int) -> Reference | None:
    if not tensors:
        return None
    try:
        from lrmil.ood import Reference

        reference = Reference.from_tensors(tensors)
        if reference.dim != dim:
            raise ValueError(f"the training tiles have {reference.dim} features instead of {dim}")
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}", remedy=_REMEDY) from error
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelFileError(f"{path}: {REFERENCE}{bad[0]} is not finite", remedy="train the model again")
    return reference


def read_card(path: Path) -> ModelCard:
    """The card alone, without the weights. Raises ModelFileError as ``load_model`` does."""
    return _card(path, _open(path, MODEL_KIND, with_tensors=False)[1])


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any], *, check: Any = None
) -> None:
    """Write tensors with a JSON header to a safetensors file, atomically. ``kind`` tells readers what the file is.

    Header and tensors each carry their SHA-256, which readers compare. Raises OutputError when it cannot be written.
    """
    text = json.dumps(header, allow_nan=False)
    values = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": kind,
        "format_version": str(FORMAT_VERSION),
        "header": text,
        "header_sha256": _text_sha256(text),
        "tensors_sha256": tensors_sha256(values),
    }
    with atomic_path(path, check) as temporary:
        write_tensor_file(temporary, values, metadata)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of that kind. Raises ModelFileError when it is missing, broken or another kind."""
    return _open(path, kind, with_tensors=True)


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """AdamW's moments and step counts by "optimizer.NUMBER.MOMENT", parameters counted through its groups."""
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"optimizer.{i}.{moment}": torch.as_tensor(value)
        for i, parameter in enumerate(parameters)
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; other names among ``tensors`` are passed over."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if head != "optimizer":
            continue
        number, _, moment = rest.partition(".")
        parameter = parameters[int(number)]
        # AdamW keeps its step count on the CPU.
        value = tensor.clone() if moment == "step" else tensor.to(parameter.device, copy=True)
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {}
        optimizer.state[parameter][moment] = value


_REMEDY = "give a model file that lrmil train has written, or copy it again"


def _open(path: Path, kind: str, *, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                what = metadata.get("format") or "a safetensors file of another program"
                raise ModelFileError(f"{path} is no {kind} file but {what}", remedy=_REMEDY)
            version = metadata.get("format_version")
            if version != str(FORMAT_VERSION):
                raise ModelFileError(
                    f"{path} has the format version {version}, this lrmil reads {FORMAT_VERSION}", remedy="update lrmil"
                )
            header = parse_json(metadata["header"])
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
            # Files of versions that wrote no digests are taken as they are.
            digests = {"header_sha256": _text_sha256(metadata["header"])}
            if with_tensors:
                digests["tensors_sha256"] = tensors_sha256(tensors)
            changed = [what for what, found in digests.items() if metadata.get(what, found) != found]
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist", remedy="check the path") from error
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}", remedy="check the path and its rights") from error
    except (SafetensorError, ValueError, RecursionError, KeyError) as error:
        raise ModelFileError(f"{path} is no readable safetensors file: {error}", remedy=_REMEDY) from error
    if changed:
        what = "header" if "header_sha256" in changed else "content of its tensors"
        raise ModelFileError(f"{path} is damaged: the {what} is not what was written", remedy=_REMEDY)
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: its header is no JSON object", remedy=_REMEDY)
    return tensors, header


def _card(path: Path, values: Mapping[str, Any]) -> ModelCard:
    try:
        return ModelCard.from_json(values)
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        message = error.message if isinstance(error, ConfigError) else str(error)
        raise ModelFileError(f"{path}: its card is wrong: {message}", remedy=_REMEDY) from error


def no_nan(value: Any) -> Any:
    """``value`` with None for every float that is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(k): no_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
