"""Tokens of chosen blocks beside the features, in one pass, against a forward pass written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork, build
from wsi_pipe.encoders.base import EncoderInfo, LayerFeatures, NonFiniteFeaturesError, check_finite
from wsi_pipe.encoders.pixels import normalise
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError

CPU = torch.device("cpu")
PRE = Preprocessing(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def encoder(pooling: str = "cls", **args: Any) -> TorchEncoder:
    recipe = Recipe(
        "vit_tiny_patch16_224", 192 * (2 if "+" in pooling else 1), PRE, pooling, {"depth": 3, "img_size": 64, **args}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = build(recipe, name="layers")
        for parameter in network.parameters():  # initial weights leave CLS nearly alone
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    info = EncoderInfo("layers", "layers", recipe.dim, "0" * 64, "MIT")
    return TorchEncoder(network, recipe, info, device=CPU, precision="float32")


@pytest.fixture
def tiles() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def written_out(network: PooledNetwork, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """All blocks' tokens, and the final ones, of a ViT: patches, tokens before them, position, blocks, norm."""
    trunk = network.trunk
    tokens = trunk.patch_embed(images)
    first = trunk.cls_token.expand(len(images), -1, -1)
    if trunk.reg_token is None:
        tokens = torch.cat([first, tokens], 1) + trunk.pos_embed
    else:
        tokens = torch.cat([first, trunk.reg_token.expand(len(images), -1, -1), tokens + trunk.pos_embed], 1)
    found = []
    for block in trunk.blocks:
        tokens = block(tokens)
        found.append(tokens)
    return found, trunk.norm(tokens)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pooling", ["cls", "cls+mean", "mean"])
def test_tokens_are_those_of_the_blocks(registers: int, pooling: str, tiles: NDArray[np.uint8]) -> None:
    args = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    under_test = encoder(pooling, **args)
    found = under_test.encode_layers(tiles, [0, 2, -2])
    with torch.no_grad():
        blocks, final = written_out(under_test.network, normalise(torch.from_numpy(tiles), PRE))
    before = 1 + registers
    assert list(found.cls) == [0, 2, -2]
    for asked, block in ((0, 0), (2, 2), (-2, 1)):
        np.testing.assert_allclose(found.cls[asked], blocks[block][:, 0], atol=1e-4)
        grid = blocks[block][:, before:].reshape(3, 4, 4, 192)
        np.testing.assert_allclose(found.patches[asked], grid, atol=1e-4)
    cls, mean = final[:, 0], final[:, before:].mean(1)
    pooled = {"cls": cls, "mean": mean, "cls+mean": torch.cat([cls, mean], -1)}[pooling]
    np.testing.assert_allclose(found.features, pooled, atol=1e-4)
    np.testing.assert_allclose(under_test.encode(tiles), pooled, atol=1e-4)


def test_patches_lie_in_image_order(tiles: NDArray[np.uint8]) -> None:
    """A change in one corner of the image moves that corner of the first block's map most."""
    under_test = encoder()
    changed = tiles.copy()
    changed[:, 48:, :16] = 255 - changed[:, 48:, :16]  # bottom left
    before, after = (under_test.encode_layers(t, [0]).patches[0] for t in (tiles, changed))
    moved = np.abs(after - before).sum((0, 3))
    assert np.unravel_index(moved.argmax(), moved.shape) == (3, 0)


def test_cls_alone_where_patches_are_not_wanted(tiles: NDArray[np.uint8]) -> None:
    under_test = encoder()
    lean = under_test.submit_layers(tiles, [0, -1], patches=False).result()
    full = under_test.encode_layers(tiles, [0, -1])
    assert lean.patches == {}
    for block in (0, -1):
        np.testing.assert_array_equal(lean.cls[block], full.cls[block])


