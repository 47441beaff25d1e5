"""Sites: where they are read, folds of whole sites, and how far the site alone gives the label away."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.cli import group
from lrmil.errors import LabelError, SplitError
from lrmil.site_splits import make_site_splits, missing_classes, torn_sites
from lrmil.sites import Sites, confounding, cramers_v, read_case_sites, read_sites, site_auc, tcga_site
from lrmil.splits import make_splits, read_splits
from wsi_pipe.cli import run_group


def cohort(counts: dict[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and sites of cases, by site and number of cases of each class."""
    labels, sites = {}, {}
    for site, numbers in counts.items():
        for label, number in enumerate(numbers):
            for i in range(number):
                labels[f"{site}-{label}-{i}"] = f"class{label}"
                sites[f"{site}-{label}-{i}"] = site
    return labels, sites


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any), min_size=3, max_size=12),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_sites_stay_whole_and_each_tests_once(counts: list[tuple[int, int]], folds: int, seed: int) -> None:
    labels, sites = cohort({f"h{i}": c for i, c in enumerate([(9, 9), *counts, (9, 9), (9, 9)])})
    table = make_site_splits(labels, sites, folds, seed)
    tested = Counter()  # type: ignore[var-annotated]
    for parts in table.folds.values():
        part_of: dict[str, set[str]] = {}
        for case, part in zip(table.ids, parts, strict=True):
            part_of.setdefault(sites[case], set()).add(part)
            tested[case] += part == "test"
        assert all(len(found) == 1 for found in part_of.values())
        assert {"train", "val", "test"} == {part for found in part_of.values() for part in found}
    assert tested == dict.fromkeys(labels, 1)
    assert torn_sites(table, sites) == dict.fromkeys(table.folds, 0)
    backwards = make_site_splits(dict(reversed(labels.items())), sites, folds, seed)
    assert backwards == table


def test_the_best_division_of_a_few_sites_is_found() -> None:
    counts = {"a": (9, 1), "b": (2, 8), "c": (7, 3), "d": (4, 6), "e": (5, 5), "f": (3, 4), "g": (6, 2)}
    labels, sites = cohort(counts)
    table = make_site_splits(labels, sites, 2, val_fraction=0.0)
    numbers = np.array(list(counts.values()))
    half = numbers.sum(0) / 2

    def imbalance(chosen: list[bool]) -> float:
        held = numbers[np.array(chosen)].sum(0)
        return float(2 * (np.square(held - half) / half).sum())

    every = [list(chosen) for chosen in itertools.product([False, True], repeat=7) if 0 < sum(chosen) < 7]
    tested = {sites[c] for c, part in zip(table.ids, table.folds["fold_1"], strict=True) if part == "test"}
    assert imbalance([name in tested for name in counts]) == pytest.approx(min(map(imbalance, every)))


def test_many_small_sites_are_divided_as_cases_would_be() -> None:
    rng = np.random.default_rng(0)
    labels, sites = cohort({f"h{i}": tuple(rng.integers(0, 3, 2).tolist()) for i in range(150)})
    table = make_site_splits(labels, sites, 5)
    for name in ("class0", "class1"):
        wanted = list(labels.values()).count(name) / 5
        for parts in table.folds.values():
            tested = sum(labels[c] == name for c, part in zip(table.ids, parts, strict=True) if part == "test")
            assert abs(tested - wanted) < 1


def test_what_sites_do_not_allow_says_so() -> None:
    labels, sites = cohort({"a": (5, 5), "b": (5, 5), "c": (5, 5)})
    with pytest.raises(SplitError, match=r"30 cases are of 3 sites \(a, b, c\), too few for 5 folds"):
        make_site_splits(labels, sites, 5)
    with pytest.raises(SplitError, match="2 cases have no site: a-0-0, b-1-2"):
        make_site_splits(labels, {**sites, "a-0-0": "", "b-1-2": ""}, 2)
    labels, sites = cohort({"a": (5, 5), "b": (5, 5)})
    with pytest.raises(SplitError, match="--val-fraction 0"):
        make_site_splits(labels, sites, 2)
    assert set(make_site_splits(labels, sites, 2, val_fraction=0.0).folds["fold_1"]) == {"train", "test"}
    # The rare class is at one hospital alone: where that tests, nobody learns it.
    labels, sites = cohort({"a": (5, 5), "b": (5, 0), "c": (5, 0), "d": (5, 0)})
    with pytest.raises(SplitError, match="without a training case of class 'class1'"):
        make_site_splits(labels, sites, 2)
    labels, sites = cohort({"a": (5, 5), "b": (5, 5), "c": (5, 0), "d": (5, 0)})
    table = make_site_splits(labels, sites, 4, val_fraction=0.0)
    assert sum("no case of class1 is in its test part" in line for line in missing_classes(table, labels)) == 2


