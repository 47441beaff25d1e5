"""Weights that a user has, held against what the registry states of them and features that somebody recorded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.availability import to_download, weights_file
from wsi_pipe.encoders.pins import revision_of
from wsi_pipe.errors import ConfigError, WeightsError
from wsi_pipe.files import write_text_atomically

__all__ = ["LEAST_COSINE", "Verification", "read_reference", "reference_picture", "verify_encoder", "write_reference"]

LEAST_COSINE = 0.999
"""Between features of one picture from two programs that compute the same, in float32."""


def reference_picture(side: int = 256) -> NDArray[np.uint8]:
    """The picture that features are compared of, uint8 (side, side, 3), the same on every machine.

    Whole numbers alone: dark round spots on a pink ground that rises and falls.
    """
    y, x = np.mgrid[:side, :side].astype(np.int64)
    ground = (x * x + 3 * y * y) // 61 % 48
    cell = (x // 32 * 7 + y // 32 * 13) % 11
    spot = (x % 32 - 16) ** 2 + (y % 32 - 16) ** 2 <= (4 + cell) ** 2
    pixels = np.stack([228 - ground // 2, 176 - ground, 204 - ground // 2], axis=-1)
    pixels[spot] = np.stack([110 - cell * 3, 70 + cell * 2, 140 - cell], axis=-1)[spot]
    return pixels.astype(np.uint8)


@dataclass(frozen=True)
class Verification:
    """What was found of an encoder's weights; that there is one means that every key and shape fits.

    cosine: to the features of a reference, None where none was given.
    """

    name: str
    file: str
    sha256: str
    revision: str
    dim: int
    features: NDArray[np.float32]
    cosine: float | None = None

    @property
    def agrees(self) -> bool:
        """False where features differ from those of the reference."""
        return self.cosine is None or self.cosine >= LEAST_COSINE


def verify_encoder(name: str, *, reference: Path | None = None, device: str = "cpu") -> Verification:
    """Load an encoder's weights strictly, in float32, and compare its features of ``reference_picture``.

    reference: a file of ``write_reference``. Raises WeightsError where the weights are not here, or keys, shapes or the
    dimension do not fit; ConfigError for a reference of another encoder or picture.
    """
    if to_download(name) is not None:
        raise WeightsError(
            f"weights of encoder {name} are not on this machine", remedy=f"get them: wsi-pipe encoders --pin {name}"
        )
    encoder = load_encoder(name, device=device, precision="float32")
    path = weights_file(name)
    features = encoder.encode(reference_picture()[None])[0]
    info = encoder.info
    cosine = None
    if reference is not None:
        held = read_reference(reference)
        if len(held) != len(features):
            raise ConfigError(
                f"{reference} holds {len(held)} features, and encoder {name} gives {len(features)}",
                remedy="give a reference of this very encoder",
            )
        cosine = float(features @ held / (np.linalg.norm(features) * np.linalg.norm(held)))
    revision = revision_of(path) if path else ""
    return Verification(name, str(path or ""), info.weights_sha256, revision, info.dim, features, cosine)


def _picture_sha256() -> str:
    return hashlib.sha256(reference_picture().tobytes()).hexdigest()


def write_reference(path: Path, found: Verification) -> None:
    """Record features for others to compare theirs with. Raises OutputError."""
    held = {
        "encoder": found.name,
        "weights_sha256": found.sha256,
        "picture_sha256": _picture_sha256(),
        "features": [round(float(value), 6) for value in found.features],
    }
    write_text_atomically(path, json.dumps(held) + "\n")


def read_reference(path: Path) -> NDArray[np.float32]:
    """The features of a reference, float32 (D,). Raises ConfigError where it is none, or is of another picture."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        features = np.asarray(held["features"], np.float32)
        picture = str(held["picture_sha256"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no reference of an encoder: {error}", remedy="give a file of --record") from error
    if picture != _picture_sha256() or features.ndim != 1:
        raise ConfigError(f"{path} is of another picture than this version's", remedy="record the reference anew")
    return features
