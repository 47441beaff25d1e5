"""A model and its encoder into one ONNX file, whose answers are compared with theirs before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard, load_model
from lrmil.deploy.graph import OPSET, Graph
from lrmil.deploy.header import METADATA_KEY, ClassifierHeader, digest_entry, read_classifier
from lrmil.deploy.heads import add_head
from lrmil.deploy.match import describe, refuse_other_encoder
from lrmil.deploy.network import encoder_graph
from lrmil.deploy.precision import quantised, rounded
from lrmil.deploy.runtime import open_session
from lrmil.deploy.tiles import TileSlide, read_tiles, sampled, slides_of
from lrmil.errors import ExportError, ModelMismatchError
from lrmil.model import MILModel
from wsi_pipe import __version__
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import atomic_path

__all__ = [
    "CALIBRATION_TILES",
    "MOST_CHANGE",
    "ExportRequest",
    "export_classifier",
    "joined",
    "model_file",
    "write_classifier",
]

TOLERANCE = 1e-3
"""By how much logits of the float32 file may differ from torch's."""
MOST_CHANGE = 0.25
"""By how much int8 may change a calibrated logit: a probability near a half by six hundredths."""
CALIBRATION_TILES = 256
JUDGED_SLIDES = 20
_BAG_LENGTHS = (1, 2, 7, 300)
_MOST_BYTES = (1 << 31) - (1 << 20)


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    model: a model's file. encoder: name or file of its encoder. out: the file to write, ``.onnx``. precision: of the
    encoder, "float32", "bfloat16" or "int8"; the head is float32 always. bags: for int8, a job or folder of bags with
    the slides of training. slides, cases: where these lie and whose they are, if not as the bags say. settings: whose
    settings of tissue and tiles go into the file. tiles: of training, to calibrate int8 by. most_change: of a logit
    divided by the model's temperature, on slides that it was not calibrated by; above it nothing is written.
    """

    model: Path
    encoder: str
    out: Path
    precision: str = "float32"
    bags: Path | None = None
    slides: Mapping[str, str] | None = None
    cases: Mapping[str, str] | None = None
    settings: JobSettings | None = None
    tiles: int = CALIBRATION_TILES
    most_change: float = MOST_CHANGE


def model_file(given: Path) -> Path:
    """The model's file of a run's or fold's folder, or the file itself. Raises ConfigError where there are several."""
    if not given.is_dir():
        return given
    own = given / "model.safetensors"
    found = [own] if own.is_file() else sorted(given.glob("*/model.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"{given} holds no model.safetensors", remedy="give a folder or file of lrmil train")
    raise ConfigError(
        f"{given} holds {len(found)} models, a fold's each",
        remedy=f"give one of them, such as {found[0]}, or train one on all cases",
    )


def export_classifier(request: ExportRequest, say: Callable[[str], object] | None = None) -> ClassifierHeader:
    """Write a classifier's file and return what it says of itself; the file appears whole or not at all.

    say: is told what is going on. Raises ModelMismatchError where the model states no resolution or the encoder is
    another than in training, ExportError where network or model cannot be written as ONNX, where the copy's logits
    differ by more than ``TOLERANCE``, or int8 changes them by more than ``request.most_change``; OutputError.
    """
    tell = say or (lambda text: None)
    if request.out.suffix.lower() != ".onnx":
        raise ConfigError(f"{request.out}: an exported classifier's file must end in .onnx")
    if request.precision == "int8" and request.bags is None:
        raise ConfigError("int8 is calibrated on tiles of training", remedy="say where they are: --bags JOB")
    model, card = load_model(request.model)
    if card.target_state:
        raise ModelMismatchError(
            f"{request.model} predicts {card.target.kind}: one file of ONNX tells classes only",
            remedy="predict with the model file itself",
        )
    if card.mpp is None or card.tile_px is None:
        raise ModelMismatchError(
            f"{request.model} was trained on {describe(card)} without a stated um/px, so no tiles can be cut for it",
            remedy="train it on bags of wsi-pipe",
        )
    encoder = load_encoder(request.encoder, device="cpu", precision="float32")
    refuse_other_encoder(card, encoder.info, request.encoder)
    if not isinstance(encoder, TorchEncoder):
        raise ExportError(
            f"encoder {request.encoder} is no network", remedy="distil one (lrmil distill), or use one of timm"
        )
    tell(f"writing {encoder.info.name} as ONNX")
    trunk = encoder_graph(encoder, card.tile_px)
    exact = joined(trunk, model, card)
    header = _header(request, card, encoder)
    _compare(exact, header, encoder, model, card)
    whole = exact
    if request.precision == "bfloat16":
        whole = joined(rounded(trunk), model, card)
    elif request.precision == "int8":
        whole, change = _int8(request, trunk, exact, model, card, tell)
        header = replace(header, quantisation=change)
    write_classifier(request.out, whole, header)
    return header


def _header(request: ExportRequest, card: ModelCard, encoder: TorchEncoder) -> ClassifierHeader:
    settings = request.settings or JobSettings()
    # Where the file lay says nothing to others, and may tell more than it should.
    name = Path(encoder.info.name).name if encoder.info.name.endswith(".safetensors") else encoder.info.name
    precision = request.precision
    assert card.mpp is not None
    assert card.tile_px is not None
    tile = replace(settings.tile, resolutions=(card.mpp,), tile_px=card.tile_px)
    return ClassifierHeader(
        replace(card, encoder=name),
        replace(encoder.info, name=name, precision=precision),
        settings.segment,
        tile,
        written_by=f"lrmil {__version__}",
    )


def joined(trunk: Any, model: MILModel, card: ModelCard) -> Any:
    """Encoder and head as one ModelProto: tiles -> features, bag -> logits, probabilities, attention_logits."""
    import onnx
    from onnx import TensorProto, helper

    graph = Graph("head")
    with torch.inference_mode():
        head = add_head(graph, model, "bag")
    graph.named(head.logits, "logits")
    scaled = graph.mul("logits", 1 / card.temperature)
    bias = graph.constant(card.bias or [0.0] * len(card.classes))
    graph.named(graph.op("Softmax", graph.op("Add", scaled, bias), axis=0), "probabilities")
    count = len(card.classes)
    outputs: dict[str, list[int | str]] = {"logits": [count], "probabilities": [count]}
    if head.attention_logits is not None:
        graph.named(head.attention_logits, "attention_logits")
        outputs["attention_logits"] = ["tiles"]
    out = onnx.ModelProto()
    out.CopyFrom(trunk)
    out.producer_name, out.producer_version = "lrmil", __version__
    out.doc_string = "tiles -> features, a batch at a time; bag, all features of a slide -> logits, probabilities"
    out.graph.name = "classifier"
    out.graph.node.extend(graph.nodes)
    out.graph.initializer.extend(graph.constants)
    bag = helper.make_tensor_value_info("bag", TensorProto.FLOAT, ["tiles", card.model.in_dim])
    out.graph.input.append(bag)
    for name, shape in outputs.items():
        out.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    versions = {entry.domain: entry.version for entry in out.opset_import}
    assert versions.get("") == OPSET, versions
    if out.ByteSize() > _MOST_BYTES:
        raise ExportError(
            f"the encoder takes {out.ByteSize() >> 20} MiB, and an ONNX file holds 2 GiB at most",
            remedy="distil a smaller student: lrmil distill --student fast or balanced",
        )
    return out


def _content(model: Any, header: ClassifierHeader) -> bytes:
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, header.to_json()
    body: bytes = model.SerializeToString(deterministic=True)
    return body + digest_entry(body)


def write_classifier(out: Path, model: Any, header: ClassifierHeader) -> None:
    """Write what ``joined`` gives, with a header, so that ``read_classifier`` reads it. Raises OutputError."""
    has_attention = any(output.name == "attention_logits" for output in model.graph.output)
    content = _content(model, replace(header, has_attention=has_attention))
    with atomic_path(out, check=read_classifier) as temporary:
        temporary.write_bytes(content)


class _Session:
    """A ModelProto at work, without the file around it."""

    def __init__(self, model: Any, card: ModelCard, what: str) -> None:
        self._session = open_session(model.SerializeToString(), "cpu", what)
        self._px, self._dim = card.tile_px or 0, card.model.in_dim

    def features(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        feed = {"tiles": tiles, "bag": np.zeros((1, self._dim), np.float32)}
        return np.asarray(self._session.run(["features"], feed)[0], np.float32)

    def logits(self, bag: NDArray[np.float32]) -> NDArray[np.float64]:
        feed = {"tiles": np.zeros((0, self._px, self._px, 3), np.uint8), "bag": bag}
        return np.asarray(self._session.run(["logits"], feed)[0], np.float64)

    def of_slide(self, slide: TileSlide, batch: int = 16) -> NDArray[np.float64]:
        parts = [self.features(tiles) for tiles in read_tiles(slide, most=batch)]
        return self.logits(np.concatenate(parts))


def _compare(exact: Any, header: ClassifierHeader, encoder: TorchEncoder, model: MILModel, card: ModelCard) -> None:
    """Raise ExportError where the float32 copy answers otherwise than torch, for bags of several lengths."""
    session = _Session(exact, card, "the exported model")
    rng = np.random.default_rng(0)
    side = card.tile_px or 0
    # Flat, smooth and noisy tiles: what resizing and normalising treat differently.
    noise = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    tiles = np.concatenate([noise, np.full_like(noise[:1], 230), np.sort(noise, axis=1)])
    own, other = encoder.encode(tiles), session.features(tiles)
    spread = rng.normal(size=(max(_BAG_LENGTHS), len(own))).astype(np.float32)
    with torch.inference_mode():
        for count in _BAG_LENGTHS:
            mix = spread[:count] / np.abs(spread[:count]).sum(1, keepdims=True)
            offsets = torch.tensor([0, count])
            wanted = model(torch.from_numpy(mix @ own), offsets).logits[0].double().numpy()
            apart = float(np.abs(session.logits(mix @ other) - wanted).max())
            if not apart <= TOLERANCE:
                raise ExportError(
                    f"logits of the exported {header.encoder.name} with its {card.model.name} model differ by "
                    f"{apart:.2g} from torch's in a bag of {count} tiles",
                    remedy="predict with model.safetensors instead, and report this",
                )


def _int8(
    request: ExportRequest,
    trunk: Any,
    exact: Any,
    model: MILModel,
    card: ModelCard,
    tell: Callable[[str], object],
) -> tuple[Any, dict[str, Any]]:
    """The int8 copy, and what it changes on slides that it was not calibrated by."""
    assert request.bags is not None
    train, judged, part = slides_of(request.bags, card, request.slides or {}, request.cases or {})
    judged = judged[:JUDGED_SLIDES]
    tell(f"calibrating int8 by about {request.tiles} tiles of {len(train)} training slides")
    small = joined(quantised(trunk, sampled(train, request.tiles)), model, card)
    before, after = _Session(exact, card, "the exported model"), _Session(small, card, "the int8 model")
    tell(f"comparing on {len(judged)} slides of the part {part}")
    pairs = [(before.of_slide(slide), after.of_slide(slide)) for slide in judged]
    one, two = (np.stack(values) for values in zip(*pairs, strict=True))
    change = np.abs(one - two) / card.temperature
    p, q = card.probabilities(one), card.probabilities(two)
    found = {
        "calibration_tiles": request.tiles,
        "calibration_slides": len(train),
        "judged_part": part,
        "judged_slides": len(judged),
        "largest_logit_change": float(change.max()),
        "mean_logit_change": float(change.mean()),
        "largest_probability_change": float(np.abs(p - q).max()),
        "other_classes": int((p.argmax(1) != q.argmax(1)).sum()),
        "bound": request.most_change,
    }
    if not change.max() <= request.most_change:
        worst = judged[int(change.max(1).argmax())].slide_id
        raise ExportError(
            f"int8 changes a logit of slide {worst} by {change.max():.3g} (in units of the temperature), more than "
            f"{request.most_change:g}; a probability changes by up to {found['largest_probability_change']:.3g}, and "
            f"{found['other_classes']} of {len(judged)} slides get another class",
            remedy="calibrate by more --tiles, allow more (--most-change), or export without --quantise",
        )
    return small, found
