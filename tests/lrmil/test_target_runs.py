"""Runs of ``lrmil train`` whose target is no plain class, and cases, from the tables that laboratories have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lrmil.checkpoint import load_model, read_card
from lrmil.cli import group
from lrmil.config import ModelSettings, TrainSettings
from lrmil.data import load_labels
from lrmil.errors import LabelError, SettingsError
from lrmil.experiment import load_cohort
from lrmil.sites import tcga_case
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, StoreMeta, find_bags, pack_bags
from lrmil.store.joined import join_cases
from lrmil.targets import TargetTable, load_targets, parse_targets
from lrmil.targets.cox import Cox
from lrmil.trainer import train
from wsi_pipe.cli import run_group
from wsi_pipe.manifest import read_manifest

MakeBag = Callable[..., Path]
LINEAR = ["--model", "linear", "--pooling", "mean", "--device", "cpu", "--replicates", "50", "--folds", "2"]


def lrmil(*arguments: object) -> int:
    return run_group(group, "lrmil", [str(a) for a in arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def archive(bag_writer: MakeBag, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 slides of 24 patients called by TCGA barcodes, with STAMP's two tables; the first feature is the hazard."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(7)
    clini, slides = ["PATIENT,OS_MONTHS,OS_STATUS,AGE,SUBTYPE"], ["PATIENT,FILENAME"]
    for k in range(24):
        case, risk = f"TCGA-A{k % 3}-{k:04d}", float(rng.normal())
        for part in range(1 + (k % 2)):
            slide = f"{case}-01Z-00-DX{part + 1}"
            features = rng.normal(size=(12, 4)) + np.array([risk, 0, 0, 0])
            bag_writer(folder / "bags", slide, features.astype(np.float16))
            slides.append(f"{case},{slide}.svs")
        true, lost = rng.exponential(20 * np.exp(-risk)), rng.uniform(10, 60)
        status = "1:DECEASED" if true < lost else "0:LIVING"
        age = "" if k % 6 == 5 else f"{60 + 10 * risk:.1f}"
        subtype = "LumA" if risk + rng.normal() / 2 < 0 else ["LumB", "Basal"][k % 2]
        clini.append(f"{case},{min(true, lost):.2f},{status},{age},{subtype}")
    (folder / "clini.csv").write_text("\n".join(clini) + "\n")
    (folder / "slide.tsv").write_text("\n".join(slides).replace(",", "\t") + "\n")
    return folder


def test_survival_and_age_of_patients_from_training_to_prediction(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--bags", archive / "bags", "--labels", archive / "clini.csv", "--slide-table", archive / "slide.tsv"]
    survival = "os:survival:time=OS_MONTHS,event=OS_STATUS,horizons=12+36"
    asked = ["--target", survival, "--target", "age:regression", "--by", "case"]
    run = tmp_path / "run"
    assert lrmil("train", *data, *asked, *LINEAR, "-o", run) == 0
    told = capsys.readouterr()
    assert "24 cases as one bag each, 12 of them of several slides" in told.err
    assert "no case ids are known" not in told.err
    assert "age: 20 of 24 bags have a value" in told.err
    assert "os.concordance" in told.out
    assert "hazard ratio" in told.out
    rows = rows_of(run / "fold_1" / "predictions.csv")
    assert all(row["slide_id"] == row["case_id"] for row in rows)
    assert {"os_time", "os_event", "os_group", "os_risk", "os_survival_12", "os_survival_36", "age"} <= set(rows[0])
    tested = [
        r["case_id"] for k in (1, 2) for r in rows_of(run / f"fold_{k}" / "predictions.csv") if r["part"] == "test"
    ]
    assert len(tested) == len(set(tested)) == 24
    figures = json.loads((run / "fold_1" / "figures.json").read_text())
    assert figures["estimates"]["os.concordance"]["value"] > 0.6
    assert figures["estimates"]["age.pearson"]["value"] > 0.5
    assert {"os-survival.png", "age-agreement.png", "target.json"} <= {p.name for p in (run / "fold_1").iterdir()}
    card = read_card(run / "fold_1" / "model.safetensors")
    assert card.training["targets"] == [survival, "age:regression"]
    assert card.training["unit"] == "case"

    assert lrmil("evaluate", run, "--replicates", 50, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["folds"][0]["estimates"]["os.concordance"]["value"] == figures["estimates"]["os.concordance"]["value"]

    assert lrmil("compare", run, run, "--replicates", 50, "--json") == 0
    same = json.loads(capsys.readouterr().out)["differences"]["os.concordance"]
    assert (same["a"], same["value"]) == (again["mean"]["os.concordance"]["value"], 0)

    # The model on the same bags: all tiles of a patient at once, and each slide alone.
    out = tmp_path / "out"
    model = run / "fold_1" / "model.safetensors"
    assert lrmil("predict", "--model", model, "--bags", archive / "bags", "--case-from", "tcga", "-o", out) == 0
    assert len(rows_of(out / "predictions.csv")) == 36
    cases = {row["case_id"]: row for row in rows_of(out / "predictions-cases.csv")}
    assert {row["how"] for row in cases.values()} == {"joined"}
    for row in rows:
        assert float(cases[row["case_id"]]["os_risk"]) == pytest.approx(float(row["os_risk"]), abs=1e-4)
        assert float(cases[row["case_id"]]["age"]) == pytest.approx(float(row["age"]), abs=1e-3)
    slides = {row["slide_id"]: row for row in rows_of(out / "predictions.csv")}
    alone = rows_of(run / "fold_1" / "predictions-slides.csv")
    assert len(alone) == sum(int(cases[row["case_id"]]["slides"]) for row in rows)
    for row in alone:
        assert float(slides[row["slide_id"]]["os_risk"]) == pytest.approx(float(row["os_risk"]), abs=1e-4)
    assert slides["TCGA-A1-0001-01Z-00-DX1"]["os_risk"] != slides["TCGA-A1-0001-01Z-00-DX2"]["os_risk"]

    external = tmp_path / "external"
    splits = ["--splits", run / "splits.csv", "--fold", 1, "--replicates", 50, "--json"]
    assert lrmil("evaluate", "--model", model, *data, *splits, "-o", external) == 0
    found = json.loads((external / "figures.json").read_text())["estimates"]["os.concordance"]["value"]
    assert found == figures["estimates"]["os.concordance"]["value"]


def test_slides_that_disagree_are_averaged_by_patient(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--bags", archive / "bags", "--labels", archive / "clini.csv", "--case-from", "tcga"]
    renames = ["--map", "LumA=luminal", "--map", "LumB=luminal"]
    run = tmp_path / "run"
    assert lrmil("train", *data, *renames, *LINEAR, "-o", run) == 0
    assert "by case" in capsys.readouterr().out
    card = read_card(run / "fold_1" / "model.safetensors")
    assert card.classes == ("Basal", "luminal")
    slides = rows_of(run / "fold_1" / "predictions.csv")
    cases = {(row["case_id"], row["part"]): row for row in rows_of(run / "fold_1" / "predictions-cases.csv")}
    seen = 0
    for (case, part), row in cases.items():
        own = [s for s in slides if s["case_id"] == case and s["part"] == part]
        assert int(row["slides"]) == len(own)
        mean = np.mean([float(s["probability_luminal"]) for s in own])
        assert float(row["probability_luminal"]) == pytest.approx(mean, abs=1e-6)
        assert row["label"] == own[0]["label"]
        seen += len(own) > 1
    assert seen > 3
    figures = json.loads((run / "fold_1" / "figures.json").read_text())
    test = [row for (_, part), row in cases.items() if part == "test"]
    right = [(float(row["probability_luminal"]) > 0.5) == (row["label"] == "luminal") for row in test]
    assert figures["by_case"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    capsys.readouterr()
    assert lrmil("evaluate", run, "--positive", "Basal", "--replicates", 50, "--json") == 0
    turned = json.loads(capsys.readouterr().out)["folds"][0]["by_case"]
    assert turned["sensitivity"]["value"] == figures["by_case"]["specificity"]["value"]


def test_joined_bags_hold_the_tiles_of_a_patient_and_know_all_of_its_slides(archive: Path, tmp_path: Path) -> None:
    store = pack_bags(archive / "bags", None, None, tmp_path / "store")
    cohort = load_cohort(store, archive / "clini.csv", targets=["age:regression"], case_from="tcga", unit="case")
    assert len(cohort.store) == 24
    slides = [i for i, slide in enumerate(store.slide_ids) if slide.startswith("TCGA-A1-0001")]
    place = cohort.store.slide_ids.index("TCGA-A1-0001")
    np.testing.assert_array_equal(cohort.store.bag(place), np.concatenate([store.bag(i) for i in slides]))
    assert len(cohort.store.records[place].slide_fingerprint.split()) == 2
    assert np.shares_memory(cohort.store.flat, store.flat)
    # Slides that are no neighbours are copied, and still in the patient's bag.
    mixed = [f"p{i % 2}" for i in range(len(store))]
    joined, places = join_cases(store, mixed)
    np.testing.assert_array_equal(joined.bag(1), np.concatenate([store.bag(i) for i in places[1]]))
    assert joined.content_hash != store.content_hash != cohort.store.content_hash


def test_patients_of_barcodes() -> None:
    assert tcga_case("TCGA-A1-A0SB-01Z-00-DX1.svs") == "TCGA-A1-A0SB"
    assert tcga_case("tcga-a1-a0sb") == "TCGA-A1-A0SB"
    assert tcga_case("slide-1") == ""
    store = FeatureStore.from_arrays([np.ones((2, 3))], ["slide-1"])
    with pytest.raises(LabelError, match="no slide is called by a TCGA barcode"):
        load_cohort(store, Path("labels.csv"), case_from="tcga")


def test_one_table_holds_slides_labels_and_settings(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs", "c.svs"):
        (tmp_path / name).write_bytes(b"slide")
    path = tmp_path / "all.csv"
    path.write_text("slide,P_ID,mpp,subtype\na.svs,p1,0.5,LumA\nb.svs,p1,0.5,LumA\nc.svs,p2,0.25,Basal\n")
    entries = read_manifest(path)
    assert [(entry.slide_id, entry.mpp) for entry in entries] == [
        ("a", (0.5, 0.5)),
        ("b", (0.5, 0.5)),
        ("c", (0.25, 0.25)),
    ]
    assert [entry.case_id for entry in entries] == ["p1", "p1", "p2"]
    table = load_labels(path, ["a", "b", "c"])
    assert table.classes == ("Basal", "LumA")
    assert table.case_ids == ("p1", "p1", "p2")


# Training by steps


def cohort(count: int, seed: int = 0) -> tuple[FeatureStore, np.ndarray]:
    """Bags whose first feature is the logarithm of the hazard, and their times and events."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=count)
    arrays = [(rng.normal(size=(6, 3)) + np.array([r, 0, 0])).astype(np.float32) for r in risk]
    true, lost = rng.exponential(np.exp(-1.5 * risk)), rng.uniform(0.5, 4, size=count)
    store = FeatureStore.from_arrays(arrays, meta=StoreMeta("net", "ab" * 32, "5x", 2.0, 256))
    return store, np.stack([np.minimum(true, lost), true <= lost], axis=1).astype(float)


