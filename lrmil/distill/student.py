"""The student: a network whose token maps and final feature learn from the teacher, with projections that stay here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmil.errors import SettingsError
from wsi_pipe.encoders.architectures import PooledNetwork

__all__ = ["Student", "StudentOutput", "relative_blocks"]


class StudentOutput(NamedTuple):
    """feature: (B, D), what the exported encoder gives. final: (B, D_teacher). patches: one (B, k*k, C_l) a layer."""

    feature: Tensor
    final: Tensor
    patches: tuple[Tensor, ...]


def relative_blocks(teacher_blocks: Sequence[int], teacher_depth: int, student_depth: int) -> list[int]:
    """The student's blocks at the same relative depth as the teacher's, both counted from 0.

    ``round((block + 1) / teacher_depth * student_depth) - 1``: the last goes to the last, whatever the depths.
    """
    return [
        min(max(round((block + 1) / teacher_depth * student_depth) - 1, 0), student_depth - 1)
        for block in teacher_blocks
    ]


class Student(nn.Module):
    """A network with a projection to the teacher's width for each layer that is learnt, and one for the final feature.

    network: the encoder that is exported. blocks: its blocks for the layers, one each, or empty for all layers taken
    from its last map (the last block of a ViT, the last feature map of a ConvNet that is not coarser than k x k).
    layer_dims: the teacher's widths. final_dim: D of the teacher. k: side of the child map. A projection is the
    identity where the widths agree, so that a copy of the teacher starts as the paper's does; but where several layers
    come from one map each has a linear one, since the map cannot equal them all. Raises SettingsError when the network
    has neither blocks nor a map, or its map is too coarse.
    """

    def __init__(
        self,
        network: PooledNetwork,
        *,
        blocks: Sequence[int],
        layer_dims: Sequence[int],
        final_dim: int,
        k: int,
        side_px: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.k = k
        self.blocks = tuple(blocks) if blocks else (network.depth - 1,)
        with torch.inference_mode():
            feature, maps = self._maps(torch.zeros(1, 3, side_px, side_px))
        self.dim = int(feature.shape[-1])
        smallest = min(min(m.shape[1:3]) for m in maps)
        if smallest < k:
            raise SettingsError(
                f"the student's map at {side_px} px, {smallest} x {smallest}, is coarser than {k} x {k} HR tiles",
                remedy="give the student larger inputs or a smaller patch",
            )
        self._shared = len(maps) == 1 and len(layer_dims) > 1
        widths = [int(m.shape[-1]) for m in (maps * len(layer_dims) if self._shared else maps)]
        self.layer_projections = nn.ModuleList(
            nn.Linear(width, dim) if self._shared else _projection(width, dim)
            for width, dim in zip(widths, layer_dims, strict=True)
        )
        self.final_projection = _projection(self.dim, final_dim)

    def forward(self, images: Tensor) -> StudentOutput:
        """Features and projected token maps of normalised images (B, 3, S, S)."""
        feature, maps = self._maps(images)
        pooled = [pool_to(m, self.k) for m in maps]
        if self._shared:
            pooled *= len(self.layer_projections)
        patches = tuple(projection(p) for projection, p in zip(self.layer_projections, pooled, strict=True))
        return StudentOutput(feature, self.final_projection(feature), patches)

    def _maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The pooled feature, and token maps (B, h, w, C): of each block, or the one of a ConvNet."""
        if self.network.depth:
            feature, layers = self.network.forward_layers(images, self.blocks)
            return feature, [patches for _, patches in layers]
        if not hasattr(self.network.trunk, "forward_intermediates"):
            raise SettingsError("this network gives no map of features", remedy="choose a ViT or a ConvNet of timm")
        features, maps = self.network.trunk.forward_intermediates(images, output_fmt="NCHW")
        # The last map is the best, if it is not coarser than the children.
        fine = [m for m in maps if min(m.shape[2:]) >= self.k] or maps[:1]
        return self.network.pool(features), [fine[-1].permute(0, 2, 3, 1)]


def _projection(width: int, wanted: int) -> nn.Module:
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


def pool_to(tokens: Tensor, k: int) -> Tensor:
    """Token maps (B, h, w, C) averaged by area to (B, k * k, C), in reading order."""
    pooled = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), k)
    return pooled.flatten(2).transpose(1, 2)
