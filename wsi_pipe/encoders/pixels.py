"""From uint8 tiles to a network's input, on the device that the tiles lie on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsi_pipe.encoders.recipe import Preprocessing

__all__ = ["Normaliser", "normalise", "resize_matrix"]


def resize_matrix(size: int, new_size: int, interpolation: str) -> Tensor:
    """The matrix (new_size, size), float32, that resizes a column of pixels with antialiasing.

    Its columns are what the filter makes of a single bright pixel, so it is the filter, whatever that is.
    """
    bright = torch.eye(size)[None, None]
    return F.interpolate(bright, (new_size, size), mode=interpolation, antialias=True)[0, 0]


class Normaliser:
    """Turns uint8 tiles (B, H, W, 3) on one device into inputs float32 (B, 3, S, S), in channels-last order.

    Resizing is antialiased and rounded to whole grey values, as PIL's is, so that features agree with those of
    pipelines that resize images before they normalise them. All constants are kept on the device: making them anew
    for each batch would wait for the batch before.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing = preprocessing
        self._device = device
        mean = torch.tensor(preprocessing.mean, dtype=torch.float32)
        std = torch.tensor(preprocessing.std, dtype=torch.float32)
        self._scale = (1 / (255 * std)).to(device)
        self._shift = (-mean / std).to(device)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._matrices: dict[tuple[int, int], Tensor] = {}

    def __call__(self, tiles: Tensor) -> Tensor:
        """Inputs of ``tiles``, which are left as they are."""
        # (B, H, W, 3) seen as (B, 3, H, W) is channels-last already: nothing is moved.
        images = tiles.permute(0, 3, 1, 2)
        side = self._preprocessing.scaled_px
        if side is not None and images.shape[-2:] != (side, side):
            images = self._resize(images, side)
        crop = self._preprocessing.input_px
        if crop is not None and images.shape[-1] != crop:
            start = round((images.shape[-1] - crop) / 2)
            images = images[:, :, start : start + crop, start : start + crop]
        out = images.permute(0, 2, 3, 1).to(torch.float32).contiguous()
        # Row by row with the constants of a whole row: a loop over three channels would not be vectorised.
        scale, shift = self._row(out.shape[2])
        out = torch.addcmul(shift, out.flatten(2), scale).view(out.shape)
        return out.permute(0, 3, 1, 2)

    def _row(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of every number in a row of ``width`` pixels."""
        if width not in self._rows:
            self._rows[width] = (self._scale.repeat(width), self._shift.repeat(width))
        return self._rows[width]

    def _resize(self, images: Tensor, side: int) -> Tensor:
        if self._device.type == "cpu":
            # torch resizes uint8 with SIMD here, and here alone.
            mode = self._preprocessing.interpolation
            return F.interpolate(images, (side, side), mode=mode, antialias=True)
        return self.resize_by_products(images, side)

    def resize_by_products(self, images: Tensor, side: int) -> Tensor:
        """Images resized to ``side``, float32 of whole values: two matrix products, which GPUs do best.

        First along x, then along y, whole values in between, as PIL and torch's uint8 resizing do it.
        """
        height, width = (self._matrix(size, side) for size in images.shape[-2:])
        rows = images.to(torch.float32, memory_format=torch.contiguous_format)
        rows = torch.matmul(rows, width.T).add_(0.5).floor_().clamp_(0, 255)
        return torch.matmul(height, rows).add_(0.5).floor_().clamp_(0, 255)

    def _matrix(self, size: int, side: int) -> Tensor:
        if (size, side) not in self._matrices:
            self._matrices[size, side] = resize_matrix(size, side, self._preprocessing.interpolation).to(self._device)
        return self._matrices[size, side]


def normalise(tiles: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Inputs of uint8 tiles (B, H, W, 3); see Normaliser, which keeps its constants from batch to batch."""
    return Normaliser(preprocessing, tiles.device)(tiles)
