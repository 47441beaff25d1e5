"""What features tell: figures of plain classifiers, by case, on slides and on tiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lrmil.cli import group
from lrmil.errors import LabelError, LeakageError, SplitError, StoreError
from lrmil.leaks import Judged
from lrmil.probe import Samples, probe, slide_samples, tile_samples
from lrmil.probe.methods import few_shot_rows, linear, neighbours, prototypes
from lrmil.splits import make_splits
from wsi_pipe.bag import TileValues, read_bag, write_bag
from wsi_pipe.cli import run_group
from wsi_pipe.pooling import pool_job, write_slide_table

MakeBag = Callable[..., Path]


def samples(cases: int, distance: float, per_case: int = 2, dim: int = 6, seed: int = 0) -> Samples:
    """Two classes whose means lie ``distance`` apart; the slides of a case are alike."""
    rng = np.random.default_rng(seed)
    of_case = np.repeat(np.arange(cases), per_case)
    labels = of_case % 2
    own = rng.normal(size=(cases, dim))[of_case] + 0.1 * rng.normal(size=(len(of_case), dim))
    own[:, 0] += distance * labels
    names = tuple(f"s{i}" for i in range(len(of_case)))
    case_names = tuple(f"c{i}" for i in of_case)
    blank = ("",) * len(names)
    return Samples(
        own.astype(np.float32), labels.astype(np.int64), ("benign", "tumour"), names, case_names, "net",
        Judged(names, case_names, blank, blank),
    )  # fmt: skip


@pytest.fixture
def cohort(make_bag: MakeBag, tmp_path: Path) -> tuple[Path, Path, dict[str, NDArray[np.float32]]]:
    """Sixteen cases of one slide, two classes that the second feature tells apart."""
    rng = np.random.default_rng(1)
    means, lines = {}, ["slide_id,label"]
    for place in range(16):
        tiles = rng.normal(size=(5, 4)).astype(np.float32)
        tiles[:, 1] += 6 * (place % 2)
        name = f"slide{place:02d}"
        make_bag(name, tiles, case_id=f"case{place:02d}")
        means[name] = tiles.mean(0)
        lines.append(f"{name},{'tumour' if place % 2 else 'benign'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "bags", tmp_path / "labels.csv", means


def test_methods_tell_classes_apart_and_chance_is_chance() -> None:
    apart, alike = samples(40, 6), samples(40, 0)
    splits = make_splits(apart.case_labels(), 4)
    for result in probe(apart, splits, replicates=200, draws=4, shots=(1, 5)):
        auc = result.figures["auc"]
        assert auc.value > (0.8 if result.shots == 1 else 0.95), result.name
        assert auc.low <= auc.value <= auc.high
    for result in probe(alike, splits, replicates=200, draws=4, shots=(5,)):
        auc = result.figures["auc"]
        assert auc.low < 0.5 < auc.high, result.name


def test_no_case_is_learnt_from_and_judged() -> None:
    """Slides of a case are near copies, and labels are those of cases at random: only a torn case could be known."""
    found = samples(40, 0, per_case=4)
    rng = np.random.default_rng(5)
    of_case = {case: int(rng.integers(2)) for case in sorted(set(found.case_ids))}
    found = dataclasses.replace(found, labels=np.array([of_case[case] for case in found.case_ids], np.int64))
    (result,) = probe(found, make_splits(found.case_labels(), 4), methods=("knn",), replicates=200)
    assert result.figures["auc"].value < 0.75


def test_neighbours_vote_by_their_similarity() -> None:
    train = np.array([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, -0.1]])
    p = neighbours(train, np.array([0, 0, 1, 1]), np.array([[2.0, 0.1], [-3.0, 0.2]]), 3)
    assert p.argmax(axis=1).tolist() == [0, 1]
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert p[:, 2].tolist() == [0, 0]


def test_a_prototype_is_a_class_s_mean() -> None:
    train = np.array([[0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [3.0, 0.0]])
    p = prototypes(train, np.array([0, 0, 1, 1]), np.array([[0.1, 2.0], [2.0, 0.1]]), 2)
    assert p[0, 0] == pytest.approx(p[1, 1])
    assert p.argmax(axis=1).tolist() == [0, 1]


def test_shots_are_of_different_cases() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    cases = np.array([0, 0, 1, 2, 2, 3])
    rng = np.random.default_rng(0)
    rows = few_shot_rows(labels, cases, 2, rng)
    assert rows is not None
    assert sorted(cases[rows].tolist()) == [0, 1, 2, 3]
    assert few_shot_rows(labels, cases, 3, rng) is None


def test_a_linear_probe_of_few_cases_and_of_one_class() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    p = linear(x, np.array([0, 0, 1, 1]), np.arange(4), x, 2, 0)
    assert p.shape == (4, 2)
    one = linear(x, np.zeros(4, np.int64), np.arange(4), x, 2, 0)
    assert one.tolist() == [[1, 0]] * 4


def test_slides_of_bags_of_vectors_and_of_a_table_are_the_same(
    cohort: tuple[Path, Path, dict[str, NDArray[np.float32]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bags, labels, means = cohort
    assert {item.status for item in pool_job(bags, "mean")} == {"written"}
    by_tiles = slide_samples(bags, labels, tmp_path / "store")
    by_vectors = slide_samples(bags, labels, tmp_path / "none", slide_encoder="mean")
    write_slide_table(tmp_path / "t.csv", list(pool_job(bags, "mean")))
    by_table = slide_samples(bags, labels, tmp_path / "none", table=tmp_path / "t.csv")
    for found in (by_tiles, by_vectors, by_table):
        assert found.classes == ("benign", "tumour")
        assert found.case_ids == tuple(f"case{place:02d}" for place in range(16))
        wanted = np.stack([means[name] for name in found.slide_ids])
        np.testing.assert_allclose(found.features, wanted, atol=2e-3)  # a store keeps float16
    assert slide_samples(bags, labels, tmp_path / "store", spread=True).features.shape == (16, 8)
    capsys.readouterr()
    arguments = ["probe", "--bags", str(bags), "--labels", str(labels), "--slide-encoder", "mean", "--folds", "4"]
    out = tmp_path / "probe.json"
    assert run_group(group, "lrmil", [*arguments, "--shots", "2", "--shots", "50", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "16 slides of 16 cases" in said.out
    assert "50-shot is left out" in said.err
    told = json.loads(out.read_text())
    assert set(told["methods"]) == {"linear", "knn", "2-shot prototypes"}
    assert told["methods"]["linear"]["auc"]["value"] == 1
    assert told["methods"]["linear"]["auc"]["low"] < 1


def test_what_an_encoder_has_seen_is_refused(
    cohort: tuple[Path, Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    bags, labels, _ = cohort
    path = bags / "slide03.h5"
    bag = read_bag(path)
    level = bag.levels[0]
    seen = {slug: dataclasses.replace(item, encoder_saw="train") for slug, item in level.features.items()}
    write_bag(path, dataclasses.replace(bag, levels=(dataclasses.replace(level, features=seen),)))
    found = slide_samples(bags, labels, tmp_path / "store")
    splits = make_splits(found.case_labels(), 4)
    with pytest.raises(LeakageError, match="slide03"):
        probe(found, splits, replicates=10)
    said: list[str] = []
    assert probe(found, splits, methods=("knn",), replicates=10, allow_seen=True, say=said.append)
    assert "slide03" in said[0]
    list(pool_job(bags, "mean"))
    with pytest.raises(LeakageError, match="slide03"):
        probe(slide_samples(bags, labels, tmp_path / "n", slide_encoder="mean"), splits, replicates=10)


def test_torn_cases_and_folds_without_test_are_refused() -> None:
    found = samples(12, 3)
    splits = make_splits(found.case_labels(), 3)
    parts = {name: tuple("train" for _ in own) for name, own in splits.folds.items()}
    with pytest.raises(SplitError, match="no fold has test cases"):
        probe(found, dataclasses.replace(splits, folds=parts), replicates=10)
    torn = dataclasses.replace(
        splits, unit="slide", ids=("s0", "s1", "s2"), folds={"fold_1": ("train", "test", "train")}
    )
    with pytest.raises(LeakageError, match="c0"):
        probe(found, torn, replicates=10)


def annotated(path: Path, covers: dict[str, NDArray[np.float32]]) -> None:
    bag = read_bag(path)
    values = {name.lower(): TileValues(cover, {"class": name}) for name, cover in covers.items()}
    write_bag(path, dataclasses.replace(bag, levels=(dataclasses.replace(bag.levels[0], annotation=values),)))


def test_tiles_are_probed_by_their_annotations(
    make_bag: MakeBag, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for place in range(10):
        tiles = rng.normal(size=(30, 4)).astype(np.float32)
        cover = np.repeat(np.array([0.9, 0.2, 0.0], np.float32), 10)
        tiles[:10, 2] += 5
        annotated(make_bag(f"s{place}", tiles, case_id=f"c{place}"), {"Tumour": cover})
    make_bag("bare", rng.normal(size=(4, 4)).astype(np.float32))
    found = tile_samples(tmp_path / "bags", most=8)
    assert found.classes == ("Tumour", "other")
    assert np.bincount(found.labels).tolist() == [80, 80]  # those in between are in neither
    assert any("bare" in note for note in found.notes)
    arguments = ["probe", "--bags", str(tmp_path / "bags"), "--level", "tile", "--folds", "2", "--json"]
    assert run_group(group, "lrmil", [*arguments, "--positive", "Tumour", "--replicates", "50", "--shots", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["methods"]["linear"]["auc"]["value"] > 0.95
    assert told["cases"] == 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --labels CSV"),
        (["--level", "tile", "--slide-encoder", "mean"], "is of slides"),
        (["--labels", "L", "--slide-encoder", "mean"], "no bag holds a vector called 'mean'"),
        (["--labels", "L", "--positive", "cat"], "there is no class 'cat'"),
        (["--level", "tile"], "a probe needs two"),
    ],
)
def test_mistakes_of_a_call(
    more: list[str],
    message: str,
    cohort: tuple[Path, Path, dict[str, NDArray[np.float32]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bags, labels, _ = cohort
    arguments = [str(labels) if word == "L" else word for word in more]
    assert run_group(group, "lrmil", ["probe", "--bags", str(bags), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bad_tables_of_vectors_name_their_row(
    cohort: tuple[Path, Path, dict[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    bags, labels, _ = cohort
    path = tmp_path / "v.csv"
    for text, message in (
        ("slide_id,f0\nslide00,1\nslide01,x\n", "row 3"),
        ("slide_id,f0\nslide00,nan\n", "NaN"),
        ("f0\n1\n", "no column slide_id"),
    ):
        path.write_text(text)
        with pytest.raises(LabelError, match=message):
            slide_samples(bags, labels, tmp_path / "s", table=path)


def test_vectors_made_in_different_ways_are_refused(
    cohort: tuple[Path, Path, dict[str, NDArray[np.float32]]], make_bag: MakeBag, tmp_path: Path
) -> None:
    bags, labels, _ = cohort
    list(pool_job(bags, "mean", name="v"))
    kept = (bags / "slide00.h5").read_bytes()
    list(pool_job(bags, "mean-spread", name="v"))
    (bags / "slide00.h5").write_bytes(kept)
    with pytest.raises(StoreError, match="different ways"):
        slide_samples(bags, labels, tmp_path / "s", slide_encoder="v")
