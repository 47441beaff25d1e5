"""Pictures are drawn from the figures that the tables hold; heatmaps put colour where the tiles are."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.metrics as sk
from numpy.typing import NDArray

from lrmil.errors import FiguresError
from lrmil.metrics import evaluate, roc_curve, softmax
from lrmil.metrics.curves import upper_edge
from lrmil.pictures import draw_attention, draw_calibration, draw_confusion, draw_curves, draw_roc
from lrmil.pictures.heatmap import Caption, attention_layer, attention_overlay, attention_picture, shares


@pytest.mark.parametrize("ties", [False, True])
def test_roc_corners_equal_scikit_learns(ties: bool) -> None:
    rng = np.random.default_rng(0)
    y = np.array([0, 1] * 30)
    s = rng.normal(size=60) + y
    s = np.round(s) if ties else s
    ours = roc_curve(y, s, replicates=10)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    assert ours.fpr == pytest.approx(fpr)
    assert ours.tpr == pytest.approx(tpr)


def test_band_counts_the_top_of_a_vertical_step() -> None:
    fpr, tpr = np.array([0, 0, 0.5, 0.5, 1]), np.array([0, 0.4, 0.4, 0.8, 1])
    assert upper_edge(fpr, tpr, np.array([0, 0.25, 0.5, 0.75, 1])) == pytest.approx([0.4, 0.4, 0.8, 0.9, 1.0])


def test_roc_band_holds_the_curve_and_narrows_with_cases() -> None:
    rng = np.random.default_rng(1)

    def band(n: int) -> float:
        y = np.arange(n) % 2
        roc = roc_curve(y, rng.normal(size=n) + 1.5 * y, replicates=400)
        middle = np.interp(roc.grid, roc.fpr, roc.tpr)
        inside = (roc.low <= middle + 0.03) & (middle - 0.03 <= roc.high)
        assert inside.mean() > 0.95
        return float((roc.high - roc.low).mean())

    assert band(800) < 0.6 * band(80)


def test_roc_band_draws_cases() -> None:
    rng = np.random.default_rng(2)
    y, s = np.array([0, 1] * 20), rng.normal(size=40)
    copied = roc_curve(np.repeat(y, 6), np.repeat(s, 6), [str(i // 6) for i in range(240)], replicates=600)
    plain = roc_curve(y, s, replicates=600)
    assert (copied.high - copied.low).mean() == pytest.approx((plain.high - plain.low).mean(), rel=0.05)


def test_roc_of_one_class_is_no_curve(tmp_path: Path) -> None:
    with pytest.raises(FiguresError):
        roc_curve([1, 1], [0.1, 0.2])
    assert draw_roc(tmp_path / "roc.png", [1, 1], [[0.4, 0.6], [0.1, 0.9]], ["a", "b"]) is False
    assert not (tmp_path / "roc.png").exists()


def test_pictures_state_the_tables_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    p = softmax(rng.normal(size=(60, 2)) + 1.5 * np.eye(2)[y])
    cases = [str(i // 2) for i in range(60)]
    assert draw_roc(tmp_path / "roc.svg", y, p, ["benign", "tumour"], cases)
    text = (tmp_path / "roc.svg").read_text()
    auc = evaluate(y, p, cases, replicates=1000)["auc"]
    # Matplotlib notes each text beside the outlines that it draws it with.
    assert f"tumour: AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})" in text
    draw_calibration(tmp_path / "calibration.svg", y, p, p)
    ece = evaluate(y, p, replicates=10)["ece"].value
    assert f"ECE {ece:.3f}" in (tmp_path / "calibration.svg").read_text()
    draw_confusion(tmp_path / "confusion.svg", y, p.argmax(axis=1), ["benign", "tumour"])
    for value in np.bincount(2 * y + p.argmax(axis=1), minlength=4):
        assert f"<!-- {value}" in (tmp_path / "confusion.svg").read_text()
    history: list[dict[str, float | None]] = [
        {"epoch": float(i), "train_loss": 1 / i, "val_loss": None if i == 2 else 2 / i, "val_auc": 0.5}
        for i in (1, 2, 3)
    ]
    draw_curves(tmp_path / "curves.png", history, 3, "auc")
    image = cv2.imread(str(tmp_path / "curves.png"))
    assert image is not None
    assert image.std() > 5


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_confusion(tmp_path / name, [0, 1, 1], [0, 1, 0], ["x", "y"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_attention_layer_puts_shares_of_the_highest_on_tiles() -> None:
    coords = np.array([[0.0, 0.0], [100.0, 0.0], [100.0, 100.0]])
    layer = attention_layer(coords, (100.0, 100.0), np.array([0.1, 0.6, 0.3], np.float32), (6, 4), (50.0, 50.0))
    assert layer.shape == (4, 6)
    assert layer[:2, :2] == pytest.approx(np.full((2, 2), 1 / 6))
    assert layer[:2, 2:4] == pytest.approx(np.ones((2, 2)))
    assert layer[2:, 2:4] == pytest.approx(np.full((2, 2), 1 / 2))
    assert np.isnan(layer[2:, :2]).all()
    assert np.isnan(layer[:, 4:]).all()


def test_tiles_that_hang_over_the_edge_do_not_wrap_round() -> None:
    layer = attention_layer(np.array([[-50.0, -50.0]]), (100.0, 100.0), np.ones(1, np.float32), (4, 4), (50.0, 50.0))
    assert np.isfinite(layer).sum() == 1
    assert layer[0, 0] == 1


STAIN = (200, 120, 160)


def stained(width: int = 100, height: int = 50) -> NDArray[np.uint8]:
    """A picture of tissue with glass at its right quarter."""
    picture = np.full((height, width, 3), STAIN, np.uint8)
    picture[:, width * 3 // 4 :] = 244
    return picture


def test_colour_lies_over_stained_tissue_and_glass_stays_clear() -> None:
    coords = np.array([[0.0, 0.0], [2500.0, 0.0], [5000.0, 0.0]])
    attention = np.array([0.1, 0.3, 0.6], np.float32)
    picture, scales = attention_overlay(
        coords, (2500.0, 2500.0), attention, overview=stained(800, 400), extent=(10000.0, 5000.0)
    )
    assert (picture.shape, scales) == ((400, 800, 3), (12.5, 12.5))
    rgb = picture.astype(int)
    assert (rgb[220:, :600] == STAIN).all(), "no tile: the slide as it is, in colour"
    assert (rgb[:, 610:] == 244).all(), "glass"
    low, middle, high = rgb[100, 100], rgb[100, 300], rgb[100, 500]
    assert low[1] < middle[1] < high[1], "viridis runs from violet to yellow: green grows"
    assert high[2] < low[2], "and blue falls"
    assert np.abs(low - STAIN).max() < np.abs(high - STAIN).max(), "little attention shows the stain"
    # A tile that hangs over glass is coloured on its tissue alone.
    over, _ = attention_overlay(
        coords + np.array([1250.0, 0.0]),
        (2500.0, 2500.0),
        attention,
        overview=stained(800, 400),
        extent=(10000.0, 5000.0),
    )
    assert (over[100, 590] != STAIN).any()
    assert (over[100, 640] == 244).all()


def test_flat_attention_looks_flat_and_pale_tissue_does_not_vanish() -> None:
    coords = np.array([[0.0, 0.0], [2500.0, 0.0], [7500.0, 0.0]])
    flat = np.full(3, 1 / 3, np.float32)
    picture, _ = attention_overlay(coords, (2500.0, 2500.0), flat, overview=stained(800, 400), extent=(10000.0, 5000.0))
    assert (picture[100, 100] == picture[100, 300]).all()
    # The last tile has nothing that is told from glass: it is coloured whole.
    assert (picture[100, 700] != 244).any()
    # What differs by a hundredth differs by a hundredth of the scale, and not by its whole length.
    assert np.ptp(shares(np.array([0.333, 0.3333, 0.3337], np.float32))) < 0.01
    assert shares(np.zeros(2, np.float32)).tolist() == [0, 0]


def test_smoothing_is_asked_for_and_stays_within_tiles() -> None:
    coords, attention = np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([0.2, 0.8], np.float32)
    plain = attention_layer(coords, (100.0, 100.0), attention, (300, 100), (1.0, 1.0))
    smooth = attention_layer(coords, (100.0, 100.0), attention, (300, 100), (1.0, 1.0), smooth=True)
    assert np.unique(plain[np.isfinite(plain)]).tolist() == [0.25, 1.0]
    assert np.array_equal(np.isfinite(plain), np.isfinite(smooth))
    assert 0.25 < smooth[50, 100] < 1.0
    assert (np.diff(smooth[50, :200]) >= -1e-6).all()


def test_a_heatmap_says_whose_it_is_and_how_long_it_is(tmp_path: Path) -> None:
    coords, attention = np.array([[0.0, 0.0], [2500.0, 0.0]]), np.array([0.1, 0.9], np.float32)
    draw = partial(
        attention_picture, coords, (2500.0, 2500.0), attention, overview=stained(800, 400), extent=(10000.0, 5000.0)
    )
    plain, named = draw(), draw(caption=Caption("s1: tumour", 0.25))
    assert plain.shape[1] == named.shape[1] == 800
    assert named.shape[0] > plain.shape[0] > 400, "a line for the title"
    assert (named[:400] == plain[:400]).all()
    # The scale bar: 500 um are 160 px at 0.25 um per unit and 12.5 units per px.
    dark = np.asarray((named[400:] < 60).all(axis=2))[:, 600:]
    assert max(len(run) for row in dark for run in "".join("x" if v else " " for v in row).split()) == pytest.approx(
        160, abs=2
    )
    draw_attention(tmp_path / "bare.png", coords, (2500.0, 2500.0), attention)
    bare = cv2.imread(str(tmp_path / "bare.png"))
    assert bare is not None
    assert bare.shape[1] == 64
