"""Networks that come as a file of their own program: ONNX and TorchScript.

An ONNX file is a graph of operators without code, which onnxruntime computes. A TorchScript archive is a program: it is
not unpickled as Python, but its operators can read and write files, so that one is opened only where the user's own
table says that its maker is trusted.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipe.errors import ConfigError, WeightsError

__all__ = ["GraphNetwork", "OnnxNetwork", "ScriptNetwork", "graph_network"]


class GraphNetwork(nn.Module):
    """A network read from a file: images float32 (B, 3, S, S) in, features (B, D) out."""

    def checked(self, found: object, images: Tensor, path: Path) -> Tensor:
        """Raise WeightsError unless ``found`` is one row of features for each image."""
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise WeightsError(
                f"{path} gave {shape} for {len(images)} images {tuple(images.shape)}",
                remedy="export a network with one input of images and one output (B, D)",
            )
        return found


class OnnxNetwork(GraphNetwork):
    """An ONNX file, computed by onnxruntime in float32, on the GPU where its package for GPUs is installed.

    A file of a fixed batch is fed batches of that size, the last filled up. Raises WeightsError for a file that
    onnxruntime does not take; without onnxruntime, ImportError.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._open()

    def _open(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        known = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]
        try:
            self._session: Any = onnxruntime.InferenceSession(str(self._path), options, providers=wanted)
        except Exception as error:  # onnxruntime raises classes of its own, without a common one
            raise WeightsError(
                f"{self._path} is no ONNX file that onnxruntime takes: {_first_line(error)}", remedy="export it again"
            ) from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in ("tensor(float)", "tensor(float16)"):
            raise WeightsError(
                f"{self._path} takes {', '.join(f'{item.name} {item.type}' for item in inputs)}",
                remedy="export a network with one input, float images (B, 3, S, S)",
            )
        self._input = inputs[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        # A session belongs to its process and its device.
        return OnnxNetwork(self._path)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) on the device of ``images``."""
        half = self._input.type == "tensor(float16)"
        fixed = self._input.shape[0]
        size = fixed if isinstance(fixed, int) and fixed > 0 else max(1, len(images))
        parts = [self._run(images[at : at + size], size, half) for at in range(0, len(images), size)]
        return self.checked(torch.cat(parts), images, self._path)

    def _run(self, images: Tensor, size: int, half: bool) -> Tensor:
        rows = len(images)
        if rows < size:
            images = torch.cat([images, images[-1:].expand(size - rows, -1, -1, -1)])
        values = images.detach().to("cpu", torch.float16 if half else torch.float32).contiguous().numpy()
        try:
            found = self._session.run(None, {self._input.name: values})[0]
        except Exception as error:
            raise WeightsError(
                f"{self._path} does not compute {tuple(images.shape)}: {_first_line(error)}",
                remedy="give the input side that it was exported for as input_px",
            ) from error
        return torch.from_numpy(found)[:rows].to(images.device, torch.float32)


class ScriptNetwork(GraphNetwork):
    """A TorchScript archive. Raises WeightsError for a file that torch does not take."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        try:
            with warnings.catch_warnings():
                # torch announces the end of TorchScript; archives are there all the same.
                for kind in (DeprecationWarning, FutureWarning):
                    warnings.simplefilter("ignore", kind)
                open_archive: Any = torch.jit.load
                self.program: Any = open_archive(str(path), map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(
                f"{path} is no TorchScript archive: {_first_line(error)}", remedy="save it with torch.jit.save"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D)."""
        return self.checked(self.program(images), images, self._path)


def graph_network(architecture: str, path: Path, *, trusted: bool) -> GraphNetwork:
    """The network in a file. Raises ConfigError for a TorchScript archive that is not said to be trusted."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file", remedy="give the path of an ONNX or TorchScript file")
    if architecture == "onnx":
        return OnnxNetwork(path)
    if not trusted:
        raise ConfigError(
            f"{path} is a TorchScript archive, a program that can read and write your files",
            remedy="if you trust whoever made it, say 'trusted = true' in the encoder's table; ONNX needs no trust",
        )
    return ScriptNetwork(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