def test_the_v_of_tables_worked_out_by_hand() -> None:
    # n 20, expected 5.5 and 4.5 in each row, chi-squared 20 * (8 * 7 - 2 * 3)^2 / (10 * 10 * 11 * 9) = 5.050505;
    # phi^2 0.252525 - 1 / 19 = 0.199894; both sides 2 - 1 / 19, less 1: 0.947368; V = sqrt(0.199894 / 0.947368).
    assert cramers_v(np.array([[8, 2], [3, 7]])) == pytest.approx(0.459347, abs=1e-6)
    assert cramers_v(np.array([[10, 0], [0, 10]])) == pytest.approx(1.0)
    # Weaker than chance alone makes it: phi^2 is 0.04 and less than 1 / 24.
    assert cramers_v(np.array([[7, 5], [5, 8]])) == 0.0
    # 3 x 2: n 12, rows of 4, columns of 6; chi-squared 6 cells of (2 or 0 off 2)^2 / 2: (4 + 4 + 4 + 4) / 2 = 8;
    # phi^2 8 / 12 - 2 / 11 = 0.484848; rows 3 - 4 / 11 - 1 = 1.636364, columns 2 - 1 / 11 - 1 = 0.909091.
    assert cramers_v(np.array([[4, 0], [0, 4], [2, 2]])) == pytest.approx(math.sqrt(0.484848 / 0.909091), abs=1e-6)
    assert math.isnan(cramers_v(np.array([[3, 4]])))
    assert math.isnan(cramers_v(np.array([[1, 0], [0, 1], [1, 0]])))


def test_the_auc_of_sites_is_that_of_all_pairs() -> None:
    counts = {"a": (6, 1), "b": (2, 5), "c": (1, 0), "d": (3, 3), "e": (0, 1)}
    labels, sites = cohort(counts)
    positive = np.array([c[1] for c in counts.values()])
    total = np.array([sum(c) for c in counts.values()])
    won = []
    for p, n in itertools.product(labels, labels):
        if labels[p] != "class1" or labels[n] != "class0":
            continue
        rest = [case for case in labels if case not in (p, n)]
        overall = np.mean([labels[c] == "class1" for c in rest])

        def share(case: str, rest: list[str] = rest, overall: float = float(overall)) -> float:
            there = [labels[c] == "class1" for c in rest if sites[c] == sites[case]]
            return (sum(there) + overall) / (len(there) + 1)

        difference = share(p) - share(n)
        won.append(0.5 if abs(difference) < 1e-12 else float(difference > 0))
    assert site_auc(positive, total) == pytest.approx(np.mean(won))
    # One site tells nothing. A mean without the case itself would rank every pair wrongly.
    assert site_auc(np.array([7]), np.array([20])) == 0.5
    assert site_auc(np.array([9, 0]), np.array([9, 9])) == 1.0
    assert math.isnan(site_auc(np.array([0]), np.array([9])))


