"""Students by what is wanted of them, for ``lrmil distill --student``; docs/encoders.md has the figures behind them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset", "preset_of"]


@dataclass(frozen=True)
class Preset:
    """A network of timm, and the side in px that its input is resized to."""

    student: str
    student_px: int


PRESETS = {
    "fast": Preset("timm:mobilenetv4_conv_small", 128),
    "balanced": Preset("timm:vit_tiny_patch16_224", 128),
}


def preset_of(student: str, student_px: int | None) -> tuple[str, int | None]:
    """Network and input side that a student's name stands for; a side that is given counts before the preset's."""
    preset = PRESETS.get(student)
    if preset is None:
        return student, student_px
    return preset.student, student_px or preset.student_px
