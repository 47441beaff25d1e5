"""Settings: TOML round trips, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrmil.config import ATTENTION_MODELS, MODELS, MONITORS, LossSettings, ModelSettings, TrainSettings, load_settings
from lrmil.metrics import NAMES
from wsi_pipe.config import dump_toml, from_mapping, to_mapping
from wsi_pipe.errors import ConfigError

positive = st.floats(1e-6, 10)
models = st.builds(
    ModelSettings,
    name=st.sampled_from([m for m in MODELS if m != "transmil"]),
    in_dim=st.integers(1, 4096),
    classes=st.integers(2, 30),
    hidden=st.integers(1, 1024),
    dropout=st.floats(0, 0.99),
)
losses = st.builds(LossSettings, ce=positive, bag=positive, soft=positive, hard=positive, temperature=positive)
training = st.builds(
    TrainSettings,
    model=models,
    loss=losses,
    epochs=st.integers(1, 1000),
    learning_rate=positive,
    clip_norm=st.floats(0, 10),
    patience=st.integers(0, 50),
    monitor=st.sampled_from(MONITORS),
    seed=st.integers(0, 2**31),
    deterministic=st.booleans(),
)


@given(training)
def test_settings_survive_toml_and_mappings(settings: TrainSettings) -> None:
    import tomllib

    assert from_mapping(TrainSettings, tomllib.loads(dump_toml(settings))) == settings
    assert from_mapping(TrainSettings, to_mapping(settings)) == settings


def test_a_file_names_itself_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("epochs = 7\n[model]\nname = 'dsmil'\n[loss]\nsoft = 0\n", encoding="utf-8")
    settings = load_settings(path)
    assert (settings.epochs, settings.model.name, settings.loss.soft) == (7, "dsmil", 0.0)
    path.write_text("[model]\nname = 'clam'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.toml\.model: no model is called 'clam'; known ones are "):
        load_settings(path)
    path.write_text("epoch = 7\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown setting 'epoch'"):
        load_settings(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"clip_norm": -1.0},
        {"schedule": "linear"},
        {"precision": "float16"},
        {"class_weights": "inverse"},
        {"monitor": "acc"},
        {"final_lr_share": 1.5},
        {"token_budget": 0},
        {"max_bags": 0},
        {"model": {"classes": 0}},
        {"model": {"dropout": 1.0}},
        {"model": {"name": "transmil", "hidden": 100, "heads": 8}},
        {"model": {"name": "abmil", "auxiliary_weight": 0.5}},
        {"model": {"name": "dsmil", "auxiliary_weight": 1.0}},
        {"loss": {"ce": -1.0}},
        {"loss": {"temperature": 0.0}},
        {"loss": {"instances": 0}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        from_mapping(TrainSettings, wrong)


def test_every_figure_can_be_monitored() -> None:
    assert set(MONITORS) == set(NAMES)
    assert set(ATTENTION_MODELS) == set(MODELS) - {"linear", "mean", "max"}


def test_shares_of_the_second_loss() -> None:
    shares = {name: ModelSettings(name=name).second_loss_share for name in MODELS}
    assert shares == {**dict.fromkeys(MODELS, 0.0), "clam-sb": 0.3, "clam-mb": 0.3, "dsmil": 0.5, "dtfd": 0.5}
    assert ModelSettings(name="dsmil", auxiliary_weight=0.0).second_loss_share == 0
