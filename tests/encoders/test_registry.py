"""The table of encoders: every entry loads a checkpoint with the published key names and gives its exact dimension."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from click.testing import CliRunner

from wsi_pipe import encoders
from wsi_pipe.cli import group
from wsi_pipe.encoders import list_encoders, load_encoder
from wsi_pipe.encoders.architectures import build
from wsi_pipe.encoders.loading import normalised_state
from wsi_pipe.encoders.registry import find_entry, load_registry, read_registry
from wsi_pipe.encoders.weights import load_into
from wsi_pipe.errors import ConfigError, UnknownEncoderError, WeightsError

TABLE = Path(encoders.__file__).with_name("registry.toml")
REQUIRED = {
    "uni", "uni2-h", "conch", "conch_v1_5", "virchow", "virchow2", "prov-gigapath", "h-optimus-0", "h-optimus-1",
    "h0-mini", "phikon", "phikon-v2", "hibou-b", "hibou-l", "kaiko-vits16", "kaiko-vitb16", "kaiko-vitl14",
    "lunit-vits8", "ctranspath", "gpfm", "midnight-12k", "openmidnight", "resnet50",
}  # fmt: skip


def _published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED: dict[str, Any] = _published().PUBLISHED
NO_LAYERS: set[str] = _published().NO_LAYERS


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights, tables or logins of the machine that runs the tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("wsi_pipe.encoders.hub.has_token", lambda: False)
    monkeypatch.delenv("WSI_PIPE_WEIGHTS", raising=False)
    monkeypatch.delenv("WSI_PIPE_ENCODERS", raising=False)


def _tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            made[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            made[key] = torch.ones(shape)
        else:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            made[key] = torch.randn(shape, generator=generator) / math.sqrt(max(fan, 1))
    return made


def _own_copy(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, depth: int | None) -> dict[str, Any]:
    """The table's entry as a user's file, cut to ``depth`` blocks, and a folder of weights beside it."""
    raw: dict[str, Any] = tomllib.loads(TABLE.read_text())[name]
    if depth is not None:
        raw.setdefault("args", {})["depth"] = depth
    (folder / "own.toml").write_text(tomli_w.dumps({name: raw}))
    monkeypatch.setenv("WSI_PIPE_ENCODERS", str(folder / "own.toml"))
    monkeypatch.setenv("WSI_PIPE_WEIGHTS", str(folder / "weights"))
    (folder / "weights" / name).mkdir(parents=True)
    return raw


def _write(path: Path, state: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def test_the_table_has_all_required_encoders() -> None:
    assert set(load_registry()) >= REQUIRED
    assert set(PUBLISHED) == set(load_registry())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_keys_and_shapes_fit_the_whole_network(name: str) -> None:
    entry = find_entry(name)
    depth, shapes, dim = PUBLISHED[name]
    with torch.device("meta"):  # shapes alone: a ViT-g takes no memory
        network = build(entry.recipe, name=name)
        state = {key: torch.empty(shape) for key, shape in shapes(depth or 0).items()}
        found = normalised_state(network, state, name, name, entry.prefix, entry.keys)
        load_into(network.trunk, found, name, "published", ignore=entry.ignore)
        features = network(torch.empty(1, 3, entry.input_px, entry.input_px))
    assert features.shape == (1, dim)
    assert entry.dim == dim
    assert entry.parameters == round(sum(weight.numel() for weight in network.parameters()) / 1e6)
    assert network.depth == (0 if name in NO_LAYERS else depth or 0)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_checkpoint_with_published_keys_loads_and_gives_its_dimension(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, shapes, dim = PUBLISHED[name]
    raw = _own_copy(name, tmp_path, monkeypatch, None if depth is None else 1)
    state = _tensors(shapes(1))
    path = tmp_path / "weights" / name / raw["files"][0]
    _write(path, state)

    encoder = load_encoder(name, device="cpu", precision="float32")
    side = raw.get("resize_px", raw["input_px"])
    tiles = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    features = encoder.encode(tiles)

    assert features.shape == (2, dim)
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-4
    assert encoder.info.weights_sha256 == _sha256(path)
    assert encoder.info.licence == raw["licence"]
    path.unlink()


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_values_reach_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of a transformers checkpoint, and the CLS position, against the definition."""
    raw = _own_copy("hibou-b", tmp_path, monkeypatch, 1)
    state = _tensors(PUBLISHED["hibou-b"][1](1))
    _write(tmp_path / "weights" / "hibou-b" / raw["files"][0], state)
    encoder: Any = load_encoder("hibou-b", device="cpu", precision="float32")
    trunk = encoder.network.trunk
    at = "encoder.layer.0.attention.attention."
    for place, part in enumerate(("query", "key", "value")):
        rows = slice(768 * place, 768 * (place + 1))
        torch.testing.assert_close(trunk.blocks[0].attn.qkv.weight[rows], state[f"{at}{part}.weight"])
    position = state["embeddings.position_embeddings"]
    torch.testing.assert_close(trunk.pos_embed, position[:, 1:])
    torch.testing.assert_close(trunk.cls_token, state["embeddings.cls_token"] + position[:, :1])
    torch.testing.assert_close(trunk.reg_token, state["embeddings.register_tokens"])


