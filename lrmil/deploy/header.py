"""What a classifier's file says of itself, and how it is read without any library for ONNX.

The file is an ONNX model. Its ``metadata_props`` hold ``lrmil_classifier``, a JSON object, and as the last 76 bytes of
the file ``sha256``, the SHA-256 in hex of all bytes before them: protocol buffers may be appended to one another. So a
file that was cut off, damaged, or changed by another program is told before any of it is run. No part of it is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrmil.checkpoint import ModelCard, read_card
from lrmil.errors import ModelFileError
from wsi_pipe.config import JobSettings, SegmentSettings, TileSettings, from_mapping, to_mapping
from wsi_pipe.encoders.base import MPP_TOLERANCE, EncoderInfo
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import parse_json
from wsi_pipe.seen import Seen

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "PRECISIONS",
    "ClassifierFile",
    "ClassifierHeader",
    "digest_entry",
    "is_classifier",
    "model_card",
    "read_classifier",
    "read_header",
]

METADATA_KEY = "lrmil_classifier"
FORMAT_VERSION = 1
PRECISIONS = ("float32", "bfloat16", "int8")
_REMEDY = "give a file that lrmil export has written, or copy it again"
_METADATA_FIELD = 14
_DIGEST_HEAD = bytes([_METADATA_FIELD << 3 | 2, 74, 0x0A, 6]) + b"sha256" + bytes([0x12, 64])
_DIGEST_BYTES = len(_DIGEST_HEAD) + 64


@dataclass(frozen=True)
class ClassifierHeader:
    """What a classifier's file says beside its graph.

    card: of the model, with classes, calibration and seen cases. encoder: facts of the encoder that is in the file;
    its ``precision`` is what it computes in. segment, tile: how tissue is found and tiles are laid. accepted_mpp: um/px
    of the least and greatest resolution at which tiles may be cut, None where the encoder takes any. has_attention:
    whether the graph gives attention logits. quantisation: of an int8 file, what it was made from and what it changed.
    written_by: program and version.
    """

    card: ModelCard
    encoder: EncoderInfo
    segment: SegmentSettings = field(default_factory=SegmentSettings)
    tile: TileSettings = field(default_factory=TileSettings)
    has_attention: bool = True
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    written_by: str = ""

    @property
    def accepted_mpp(self) -> tuple[float, float] | None:
        """See the class."""
        mpp = self.encoder.mpp
        if mpp is None or not self.encoder.mpp_required:
            return None
        return (mpp * (1 - MPP_TOLERANCE), mpp * (1 + MPP_TOLERANCE))

    def settings(self) -> JobSettings:
        """A job's settings with the file's own of tissue and tiles."""
        return dataclasses.replace(JobSettings(), segment=self.segment, tile=self.tile)

    def to_json(self) -> str:
        """The header as JSON text, as the metadata holds it."""
        encoder = {f.name: getattr(self.encoder, f.name) for f in dataclasses.fields(EncoderInfo)}
        accepted = self.accepted_mpp
        values = {
            "format_version": FORMAT_VERSION,
            "card": self.card.to_json(),
            "encoder": encoder | {"transform": dict(self.encoder.transform), "seen": self.encoder.seen.to_json()},
            "segment": to_mapping(self.segment),
            "tile": to_mapping(self.tile),
            "accepted_mpp": None if accepted is None else list(accepted),
            "has_attention": self.has_attention,
            "quantisation": dict(self.quantisation),
            "written_by": self.written_by,
        }
        return json.dumps(values, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: Path) -> ClassifierHeader:
        """The inverse of ``to_json``. Raises ModelFileError, naming ``where``, when it is damaged or of a later
        version."""
        try:
            values = parse_json(text)
            version = values["format_version"]
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise ModelFileError(
                    f"{where} has the format version {version}, this lrmil reads up to {FORMAT_VERSION}",
                    remedy="update lrmil",
                )
            facts = dict(values["encoder"])
            facts["seen"] = Seen.from_json(facts.get("seen"))
            known = {f.name for f in dataclasses.fields(EncoderInfo)}
            encoder = EncoderInfo(**{name: value for name, value in facts.items() if name in known})
            if encoder.precision not in PRECISIONS:
                raise ValueError(f"no precision is called {encoder.precision!r}")
            return cls(
                ModelCard.from_json(values["card"]),
                encoder,
                from_mapping(SegmentSettings, values["segment"], "segment"),
                from_mapping(TileSettings, values["tile"], "tile"),
                bool(values["has_attention"]),
                dict(values.get("quantisation") or {}),
                str(values.get("written_by", "")),
            )
        except ModelFileError:
            raise
        except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
            message = error.message if isinstance(error, ConfigError) else str(error)
            raise ModelFileError(f"{where}: its metadata is wrong: {message}", remedy=_REMEDY) from error


@dataclass(frozen=True)
class ClassifierFile:
    """A classifier's file that was read: ``content``, all of its bytes; ``sha256``, theirs, in hex."""

    header: ClassifierHeader
    content: bytes
    sha256: str


def is_classifier(path: str | Path) -> bool:
    """Whether a path is, by its name, that of an exported classifier."""
    return str(path).lower().endswith(".onnx")


def model_card(path: str | Path) -> ModelCard:
    """The card of a model's file or of an exported classifier. Raises ModelFileError where it is missing or broken."""
    return read_header(path).card if is_classifier(path) else read_card(Path(path))


def digest_entry(body: bytes) -> bytes:
    """What is appended to a file's bytes so that their digest stands in its metadata."""
    return _DIGEST_HEAD + hashlib.sha256(body).hexdigest().encode()


def read_header(path: str | Path) -> ClassifierHeader:
    """What a classifier's file says of itself. Raises ModelFileError as ``read_classifier`` does."""
    return read_classifier(path).header


def read_classifier(path: str | Path) -> ClassifierFile:
    """A classifier's file, checked against its own digest; nothing of it is run.

    Raises ModelFileError when it is missing, no classifier of ``lrmil export``, damaged, or of a later version.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist", remedy="check the path") from error
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}", remedy="check the path and its rights") from error
    body, tail = memoryview(content)[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    try:
        metadata = dict(_metadata(content))
    except (IndexError, ValueError) as error:
        raise ModelFileError(f"{path} is no readable ONNX file, or was cut off", remedy=_REMEDY) from error
    if METADATA_KEY not in metadata:
        raise ModelFileError(f"{path} is no classifier: it has no {METADATA_KEY} metadata", remedy=_REMEDY)
    digest = hashlib.sha256(body)
    if tail != _DIGEST_HEAD + digest.hexdigest().encode():
        raise ModelFileError(
            f"{path} is damaged, or was changed by another program: its content is not what was written",
            remedy=_REMEDY,
        )
    digest.update(tail)
    return ClassifierFile(ClassifierHeader.from_json(metadata[METADATA_KEY], path), content, digest.hexdigest())


def _metadata(content: bytes) -> Iterator[tuple[str, str]]:
    """Keys and values of a ModelProto's ``metadata_props``, by the encoding of protocol buffers."""
    for number, value in _fields(memoryview(content)):
        if number == _METADATA_FIELD:
            entry = {inner: bytes(text).decode() for inner, text in _fields(value)}
            yield entry.get(1, ""), entry.get(2, "")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields that have a length; others are passed over. Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field ends behind the file's end")
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"there is no wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has too many bytes")
