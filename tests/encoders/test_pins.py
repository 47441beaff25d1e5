"""Weights are held to what they were: recorded at the first load, checked from then on, moved only when asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from wsi_pipe.cli import group, run_group
from wsi_pipe.encoders import hub, list_encoders, load_encoder
from wsi_pipe.encoders.architectures import build
from wsi_pipe.encoders.listing import ranked
from wsi_pipe.encoders.pins import read_pins, write_pin
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.encoders.verifying import reference_picture, verify_encoder
from wsi_pipe.errors import ConfigError, WeightsError
from wsi_pipe.files import file_sha256

OLD, NEW = "a" * 40, "b" * 40
ENTRY: dict[str, Any] = {
    "title": "Small", "hub_id": "us/small", "files": ["model.safetensors"], "architecture": "vit_tiny_patch16_224",
    "args": {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}, "dim": 24, "pooling": "cls", "input_px": 32,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "licence": "MIT",
}  # fmt: skip


class Hub:
    """A repository in the cache, whose newest commit may move."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "hub" / "models--us--small"
        (self.folder / "refs").mkdir(parents=True)

    def publish(self, commit: str, seed: int) -> Path:
        torch.manual_seed(seed)
        network = build(find_entry("small").recipe, name="small")
        path = self.folder / "snapshots" / commit / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_file({key: torch.randn_like(value) for key, value in network.trunk.state_dict().items()}, path)
        (self.folder / "refs" / "main").write_text(commit)
        return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("WSI_PIPE_WEIGHTS", raising=False)
    monkeypatch.delenv("WSI_PIPE_PINS", raising=False)
    table(tmp_path, monkeypatch)
    return Hub(tmp_path)


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    (folder / "small.toml").write_text(tomli_w.dumps({"small": ENTRY | more}))
    monkeypatch.setenv("WSI_PIPE_ENCODERS", str(folder / "small.toml"))


def test_the_first_load_pins_and_a_moved_revision_changes_nothing(small: Hub) -> None:
    first = small.publish(OLD, 1)
    encoder = load_encoder("small", device="cpu")
    pin = read_pins()["us/small/model.safetensors"]
    assert (pin.revision, pin.sha256) == (OLD, file_sha256(first))
    moved = small.publish(NEW, 2)
    # The newest is another file, and the pinned one is still taken.
    again = load_encoder("small", device="cpu")
    assert again.info.weights_sha256 == encoder.info.weights_sha256 != file_sha256(moved)
    assert {item.name: item.revision for item in list_encoders()}["small"] == OLD


def test_where_the_pinned_revision_is_gone_it_is_said(small: Hub) -> None:
    first = small.publish(OLD, 1)
    load_encoder("small", device="cpu")
    first.unlink()
    moved = small.publish(NEW, 2)
    with pytest.raises(WeightsError, match=f"have moved: pinned is revision {OLD[:12]}.*here is revision {NEW[:12]}"):
        load_encoder("small", device="cpu")
    said = CliRunner().invoke(group, ["encoders", "--pin", "small"])
    assert said.exit_code == 0, said.output
    assert f"revision {NEW}" in said.output
    assert f"moved from revision {OLD}" in said.output
    assert load_encoder("small", device="cpu").info.weights_sha256 == file_sha256(moved)