def test_another_grid_of_positions_is_interpolated_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _own_copy("midnight-12k", tmp_path, monkeypatch, 1)
    state = _tensors(PUBLISHED["midnight-12k"][1](1))
    # A plane that rises along x: interpolated, it still rises by the same amount over the whole width.
    ramp = torch.linspace(-1, 1, 37).repeat(37).reshape(1, 1369, 1).expand(1, 1369, 1536)
    state["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, 1536), ramp], 1).contiguous()
    _write(tmp_path / "weights" / "midnight-12k" / raw["files"][0], state)
    encoder: Any = load_encoder("midnight-12k", device="cpu", precision="float32")
    grid = encoder.network.trunk.pos_embed[0, 1:, 0].reshape(16, 16)
    centres = (torch.arange(16) + 0.5) * 37 / 16 - 0.5
    expected = -1 + 2 * centres / 36
    # A cubic kernel gives a ramp back within a few thousandths; a cut grid would be off by tenths.
    torch.testing.assert_close(grid[8][2:-2], expected[2:-2], atol=5e-3, rtol=0)


def test_missing_surplus_and_misshapen_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _own_copy("kaiko-vits16", tmp_path, monkeypatch, 1)
    state = _tensors(PUBLISHED["kaiko-vits16"][1](1))
    del state["blocks.0.attn.qkv.bias"]
    state["stranger"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    path = tmp_path / "weights" / "kaiko-vits16" / raw["files"][0]
    _write(path, state)
    with pytest.raises(WeightsError) as caught:
        load_encoder("kaiko-vits16", device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    for word in (str(path), "blocks.0.attn.qkv.bias", "stranger", "norm.weight is (3,) instead of (384,)"):
        assert word in text


def test_a_wrong_dimension_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _own_copy("kaiko-vits16", tmp_path, monkeypatch, 1)
    _write(tmp_path / "weights" / "kaiko-vits16" / raw["files"][0], _tensors(PUBLISHED["kaiko-vits16"][1](1)))
    raw["dim"] = 385
    (tmp_path / "own.toml").write_text(tomli_w.dumps({"kaiko-vits16": raw}))
    with pytest.raises(WeightsError, match="gives 384 features, not the 385"):
        load_encoder("kaiko-vits16", device="cpu")


def test_names_aliases_and_near_misses() -> None:
    assert find_entry("UNI_v1").name == "uni"
    with pytest.raises(UnknownEncoderError, match=r"did you mean .*virchow2"):
        find_entry("virchow3")
    names = [name for entry in load_registry().values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_a_users_table_adds_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(
        '[mine]\ntitle = "Mine"\nloader = "local"\nfile = "mine.safetensors"\narchitecture = "vit_tiny_patch16_224"\n'
        "args = { depth = 1 }\ndim = 192\ninput_px = 224\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
        'licence = "MIT"\npooling = "cls"\n'
    )
    monkeypatch.setenv("WSI_PIPE_ENCODERS", str(table))
    listed = {item.name: item for item in list_encoders()}
    assert not listed["mine"].loads
    assert str(tmp_path / "mine.safetensors") in listed["mine"].lacks
    shapes = _published().timm_vit(192, 1, patch=16, tokens=197, fc1=768, fc2=768, scale=False)
    _write(tmp_path / "mine.safetensors", _tensors(shapes))
    assert {item.name: item for item in list_encoders()}["mine"].loads
    assert load_encoder("mine", device="cpu").encode(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": "many"}, r"dim: 'many' is not a valid int"),
        ({"dim": 0}, "dim 0 must be at least 1"),
        ({"pooling": "max"}, "pooling 'max' must be one of"),
        ({"std": [0.1, 0.1, 0.0]}, "must be above zero"),
        ({"std": [0.1, 0.1]}, "std"),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"title": None}, "title not given"),
        ({"hub_id": None}, "needs hub_id and files"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos'"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"args": 3}, "args must be a table"),
        ({"mpp_min": 0.5}, "mpp_min and mpp_max go together"),
        ({"mpp_min": 2.0, "mpp_max": 0.5}, "at most mpp_max"),
        ({"revision": "main"}, "40 hexadecimal digits"),
        ({"sha256": {"model.bin": "12"}}, "sha256 of model.bin"),
    ],
)
def test_errors_in_a_users_table_name_file_encoder_and_setting(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = tomllib.loads(TABLE.read_text())["uni"] | change
    path = tmp_path / "own.toml"
    path.write_text(tomli_w.dumps({"uni": {key: value for key, value in raw.items() if value is not None}}))
    with pytest.raises(ConfigError, match=message) as caught:
        read_registry(path)
    assert str(path) in str(caught.value)
    assert "uni" in str(caught.value)


def test_a_table_that_is_no_toml_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("= 3")
    for name in ("bad.toml", "none.toml"):
        with pytest.raises(ConfigError, match=name):
            read_registry(tmp_path / name)


def test_listing_says_what_is_lacking() -> None:
    listed = {item.name: item for item in list_encoders()}
    assert listed["texture"].loads
    assert listed["texture"].lacks == ""
    assert not listed["uni"].loads
    for word in ("licence accepted at https://huggingface.co/MahmoodLab/UNI", "login", "download"):
        assert word in listed["uni"].lacks
    assert "login" not in listed["phikon"].lacks
    assert "download" in listed["phikon"].lacks


def test_the_command_lists_them() -> None:
    said = CliRunner().invoke(group, ["encoders"])
    assert said.exit_code == 0
    lines = {line.split()[0]: line for line in said.output.splitlines() if line.strip()}
    assert "yes" in lines["texture"]
    for word in ("2560", "224 px", "CC-BY-NC-ND-4.0", "licence accepted at", "login", "download"):
        assert word in lines["virchow2"]
    told = json.loads(CliRunner().invoke(group, ["encoders", "--json"]).output)
    assert {item["name"] for item in told} == {"texture", *PUBLISHED}


def test_the_page_s_table_is_that_of_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    table = page.split("| name | M parameters |")[1].split("\n\n")[0]
    rows = {cells[0].strip(" `"): cells for line in table.splitlines()[2:] if (cells := line.strip("|").split("|"))}
    assert list(rows) == list(load_registry())
    for entry in load_registry().values():
        told = [cell.strip() for cell in rows[entry.name]]
        assert told[1:4] == [str(entry.parameters), str(entry.dim), str(entry.input_px)], entry.name
        assert told[5:8] == [entry.licence, "yes" if entry.gated else "no", "yes" if entry.verified else "unverified"]


def test_an_entry_that_could_not_be_checked_says_so() -> None:
    for entry in load_registry().values():
        assert entry.sources, entry.name
        assert entry.verified or entry.note, entry.name


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, wsi_pipe.encoders as e; e.load_encoder('texture'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