def survival_table(store: FeatureStore, truth: np.ndarray) -> TargetTable:
    target = Cox("os")
    names, strata = target.strata(truth)
    return TargetTable(names, strata, store.slide_ids, np.arange(len(store)), target=target, truth=truth)


SMALL = TrainSettings(
    model=ModelSettings("mean", hidden=8, dropout=0.0),
    epochs=12,
    learning_rate=0.01,
    small_cohorts="off",
    device="cpu",
    precision="float32",
    targets=("os:survival",),
)


def test_cox_learns_in_steps_of_one_bag_and_a_run_that_stops_goes_on(tmp_path: Path) -> None:
    store, truth = cohort(70)
    every = np.arange(70)
    split, table = FoldIndices(every[:40], every[40:55], every[55:]), survival_table(store, truth)
    settings = replace(SMALL, max_bags=1)
    whole = train(store, table, split, settings, tmp_path / "whole")
    assert whole.card.metrics["test_concordance"] > 0.7
    assert [row["val_concordance"] is not None for row in whole.history] == [True] * len(whole.history)

    class StoppedError(Exception):
        pass

    def stop(row: object) -> None:
        if row["epoch"] == 5:  # type: ignore[index]
            raise StoppedError

    with pytest.raises(StoppedError):
        train(store, table, split, settings, tmp_path / "part", progress=stop)
    resumed = train(store, table, split, settings, tmp_path / "part")
    assert resumed.predictions == whole.predictions
    _, card = load_model(tmp_path / "whole" / "model.safetensors")
    assert card.target == whole.card.target
    assert card.classes == ("os_log_hazard",)


