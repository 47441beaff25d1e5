"""Tiles in one reference's colours before encoding, and what of them is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import wsi_pipe as wp
from wsi_pipe.asked import settings_from
from wsi_pipe.config import JobSettings, fingerprint
from wsi_pipe.encoders import load_encoder, own
from wsi_pipe.encoders.availability import check_encoder, to_download
from wsi_pipe.encoders.elsewhere import same_encoder
from wsi_pipe.encoders.naming import draws_weights, known_dim, slug_of, split_stain, with_stain
from wsi_pipe.encoders.stain import REFERENCES, StainNormaliser, macenko, reinhard
from wsi_pipe.errors import ConfigError

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Haematoxylin and eosin of Ruifrok and Johnston (2001)."""


def tile(seed: int = 0, strength: float = 1.0, turn: float = 0.0, side: int = 96) -> NDArray[np.uint8]:
    """A tile of two stains with glass between; strength and turn change colours, and not what is where."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.35, (side * side, 2)) * rng.integers(0, 2, (side * side, 2))
    amounts[: side * side // 4] = 0
    stains = STAINS + turn * np.array([[-0.2, 0.1, 0.3], [0.25, -0.1, 0.2]])
    density = strength * amounts @ stains
    return np.clip(240 * np.exp(-density), 0, 255).astype(np.uint8).reshape(side, side, 3)


def both(*tiles: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.stack(tiles))


@pytest.mark.parametrize("method", [macenko, reinhard])
def test_tiles_of_other_stain_come_nearer(method: Any) -> None:
    given = both(tile(), tile(strength=0.6, turn=0.8))
    made = method(given)
    assert made.dtype == torch.uint8
    assert made.shape == given.shape
    stained = (given < 200).all(dim=(0, 3))
    before, after = (
        (images[0][stained].float() - images[1][stained].float()).abs().mean().item() for images in (given, made)
    )
    assert after < 0.5 * before


def test_macenko_s_stains_are_the_reference_s() -> None:
    made = macenko(both(tile()))[0].flatten(0, 1).double()
    density = -torch.log((made + 1) / 240)
    stains = torch.tensor(REFERENCES["macenko"]["stains"], dtype=torch.float64)
    # Where a colour is not clipped to black or white.
    strong = (made < 150).any(dim=1) & (made > 0).all(dim=1) & (made < 239).all(dim=1)
    assert strong.sum() > 500
    left = density[strong] - density[strong] @ torch.linalg.pinv(stains).T @ stains.T
    assert left.abs().mean() < 0.02


def test_reinhard_s_mean_and_spread_are_the_reference_s() -> None:
    given = both(tile())
    made = reinhard(given)[0].flatten(0, 1).double()
    lms = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    turn = torch.tensor([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]])
    turn = turn / turn.norm(dim=1, keepdim=True)
    od = -torch.log((given[0].flatten(0, 1).double() + 1) / 240)
    inside = (od >= 0.15).any(dim=1) & (made > 0).all(dim=1) & (made < 255).all(dim=1)
    colour = torch.log((made[inside] + 1) @ lms.double().T) @ turn.double().T
    wanted = REFERENCES["reinhard"]
    assert abs(colour[:, 0].mean().item() - wanted["mean"][0]) < 0.1
    assert abs(colour[:, 0].std().item() - wanted["sd"][0]) < 0.15


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_glass_and_tiles_that_tell_nothing_stay(method: str) -> None:
    white = np.full((96, 96, 3), 244, np.uint8)
    flat = np.full((96, 96, 3), (180, 120, 160), np.uint8)
    black = np.zeros((96, 96, 3), np.uint8)
    given = both(white, flat, black, tile())
    made = StainNormaliser(method)(given)
    for place in range(3):
        assert torch.equal(made[place], given[place])
    glass = (given[3] > 230).all(dim=-1)
    assert torch.equal(made[3][glass], given[3][glass])
    assert not torch.equal(made[3], given[3])


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_tile_s_result_does_not_depend_on_its_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = both(*(tile(seed, 0.5 + seed / 4) for seed in range(4)))
    whole = StainNormaliser(method)(given)
    monkeypatch.setattr(StainNormaliser, "AT_ONCE", 96 * 96)
    assert torch.equal(StainNormaliser(method)(given), whole)
    assert StainNormaliser(method)(given[:0]).shape == (0, 96, 96, 3)


def test_names_stand_for_encoders_of_their_own() -> None:
    assert split_stain("uni+macenko") == ("uni", "macenko")
    assert split_stain("uni") == ("uni", None)
    assert split_stain("a+b.safetensors") == ("a+b.safetensors", None)
    assert with_stain("uni+reinhard", "macenko") == "uni+macenko"
    assert with_stain("uni+reinhard", "none") == "uni"
    assert slug_of("UNI_v1+macenko") == "uni+macenko"
    assert same_encoder("uni_v1+macenko", "uni+macenko")
    assert not same_encoder("uni+macenko", "uni")
    assert known_dim("uni+macenko") == 1024
    assert draws_weights("uni+macenko")
    assert not draws_weights("texture+macenko")
    assert to_download("texture+reinhard") is None
    check_encoder("texture+reinhard", [], 0.02)


def test_an_encoder_behind_a_normaliser_says_so() -> None:
    tiles = np.stack([tile(), tile(strength=0.6, turn=0.8)])
    plain, normal = load_encoder("texture"), load_encoder("texture+macenko")
    assert (normal.info.name, normal.info.slug) == ("texture+macenko", "texture+macenko")
    assert normal.info.transform["stain"]["reference"] == REFERENCES["macenko"]
    assert normal.info.weights_sha256 == plain.info.weights_sha256
    np.testing.assert_array_equal(normal.encode(tiles), plain.encode(macenko(torch.from_numpy(tiles)).numpy()))
    np.testing.assert_array_equal(normal.submit(tiles).result(), normal.encode(tiles))


def test_a_network_s_tiles_are_normalised_on_its_device() -> None:
    tiles = np.stack([tile(side=64), tile(strength=0.6, side=64)])
    options: Any = {"device": "cpu", "precision": "float32", "random_weights": True}
    plain, normal = load_encoder("timm:test_vit", **options), load_encoder("timm:test_vit+reinhard", **options)
    assert normal.info.slug == "timm-test_vit+reinhard-random"
    assert normal.info.random
    assert slug_of("timm:test_vit+reinhard") + "-random" == normal.info.slug
    np.testing.assert_allclose(normal.encode(tiles), plain.encode(reinhard(torch.from_numpy(tiles)).numpy()), atol=1e-5)
    assert np.abs(normal.encode(tiles) - plain.encode(tiles)).max() > 1e-3


def test_a_registered_encoder_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_held", {})
    wp.register_encoder("mine", lambda tiles: tiles.reshape(len(tiles), -1, 3).mean(axis=1))
    tiles = np.stack([tile()])
    before = load_encoder("mine").encode(tiles)
    assert np.abs(load_encoder("mine+macenko").encode(tiles) - before).max() > 1
    np.testing.assert_array_equal(load_encoder("mine").encode(tiles), before)


def test_the_option_names_every_encoder_anew_and_leaves_lr_encoders(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "lr.safetensors").write_bytes(b"x")
    lr = str(tmp_path / "lr.safetensors")
    given = {"encoders": ("uni", f"5x={lr}"), "resolutions": (0.5, 2.0), "normalise": "macenko"}
    settings = settings_from(given, None, None, said.append)
    assert settings.extract.encoders == {"*": ("uni+macenko",), "5x": (lr,)}
    assert any("distilled from tiles as they are" in line for line in said)
    with pytest.raises(ConfigError, match="distilled from tiles as they are"):
        check_encoder(f"{lr}+macenko", [], 0.02)
    plain = settings_from(given | {"normalise": "none"}, None, None, said.append)
    assert plain.extract.encoders == {"*": ("uni",), "5x": (lr,)}


def test_without_the_option_settings_and_fingerprints_are_as_before() -> None:
    assert settings_from({}, None, None, lambda line: None) == JobSettings()
    # As it was before there was such an option.
    assert fingerprint(JobSettings().extract) == "479b4a045577fd7db631a3de3061dcf905ae23c05265ccc5a5eba18a017397db"
