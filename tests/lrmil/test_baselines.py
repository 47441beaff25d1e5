"""What the baselines choose and put together, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lrmil.checkpoint import ModelCard, save_model
from lrmil.config import ModelSettings
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.experiment.baselines import (
    BASELINES,
    guided_rows,
    kept,
    model_of,
    random_rows,
    tile_attention,
    with_parents,
    zoomed_rows,
)
from lrmil.experiment.settings import ExperimentSettings
from lrmil.model import build_model
from lrmil.store import FeatureStore, StoreMeta
from wsi_pipe.errors import ConfigError

ATTENTION = np.array([0.1, 0.5, 0.1, 0.3], np.float32)
# HR tiles 0 and 5 lie in LR tile 3, 1 and 4 in tile 1, 3 and 6 in tile 0, 2 in none; LR tile 2 has no HR tile.
PARENTS = np.array([3, 1, -1, 0, 1, 3, 0])


@pytest.mark.parametrize(
    ("tiles", "rows"), [(1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (5, [0, 1, 3, 4, 5]), (25, [0, 1, 3, 4, 5, 6])]
)
def test_hr_tiles_are_those_of_the_most_attended_lr_tiles(tiles: int, rows: list[int]) -> None:
    assert guided_rows(ATTENTION, PARENTS, tiles).tolist() == rows


@pytest.mark.parametrize(("lr_tiles", "rows"), [(1, [1, 4]), (2, [0, 1, 4, 5]), (9, [0, 1, 3, 4, 5, 6])])
def test_zooming_takes_all_children_of_some_lr_tiles(lr_tiles: int, rows: list[int]) -> None:
    assert zoomed_rows(ATTENTION, PARENTS, lr_tiles).tolist() == rows


def test_no_slide_is_left_without_tiles() -> None:
    alone = np.full(5, -1)
    assert guided_rows(ATTENTION, alone, 3).tolist() == [0, 1, 2]
    assert zoomed_rows(ATTENTION, alone, 1).tolist() == [0, 1, 2, 3, 4]


def test_a_random_budget_is_drawn_once_and_for_all() -> None:
    rows = random_rows([10, 3], [4, 9], seed=1)
    assert [len(own) for own in rows] == [4, 3]
    assert all((np.diff(own) > 0).all() for own in rows)
    assert [own.tolist() for own in rows] == [own.tolist() for own in random_rows([10, 3], [4, 9], seed=1)]
    assert rows[0].tolist() != random_rows([10, 3], [4, 9], seed=2)[0].tolist()


def stores() -> tuple[FeatureStore, FeatureStore]:
    lr = FeatureStore.from_arrays(
        [np.arange(8.0).reshape(4, 2), 100 + np.arange(2.0).reshape(1, 2)], meta=StoreMeta("e", "ab", "5x")
    )
    hr = FeatureStore.from_arrays(
        [np.arange(21.0).reshape(7, 3), np.ones((2, 3))], parents=[PARENTS, [0, 0]], meta=StoreMeta("e", "ab", "20x")
    )
    return lr, hr


def test_some_rows_of_a_store_are_a_store() -> None:
    _, hr = stores()
    found = kept(hr, [np.array([1, 4]), np.array([0])])
    assert found.bag(0).tolist() == [[3, 4, 5], [12, 13, 14]]
    assert found.bag(1).tolist() == [[1, 1, 1]]
    assert found.parents is not None
    assert found.parents.tolist() == [1, 1, 0]
    assert found.records == hr.records
    assert found.content_hash != hr.content_hash


def test_both_levels_stand_side_by_side_and_a_model_of_them_is_its_forward_pass_by_hand() -> None:
    lr, hr = stores()
    both = with_parents(hr, lr)
    assert both.bag(0).tolist()[:4] == [[0, 1, 2, 6, 7], [3, 4, 5, 2, 3], [6, 7, 8, 0, 0], [9, 10, 11, 0, 1]]
    assert both.bag(1).tolist() == [[1, 1, 1, 100, 101]] * 2
    assert both.meta.weights_sha256 == ""
    torch.manual_seed(0)
    model = build_model(ModelSettings("abmil", in_dim=5, attention_dim=2, dropout=0.0, projection=False)).eval()
    w = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    x = np.array([[*h, *(lr.bag(0)[p] if p >= 0 else (0, 0))] for h, p in zip(hr.bag(0), PARENTS, strict=True)])
    scores = np.tanh(x @ w["attention.weight"].T + w["attention.bias"]) @ w["attention_score.weight"][0]
    a = np.exp(scores - scores.max())
    logits = w["classifier.weight"] @ ((a / a.sum()) @ x) + w["classifier.bias"]
    rows = torch.from_numpy(np.asarray(both.bag(0), np.float32))
    told = model(rows, torch.tensor([0, len(rows)])).logits[0]
    assert told.tolist() == pytest.approx(logits.tolist(), rel=1e-4)
    with pytest.raises(BagMismatchError, match="do not know their LR tiles"):
        with_parents(lr, lr)


def test_guidance_is_the_attention_of_the_folds_own_classifier(tmp_path: Path) -> None:
    lr, _ = stores()
    torch.manual_seed(0)
    model = build_model(ModelSettings("abmil", in_dim=2, hidden=4, attention_dim=2)).eval()
    save_model(tmp_path / "m.safetensors", model, ModelCard(model.settings, ("a", "b")))
    found = tile_attention(tmp_path / "m.safetensors", lr)
    rows = torch.from_numpy(np.asarray(lr.bag(0), np.float32))
    logits = model(rows, torch.tensor([0, 4])).attention_logits
    assert logits is not None
    assert found[0].tolist() == pytest.approx(logits.softmax(0).tolist())
    assert found[1].tolist() == [1.0]
    mean = build_model(ModelSettings("mean", in_dim=2, hidden=4))
    save_model(tmp_path / "mean.safetensors", mean, ModelCard(mean.settings, ("a", "b")))
    with pytest.raises(SettingsError, match="cannot guide"):
        tile_attention(tmp_path / "mean.safetensors", lr)


def test_every_baseline_is_a_model_that_can_be_built() -> None:
    own = ModelSettings("abmil", in_dim=4, hidden=8, attention_dim=4, projection=False)
    for name, baseline in BASELINES.items():
        build_model(model_of(own, baseline))
        assert (model_of(own, baseline) == own) == (name in ("random-hr", "zoom", "hr+lr"))
    with pytest.raises(ConfigError, match="no baseline is called 'chance'"):
        ExperimentSettings(baselines=("chance",))
    with pytest.raises(ConfigError, match="zoom_tiles"):
        ExperimentSettings(zoom_tiles=0)
