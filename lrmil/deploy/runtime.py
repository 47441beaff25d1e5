"""An exported classifier at work in onnxruntime; torch is not imported."""

from __future__ import annotations

import dataclasses
import platform
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrmil.deploy.header import ClassifierFile, ClassifierHeader, read_classifier
from lrmil.errors import ModelFileError, SettingsError
from wsi_pipe.cores import available_cores
from wsi_pipe.encoders.base import EncoderInfo, FeatureArray, TileArray, check_finite
from wsi_pipe.errors import ConfigError, EncoderError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxClassifier", "OnnxEncoder", "open_session"]

CPU_BATCH, CUDA_BATCH = 16, 64
"""Tiles of a batch. Fixed, so that two runs give the same bytes, and memory does not grow with the slide."""


def open_session(content: bytes, device: str, what: str) -> onnxruntime.InferenceSession:
    """A session of an ONNX model's bytes.

    device: "cpu", "cuda" or "cuda:1", or "auto", the GPU where onnxruntime has one. what: the model, for messages.
    Raises SettingsError where the device is not there, EncoderError where the runtime lacks kernels for the model,
    ModelFileError where it is no valid model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 3
    # Threads that wait for the next tiles would take the cores from those that read them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(device, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # onnxruntime's own classes share no base but this one
        name, first = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        if name == "NotImplemented":
            raise EncoderError(
                f"onnxruntime {onnxruntime.__version__} has no kernels here for {what} "
                f"({device}, {platform.machine()}): {first}",
                remedy="export it in float32 or int8, or predict from model.safetensors, which torch runs",
            ) from error
        raise ModelFileError(
            f"{what}: onnxruntime cannot load it: {name}: {first}", remedy="export it again"
        ) from error
    if device not in ("auto", "cpu") and session.get_providers()[0] == "CPUExecutionProvider":
        raise SettingsError(
            f"the device {device!r} cannot be used: onnxruntime could not start its CUDA provider",
            remedy="check driver and CUDA libraries, or use cpu",
        )
    return session


def _providers(device: str, there: list[str]) -> list[Any]:
    kind, _, number = device.partition(":")
    cuda = "CUDAExecutionProvider" in there
    if kind == "cpu" or (kind == "auto" and not cuda):
        return ["CPUExecutionProvider"]
    if kind not in ("auto", "cuda") or (number and not number.isdecimal()):
        raise SettingsError(f"the device {device!r} is not known to onnxruntime", remedy="use auto, cpu or cuda:0")
    if not cuda:
        raise SettingsError(
            f"the device {device!r} cannot be used: this onnxruntime has no CUDA provider",
            remedy="pip install onnxruntime-gpu in place of onnxruntime, or use cpu",
        )
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"]


@dataclasses.dataclass(frozen=True)
class _Done:
    """Features that are there already; see PendingFeatures."""

    features: FeatureArray

    def result(self) -> FeatureArray:
        """Float32 (B, D)."""
        return self.features


class OnnxClassifier:
    """A classifier from its file: an encoder of tiles, and a head over a bag's features.

    header: what the file says. sha256: of the file. device: where it runs, "cpu" or "cuda". Raises as
    ``read_classifier`` and ``open_session`` do.
    """

    def __init__(self, file: ClassifierFile, *, device: str = "auto", where: str = "the classifier") -> None:
        self.header: ClassifierHeader = file.header
        self.sha256 = file.sha256
        self._session = open_session(file.content, device, f"{where} in {file.header.encoder.precision}")
        self.device = "cuda" if self._session.get_providers()[0].startswith("CUDA") else "cpu"
        self._px = int(self._session.get_inputs()[0].shape[1])

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> OnnxClassifier:
        """The classifier of a file; arguments and errors as of the class."""
        return cls(read_classifier(path), device=device, where=str(path))

    @cached_property
    def _only_what_is_asked(self) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        # Encoder and head share a graph and no value: one runs without the other.
        options.only_execute_path_to_fetches = True
        return options

    def _run(self, wanted: list[str], tiles: TileArray, bag: NDArray[np.float32]) -> list[NDArray[Any]]:
        feed = {"tiles": tiles, "bag": bag}
        found: list[NDArray[Any]] = self._session.run(wanted, feed, self._only_what_is_asked)
        return found

    def encode(self, tiles: TileArray) -> FeatureArray:
        """Features float32 (B, D) of tiles uint8 (B, S, S, 3). Raises ConfigError for another S than the file's."""
        side = self._px
        if tiles.dtype != np.uint8 or tiles.shape[1:] != (side, side, 3):
            raise ConfigError(
                f"tiles must be uint8 (B, {side}, {side}, 3) for this classifier, not {tiles.dtype} {tiles.shape}"
            )
        nothing = np.zeros((1, self.header.card.model.in_dim), np.float32)
        return np.asarray(self._run(["features"], np.ascontiguousarray(tiles), nothing)[0], np.float32)

    def forward(self, features: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Logits (C,) and attention logits (T,), or None, of one bag's features (T, D), T at least 1."""
        wanted = ["logits", *(["attention_logits"] if self.header.has_attention else [])]
        nothing = np.zeros((0, self._px, self._px, 3), np.uint8)
        found = self._run(wanted, nothing, np.ascontiguousarray(features, np.float32))
        return found[0].astype(np.float64), found[1].astype(np.float64) if len(found) > 1 else None

    def encoder(self) -> OnnxEncoder:
        """The encoder as the pipeline takes one."""
        return OnnxEncoder(self)


class OnnxEncoder:
    """The encoder of a classifier's file; see ``wsi_pipe.encoders.base.Encoder``."""

    in_flight = 1
    shares_batches = False

    def __init__(self, classifier: OnnxClassifier) -> None:
        self._classifier = classifier

    @property
    def info(self) -> EncoderInfo:
        """See Encoder.info."""
        return self._classifier.header.encoder

    def suggest_batch(self, tile_px: int) -> int:
        """Tiles of a batch, whatever their side."""
        return CUDA_BATCH if self._classifier.device == "cuda" else CPU_BATCH

    def encode(self, tiles: TileArray) -> FeatureArray:
        """See Encoder.encode."""
        return check_finite(self._classifier.encode(tiles), self.info.name)

    def submit(self, tiles: TileArray) -> _Done:
        """See Encoder.submit; the features are there when it returns."""
        return _Done(self.encode(tiles))
