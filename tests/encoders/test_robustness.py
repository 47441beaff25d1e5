"""How far features move when only the making of the picture changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.cli import group, run_group
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.robustness import CHANGES, measure_robustness

TILES = np.random.default_rng(0).integers(60, 240, (6, 8, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)


class Encoder:
    """Features that are known: of a tile's mean colour, or of its edges."""

    def __init__(self, function: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> None:
        self.function = function
        self.info = EncoderInfo("known", "known", 3, "0" * 64, "MIT")

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.function(tiles).astype(np.float32)

    def submit(self, tiles: NDArray[np.uint8]) -> object:
        raise NotImplementedError


def colour(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    return tiles.reshape(len(tiles), -1, 3).mean(1).astype(np.float32)


def edges(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = tiles.astype(np.float32).mean(-1)
    rows = np.abs(np.diff(grey, axis=1)).reshape(len(tiles), -1)
    columns = np.abs(np.diff(grey, axis=2)).reshape(len(tiles), -1)
    return np.concatenate([rows, columns], axis=1)


def test_colours_move_with_stain_and_edges_with_blur() -> None:
    of_colour = {item.change: item for item in measure_robustness(Encoder(colour), TILES)}
    of_edges = {item.change: item for item in measure_robustness(Encoder(edges), TILES)}
    assert set(of_colour) == set(CHANGES)
    assert of_colour["blur, sigma 2 px"].cosine > 0.99 > of_edges["blur, sigma 2 px"].cosine
    assert of_colour["haematoxylin x 1.3"].cosine < of_colour["blur, sigma 2 px"].cosine
    for item in (*of_colour.values(), *of_edges.values()):
        assert item.low <= item.cosine <= 1 + 1e-6
        assert 0 <= item.kept <= 1


def test_an_encoder_that_sees_nothing_else_keeps_everything() -> None:
    place = {tile.tobytes()[:64]: number for number, tile in enumerate(TILES)}

    def blind(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.eye(6, dtype=np.float32)[: len(tiles)]

    assert len(place) == 6
    for item in measure_robustness(Encoder(blind), TILES, changes=["JPEG, quality 30"]):
        assert item.cosine == pytest.approx(1)
        assert item.kept == 1


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_change_changes_something_and_keeps_the_shape(change: str) -> None:
    before = TILES.copy()
    made = CHANGES[change](TILES)
    assert made.shape == TILES.shape
    assert made.dtype == np.uint8
    assert (made != TILES).mean() > 0.05
    np.testing.assert_array_equal(TILES, before)


def test_more_eosin_takes_more_green() -> None:
    pink = np.full((2, 16, 16, 3), (222, 140, 190), np.uint8)
    moved = CHANGES["eosin x 1.3"](pink).astype(int)[0, 0, 0] - pink[0, 0, 0]
    assert moved[1] < -10
    assert moved[1] < moved[0]
    assert moved[1] < moved[2]


def test_the_command_takes_a_slide_s_own_tiles(
    make_slide: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_slide(tmp_path / "a.tif")
    arguments = ["encoders", "--robustness", str(path), "--tiles", "4", "-e", "texture", "--for", "10x"]
    assert run_group(group, "wsi-pipe", [*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {item["change"] for item in told["texture"]} == set(CHANGES)
    assert run_group(group, "wsi-pipe", ["encoders", "-e", "uni"]) == 2
