"""What learns: a fresh student, from the teacher's copy or another network, and the recipe to export it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch

from lrmil.distill.request import COPY, DistillRequest
from lrmil.distill.student import Head, Student, relative_blocks
from lrmil.distill.targets import DistillSlide
from lrmil.distill.teachers import Teacher
from lrmil.errors import SettingsError
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError

__all__ = ["fresh_student", "load_student"]


def fresh_student(
    request: DistillRequest, teachers: Sequence[Teacher], slides: Sequence[DistillSlide]
) -> tuple[Student, Recipe, str]:
    """A fresh student, the recipe to export it by, and the licence of its weights.

    slides: one of each teacher, which shows the widths of its targets.
    """
    side = request.student_px
    teacher, slide = teachers[0].encoder, slides[0]
    if request.student == COPY:
        if not isinstance(teacher, TorchEncoder):
            raise SettingsError(
                f"teacher {teacher.info.name} is no network that could be copied", remedy="give --student timm:MODEL"
            )
        source = load_encoder(
            request.teacher, device="cpu", precision="float32", random_weights=request.random_teacher, input_px=side
        )
    else:
        source = load_student(
            request.student, side or slide.lr.spec.size_px, random_weights=request.random_student, input_px=side
        )
    encoder = cast(TorchEncoder, source)
    recipe = encoder.recipe
    if encoder.network.depth and side and request.student == COPY:
        recipe = _of_any_side(recipe)
    network: PooledNetwork = encoder.network
    first, *others = (
        Head(_blocks(one, network), [layer.shape[1] for layer in own.layers], own.final.shape[1])
        for one, own in zip(teachers, slides, strict=True)
    )
    torch.manual_seed(request.settings.seed)
    pixels = recipe.preprocessing.input_px or slide.lr.spec.size_px
    student = Student(
        network,
        blocks=first.blocks,
        layer_dims=first.layer_dims,
        final_dim=first.final_dim,
        k=slide.children.k,
        side_px=pixels,
        more=others,
    )
    infos = [one.encoder.info for one in teachers]
    licence = " and ".join(f"{info.licence} (distilled from {info.name})" for info in infos)
    return student, recipe, licence


def _blocks(teacher: Teacher, network: PooledNetwork) -> list[int]:
    """The student's blocks for a teacher's. A ConvNet has none to match them with: its last map learns every layer."""
    return relative_blocks(teacher.layers, teacher.depth, network.depth) if teacher.layers and network.depth else []


def load_student(name: str, side: int, *, random_weights: bool = False, input_px: int | None = None) -> TorchEncoder:
    """A network to be trained, on the CPU in float32, with the recipe to export it by.

    side: of its inputs where it is one of timm's, which has no say in it. input_px: of another network's, None for its
    own. Raises SettingsError for an encoder that is no network, and as ``load_encoder`` does.
    """
    options = {"device": "cpu", "precision": "float32", "random_weights": random_weights}
    wanted = side if name.startswith("timm:") else input_px
    try:
        encoder: Encoder = load_encoder(name, **options, input_px=wanted)  # type: ignore[arg-type]
    except ConfigError:
        if not name.startswith("timm:"):
            raise
        # A ConvNet takes any side as it is; only its preprocessing names one.
        encoder = load_encoder(name, **options)  # type: ignore[arg-type]
        assert isinstance(encoder, TorchEncoder)
        pre = dataclasses.replace(encoder.recipe.preprocessing, input_px=side, resize_px=None)
        encoder.recipe = dataclasses.replace(encoder.recipe, preprocessing=pre)
    if not isinstance(encoder, TorchEncoder):
        raise SettingsError(f"{name} is no network that could be trained", remedy="give another, such as timm:MODEL")
    if encoder.network.depth:
        encoder.recipe = _of_any_side(encoder.recipe)
    return encoder


def _of_any_side(recipe: Recipe) -> Recipe:
    """So that a ViT interpolates its position embeddings to another input than it was built for."""
    return dataclasses.replace(recipe, args={**recipe.args, "dynamic_img_size": True})
