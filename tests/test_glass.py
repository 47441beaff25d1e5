"""Tissue on glass that is not grey: tinted, stitched of fields of several tints, under a lamp that changes, red ink."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.geometry import TissueMask
from wsi_pipe.slides import open_slide
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide
from wsi_pipe.tissue import find_tissue, share_notes
from wsi_pipe.tissue.glass import white_map

UM = (8.0, 8.0)
SCALE = (16.0, 16.0)
PALE = (240, 226, 237)

Picture = NDArray[np.uint8]
Bools = NDArray[np.bool_]


def iou(a: Bools, b: Bools) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def slide(seed: int = 1) -> tuple[Picture, Bools]:
    """Glass with a pale and a dark ellipse, both with texture, and where they are."""
    rng = np.random.default_rng(seed)
    picture = np.clip(np.array((243, 242, 244)) + rng.normal(0, 0.5, (240, 320, 3)), 0, 255)
    where = np.zeros((240, 320), np.uint8)
    for centre, axes, colour, spread in (((95, 120), (60, 85), PALE, 4.0), ((230, 110), (55, 70), (205, 130, 185), 14)):
        part = np.zeros_like(where)
        cv2.ellipse(part, centre, axes, 20, 0, 360, 1, -1)
        inside = part > 0
        picture[inside] = np.array(colour) + rng.normal(0, spread, (int(inside.sum()), 1))
        where |= part
    return np.clip(picture, 0, 255).astype(np.uint8), where > 0


def lit(picture: Picture, gain: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(picture * gain), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "gain",
    [(1, 0.95, 1), (0.95, 0.95, 1), (0.98, 0.92, 1), (1, 0.94, 0.99), (1, 1, 0.92), (0.94, 1, 1)],
)
def test_tinted_glass_is_glass_and_pale_tissue_on_it_is_not(gain: tuple[float, float, float]) -> None:
    picture, where = slide()
    assert iou(find_tissue(lit(picture, np.array(gain)), UM, SCALE).mask, where) > 0.95


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("green", [0.03, 0.05, 0.08])
def test_fields_of_another_tint_are_glass(seed: int, green: float) -> None:
    picture, where = slide(seed)
    rng = np.random.default_rng(seed)
    gain = np.ones((240, 320, 3))
    for y in range(0, 240, 70):
        for x in range(0, 320, 85):
            if rng.random() < 0.5:
                gain[y : y + 70, x : x + 85] = (1 - green / 4, 1 - green, 1)
    assert iou(find_tissue(lit(picture, gain), UM, SCALE).mask, where) > 0.93


def test_a_lamp_that_drifts_and_darkens_towards_the_corners() -> None:
    picture, where = slide()
    y, x = np.linspace(-1, 1, 240)[:, None, None], np.linspace(-1, 1, 320)[None, :, None]
    vignette = 1 - 0.05 * (x**2 + y**2)
    drift = np.ones((240, 320, 3))
    drift[..., 1] -= 0.07 * np.linspace(0, 1, 320)
    for gain in (vignette * np.array([0.98, 0.93, 1]), drift, drift * vignette):
        assert iou(find_tissue(lit(picture, gain), UM, SCALE).mask, where) > 0.94


def test_tinted_glass_within_black_or_white_surroundings() -> None:
    picture, where = slide()
    for around in (0, 255):
        tinted = lit(picture, np.array((0.99, 0.94, 1)))
        tinted[:12], tinted[:, :12], tinted[-12:], tinted[:, -12:] = around, around, around, around
        assert iou(find_tissue(tinted, UM, SCALE).mask, where) > 0.95


def test_noise_of_the_sensor_does_not_hide_tinted_glass() -> None:
    picture, where = slide()
    noisy = lit(picture, np.array((1, 0.94, 1))) + np.random.default_rng(3).normal(0, 1.6, picture.shape)
    assert iou(find_tissue(np.clip(noisy, 0, 255).astype(np.uint8), UM, SCALE).mask, where) > 0.9


@pytest.mark.parametrize("axes", [(30, 20), (60, 40), (80, 80)])
def test_pale_tissue_without_any_texture_is_tissue_still(axes: tuple[int, int]) -> None:
    """What is round is no field of view."""
    picture = np.full((240, 300, 3), (243, 242, 244), np.uint8)
    where = np.zeros((240, 300), np.uint8)
    cv2.ellipse(where, (150, 120), axes, 15, 0, 360, 1, -1)
    picture[where > 0] = PALE
    assert iou(find_tissue(picture, UM, SCALE).mask, where > 0) > 0.97


def test_one_colour_of_glass_is_one_colour_and_two_are_a_map() -> None:
    picture, _ = slide()
    assert white_map(picture, UM).shape == (3,)
    tinted = picture.copy()
    tinted[:, 160:] = lit(picture[:, 160:], np.array((1, 0.94, 1)))
    white = white_map(tinted, UM)
    assert white.shape == tinted.shape
    assert white[5, 20] == pytest.approx((243, 242, 244), abs=1.5)
    assert white[5, 300] == pytest.approx((243, 227.5, 244), abs=1.5)


@pytest.mark.parametrize("options", [{}, {"stain": "dab"}, {"stain": "pas"}, {"pale": True}])
def test_synthetic_slides_with_lilac_fields(options: dict[str, object]) -> None:
    made = SyntheticSlide(SlideSpec(4, (1024, 1024), 2.0, field_tint=0.06, **options))  # type: ignore[arg-type]
    rgb, um, scale = made.overview(8.0)
    truth = made.truth((rgb.shape[1], rgb.shape[0])).tissue.mask
    assert iou(find_tissue(rgb, um, scale).mask, truth) > 0.94


@pytest.mark.parametrize("bleed", [0.0, 20.0, 40.0])
def test_rims_of_red_pen_are_left_out(bleed: float) -> None:
    made = SyntheticSlide(SlideSpec(2, (1024, 1024), 2.0, pale=True))
    rgb, um, scale = made.overview(8.0)
    truth = made.truth((rgb.shape[1], rgb.shape[0])).tissue.mask
    stroke = np.zeros(truth.shape, np.float32)
    cv2.circle(stroke, (truth.shape[1] // 2, truth.shape[0] // 2), 118, 1.0, 12)
    ink = cv2.GaussianBlur(stroke, (0, 0), bleed / 8) if bleed else stroke
    picture = lit(rgb, np.power(10.0, -ink[..., None] * np.array((0.03, 0.95, 0.80))))
    mask = find_tissue(picture, um, scale).mask
    inked = (ink > 0.01) & ~truth
    assert (mask & inked).sum() < 0.02 * inked.sum()
    assert (mask & truth).sum() > 0.93 * (truth & (ink < 0.01)).sum()


@pytest.mark.slow
def test_lilac_fields_of_a_real_slide_give_no_tiles_of_bare_glass(shared_slides: Path) -> None:
    """The glass of this slide, as scanned, has lilac fields; here half of them more so."""
    full = open_slide(shared_slides / "TCGA-CR-7395-01A-01-TS1.svs", mpp=0.5)
    width, height = full.pyramid.size_l0
    rgb = full.read_region(0, 0, 0, width, height)
    full.close()
    small = np.asarray(cv2.resize(rgb, (width // 16, height // 16), interpolation=cv2.INTER_AREA), np.uint8)
    plain = find_tissue(small, UM, SCALE).mask
    gain = np.ones(small.shape)
    gain[:, 90:180] = gain[100:, 200:] = (0.985, 0.94, 1)
    gain[small.min(axis=2) == 255] = 1
    mask = find_tissue(lit(small, gain), UM, SCALE).mask
    assert iou(mask, plain) > 0.97
    # Tiles of 16 x 16 mask pixels are 128 um, a quarter of tissue keeps them.
    tiles = mask[:208, :272].reshape(13, 16, 17, 16).mean(axis=(1, 3)) >= 0.25
    stained = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)[..., 1][:208, :272].reshape(13, 16, 17, 16) > 25.5
    bare = tiles & (stained.mean(axis=(1, 3)) < 0.02)
    assert tiles.sum() > 100
    assert bare.sum() <= 0.01 * tiles.sum()


def test_a_mask_of_all_or_next_to_nothing_is_told() -> None:
    mask = np.zeros((100, 100), bool)
    assert share_notes(TissueMask(mask, SCALE, "none"), (1600, 1600)) == []
    mask[:3, :3] = True
    assert "only 0.090%" in share_notes(TissueMask(mask, SCALE), (1600, 1600))[0]
    mask[:, :50] = True
    assert share_notes(TissueMask(mask, SCALE), (1600, 1600)) == []
    mask[:, :96] = True
    assert "96.0%" in share_notes(TissueMask(mask, SCALE), (1600, 1600))[0]


def test_no_tissue_names_the_options_that_may_find_it() -> None:
    reason = find_tissue(np.full((90, 120, 3), (243, 242, 244), np.uint8), UM, SCALE).empty_reason
    assert reason is not None
    for option in ("--method od", "--stain-seed", "--min-area-um2"):
        assert option in reason
