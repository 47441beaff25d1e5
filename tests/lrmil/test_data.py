"""Labels joined to bags with nothing lost, and batches that hold exactly the bags asked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.data import batches, load_labels, plan_batches
from lrmil.errors import LabelError
from lrmil.store import FeatureStore


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_by_slide_with_everything_left_out_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "slide_id,case_id,label\na,p1,tumour\nb.svs,p1,benign\nc,p2,tumour\ngone,p3,benign\n")
    table = load_labels(path, ["a", "b", "c", "extra"], lengths=[5, 3, 0, 2], empty_reasons={"c": "no tissue found"})
    assert table.classes == ("benign", "tumour")
    assert table.labels.tolist() == [1, 0, 1, -1]
    assert table.usable.tolist() == [0, 1]
    assert table.case_ids[:3] == ("p1", "p1", "p2")
    assert table.notes() == [
        "1 in the labels but without a bag: gone",
        "1 without a label: extra",
        "1 without tiles: c (no tissue found)",
    ]
    assert table.case_labels() == {"p1": "benign+tumour"}


def test_labels_by_case_reach_all_its_slides(tmp_path: Path) -> None:
    path = csv(tmp_path, "case_id;label\np1;x\np2;y\n")
    table = load_labels(path, ["a", "b", "c"], ["p1", "p2", "p1"])
    assert table.labels.tolist() == [0, 1, 0]
    assert table.case_ids == ("p1", "p2", "p1")


def test_classes_keep_a_trained_models_order(tmp_path: Path) -> None:
    path = csv(tmp_path, "slide_id,label\na,x\nb,y\n")
    assert load_labels(path, ["a", "b"], classes=["y", "x"]).labels.tolist() == [1, 0]
    with pytest.raises(LabelError, match="class 'x' is not one of y, z"):
        load_labels(path, ["a", "b"], classes=["y", "z"])


def test_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    path = csv(tmp_path, "slide_id,label\na,10\nb,2\nc,none\n")
    assert load_labels(path, ["a", "b", "c"]).classes == ("2", "10", "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,label\na,x\na,y\n", r"row 3: a is labelled 'x' and 'y'"),
        ("slide_id,label\na,\n", r"no bag has a label"),
        ("slide_id,label\n,x\n", r"row 2: slide_id is empty"),
        ("slide_id,grade\na,x\n", r"no column 'label'; its columns are slide_id, grade"),
        ("name,label\na,x\n", r"no column case_id"),
        ("slide_id,label\na,x,z\n", r"row 2: has more cells .* .3 values under 2 columns."),
        ("slide_id,label\nq,x\nr,y\n", r"no bag has a label; check the ids: the table has 'q', the bags have 'a'"),
        ("slide_id,label\na,x\nb,x\n", r"all labels are 'x'"),
        ("slide_id,case_id,label\na,p,x\na,q,x\n", r"row 3: a is of case 'p' and 'q'"),
        ("", r"is empty"),
    ],
)
def test_bad_tables_give_line_and_cause(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        load_labels(csv(tmp_path, text), ["a", "b"])


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"none\.csv: No such file"):
        load_labels(tmp_path / "none.csv", ["a"])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=0, max_size=30),
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(0, 99)),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_batches_hold_each_bag_once_within_the_budget(
    sizes: list[int], budget: int, seed: int | None, most: int | None
) -> None:
    lengths = np.array(sizes, np.int64)
    indices = np.arange(len(sizes))[::-1]
    arguments = {"token_budget": budget, "shuffle_seed": seed, "max_bags": most}
    plan = plan_batches(lengths, indices, **arguments)  # type: ignore[arg-type]
    flat = [int(i) for batch in plan for i in batch]
    assert sorted(flat) == sorted(indices.tolist())
    if seed is None:
        assert flat == indices.tolist()
    for batch in plan:
        assert len(batch) == 1 or lengths[batch].sum() <= budget
        assert most is None or len(batch) <= most
    for one, following in itertools.pairwise(plan):  # no batch is ended before it must be
        full = most is not None and len(one) == most
        assert full or lengths[one].sum() + lengths[following[0]] > budget
    again = plan_batches(lengths, indices, **arguments)  # type: ignore[arg-type]
    assert [b.tolist() for b in again] == [b.tolist() for b in plan]


def test_seeds_shuffle_differently() -> None:
    lengths = np.ones(20, np.int64)
    plans = [plan_batches(lengths, range(20), token_budget=5, shuffle_seed=seed) for seed in (0, 1)]
    assert [b.tolist() for b in plans[0]] != [b.tolist() for b in plans[1]]


def test_batches_carry_rows_labels_and_places() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 4)).astype(np.float32) for n in (2, 6, 1, 3)]
    store = FeatureStore.from_arrays(arrays, parents=[np.full(len(a), i) for i, a in enumerate(arrays)])
    labels = [1, 0, 1, 0]
    seen = []
    for batch in batches(store, labels, [0, 1, 3], token_budget=5, shuffle_seed=4):
        for k, i in enumerate(batch.bag_index.tolist()):
            rows = slice(int(batch.offsets[k]), int(batch.offsets[k + 1]))
            assert np.array_equal(batch.features[rows].numpy(), arrays[i])
            assert (batch.segment[rows] == k).all()
            assert int(batch.labels[k]) == labels[i]
            assert batch.parent is not None
            assert (batch.parent[rows] == i).all()
            seen.append(i)
    assert sorted(seen) == [0, 1, 3]


def test_a_bag_without_rows_is_not_silently_dropped() -> None:
    with pytest.raises(ValueError, match="bag 1 has no rows"):
        plan_batches(np.array([3, 0]), [0, 1], token_budget=5, shuffle_seed=None)