def test_a_hash_that_the_table_states_is_held_to(small: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small.publish(OLD, 1)
    table(tmp_path, monkeypatch, revision=OLD, sha256={"model.safetensors": file_sha256(path)})
    load_encoder("small", device="cpu")
    table(tmp_path, monkeypatch, sha256={"model.safetensors": "0" * 64})
    load_encoder("small", device="cpu")  # what is pinned comes first
    (tmp_path / "hub" / "wsi-pipe-pins.json").unlink()
    with pytest.raises(WeightsError, match="not those that its entry was written for"):
        load_encoder("small", device="cpu")


def test_the_hub_is_asked_for_the_stated_revision(small: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    asked: list[str | None] = []

    def download(repo: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        asked.append(revision)
        if revision == OLD:
            response: Any = SimpleNamespace(status_code=404, headers={}, text="", request=None)
            raise errors.RevisionNotFoundError("gone", response=response)
        return str(small.publish(NEW, 3))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    table(tmp_path, monkeypatch, revision=OLD)
    with pytest.raises(WeightsError, match=f"no revision {OLD} any more.*--pin small"):
        load_encoder("small", device="cpu")
    assert CliRunner().invoke(group, ["encoders", "--pin", "small"]).exit_code == 0
    assert asked == [OLD, None]
    assert load_encoder("small", device="cpu").info.weights_sha256


def test_weights_put_there_by_hand_are_held_to_nothing(
    small: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.publish(OLD, 1)
    monkeypatch.setenv("WSI_PIPE_WEIGHTS", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    path.rename(tmp_path / "own" / "small.safetensors")
    load_encoder("small", device="cpu")
    assert read_pins() == {}


def test_damaged_pins_name_their_file(small: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub" / "wsi-pipe-pins.json").write_text("{")
    with pytest.raises(ConfigError, match=r"wsi-pipe-pins\.json"):
        load_encoder("small", device="cpu")


def test_pins_may_lie_elsewhere(small: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSI_PIPE_PINS", str(tmp_path / "mine" / "pins.json"))
    path = small.publish(OLD, 1)
    write_pin("us/small", path)
    assert json.loads((tmp_path / "mine" / "pins.json").read_text())["pins"]["us/small/model.safetensors"]


def test_verify_compares_with_recorded_features(small: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.publish(OLD, 1)
    record = str(tmp_path / "small.json")
    assert run_group(group, "wsi-pipe", ["encoders", "--verify", "small", "--record", record]) == 0
    assert "every key and shape" in capsys.readouterr().out
    assert run_group(group, "wsi-pipe", ["encoders", "--verify", "small", "--reference", record]) == 0
    assert "features agree" in capsys.readouterr().out
    held = json.loads(Path(record).read_text())
    held["features"] = held["features"][::-1]
    Path(record).write_text(json.dumps(held))
    assert run_group(group, "wsi-pipe", ["encoders", "--verify", "small", "--reference", record]) == 1
    assert "features DIFFER" in capsys.readouterr().out
    held["features"] = [1.0]
    Path(record).write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="holds 1 features"):
        verify_encoder("small", reference=Path(record))


def test_verify_without_weights_says_how_to_get_them(small: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_group(group, "wsi-pipe", ["encoders", "--verify", "uni"]) == 2
    assert "--pin uni" in capsys.readouterr().err


def test_the_picture_is_the_same_everywhere() -> None:
    import hashlib

    picture = reference_picture()
    assert picture.shape == (256, 256, 3)
    assert picture.dtype == np.uint8
    assert hashlib.sha256(picture.tobytes()).hexdigest().startswith("97d7cd46a3d0169a")


def test_encoders_are_ranked_by_what_they_were_trained_at(small: Hub) -> None:
    names = [item.name for item in ranked(list_encoders(), 2.0)]
    fits = {item.name: item.fit for item in ranked(list_encoders(), 2.0)}
    assert names.index("virchow2") < names.index("retccl") < names.index("uni") < names.index("keep")
    assert fits["virchow2"] == "trained at it"
    assert fits["retccl"] == "2 times coarser than trained"
    assert fits["keep"] == "no resolution is stated"
    assert fits["texture"] == "any"
    # Of those that are as far away, the smaller network comes first.
    assert names.index("kaiko-vits16") < names.index("kaiko-vitb16") < names.index("h-optimus-0")


def test_for_and_commercial_on_the_command_line(small: Hub) -> None:
    said = CliRunner().invoke(group, ["encoders", "--for", "2um", "--commercial"])
    assert said.exit_code == 0, said.output
    named = [line.split()[0] for line in said.output.splitlines() if line.strip()]
    assert "midnight-12k" in named
    assert "virchow2" not in named
    assert "gpfm" not in named  # whose two statements disagree
    assert "have a licence that forbids commercial use" in said.output
    assert named.index("midnight-12k") < named.index("h-optimus-0")
    assert run_group(group, "wsi-pipe", ["encoders", "--for", "coarse"]) == 2
    assert run_group(group, "wsi-pipe", ["encoders", "--record", "x.json"]) == 2
