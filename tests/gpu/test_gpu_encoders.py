"""Encoders on a real CUDA device; everything here is skipped where there is none."""

from __future__ import annotations

import re
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import DeviceError
from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, extract_features
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

VIT, CONVNET = "timm:vit_tiny_patch16_224", "timm:resnet18"
PLAIN = Preprocessing(None, (0.5,) * 3, (0.25,) * 3)


def load(name: str = VIT, device: str = "cuda:0", **options: Any) -> TorchEncoder:
    encoder = load_encoder(name, device=device, random_weights=True, **options)
    assert isinstance(encoder, TorchEncoder)
    return encoder


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The least cosine of any tile."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Relative, over all tiles at once."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def tiles() -> NDArray[np.uint8]:
    """Smooth colours with grain, 48 tiles of 256 px, no two alike."""
    rng = np.random.default_rng()
    coarse = rng.integers(40, 230, (48, 4, 4, 3)).repeat(64, 1).repeat(64, 2)
    return np.clip(coarse + rng.normal(0, 12, (48, 256, 256, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", [VIT, CONVNET])
def test_float32_is_what_the_cpu_gives(name: str, tiles: NDArray[np.uint8]) -> None:
    here, there = load(name, "cpu", precision="float32"), load(name, precision="float32")
    assert distance(there.encode(tiles), here.encode(tiles)) < 1e-3


@pytest.mark.parametrize("name", [VIT, CONVNET])
def test_batch_size_and_neighbours_do_not_matter(name: str, tiles: NDArray[np.uint8]) -> None:
    encoder = load(name, precision="float32")
    whole = encoder.encode(tiles)
    for size in (1, 5, 16):
        parts = np.concatenate([encoder.encode(tiles[k : k + size]) for k in range(0, len(tiles), size)])
        assert cosine(parts, whole) > 0.9999
    order = np.random.default_rng(0).permutation(len(tiles))
    assert cosine(encoder.encode(tiles[order]), whole[order]) > 0.9999


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["timm:vit_small_patch16_224", "timm:vit_base_patch16_224", "timm:resnet50"])
def test_half_precision_is_near_float32(name: str, precision: str, tiles: NDArray[np.uint8]) -> None:
    exact = load(name, precision="float32").encode(tiles)
    assert cosine(load(name, precision=precision).encode(tiles), exact) > 0.999


def test_auto_is_a_half_precision() -> None:
    assert load().precision in ("bfloat16", "float16")


def test_batches_under_way_do_not_touch_each_other(tiles: NDArray[np.uint8]) -> None:
    """Many more batches than there are buffers, each with its own tiles, read back late."""
    encoder = load(precision="float32")
    rng = np.random.default_rng()
    batches = [tiles[rng.integers(0, len(tiles), rng.integers(1, 40))] for _ in range(60)]
    alone = [encoder.encode(batch) for batch in batches]
    pending = [encoder.submit(batch.copy()) for batch in batches]
    for got, wanted in zip(pending, alone, strict=True):
        assert distance(got.result(), wanted) < 1e-5


def test_tiles_cross_from_where_they_were_made(tiles: NDArray[np.uint8]) -> None:
    """Whole arrays and parts of them, many under way, their memory taken anew as soon as they are let go of."""
    encoder = load(precision="float32")
    lane = encoder._cuda
    assert lane is not None
    wanted = encoder.encode(tiles)
    lane.release()
    assert encoder.new_tiles is not None
    rng = np.random.default_rng()
    pending = []
    for _ in range(40):
        chosen = rng.permutation(len(tiles))
        mine = encoder.new_tiles(tiles.shape)
        mine[:] = tiles[chosen]
        pending += [(chosen[:20], encoder.submit(mine[:20])), (chosen[20:], encoder.submit(mine[20:]))]
    assert not lane.staging, "they were copied first"
    for chosen, part in pending:
        assert distance(part.result(), wanted[chosen]) < 1e-5


def test_layers_come_beside_the_features(tiles: NDArray[np.uint8]) -> None:
    here, there = load(device="cpu", precision="float32"), load(precision="float32")
    # Cut, not resized: a resize rounds pixels, which a single patch feels more than the mean over a tile does.
    tiles = np.ascontiguousarray(tiles[:8, :224, :224])
    wanted, got = here.encode_layers(tiles, [0, -2]), there.encode_layers(tiles, [0, -2])
    assert distance(got.features, wanted.features) < 1e-3
    for block in (0, -2):
        assert distance(got.cls[block], wanted.cls[block]) < 1e-3
        assert distance(got.patches[block], wanted.patches[block]) < 1e-3


@pytest.mark.slow
def test_compiled_features_are_the_same(tiles: NDArray[np.uint8]) -> None:
    plain, compiled = load(precision="float32"), load(precision="float32", compile=True)
    for size in (32, 7):  # the second is filled up to the first
        assert distance(compiled.encode(tiles[:size]), plain.encode(tiles[:size])) < 1e-3


def test_a_batch_is_found_by_trial_and_its_memory_given_back() -> None:
    encoder = load("timm:vit_small_patch16_224")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert encoder.suggest_batch(256) >= 16
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


class Hungry(nn.Module):
    """Takes so many bytes a tile while it computes the mean colours."""

    def __init__(self, bytes_a_tile: int) -> None:
        super().__init__()
        self.bytes_a_tile = bytes_a_tile

    def forward(self, images: Tensor) -> Tensor:
        held = torch.ones(len(images), self.bytes_a_tile // 4, device=images.device)
        return images.mean((2, 3)) * held[:, :1]


def hungry(share_a_tile: float) -> TorchEncoder:
    """An encoder a tile of which takes this share of the device's memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    recipe = Recipe("hungry", 3, PLAIN)
    info = EncoderInfo("hungry", "hungry", 3, "", "")
    network = PooledNetwork(Hungry(int(total * share_a_tile)), "model")
    return TorchEncoder(network, recipe, info, device=torch.device("cuda:0"), precision="float32")


def test_out_of_memory_halves_the_batch_and_loses_no_tile(tiles: NDArray[np.uint8]) -> None:
    encoder = hungry(0.12)
    small = tiles[:, :32, :32]
    got = encoder.encode(small)
    assert encoder.batch_limit is not None
    assert 1 <= encoder.batch_limit <= 8
    wanted = ((small / 255 - 0.5) / 0.25).mean((1, 2))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert len(encoder.encode(small)) == len(small)
    torch.cuda.empty_cache()


def test_out_of_memory_with_a_single_tile_says_so(tiles: NDArray[np.uint8]) -> None:
    with pytest.raises(DeviceError, match=r"cuda:0 is out of memory with encoder hungry on a single tile"):
        hungry(1.5).encode(tiles[:4, :32, :32])
    torch.cuda.empty_cache()


def test_an_lr_encoder_file_gives_what_the_network_gave(tmp_path: Path, tiles: NDArray[np.uint8]) -> None:
    made = load("timm:vit_tiny_patch16_224", "cpu", precision="float32")
    wanted = made.encode(tiles[:16])
    path = tmp_path / "lr.safetensors"
    write_lr_encoder(path, made.network, recipe=made.recipe, tile=TileSpec(2.0, 256, 0), licence="none")
    loaded = load_encoder(str(path), device="cuda:0", precision="float32")
    assert distance(loaded.encode(tiles[:16]), wanted) < 1e-3


# Through the engine


def grid_of(path: Path, count: int) -> TileGrid:
    with closing(open_slide(path)) as slide:
        overview = read_overview(slide)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, SegmentSettings())
        grid = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(0.5,), tile_px=128))[0]
    assert len(grid) >= count
    return grid.take(slice(count))


def items(paths: list[Path]) -> list[ExtractItem]:
    found = []
    for number, path in enumerate(paths):
        grid = grid_of(path, 3 + 5 * number)  # of unequal size, none a whole batch
        found.append(ExtractItem(path.stem, partial(open_slide, path), [grid], {grid.label: ["model"]}))
    return found


def test_small_slides_share_batches_and_keep_their_rows(tmp_path: Path, make_slide: Any) -> None:
    paths = [make_slide(tmp_path / f"slide{k}.svs", seed=k) for k in range(5)]
    there, here = load(precision="float32"), load(device="cpu", precision="float32")
    sizes: list[int] = []
    submit = there.submit

    def counted(pixels: NDArray[np.uint8]) -> Any:
        sizes.append(len(pixels))
        return submit(pixels)

    there.submit = counted  # type: ignore[method-assign]
    got = {r.slide_id: r for r in extract_features(items(paths), {"model": there}, batch_size=16, dtype="float32")}
    wanted = {r.slide_id: r for r in extract_features(items(paths), {"model": here}, batch_size=16, dtype="float32")}
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert sum(sizes) == sum(len(item.grids[0]) for item in items(paths))
    for name, result in wanted.items():
        other = got[name]
        assert isinstance(result, SlideFeatures)
        assert isinstance(other, SlideFeatures)
        for label, by_encoder in result.features.items():
            for slug, values in by_encoder.items():
                assert distance(other.features[label][slug], values) < 1e-3


class NotANumberInTheDark(nn.Module):
    """Mean colours; not a number for the darkest tile of a batch."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return torch.where(means[:, :1] == means[:, :1].amin(), torch.nan, means)


def test_a_feature_that_is_not_a_number_names_its_tile(tmp_path: Path, make_slide: Any) -> None:
    path = make_slide(tmp_path / "slide.svs")
    network = PooledNetwork(NotANumberInTheDark(), "model")
    info = EncoderInfo("bad", "bad", 3, "", "")
    encoder = TorchEncoder(network, Recipe("bad", 3, PLAIN), info, device=torch.device("cuda:0"), precision="float32")
    (result,) = extract_features(items([path]), {"model": encoder})
    assert isinstance(result, SlideFailure)
    assert re.search(r"for 1 tiles of slide, the first at 20x tile x=\d+, y=\d+", str(result.error))
