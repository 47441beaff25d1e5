"""Students by what is wanted of them."""

from __future__ import annotations

import timm

from lrmil.distill.presets import PRESETS, preset_of


def test_presets_name_networks_that_timm_has() -> None:
    assert set(PRESETS) == {"fast", "balanced"}
    for preset in PRESETS.values():
        assert timm.is_model(preset.student.removeprefix("timm:"))


def test_a_side_that_is_given_counts_before_the_presets() -> None:
    assert preset_of("fast", None) == (PRESETS["fast"].student, PRESETS["fast"].student_px)
    assert preset_of("fast", 192) == (PRESETS["fast"].student, 192)
    assert preset_of("copy", None) == ("copy", None)
    assert preset_of("timm:vit_small_patch16_224", 224) == ("timm:vit_small_patch16_224", 224)
