"""What learns: a fresh student, from the teacher's copy or another network, and the recipe to export it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch

from lrmil.distill.request import COPY, DistillRequest
from lrmil.distill.student import Student, relative_blocks
from lrmil.distill.targets import DistillSlide
from lrmil.errors import SettingsError
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError

__all__ = ["fresh_student"]


def fresh_student(
    request: DistillRequest, teacher: Encoder, slide: DistillSlide, layers: Sequence[int], depth: int
) -> tuple[Student, Recipe, str]:
    """A fresh student, the recipe to export it by, and the licence of its weights."""
    side = request.student_px
    if request.student == COPY:
        if not isinstance(teacher, TorchEncoder):
            raise SettingsError(
                f"teacher {teacher.info.name} is no network that could be copied", remedy="give --student timm:MODEL"
            )
        source = load_encoder(
            request.teacher, device="cpu", precision="float32", random_weights=request.random_teacher, input_px=side
        )
    else:
        source = _load_student(request, side or slide.lr.spec.size_px)
    encoder = cast(TorchEncoder, source)
    recipe = encoder.recipe
    if encoder.network.depth and (side or request.student != COPY):
        # The network interpolates its position embeddings to another input than it was built for.
        recipe = dataclasses.replace(recipe, args={**recipe.args, "dynamic_img_size": True})
    network: PooledNetwork = encoder.network
    # A ConvNet has no blocks to match the teacher's with: its last map learns every layer.
    blocks = relative_blocks(layers, depth, network.depth) if layers and network.depth else []
    torch.manual_seed(request.settings.seed)
    pixels = recipe.preprocessing.input_px or slide.lr.spec.size_px
    student = Student(
        network,
        blocks=blocks,
        layer_dims=[layer.shape[1] for layer in slide.layers],
        final_dim=slide.final.shape[1],
        k=slide.children.k,
        side_px=pixels,
    )
    licence = f"{teacher.info.licence} (distilled from {teacher.info.name})"
    return student, recipe, licence


def _load_student(request: DistillRequest, side: int) -> Encoder:
    options = {"device": "cpu", "precision": "float32", "random_weights": request.random_student}
    if not request.student.startswith("timm:"):
        return load_encoder(request.student, **options, input_px=request.student_px)  # type: ignore[arg-type]
    try:
        return load_encoder(request.student, **options, input_px=side)  # type: ignore[arg-type]
    except ConfigError:
        # A ConvNet takes any side as it is; only its preprocessing names one.
        encoder = cast(TorchEncoder, load_encoder(request.student, **options))  # type: ignore[arg-type]
        pre = dataclasses.replace(encoder.recipe.preprocessing, input_px=side, resize_px=None)
        encoder.recipe = dataclasses.replace(encoder.recipe, preprocessing=pre)
        return encoder
