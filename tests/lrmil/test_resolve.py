"""Which resolution is needed: the statistics on simulated scores, and the audit of a small cohort."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lrmil.cli import group
from lrmil.errors import FiguresError
from lrmil.resolve.cost import job_costs
from lrmil.resolve.verdict import Comparison, Fold, cases_needed, compare_arms, decide
from wsi_pipe.bag import Bag, BagLevel, Features, read_bag, write_bag
from wsi_pipe.cli import run_group
from wsi_pipe.job import append_outcome
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.outcome import SlideOutcome

MARGIN = 0.05


def simulated(n: int, seed: int, fine: float, coarse: float, shared: float = 0.7) -> tuple[list[Fold], list[Fold]]:
    """Scores of n cases at a fine and a coarse resolution, normal with these shifts of the positives, correlated."""
    rng = np.random.default_rng([5, seed])
    y = np.arange(n) % 2
    common = rng.normal(size=n)
    arms = []
    for shift in (fine, coarse):
        score = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=n) + shift * y
        p = 1 / (1 + np.exp(-score))
        arms.append([(y, np.stack([1 - p, p], axis=1), [f"c{i}" for i in range(n)])])
    return arms[0], arms[1]


def shift_of(auc: float) -> float:
    from scipy.stats import norm

    return math.sqrt(2) * float(norm.ppf(auc))


def states(n: int, fine: float, coarse: float, draws: int) -> NDArray[np.str_]:
    found = []
    for seed in range(draws):
        a, b = simulated(n, seed, shift_of(fine), shift_of(coarse))
        found.append(compare_arms("5x", "5x", b, a, MARGIN).state)
    return np.array(found)


def test_a_loss_of_the_margin_is_rarely_called_enough_and_an_equal_one_often() -> None:
    # At a loss of the margin itself, at most one in forty, but for chance of 200 draws.
    assert (states(200, 0.92, 0.92 - MARGIN, 200) == "enough").mean() <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 200)
    # Nor where samples have an AUC of 1 now and then.
    assert (states(60, 0.999, 0.999 - MARGIN, 100) == "enough").mean() <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 100)
    assert (states(200, 0.92, 0.92, 60) == "enough").mean() > 0.6
    assert (states(200, 0.92, 0.70, 30) == "loses").mean() > 0.9


def test_the_number_of_cases_that_is_named_gives_the_power() -> None:
    """As many cases as are named, from what 80 cases show of the error, tell with about the power that was asked."""
    errors = []
    for seed in range(20):
        a, b = simulated(80, 1000 + seed, shift_of(0.92), shift_of(0.92))
        errors.append(compare_arms("5x", "5x", b, a, MARGIN).error)
    needed = cases_needed(0.0, float(np.mean(errors)), 80, MARGIN)
    assert needed is not None
    assert 0.7 < (states(int(needed) // 2 * 2, 0.92, 0.92, 150) == "enough").mean() < 0.95
    # Half as many do not.
    assert (states(int(needed) // 4 * 2, 0.92, 0.92, 150) == "enough").mean() < 0.7
    assert cases_needed(-MARGIN, 0.02, 80, MARGIN) == math.inf
    assert cases_needed(0.0, math.nan, 10, MARGIN) is None
    # Where it is undecided, more cases are named than there are.
    undecided = [c for seed in range(40) if (c := _one(seed)).state == "undecided"]
    assert undecided
    assert all(c.needed is not None and c.needed > c.cases for c in undecided)


def _one(seed: int) -> Comparison:
    a, b = simulated(80, seed, shift_of(0.92), shift_of(0.9))
    return compare_arms("5x", "5x", b, a, MARGIN)


def arm(name: str, state: Any, difference: float = 0.0, needed: float | None = None) -> Comparison:
    auc, low, high = 0.95 + difference, difference - 0.02, difference + 0.02
    return Comparison(name, name, auc, auc - 0.04, auc + 0.03, difference, low, high, 0.01, 120, state, needed)


def test_verdicts_in_words() -> None:
    first = arm("20x", "reference")
    found = decide([first, arm("10x", "enough"), arm("5x", "enough", -0.005)], 0.03)
    assert (found.kind, found.level) == ("enough", "5x")
    assert found.text.startswith(
        "5x is enough (AUC 0.945 against 0.950 at 20x, difference -0.005 (-0.025 to +0.015), above"
    )
    found = decide([first, arm("10x", "enough"), arm("5x", "loses", -0.2)], 0.03)
    assert (found.kind, found.level) == ("enough", "10x")
    assert found.text.endswith("; 5x is not")
    found = decide([first, arm("10x", "loses", -0.2), arm("5x", "enough")], 0.03)
    # What lies behind one that loses is not asked any more.
    assert (found.kind, found.level) == ("needed", "20x")
    assert found.text.startswith("20x is needed")
    found = decide([first, arm("10x", "undecided", -0.01, 480.0), arm("5x", "loses", -0.2)], 0.03)
    assert found.kind == "undecided"
    assert found.text.startswith("too few cases to say: about 480 needed for 10x")
    assert "more than 12,000" in decide([first, arm("10x", "undecided", -0.03, math.inf)], 0.03).text
    assert "5 of each class" in decide([first, arm("10x", "undecided", -0.03)], 0.03).text
    # Nothing is enough where the finest tells nothing.
    blind = replace(first, auc=0.55, low_auc=0.42, high_auc=0.67)
    assert decide([blind, arm("5x", "enough")], 0.03).kind == "nothing"


def test_other_slides_are_no_pair() -> None:
    a, b = simulated(20, 0, 1, 1)
    y, p, ids = b[0]
    with pytest.raises(FiguresError, match="not tested on the slides"):
        compare_arms("5x", "5x", [(y, p, ids[::-1])], a, 0.03)


def test_an_audit(bag_writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10x knows what 20x knows, 5x knows nothing; what each costs is in the job's outcomes."""
    rng = np.random.default_rng(0)
    job, rows = JobPaths(tmp_path / "job"), ["slide_id,label"]
    job.root.mkdir()
    for i in range(40):
        label = i % 2
        path = bag_writer(tmp_path / "job" / "bags", f"s{i:02d}", rng.normal(size=(5, 4)).astype(np.float32), deep=True)
        bag = read_bag(path)
        levels = []
        for level in bag.levels:
            values = rng.normal(size=(len(level.grid), 4)).astype(np.float32)
            values[:, 0] += 0 if level.grid.label == "5x" else 4 * label
            net = Features("timm:some/net", values, "ab" * 32, "MIT", "float32", "{}", f"{level.grid.label}-{i}")
            levels.append(BagLevel(level.grid, {"net": net}))
        write_bag(path, Bag(bag.attrs, tuple(levels)))
        rows.append(f"s{i:02d},{label}")
        costs = {"20x/net": {"read": 4.0, "encode": 6.0}, "10x/net": {"read": 1.0, "encode": 1.0}}
        times = {"open": 0.5, "segment": 1.0, "read": 5.0, "encode": 7.0}
        append_outcome(job, SlideOutcome(f"s{i:02d}", "done", seconds=times, tiles={"20x": 20, "10x": 20}, costs=costs))
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows) + "\n")
    audit = ["resolve", "--bags", str(job.root), "--labels", str(labels), "-r", "20x", "-r", "10x", "-r", "5x"]
    audit += ["--model", "linear", "--folds", "2", "--margin", "0.1", "-o", str(tmp_path / "audit")]
    assert run_group(group, "lrmil", audit) == 0
    said = capsys.readouterr().out
    assert "10x is enough" in said
    assert "5x is not" in said
    assert "3.5 s a slide against 11.5" in said
    result = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [c["state"] for c in result["models"][0]["comparisons"]] == ["reference", "enough", "loses"]
    assert result["costs"]["20x"] == {"seconds": 11.5, "read": 4.0, "encode": 6.0, "tiles": 20.0, "slides": 40}
    assert "5x" not in result["costs"]
    assert (tmp_path / "audit" / "audit.png").stat().st_size > 5000
    splits = [(tmp_path / "audit" / arm / "linear" / "splits.csv").read_bytes() for arm in ("20x", "10x", "5x")]
    assert len(set(splits)) == 1
    assert job_costs(tmp_path, ["s00"], "20x", "net") is None
    # One resolution is no audit.
    assert run_group(group, "lrmil", [*audit[:5], "-r", "20x", "-o", str(tmp_path / "one")]) == 2
