"""The student: a network whose token maps and final feature learn from the teacher, with projections that stay here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmil.errors import SettingsError
from wsi_pipe.encoders.architectures import PooledNetwork

__all__ = ["Head", "Student", "StudentOutput", "relative_blocks"]


class Answer(NamedTuple):
    """What a student says to one more teacher. final: (B, D_teacher). patches: one (B, k*k, C_l) a layer."""

    final: Tensor
    patches: tuple[Tensor, ...]


class StudentOutput(NamedTuple):
    """feature: (B, D), what the exported encoder gives. final: (B, D_teacher). patches: one (B, k*k, C_l) a layer.

    more: final and patches for each teacher after the first.
    """

    feature: Tensor
    final: Tensor
    patches: tuple[Tensor, ...]
    more: tuple[Answer, ...] = ()

    def of(self, teacher: int) -> StudentOutput:
        """What is for one teacher, counted from 0."""
        return self._replace(more=()) if teacher == 0 else StudentOutput(self.feature, *self.more[teacher - 1])


class Head(NamedTuple):
    """What a teacher asks of a student: blocks of the student and widths of the teacher's layers, one each, and the
    width of its final features. See ``Student``."""

    blocks: Sequence[int]
    layer_dims: Sequence[int]
    final_dim: int


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

    more: the same of further teachers, each with projections of its own.

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
        more: Sequence[Head] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.k = k
        heads = (Head(blocks, layer_dims, final_dim), *more)
        self._own = [tuple(head.blocks) or (network.depth - 1,) for head in heads]
        self.blocks = tuple(block for own in self._own for block in own)
        with torch.inference_mode():
            feature, maps = self._maps(torch.zeros(1, 3, side_px, side_px))
        self.dim = int(feature.shape[-1])
        smallest = min(min(m.shape[1:3]) for m in maps)
        if smallest < k:
            raise SettingsError(
                f"the student's map at {side_px} px, {smallest} x {smallest}, is coarser than {k} x {k} HR tiles",
                remedy="give the student larger inputs or a smaller patch",
            )
        widths = [[int(m.shape[-1]) for m in own] for own in self._dealt(maps)]
        self.layer_projections = _projections(widths[0], layer_dims)
        self.final_projection = _projection(self.dim, final_dim)
        self.more_projections = nn.ModuleList(
            _projections(w, h.layer_dims) for w, h in zip(widths[1:], more, strict=True)
        )
        self.more_finals = nn.ModuleList(_projection(self.dim, head.final_dim) for head in more)

    def forward(self, images: Tensor) -> StudentOutput:
        """Features and projected token maps of normalised images (B, 3, S, S)."""
        feature, maps = self._maps(images)
        first, *others = self._dealt([pool_to(m, self.k) for m in maps])
        more = tuple(
            Answer(final(feature), _projected(projections, pooled))
            for final, projections, pooled in zip(self.more_finals, self.more_projections, others, strict=True)
        )
        return StudentOutput(feature, self.final_projection(feature), _projected(self.layer_projections, first), more)

    def _dealt(self, maps: list[Tensor]) -> list[list[Tensor]]:
        """The maps of each teacher's blocks; a ConvNet's one map for each."""
        if not self.network.depth:
            return [maps] * len(self._own)
        rest = iter(maps)
        return [[next(rest) for _ in own] for own in self._own]

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


def _projections(widths: Sequence[int], wanted: Sequence[int]) -> nn.ModuleList:
    """For each layer; from one map for all of them where there is only one."""
    shared = len(widths) == 1 and len(wanted) > 1
    return nn.ModuleList(
        nn.Linear(width, dim) if shared else _projection(width, dim)
        for width, dim in zip([*widths] * len(wanted) if shared else widths, wanted, strict=True)
    )


def _projected(projections: nn.Module, pooled: list[Tensor]) -> tuple[Tensor, ...]:
    own = list(projections.children())
    maps = pooled * len(own) if len(pooled) == 1 else pooled
    return tuple(projection(p) for projection, p in zip(own, maps, strict=True))


def _projection(width: int, wanted: int) -> nn.Module:
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


def pool_to(tokens: Tensor, k: int) -> Tensor:
    """Token maps (B, h, w, C) averaged by area to (B, k * k, C), in reading order."""
    pooled = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), k)
    return pooled.flatten(2).transpose(1, 2)