def test_what_does_not_go_with_a_target_is_refused() -> None:
    store, truth = cohort(30)
    every = np.arange(30)
    split, table = FoldIndices(every[:20], every[20:25], every[25:]), survival_table(store, truth)
    with pytest.raises(SettingsError, match="clam-sb clusters tiles by the bag's class"):
        train(store, table, split, replace(SMALL, model=ModelSettings("clam-sb")))
    with pytest.raises(SettingsError, match="auc is no figure of this target"):
        train(store, table, split, replace(SMALL, monitor="auc"))


def test_targets_and_label_columns_do_not_go_together(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--bags", archive / "bags", "--labels", archive / "clini.csv", "-o", tmp_path / "run"]
    assert lrmil("train", *data, "--target", "age:regression", "--label-column", "AGE") == 2
    assert "--target NAME:KIND:column=COLUMN" in capsys.readouterr().err
    assert (
        lrmil("split", "--labels", archive / "clini.csv", "--target", "age:regression", "-o", tmp_path / "s.csv") == 0
    )
    assert len(rows_of(tmp_path / "s.csv")) == 20
    assert find_bags(archive / "bags")
    assert load_targets(
        archive / "clini.csv", ["x"], ["TCGA-A0-0000"], parse_targets(["age:regression"])
    ).usable.tolist() == [0]