def test_chance_is_not_called_confounding_and_a_hospital_with_a_class_of_its_own_is() -> None:
    rng = np.random.default_rng(5)
    told = []
    for _ in range(40):
        labels = {f"c{i}": str(v) for i, v in enumerate(rng.integers(0, 2, 120))}
        sites = Sites({f"c{i}": str(v) for i, v in enumerate(rng.integers(0, 20, 120))}, "site")
        found = confounding(labels, sites)
        assert found is not None
        told.append((found.found, found.auc))
    assert sum(one for one, _ in told) <= 5
    assert abs(np.mean([auc for _, auc in told]) - 0.5) < 0.03
    labels, sites_of = cohort({"a": (30, 2), "b": (3, 25), "c": (10, 10)})
    splits = make_splits(labels, 3)
    found = confounding(labels | {"stray": "class0"}, Sites(sites_of, "hospital"), splits)
    assert found is not None
    assert found.found
    assert (found.cases, found.sites, found.unknown) == (80, 3, 1)
    # Of a and b all are as the others there, but for 2 and 3; at c the ten of each class see nine and ten others.
    assert found.accuracy == pytest.approx((30 + 25) / 80)
    assert found.commonest == pytest.approx(43 / 80)
    assert found.torn == {"fold_1": 3, "fold_2": 3, "fold_3": 3}
    text = " ".join(found.notes())
    assert "are confounded: 3 sites (hospital)" in text
    assert "lrmil split --by site" in text
    assert json.loads(json.dumps(found.to_json()))["torn"]["fold_1"] == 3
    assert confounding(labels, Sites()) is None


def test_barcodes_and_columns_say_the_site(tmp_path: Path) -> None:
    assert tcga_site("TCGA-A1-A0SB-01Z-00-DX1.3fd7") == "A1"
    assert tcga_site("tcga-e9-a1r7") == "E9"
    assert tcga_site("TCGA-A1") == tcga_site("case-TCGA-A1-A0SB") == tcga_site("TCGA-A1-A0SB2") == ""
    path = tmp_path / "labels.csv"
    path.write_text("slide,label\nTCGA-A1-A0SB-01Z-00-DX1.svs,a\nTCGA-A1-A0SD-01Z-00-DX1.svs,b\nown.svs,a\n")
    sites = read_sites(path, ["TCGA-A1-A0SB-01Z-00-DX1", "own"], ["TCGA-A1-A0SB", "own"])
    assert sites == Sites({"TCGA-A1-A0SB": "A1"}, "TCGA barcode")
    assert set(read_case_sites(path).of_case.values()) == {"A1"}
    path.write_text("slide_id,case_id,Hospital,label\ns1.svs,p1,north,a\ns2,p1,,a\ns3,p2,south,b\ns4,p3,NA,b\n")
    sites = read_sites(path, ["s1", "s2", "s3", "s4"], ["p1", "p1", "p2", "p3"])
    assert sites == Sites({"p1": "north", "p2": "south"}, "Hospital")
    assert read_case_sites(path) == sites
    with pytest.raises(LabelError, match="no column 'clinic'"):
        read_sites(path, ["s1"], ["p1"], column="clinic")
    path.write_text("slide_id,case_id,site,label\ns1,p1,north,a\ns2,p1,south,a\ns3,p2,south,b\n")
    assert read_sites(path, ["s1", "s2", "s3"], ["p1", "p1", "p2"]).torn == {"p1": ("north", "south")}
    with pytest.raises(LabelError, match="two sites, such as p1: north, south"):
        read_case_sites(path)
    path.write_text("slide_id,label\ns1,a\ns2,b\n")
    with pytest.raises(LabelError, match="--site-column NAME"):
        read_case_sites(path)


def test_the_command_divides_by_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"TCGA-{'ABCDEF'[i % 6]}1-{i:04d}-01Z,TCGA-{'ABCDEF'[i % 6]}1-{i:04d},{'xy'[i // 6 % 2]}" for i in range(48)
    ]
    labels, out = tmp_path / "labels.csv", tmp_path / "splits.csv"
    labels.write_text("\n".join(["slide_id,case_id,label", *rows]) + "\n")
    arguments = ["split", "--labels", str(labels), "-o", str(out)]
    assert run_group(group, "lrmil", [*arguments, "--by", "site", "--folds", "3"]) == 0
    assert "48 cases of 6 sites (TCGA barcode) in 3 fold(s)" in capsys.readouterr().out
    table = read_splits(out)
    assert torn_sites(table, {case: tcga_site(case) for case in table.ids}) == dict.fromkeys(table.folds, 0)
    assert run_group(group, "lrmil", [*arguments, "--by", "site", "--folds", "7"]) == 2
    assert "6 sites" in capsys.readouterr().err
    assert run_group(group, "lrmil", [*arguments, "--site-column", "label"]) == 2
    assert "add --by site" in capsys.readouterr().err
