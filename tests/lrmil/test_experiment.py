"""Figures, summaries and comparisons read from tables of predictions with known contents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lrmil.errors import FiguresError
from lrmil.experiment import compare_runs, evaluate_run, read_predictions
from lrmil.metrics import delong, figures, softmax


def write_fold(folder: Path, seed: int, *, noise: float = 0.0, names: str = "s", flip: bool = False) -> np.ndarray:
    """Forty slides of twenty cases; equal seeds share slides and labels, ``noise`` is added to the logits."""
    rng = np.random.default_rng(seed)
    y = np.arange(40) // 2 % 2
    logits = rng.normal(size=(40, 2)) + 1.5 * np.eye(2)[y] + noise * np.random.default_rng(99).normal(size=(40, 2))
    p = softmax(logits, 2.0)
    lines = ["slide_id,case_id,part,label,logit_x,logit_y,probability_x,probability_y"]
    order = range(40)[::-1] if noise else range(40)
    for i in order:
        label = "xy"[(1 - y[i]) if flip and i == 3 else y[i]]
        row = [f"{names}{seed}-{i}", f"c{seed}-{i // 2}", "test", label, *map(repr, map(float, (*logits[i], *p[i])))]
        lines.append(",".join(row))
    lines.append("v,cv,val,x,0.0,0.0,0.5,0.5")
    folder.mkdir(parents=True)
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    return p


def test_figures_of_a_run(tmp_path: Path) -> None:
    y = np.arange(40) // 2 % 2
    ps = [write_fold(tmp_path / "run" / f"fold_{k}", k) for k in (1, 2, 10)]
    result = evaluate_run(tmp_path / "run", replicates=100)
    assert [fold.name for fold in result.folds] == ["fold_1", "fold_2", "fold_10"]
    expected = [figures(y, p) for p in ps]
    for name in ("auc", "brier", "ece"):
        values = [e[name] for e in expected]
        assert [fold.estimates[name].value for fold in result.folds] == pytest.approx(values)
        assert result.mean[name].value == pytest.approx(np.mean(values))
        assert result.mean[name].low <= np.mean(values) <= result.mean[name].high
        assert result.spread[name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert result.folds[0].cases == 20
    # Three folds together are known better than one.
    widths = [fold.estimates["auc"].high - fold.estimates["auc"].low for fold in result.folds]
    assert result.mean["auc"].high - result.mean["auc"].low < np.mean(widths)
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["mean"]["auc"]["value"] == pytest.approx(result.mean["auc"].value)
    assert (tmp_path / "run" / "summary.csv").read_text().splitlines()[-1].startswith("mean,120,60,")
    assert (tmp_path / "run" / "fold_10" / "roc.png").is_file()


def test_undefined_figures_are_null_with_their_reason(tmp_path: Path) -> None:
    write_fold(tmp_path / "run", 1)
    result = evaluate_run(tmp_path / "run", part="val", replicates=20)
    stored = json.loads((tmp_path / "run" / "figures-val.json").read_text())
    assert stored["estimates"]["auc"] == {"value": None, "low": None, "high": None, "reason": "all slides are x"} | {
        "defined": 0.0
    }
    assert result.folds[0].estimates["accuracy"].value == 1.0
    assert not (tmp_path / "run" / "roc-val.png").exists()


def test_compare_pairs_slides_by_name(tmp_path: Path) -> None:
    y = np.arange(40) // 2 % 2
    cases = [str(i // 2) for i in range(40)]
    pairs = [
        (write_fold(tmp_path / "a" / f"fold_{k}", k), write_fold(tmp_path / "b" / f"fold_{k}", k, noise=2.0))
        for k in (1, 2)
    ]
    result = compare_runs(tmp_path / "a", tmp_path / "b", replicates=200)
    assert result.slides == 80
    delta = np.mean([figures(y, p)["auc"] - figures(y, q)["auc"] for p, q in pairs])
    assert result.differences["auc"].value == pytest.approx(delta)
    tests = [delong(y, p[:, 1], q[:, 1], cases) for p, q in pairs]
    assert result.delong["fold_2"].difference == pytest.approx(tests[1].difference)
    assert result.delong["fold_2"].standard_error == pytest.approx(tests[1].standard_error)
    assert result.delong_mean is not None
    assert result.delong_mean.difference == pytest.approx(delta)
    # Folds test different cases: the mean of two independent differences.
    error = np.sqrt(tests[0].standard_error ** 2 + tests[1].standard_error ** 2) / 2
    assert result.delong_mean.standard_error == pytest.approx(error)
    assert result.delong_mean.p < min(t.p for t in tests)
    back = compare_runs(tmp_path / "b", tmp_path / "a", replicates=200)
    assert back.differences["auc"].value == pytest.approx(-delta)
    assert back.differences["auc"].p == pytest.approx(result.differences["auc"].p, rel=1e-9)


def test_folds_that_share_cases_have_no_joint_delong(tmp_path: Path) -> None:
    for run in ("a", "b"):
        for k in (1, 2):
            write_fold(tmp_path / run / f"fold_{k}", 7, noise=float(run == "b"))
    assert compare_runs(tmp_path / "a", tmp_path / "b", replicates=20).delong_mean is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"names": "t"}, "did not predict the same slides: s1-0"), ({"flip": True}, "s1-3 has another label")],
)
def test_runs_on_other_slides_or_labels_are_not_compared(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    write_fold(tmp_path / "a", 1)
    write_fold(tmp_path / "b", 1, **options)  # type: ignore[arg-type]
    with pytest.raises(FiguresError, match=message):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_what_holds_no_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FiguresError, match=r"holds no predictions\.csv"):
        evaluate_run(tmp_path)
    (tmp_path / "predictions.csv").write_text("slide_id,part\ns,test\n")
    with pytest.raises(FiguresError, match="is no table of predictions"):
        read_predictions(tmp_path / "predictions.csv")
