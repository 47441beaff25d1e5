"""Folds: every case tests once, classes stay in proportion, and no case is ever torn apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.errors import LeakageError, SplitError
from lrmil.splits import make_splits, read_splits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.lists(st.integers(0, 25), min_size=2, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)
def test_folds_are_a_stratified_partition(folds: int, sizes: list[int], seed: int, val_fraction: float) -> None:
    counts = [size + folds for size in sizes]
    labels = {f"{c}-{i}": f"class{c}" for c, n in enumerate(counts) for i in range(n)}
    table = make_splits(labels, folds, seed, val_fraction)
    tested = Counter(
        case for parts in table.folds.values() for case, p in zip(table.ids, parts, strict=True) if p == "test"
    )
    assert tested == dict.fromkeys(labels, 1)
    for parts in table.folds.values():
        part_of = dict(zip(table.ids, parts, strict=True))
        assert set(parts) <= {"train", "val", "test"}
        for c, n in enumerate(counts):
            per = Counter(part_of[case] for case in labels if labels[case] == f"class{c}")
            assert n // folds <= per["test"] <= -(-n // folds)
            assert per["train"] >= 1
            rest = n - per["test"]
            assert per["val"] == min(max(round(val_fraction * rest), val_fraction > 0), rest - 1)
    tests = [list(parts).count("test") for parts in table.folds.values()]
    assert max(tests) - min(tests) <= 1


def test_splits_depend_on_cases_and_seed_not_on_their_order() -> None:
    labels = {f"c{i}": "ab"[i % 2] for i in range(30)}
    backwards = dict(reversed(labels.items()))
    assert make_splits(labels, 5, 1) == make_splits(backwards, 5, 1)
    assert make_splits(labels, 5, 1) != make_splits(labels, 5, 2)


def test_hold_out() -> None:
    table = make_splits({f"c{i}": "ab"[i % 2] for i in range(40)}, 1, test_fraction=0.3, val_fraction=0.25)
    # 20 cases a class: 6 test, and a quarter of the 14 others, rounded to even, validate.
    assert Counter(table.folds["fold_1"]) == {"test": 12, "val": 8, "train": 20}


def test_round_trip_through_csv(tmp_path: Path) -> None:
    table = make_splits({f"c{i}": "ab"[i % 2] for i in range(12)}, 3)
    table.write(tmp_path / "splits.csv")
    assert read_splits(tmp_path / "splits.csv") == table
    lines = (tmp_path / "splits.csv").read_text().splitlines()
    assert lines[0] == "case_id,fold_1,fold_2,fold_3"


def test_indices_follow_cases_to_their_slides(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("case_id,fold_1,fold_2\np1,Train,test\np2,validation,train\np3,test,\n")
    table = read_splits(path)
    slides, cases = ["a", "b", "c", "d", "e"], ["p1", "p2", "p1", "p3", "p9"]
    one = table.indices(1, slides, cases)
    assert (one.train.tolist(), one.val.tolist(), one.test.tolist()) == ([0, 2], [1], [3])
    two = table.indices("fold_2", slides, cases)
    assert (two.train.tolist(), two.val.tolist(), two.test.tolist()) == ([1], [], [0, 2])
    assert table.unassigned(slides, cases) == ("e",)


def test_leakage_of_a_case_by_its_slides_raises(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("slide_id,fold_1\na,train\nb,test\nc,val\nd,\n")
    table = read_splits(path)
    with pytest.raises(LeakageError, match="fold_1: 1 cases stand in two parts: p1"):
        table.indices(1, ["a", "b", "c"], ["p1", "p1", "p2"])
    # A slide that the fold leaves out leaks nothing.
    assert table.indices(1, ["a", "b", "c", "d"], ["p1", "p2", "p3", "p1"]).train.tolist() == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,fold_1\np1,trian\n", "row 2: 'trian' in fold_1; write train, val or test"),
        ("case_id,fold_1\np1,train\np1,test\n", "rows 2 and 3: p1 has two rows"),
        ("case_id,part\np1,train\n", "no column fold_1"),
        ("id,fold_1\np1,train\n", "no column slide_id or case_id"),
        ("case_id,fold_1\n,train\n", "row 2: case_id is empty"),
    ],
)
def test_bad_split_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(SplitError, match=message):
        read_splits(path)


def test_what_cannot_be_split_says_so() -> None:
    labels = {f"c{i}": "a" for i in range(20)} | {"r1": "rare", "r2": "rare"}
    with pytest.raises(SplitError, match="class 'rare' has 2 cases, too few for 5 folds"):
        make_splits(labels, 5)
    with pytest.raises(SplitError, match="fractions"):
        make_splits(labels, 2, val_fraction=1.0)
    with pytest.raises(SplitError, match="there is no fold 3"):
        make_splits(labels, 2).indices(3, [], [])
    with pytest.raises(SplitError, match="fold_1 has no training bag"):
        make_splits(labels, 2).indices(1, ["x"], ["x"])


def test_classes_are_dealt_evenly_even_when_small() -> None:
    # Ten classes of three cases in three folds: each fold tests exactly one case of each.
    labels = {f"{c}-{i}": str(c) for c in range(10) for i in range(3)}
    table = make_splits(labels, 3, val_fraction=0.0)
    for parts in table.folds.values():
        tested = np.array([labels[i] for i, p in zip(table.ids, parts, strict=True) if p == "test"])
        assert sorted(tested) == sorted({*labels.values()})
