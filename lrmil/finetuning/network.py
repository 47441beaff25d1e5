"""An encoder with a MIL model on top: a MIL model whose features are pixels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lrmil.config import ModelSettings
from lrmil.model import MILOutput, build_model
from wsi_pipe.encoders.pixels import Normaliser
from wsi_pipe.encoders.torch_encoder import TorchEncoder

__all__ = ["TileClassifier"]


class TileClassifier(nn.Module):
    """A tile network and a MIL model that are trained together.

    source: the encoder, on the CPU; its network is taken over and becomes trainable. head: the MIL model, whose
    ``in_dim`` is the encoder's. side_px: of the tiles. Random numbers of the head are torch's.
    """

    def __init__(self, source: TorchEncoder, head: ModelSettings, side_px: int) -> None:
        super().__init__()
        self.network = source.network
        self.network.requires_grad_(True)
        self._preprocessing = source.recipe.preprocessing
        self._normalise = Normaliser(self._preprocessing, torch.device("cpu"))
        with torch.inference_mode():
            side = self._preprocessing.input_px or side_px
            width = int(self.network.eval()(torch.zeros(1, 3, side, side)).shape[-1])
        self.head = build_model(dataclasses.replace(head, in_dim=width))
        # What a step of stage 2 asks of a MIL model.
        self.settings = self.head.settings
        self.instance_head = self.head.instance_head
        self.second_loss = self.head.second_loss

    def on(self, device: torch.device) -> TileClassifier:
        """Itself, moved to a device."""
        self.to(device)
        self._normalise = Normaliser(self._preprocessing, device)
        return self

    def tiles(self, pixels: Tensor) -> Tensor:
        """Features (T, D) of tiles, uint8 (T, S, S, 3) on the model's device."""
        features: Tensor = self.network(self._normalise(pixels))
        return features

    def forward(self, pixels: Tensor, offsets: Tensor) -> MILOutput:
        """Of slides whose tiles, uint8 (T, S, S, 3), lie at ``offsets`` (B + 1,)."""
        output: MILOutput = self.head(self.tiles(pixels), offsets)
        return output
