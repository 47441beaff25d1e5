"""LR encoder files: what is written comes back, and what is damaged or used at a wrong resolution is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wsi_pipe.config import ExtractSettings
from wsi_pipe.encoders import encoder_of_job, load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork, build, timm_recipe
from wsi_pipe.encoders.base import EncoderInfo, check_grid
from wsi_pipe.encoders.lr_file import (
    METADATA_KEY,
    LrHeader,
    header_from_json,
    read_lr_header,
    tensors_sha256,
    write_lr_encoder,
)
from wsi_pipe.encoders.random_id import random_weights_id
from wsi_pipe.encoders.recipe import INTERPOLATIONS, POOLINGS, Preprocessing, Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.encoders.weights import file_sha256
from wsi_pipe.errors import ConfigError, OutputError, ResolutionError, WeightsError
from wsi_pipe.geometry import TileGrid, TileSpec

TILE = TileSpec(2.0, 256)


def student() -> tuple[PooledNetwork, Recipe]:
    recipe, _ = timm_recipe("test_vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return build(recipe, name="student"), recipe


@pytest.fixture
def written(tmp_path: Path) -> Path:
    network, recipe = student()
    path = tmp_path / "lr-fold1.safetensors"
    training = {"epochs": 3, "teacher": "uni"}
    write_lr_encoder(path, network, recipe=recipe, tile=TILE, licence="CC-BY-4.0", training=training)
    return path


def grid(spec_mpp: float, effective: float | None = None) -> TileGrid:
    mpp = spec_mpp if effective is None else effective
    nothing = np.zeros((0, 2), np.int32)
    return TileGrid(TileSpec(spec_mpp), (mpp, mpp), (0, 0), (1, 1), (1, 1), nothing, np.zeros(0, np.float32))


def test_a_file_runs_like_any_other_encoder(written: Path) -> None:
    network, recipe = student()
    loaded = load_encoder(str(written), device="cpu", precision="float32")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    info = EncoderInfo("x", "x", recipe.dim, "", "")
    direct = TorchEncoder(network, recipe, info, device=torch.device("cpu"), precision="float32")
    np.testing.assert_array_equal(loaded.encode(tiles), direct.encode(tiles))
    assert loaded.info.slug == "lr-fold1"
    assert loaded.info.mpp == 2.0
    assert loaded.info.mpp_required
    assert loaded.info.licence == "CC-BY-4.0"
    assert loaded.info.weights_sha256 == hashlib.sha256(written.read_bytes()).hexdigest()


def test_a_jobs_random_weights_leave_files_alone(written: Path, tmp_path: Path) -> None:
    """``-e 20x=timm:... -e 5x=lr.safetensors --random-weights`` once drew the distilled weights anew too."""
    job = ExtractSettings(devices=("cpu",), precision="float32", random_weights=True)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    wanted = load_encoder(str(written), device="cpu", precision="float32")
    found = encoder_of_job(str(written), job)
    assert found.info.weights_sha256 == wanted.info.weights_sha256
    np.testing.assert_array_equal(found.encode(tiles), wanted.encode(tiles))
    own = tmp_path / "own.safetensors"
    save_file(student()[0].trunk.state_dict(), own)
    assert encoder_of_job(f"timm:test_vit@{own}", job).info.weights_sha256 == file_sha256(own)
    drawn = encoder_of_job("timm:test_vit", job).info
    assert drawn.weights_sha256 == random_weights_id("timm-test_vit")
    assert (drawn.name, drawn.slug, drawn.random) == ("timm:test_vit-random", "timm-test_vit-random", True)
    with pytest.raises(ConfigError, match="choose one"):
        load_encoder(str(written), random_weights=True)


def test_a_path_with_an_at_sign(written: Path) -> None:
    folder = written.parent / "me@here"
    folder.mkdir()
    moved = written.rename(folder / "lr.safetensors")
    assert load_encoder(str(moved), device="cpu").info.slug == "lr"


def test_the_header_says_all_and_is_read_without_tensors(written: Path) -> None:
    header = read_lr_header(written)
    _, recipe = student()
    assert header.recipe == recipe
    assert header.tile == TILE
    assert header.training == {"epochs": 3, "teacher": "uni"}
    assert header.name == "lr-fold1"
    assert header.format_version == 1
    with safe_open(written, framework="numpy") as handle:
        values = json.loads(handle.metadata()[METADATA_KEY])
    assert values["tile"] == {"mpp": 2.0, "overlap_px": 0, "size_px": 256}
    assert values["recipe"]["architecture"] == "test_vit"
    assert values["recipe"]["preprocessing"]["input_px"] == recipe.preprocessing.input_px
    # The hash as docs/lr-encoder.md defines it, computed from the file another way.
    digest = hashlib.sha256()
    tensors = load_file(written)
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    assert values["tensors_sha256"] == digest.hexdigest()


def test_half_precision_students_are_stored_as_float32(tmp_path: Path) -> None:
    network, recipe = student()
    path = tmp_path / "half.safetensors"
    write_lr_encoder(path, network.trunk.half().state_dict(), recipe=recipe, tile=TILE, licence="MIT")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    network, recipe = student()
    state = dict(network.trunk.state_dict())
    path = tmp_path / "bad.safetensors"
    removed = state.pop("norm.weight")
    with pytest.raises(WeightsError, match=r"norm\.weight"):
        write_lr_encoder(path, state, recipe=recipe, tile=TILE, licence="MIT")
    state["norm.weight"] = removed
    with pytest.raises(WeightsError, match="features, not the 99"):
        write_lr_encoder(path, state, recipe=dataclasses.replace(recipe, dim=99), tile=TILE, licence="MIT")
    with pytest.raises(ConfigError, match="not JSON-able"):
        write_lr_encoder(path, state, recipe=recipe, tile=TILE, licence="MIT", training={"net": network})
    with pytest.raises(ConfigError, match="safetensors"):
        write_lr_encoder(tmp_path / "bad.pt", state, recipe=recipe, tile=TILE, licence="MIT")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_lr_encoder(tmp_path / "file" / "x.safetensors", state, recipe=recipe, tile=TILE, licence="MIT")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file"]


def test_an_existing_file_stays_when_writing_fails(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsi_pipe.encoders.lr_file.write_tensor_file", full)
    network, recipe = student()
    with pytest.raises(OutputError, match="No space left"):
        write_lr_encoder(written, network, recipe=recipe, tile=TILE, licence="MIT")
    assert written.read_bytes() == before
    assert [item.name for item in written.parent.iterdir()] == [written.name]


def _rewritten(path: Path, change: Any) -> Path:
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as handle:
        values = json.loads(handle.metadata()[METADATA_KEY])
    metadata = change(tensors, values)
    out = path.with_name("changed.safetensors")
    save_file(tensors, out, metadata={METADATA_KEY: json.dumps(values)} if metadata is None else metadata)
    return out


def _touch_tensor(tensors: Any, values: Any) -> None:
    tensors["norm.weight"][0] += 1


def _later(tensors: Any, values: Any) -> None:
    values["format_version"] = 2


def _no_tile(tensors: Any, values: Any) -> None:
    del values["tile"]


def _odd_pooling(tensors: Any, values: Any) -> None:
    values["recipe"]["pooling"] = "max"


def _other_architecture(tensors: Any, values: Any) -> None:
    values["recipe"]["args"]["depth"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_touch_tensor, "not those that its metadata was written for"),
        (_later, "format version 2"),
        (_no_tile, "metadata is damaged"),
        (_odd_pooling, "metadata is damaged"),
        (_other_architecture, "belong to nothing"),
        (lambda tensors, values: {"format": "pt"}, "is not an LR encoder"),
        (lambda tensors, values: {METADATA_KEY: "{"}, "metadata is damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(change: Any, message: str, written: Path) -> None:
    path = _rewritten(written, change)
    with pytest.raises(WeightsError, match=message) as caught:
        load_encoder(str(path), device="cpu")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_torn_or_missing_file(written: Path) -> None:
    torn = written.with_name("torn.safetensors")
    torn.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"torn\.safetensors"):
        load_encoder(str(torn), device="cpu")
    with pytest.raises(WeightsError, match="no such file"):
        load_encoder(str(written.with_name("none.safetensors")), device="cpu")


@pytest.mark.parametrize(
    ("spec_mpp", "effective", "fits"),
    [
        (2.0, None, True),
        (2.0, 2.0216, True),  # laid at the slide's own scale: 4 x 0.5054
        (1.9768, 2.0, True),  # asked for otherwise, cut at the encoder's
        (2.0, 2.2, True),  # asked for what the encoder wants
        (2.05, None, True),
        (2.06, None, False),
        (0.5, None, False),
        (4.0, None, False),
    ],
)
def test_the_resolution_is_checked_against_the_grid(
    spec_mpp: float, effective: float | None, fits: bool, written: Path
) -> None:
    info = load_encoder(str(written), device="cpu").info
    if fits:
        check_grid(info, grid(spec_mpp, effective))
    else:
        with pytest.raises(ResolutionError, match=r"made for 2 um/px \(5x\).*-r 5x"):
            check_grid(info, grid(spec_mpp, effective))


def test_the_size_of_tiles_is_checked_against_the_grid(written: Path) -> None:
    info = load_encoder(str(written), device="cpu").info
    assert info.tile_px == 256
    fitting = grid(2.0)
    larger = dataclasses.replace(fitting, spec=TileSpec(2.0, 512))
    check_grid(info, fitting)
    with pytest.raises(ResolutionError, match=r"tiles of 256 px \(512 um\).* 5x has tiles of 512 px; .*--tile-px 256"):
        check_grid(info, larger)
    check_grid(EncoderInfo("uni", "uni", 1024, "", "", mpp=0.5), larger)


def test_encoders_that_only_recommend_a_resolution_take_any() -> None:
    check_grid(EncoderInfo("uni", "uni", 1024, "", "", mpp=0.5), grid(8.0))


NUMBERS = st.integers(-(2**50), 2**50) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
UNIT = st.floats(0.01, 1.0)
PREPROCESSING = st.builds(
    Preprocessing,
    st.integers(1, 512),
    st.tuples(UNIT, UNIT, UNIT),
    st.tuples(UNIT, UNIT, UNIT),
    st.sampled_from(INTERPOLATIONS),
    st.none() | st.integers(512, 1024),
)
RECIPES = st.builds(
    Recipe,
    st.text(min_size=1),
    st.integers(1, 4096),
    PREPROCESSING,
    st.sampled_from(POOLINGS),
    st.dictionaries(st.text(), JSON, max_size=3),
)
HEADERS = st.builds(
    LrHeader,
    RECIPES,
    st.builds(TileSpec, st.floats(0.1, 16), st.integers(64, 1024), st.integers(0, 63)),
    st.text(),
    st.text(),
    st.dictionaries(st.text(), JSON, max_size=3),
    st.text(),
)


@given(HEADERS)
@settings(max_examples=60, deadline=None)
def test_headers_survive_their_text(header: LrHeader) -> None:
    assert header_from_json(header.to_json(), "file") == header


def test_the_hash_sees_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others: list[dict[str, torch.Tensor]] = [
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0).double(), "b": torch.zeros(2)},
        {"a": torch.arange(6.0) + 1, "b": torch.zeros(2)},
    ]
    assert len({tensors_sha256(state) for state in [base, *others]}) == 5
    assert tensors_sha256(dict(reversed(base.items()))) == tensors_sha256(base)
