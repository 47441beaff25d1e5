"""Pictures say with pixels what they are given: outlines on edges, tiles in place, values in colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsi_pipe.errors import OutputError
from wsi_pipe.geometry import TileGrid, TileSpec, TissueMask
from wsi_pipe.pictures import (
    GRID_COLOURS,
    TISSUE_COLOUR,
    ColourBar,
    thumbnail_with_contours,
    thumbnail_with_grids,
    viridis,
    with_panel,
    write_image,
)

Picture = NDArray[np.uint8]
PINK = (225, 150, 190)


def slide(width: int = 1000, height: int = 800) -> Picture:
    return np.full((height, width, 3), PINK, np.uint8)


def grid(cells: list[tuple[int, int]], size_l0: float, mpp: float = 0.5) -> TileGrid:
    table = np.array(cells, np.int32).reshape(-1, 2)
    return TileGrid(
        TileSpec(mpp, 256), (mpp, mpp), (0.0, 0.0), (size_l0, size_l0), (size_l0, size_l0), table,
        np.ones(len(cells), np.float32),
    )  # fmt: skip


def near(picture: Picture, colour: tuple[int, int, int], tolerance: int = 40) -> NDArray[np.bool_]:
    return np.asarray((np.abs(picture.astype(int) - colour) <= tolerance).all(axis=2), np.bool_)


def test_contours_run_along_the_edges_of_the_mask() -> None:
    mask = np.zeros((80, 100), bool)
    mask[20:60, 30:70] = True
    picture = thumbnail_with_contours(slide(), TissueMask(mask, (160.0, 160.0)), um_per_px=(8.0, 8.0))
    assert picture.shape[1] == 1000
    assert picture.shape[0] > 800
    rows, columns = np.nonzero(near(picture[:800], TISSUE_COLOUR))
    # A pixel of the mask is ten of the picture.
    assert abs(rows.min() - 200) <= 2
    assert abs(rows.max() - 599) <= 2
    assert abs(columns.min() - 300) <= 2
    assert abs(columns.max() - 699) <= 2
    inside = picture[220:580, 320:680]
    assert (inside == PINK).all()


def test_an_empty_mask_shows_the_slide_and_the_reason() -> None:
    empty = TissueMask(np.zeros((80, 100), bool), (10.0, 10.0), "no tissue: only pen")
    other = TissueMask(np.zeros((80, 100), bool), (10.0, 10.0), "dark background")
    first, second = thumbnail_with_contours(slide(), empty), thumbnail_with_contours(slide(), other)
    assert (first[:800] == PINK).all()
    assert (first[800:] < 128).any()
    assert not np.array_equal(first[800:], second[800:])


@pytest.mark.parametrize(
    ("size", "longest"),
    [((4000, 3000), 1600), ((1200, 900), 1200), ((100, 50), 900), ((30, 3000), 1600), ((1, 1), 900)],
)
def test_pictures_are_neither_huge_nor_tiny(size: tuple[int, int], longest: int) -> None:
    mask = TissueMask(np.ones((10, 10), bool), (1.0, 1.0))
    picture = thumbnail_with_contours(slide(*size), mask, um_per_px=(8.0, 8.0), title="a title " * 30)
    panel = picture.shape[0] - max(1, round(size[1] * longest / max(size)))
    assert picture.shape[1] == max(1, round(size[0] * longest / max(size)))
    assert 0 < panel < 200


def test_the_input_is_not_drawn_on() -> None:
    rgb = slide()
    rgb.setflags(write=False)
    mask = TissueMask(np.eye(50, dtype=bool), (16.0, 16.0))
    fine = grid([(1, 1), (2, 1)], 100.0)
    thumbnail_with_contours(rgb, mask)
    thumbnail_with_grids(rgb, (1.0, 1.0), [fine], mask=mask)
    with_panel(rgb, title="s")
    assert (rgb == PINK).all()


def test_tiles_are_drawn_where_they_are() -> None:
    coarse, fine = grid([(1, 0)], 800.0, 2.0), grid([(4, 0), (5, 1)], 200.0)
    picture = thumbnail_with_grids(slide(), (2.0, 2.0), [coarse, fine], um_per_px=(1.0, 1.0))
    rows, columns = np.nonzero(near(picture[:800], GRID_COLOURS[0]))
    # Level-0 pixels are halved: the coarse tile covers x from 400 to 800, y from 0 to 400.
    assert abs(columns.min() - 400) <= 2
    assert abs(columns.max() - 800) <= 2
    assert abs(rows.max() - 400) <= 2
    rows, columns = np.nonzero(near(picture[:800], GRID_COLOURS[1]))
    assert columns.min() >= 400
    assert abs(columns.max() - 600) <= 2
    assert abs(rows.max() - 200) <= 2


def test_tiles_too_small_for_lines_are_a_tint() -> None:
    tiny = grid([(c, r) for r in range(10) for c in range(10)], 20.0)
    picture = thumbnail_with_grids(slide(), (10.0, 10.0), [tiny])
    tinted = (picture[:800] != PINK).any(axis=2)
    assert tinted[2:18, 2:18].all()
    assert not tinted[24:].any()
    assert not tinted[:, 24:].any()


def test_a_legend_names_each_grid_and_an_empty_grid_draws_nothing() -> None:
    fine = grid([], 200.0)
    picture = thumbnail_with_grids(slide(), (2.0, 2.0), [grid([], 800.0, 2.0), fine])
    assert (picture[:800] == PINK).all()
    panel = picture[800:]
    assert near(panel, GRID_COLOURS[0]).any()
    assert near(panel, GRID_COLOURS[1]).any()


def test_the_scale_bar_has_the_length_it_says() -> None:
    mask = TissueMask(np.ones((10, 10), bool), (1.0, 1.0))
    picture = thumbnail_with_contours(slide(), mask, um_per_px=(7.0, 7.0))
    without = thumbnail_with_contours(slide(), mask)
    panel = near(picture[800:], (40, 40, 40), 5)
    # At 7 um/px a fifth of the width is 1400 um, so the bar stands for 1 mm: the longest dark run in the panel.
    runs = [len(run) for row in panel for run in "".join("x" if v else " " for v in row).split()]
    assert max(runs) - 1 == round(1000 / 7)
    assert max(len(r) for row in near(without[800:], (40, 40, 40), 5) for r in ["x"] if row.any()) == 1


def test_a_panel_has_a_bar_of_its_colours_and_lines() -> None:
    colours = np.stack([np.arange(256), np.zeros(256), 255 - np.arange(256)], axis=1).astype(np.uint8)
    bare = with_panel(slide(), title="one")
    full = with_panel(slide(), title="one", lines=("two", "three"), bar=ColourBar("share", (0.0, 1.0), colours))
    assert (full[:800] == PINK).all()
    assert full.shape[0] > bare.shape[0]
    reds = full[800:].reshape(-1, 3).astype(int)
    ramp = np.unique(reds[(reds[:, 1] == 0) & (reds[:, 0] + reds[:, 2] == 255)], axis=0)
    assert len(ramp) > 100
    assert ramp[0].tolist() == [0, 0, 255]
    assert ramp[-1].tolist() == [255, 0, 0]


def test_viridis_grows_lighter_all_the_way() -> None:
    light = viridis().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > -1).all()
    assert light[-1] - light[0] > 150


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    write_image(tmp_path / "new" / "ä 🙂.png", rgb)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "ä 🙂.png")), rgb)
    write_image(tmp_path / "b.JPG", slide(64, 48))
    loaded = np.asarray(Image.open(tmp_path / "b.JPG"))
    assert np.abs(loaded.astype(int) - PINK).max() <= 3
    with pytest.raises(OutputError, match="PNG or JPEG"):
        write_image(tmp_path / "c.gif", rgb)
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OutputError):
        write_image(blocked / "d.png", rgb)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.JPG", "file", "new"]
