"""Encoders of one's own: a callable or a network by name, ONNX and TorchScript files by a table."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from numpy.typing import NDArray

import wsi_pipe as wp
from wsi_pipe.encoders import own
from wsi_pipe.encoders.availability import check_encoder, to_download
from wsi_pipe.encoders.naming import draws_weights, known_dim
from wsi_pipe.errors import ConfigError, EncoderOutputError, UnknownEncoderError, WeightsError, lacks_package

TILES = np.random.default_rng(3).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WSI_PIPE_ENCODERS", raising=False)
    held = dict(own._held)
    yield
    own._held.clear()
    own._held.update(held)


def means(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    return tiles.reshape(len(tiles), -1, 3).mean(axis=1).astype(np.float32)


class Network(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.amax(dim=(2, 3))], dim=1)


def test_a_callable_gets_a_name_that_everything_knows() -> None:
    wp.register_encoder("mean-colour", means, version="1", licence="MIT", mpp=2.0)
    encoder = wp.load_encoder("mean-colour")
    np.testing.assert_allclose(encoder.encode(TILES), means(TILES))
    assert (encoder.info.dim, encoder.info.licence, encoder.info.mpp) == (3, "MIT", 2.0)
    check_encoder("mean-colour", [], 0.02)
    assert to_download("mean-colour") is None
    assert known_dim("mean-colour") == 3
    assert not draws_weights("mean-colour")
    before = encoder.info.weights_sha256
    wp.register_encoder("mean-colour", means, version="2")
    assert wp.load_encoder("mean-colour").info.weights_sha256 != before


def test_a_network_is_normalised_and_resized() -> None:
    wp.register_encoder("mine", Network(), mean=[0, 0, 0], std=[1, 1, 1], input_px=32, device="cpu")
    found = wp.load_encoder("mine").encode(TILES)
    assert found.shape == (5, 6)
    np.testing.assert_allclose(found[:, :3], means(TILES) / 255, atol=2e-3)


@pytest.mark.parametrize("name", ["uni", "texture", "timm:vit", "a.safetensors", "mine+macenko"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is the name of an encoder of this program"):
        wp.register_encoder(name, means)


def test_what_gives_no_features_is_refused_and_leaves_no_name() -> None:
    with pytest.raises(EncoderOutputError):
        wp.register_encoder("bad", lambda tiles: tiles)
    with pytest.raises(UnknownEncoderError):
        wp.load_encoder("bad")


def test_a_registered_name_makes_features_of_a_grid(tmp_path: Path) -> None:
    pixels = np.full((512, 512, 3), (190, 90, 150), np.uint8)
    wp.register_encoder("mean-colour", means)
    from PIL import Image

    Image.fromarray(pixels).save(tmp_path / "a.png")
    with wp.open(tmp_path / "a.png", mpp=0.5) as slide:
        features = slide.grids("20x", tile_px=128, tissue=None)["20x"].encode("mean-colour")
    assert features.values.shape[1] == 3


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, file: str, **more: Any) -> None:
    entry = {
        "title": "Mine", "loader": "local", "file": file, "architecture": architecture, "dim": 6, "input_px": 32,
        "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "licence": "MIT",
    }  # fmt: skip
    (folder / "own.toml").write_text(tomli_w.dumps({"mine": entry | more}))
    monkeypatch.setenv("WSI_PIPE_ENCODERS", str(folder / "own.toml"))


def onnx_file(path: Path, batch: int | str = "batch") -> None:
    """The network above as an ONNX graph, made operator by operator."""
    onnx: Any = pytest.importorskip("onnx", reason="of the extra test")
    pytest.importorskip("onnxruntime", reason="of the extra onnx")
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 32, 32])
    out = helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, 6])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["images"], ["most"], axes=[2, 3], keepdims=0),
        helper.make_node("Concat", ["mean", "most"], ["features"], axis=1),
    ]
    graph = helper.make_graph(nodes, "mine", [images], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


@pytest.mark.parametrize("batch", ["batch", 2])
def test_an_onnx_file_gives_what_its_network_gives(
    batch: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_file(tmp_path / "mine.onnx", batch)
    table(tmp_path, monkeypatch, "onnx", "mine.onnx")
    wp.register_encoder("direct", Network(), mean=[0, 0, 0], std=[1, 1, 1], input_px=32, device="cpu")
    found: Any = wp.load_encoder("mine", device="cpu", precision="float32")
    np.testing.assert_allclose(found.encode(TILES), wp.load_encoder("direct").encode(TILES), atol=1e-6)
    # A replica for each of several devices opens a session of its own.
    trunk = found.network.trunk
    copied = copy.deepcopy(trunk)
    assert copied._session is not trunk._session
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(copied(images), trunk(images))


def test_a_damaged_onnx_file_and_a_wrong_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="of the extra onnx")
    (tmp_path / "mine.onnx").write_bytes(b"no graph")
    table(tmp_path, monkeypatch, "onnx", "mine.onnx")
    with pytest.raises(WeightsError, match=r"mine\.onnx is no ONNX file"):
        wp.load_encoder("mine", device="cpu")
    onnx_file(tmp_path / "mine.onnx")
    table(tmp_path, monkeypatch, "onnx", "mine.onnx", dim=7)
    with pytest.raises(WeightsError, match="gives 6 features, not the 7"):
        wp.load_encoder("mine", device="cpu")
    table(tmp_path, monkeypatch, "onnx", "mine.onnx", input_px=40)
    with pytest.raises(WeightsError, match="does not compute"):
        wp.load_encoder("mine", device="cpu")


def test_without_onnxruntime_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.onnx").write_bytes(b"a graph")
    table(tmp_path, monkeypatch, "onnx", "mine.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError) as caught:
        wp.load_encoder("mine", device="cpu")
    assert lacks_package(caught.value)[1] == "install it: pip install 'wsi-pipe[onnx]'"


def test_a_torchscript_archive_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        torch.jit.save(torch.jit.trace(Network().eval(), torch.zeros(2, 3, 32, 32)), str(tmp_path / "mine.pt"))
    table(tmp_path, monkeypatch, "torchscript", "mine.pt")
    with pytest.raises(ConfigError, match="trusted = true"):
        wp.load_encoder("mine", device="cpu")
    table(tmp_path, monkeypatch, "torchscript", "mine.pt", trusted=True)
    wp.register_encoder("direct", Network(), mean=[0, 0, 0], std=[1, 1, 1], input_px=32, device="cpu")
    found = wp.load_encoder("mine", device="cpu", precision="float32").encode(TILES)
    np.testing.assert_allclose(found, wp.load_encoder("direct").encode(TILES), atol=1e-6)
    (tmp_path / "mine.pt").write_bytes(b"no archive")
    with pytest.raises(WeightsError, match="is no TorchScript archive"):
        wp.load_encoder("mine", device="cpu")


def test_a_graph_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path, monkeypatch, "onnx", "mine.onnx", loader="hub", hub_id="a/b", files=["mine.onnx"])
    with pytest.raises(ConfigError, match="needs loader = 'local'"):
        wp.load_encoder("mine", device="cpu")


def test_onnxruntime_is_imported_only_for_its_files() -> None:
    code = "import sys, wsi_pipe as wp; wp.load_encoder('texture'); assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
