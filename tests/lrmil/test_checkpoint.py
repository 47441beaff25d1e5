"""Model files: round trips, and one clear error for every way in which a file can be wrong."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrmil.checkpoint import MODEL_KIND, ModelCard, load_model, read_card, read_tensors, save_model, write_tensors
from lrmil.config import MODELS, ModelSettings
from lrmil.errors import ModelFileError
from lrmil.model import build_model
from wsi_pipe.errors import ConfigError, OutputError

SETTINGS = ModelSettings(
    name="gated-abmil", in_dim=12, classes=2, hidden=8, attention_dim=4, heads=4, pooling="quantiles"
)
CARD = ModelCard(
    SETTINGS,
    ("benign", "tumour"),
    encoder="uni2-h",
    weights_sha256="ab" * 32,
    level="5x",
    mpp=2.0,
    tile_px=256,
    temperature=1.37,
    training={"epochs": 3, "loss": {"soft": 0.5}},
    metrics={"val_auc": 0.9, "test_auc": math.nan},
    fold="fold_2",
)


def saved(path: Path, name: str = "gated-abmil") -> Path:
    torch.manual_seed(0)
    settings = replace(SETTINGS, name=name)
    save_model(path, build_model(settings), replace(CARD, model=settings))
    return path


def rewritten(path: Path, change: dict[str, str] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """The file with other metadata or tensors, and without digests, as earlier versions wrote it."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if not name.endswith("_sha256")}
    save_file(load_file(path) if tensors is None else tensors, path, {**metadata, **(change or {})})
    return path


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", name)
    torch.manual_seed(0)
    original = build_model(replace(SETTINGS, name=name)).eval()
    before = torch.random.get_rng_state()
    module, card = load_model(path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not module.training
    assert all(p.requires_grad for p in module.parameters())
    features, offsets = torch.randn(20, 12), torch.tensor([0, 9, 20])
    assert torch.equal(original(features, offsets).logits, module(features, offsets).logits)
    assert math.isnan(card.metrics["test_auc"])
    assert replace(card, metrics={}) == replace(CARD, model=replace(SETTINGS, name=name), metrics={})
    assert read_card(path).classes == ("benign", "tumour")


def test_the_file_is_plain_safetensors_with_json(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = saved(tmp_path / "model.safetensors")
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "lrmil.model"
    assert json.loads(metadata["header"])["encoder"] == "uni2-h"


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError):
        load_model(tmp_path)
    path = saved(tmp_path / "model.safetensors")
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"model\.safetensors is no readable safetensors file"):
            load_model(path)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("exploded").touch, ())


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelFileError):
        load_model(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ModelFileError):
        load_model(path)
    assert not (tmp_path / "exploded").exists()


def test_other_kinds_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ModelFileError, match="another program"):
        load_model(path)
    write_tensors(path, {"x": torch.zeros(2)}, "lrmil.training-state", {})
    with pytest.raises(ModelFileError, match=r"lrmil\.training-state"):
        load_model(path)
    with pytest.raises(ModelFileError, match="version 99"):
        load_model(rewritten(saved(path), {"format_version": "99"}))


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ("not json", "no readable"),
        ("[]", "no JSON object"),
        ("{}", "lacks 'model'"),
        ('{"model": {"name": "nothing"}, "classes": ["a", "b"]}', "no model is called"),
        ('{"model": {"in_dim": "12"}, "classes": ["a", "b"]}', "in_dim"),
        ('{"model": {}, "classes": ["a"]}', "1 class names for a model of 2"),
        ('{"model": {}, "classes": ["a", "b"], "temperature": 0}', "temperature"),
        ('{"model": 3, "classes": ["a", "b"]}', "card is wrong"),
    ],
)
def test_wrong_cards(header: str, cause: str, tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "model.safetensors"), {"header": header})
    with pytest.raises(ModelFileError, match=cause):
        load_model(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    tensors = load_file(path)
    for change, cause in (
        ({"classifier.bias": None}, r"lacks classifier\.bias"),
        ({"projection.weight": None}, r"projection\.weight has the shape"),
        ({"more": torch.zeros(1)}, "unknown more"),
        ({"classifier.bias": torch.zeros(3)}, r"classifier\.bias has the shape \(3,\) instead of \(2,\)"),
        ({"classifier.bias": torch.tensor([0.0, torch.nan])}, "not finite"),
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(ModelFileError, match=cause):
            load_model(rewritten(path, tensors=changed))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    before = path.read_bytes()
    broken = build_model(SETTINGS)
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.nan)
    with pytest.raises(ModelFileError, match="not finite"):
        save_model(path, broken, CARD)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        save_model(tmp_path / "file" / "model.safetensors", build_model(SETTINGS), CARD)


def test_a_card_must_agree_with_its_model() -> None:
    with pytest.raises(ConfigError):
        ModelCard(SETTINGS, ("a", "b", "c"))


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    write_tensors(tmp_path / "x.safetensors", {"a": base, "b": base[::2]}, MODEL_KIND, {"n": 1})
    tensors, header = read_tensors(tmp_path / "x.safetensors", MODEL_KIND)
    assert tensors["b"].tolist() == [0, 2, 4]
    assert header == {"n": 1}