def test_one_pass_gives_it_all(tiles: NDArray[np.uint8]) -> None:
    under_test = encoder()
    calls: list[int] = []
    for number, block in enumerate(under_test.network.trunk.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    under_test.encode_layers(tiles, [0, 1, -1])
    assert calls == [0, 1, 2]


def test_blocks_that_are_not_there(tiles: NDArray[np.uint8]) -> None:
    under_test = encoder()
    assert under_test.depth == 3
    for bad in (3, -4):
        with pytest.raises(ConfigError, match=rf"no block {bad}; it has 3: choose from 0 to 2, or -1 to -3"):
            under_test.encode_layers(tiles, [0, bad])
    flat: Any = load_encoder("timm:test_resnet", device="cpu", random_weights=True)
    assert flat.depth == 0
    with pytest.raises(ConfigError, match="has no blocks"):
        flat.encode_layers(tiles, [0])


def test_networks_with_blocks_but_no_cls_have_no_layers() -> None:
    for name in ("test_efficientnet", "test_resnet"):
        encoder_of: Any = load_encoder(f"timm:{name}", device="cpu", random_weights=True)
        assert encoder_of.depth == 0


def test_other_input_sides(tiles: NDArray[np.uint8]) -> None:
    convolutional: Any = load_encoder("timm:test_resnet", device="cpu", random_weights=True, input_px=96)
    assert convolutional.encode(tiles).shape == (3, convolutional.info.dim)
    with pytest.raises(ConfigError, match="cannot work on images of 100 px"):
        load_encoder("timm:test_vit", device="cpu", random_weights=True, input_px=100)


def test_positions_are_interpolated_to_another_input_side(tiles: NDArray[np.uint8]) -> None:
    """The same weights at 96 px: as if their 4 x 4 positions had been resampled to 6 x 6 and stored."""
    small: Any = load_encoder("timm:test_vit", device="cpu", precision="float32", random_weights=True)
    large: Any = load_encoder("timm:test_vit", device="cpu", precision="float32", random_weights=True, input_px=240)
    assert large.info.input_px == 240
    patch = small.network.trunk.patch_embed.patch_size[0]
    old, new = small.recipe.preprocessing.input_px // patch, 240 // patch
    found = large.encode_layers(tiles, [-1])
    assert found.patches[-1].shape[1:3] == (new, new)
    trunk = small.network.trunk
    prefix = trunk.pos_embed.shape[1] - old * old
    grid = trunk.pos_embed[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    images = normalise(torch.from_numpy(tiles), large.recipe.preprocessing)
    with torch.no_grad():
        tokens = trunk.patch_embed(images).flatten(1, -2)
        first = trunk.cls_token.expand(3, -1, -1)
        position = torch.cat([trunk.pos_embed[:, :prefix], grid], 1)
        tokens = torch.cat([first, tokens], 1) + position if prefix else torch.cat([first, tokens + position], 1)
        for block in trunk.blocks:
            tokens = block(tokens)
    np.testing.assert_allclose(found.cls[-1], tokens[:, 0], atol=1e-3)


def test_layers_of_a_batch_that_is_cut_to_fit(tiles: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = encoder()
    whole = under_test.encode_layers(tiles, [1])
    inner = under_test.network.forward_layers

    def crowded(images: Tensor, blocks: Any) -> Any:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(images, blocks)

    monkeypatch.setattr(under_test.network, "forward_layers", crowded)
    cut = under_test.encode_layers(tiles, [1])
    np.testing.assert_allclose(cut.cls[1], whole.cls[1], atol=1e-5)
    np.testing.assert_allclose(cut.patches[1], whole.patches[1], atol=1e-5)
    np.testing.assert_allclose(cut.features, whole.features, atol=1e-5)


def test_a_layer_that_is_not_finite_is_an_error_though_the_features_are() -> None:
    features = np.ones((3, 4), np.float32)
    cls = {0: np.ones((3, 2), np.float32), -1: np.ones((3, 2), np.float32)}
    assert check_finite(features, "x", LayerFeatures(features, cls, {})) is features
    cls[-1][1, 0] = np.nan
    with pytest.raises(NonFiniteFeaturesError, match="1 of 3 tiles") as caught:
        check_finite(features, "x", LayerFeatures(features, cls, {}))
    assert caught.value.rows == (1,)
