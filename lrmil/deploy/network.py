"""An encoder as an ONNX graph: uint8 tiles in, features out, normalisation inside."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrmil.deploy.graph import OPSET
from lrmil.errors import ExportError
from wsi_pipe.encoders.pixels import resize_matrix
from wsi_pipe.encoders.recipe import Preprocessing

if TYPE_CHECKING:
    from wsi_pipe.encoders.torch_encoder import TorchEncoder

__all__ = ["FromTiles", "encoder_graph"]

_EXAMPLES = 3
_MOST_BATCH = 1 << 16


class FromTiles(nn.Module):
    """A network together with what turns tiles into its input; see ``wsi_pipe.encoders.pixels.Normaliser``.

    Resizing is two matrix products with whole grey values in between.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, tile_px: int) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        side = preprocessing.scaled_px or tile_px
        matrix = None if side == tile_px else resize_matrix(tile_px, side, preprocessing.interpolation)
        self.register_buffer("resize", matrix)
        self.crop = preprocessing.input_px if preprocessing.input_px != side else None
        self.start = 0 if self.crop is None else round((side - self.crop) / 2)

    def forward(self, tiles: Tensor) -> Tensor:
        """Features (B, D) of tiles uint8 (B, S, S, 3)."""
        images = tiles.to(torch.float32)
        if isinstance(self.resize, Tensor):
            planes = images.permute(0, 3, 1, 2)
            planes = ((planes @ self.resize.T) + 0.5).floor().clamp(0, 255)
            images = ((self.resize @ planes) + 0.5).floor().clamp(0, 255).permute(0, 2, 3, 1)
        if self.crop is not None:
            end = self.start + self.crop
            images = images[:, self.start : end, self.start : end]
        out: Tensor = self.network((images * self.scale + self.shift).permute(0, 3, 1, 2))
        return out


def encoder_graph(encoder: TorchEncoder, tile_px: int) -> Any:
    """An ``onnx.ModelProto`` from ``tiles``, uint8 (batch, S, S, 3), to ``features``, float32 (batch, D).

    encoder: on the CPU in float32. Raises ExportError when torch cannot write its network as ONNX.
    """
    # torch's exporter imports these, and says so less clearly.
    import onnx
    import onnxscript

    assert onnxscript
    module = FromTiles(encoder.network, encoder.recipe.preprocessing, tile_px).eval()
    example = torch.zeros((_EXAMPLES, tile_px, tile_px, 3), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=_MOST_BATCH)
    try:
        with warnings.catch_warnings():
            # What it warns of concerns itself; whether the copy computes the same is measured afterwards.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=["tiles"],
                output_names=["features"],
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
        onnx.checker.check_model(model)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the exporter's errors are of many kinds, down to plain RuntimeError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"encoder {encoder.info.name} cannot be written as ONNX: {first[:300]}",
            remedy="choose another student, such as lrmil distill --student fast or balanced",
        ) from error
    return model
