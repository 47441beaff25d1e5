"""Who teaches: encoders of HR tiles, each with the blocks that are learned from it and a place for its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrmil.distill.request import DistillRequest
from lrmil.distill.settings import DistillSettings
from lrmil.distill.stored import stored_teacher
from lrmil.errors import SettingsError
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.base import Encoder, LayeredEncoder, block_indices

__all__ = ["Teacher", "load_teachers"]


@dataclass(frozen=True)
class Teacher:
    """One teacher.

    layers: blocks counted from 0, () for a teacher without any. depth: its number of blocks. folder: where what it says
    of tiles is kept. name: in figures, "" for an only one.
    """

    encoder: Encoder
    layers: tuple[int, ...]
    depth: int
    folder: Path
    name: str = ""

    def standardises(self, settings: DistillSettings) -> bool:
        """Whether each dimension of its targets is standardised: such without blocks have units of their own."""
        return settings.standardise == "yes" or (settings.standardise == "auto" and not self.layers)


def load_teachers(request: DistillRequest, device: str) -> list[Teacher]:
    """All teachers of a request.

    Raises SettingsError when one is given twice, ConfigError for blocks that one lacks.
    """
    folder = request.targets_dir or request.out.parent / f"{request.out.stem}.targets"
    encoders = [
        stored_teacher(request, name)
        or load_encoder(name, device=device, precision="auto", random_weights=request.random_teacher)
        for name in request.teachers
    ]
    slugs = [encoder.info.slug for encoder in encoders]
    twice = {slug for slug in slugs if slugs.count(slug) > 1}
    if twice:
        raise SettingsError(f"teacher {min(twice)} is given twice", remedy="give each teacher once")
    several = len(encoders) > 1
    return [
        # The first one's targets lie where those of an only teacher do, so that they are found again.
        Teacher(encoder, *_layers(encoder, request.settings), folder / slug if n else folder, slug if several else "")
        for n, (encoder, slug) in enumerate(zip(encoders, slugs, strict=True))
    ]


def _layers(encoder: Encoder, settings: DistillSettings) -> tuple[tuple[int, ...], int]:
    """Blocks of the teacher counted from 0, and its depth; none for a teacher without blocks."""
    depth = encoder.depth if isinstance(encoder, LayeredEncoder) else 0
    if not depth or not settings.layers:
        return (), depth
    wanted: Sequence[int] = block_indices(settings.layers, depth, encoder.info.name)
    return tuple(dict.fromkeys(wanted)), depth
