"""No route by which a model is judged on cases that it, its teacher or its encoder has seen passes in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from lrmil.checkpoint import load_model, save_model
from lrmil.cli import group
from lrmil.splits import SplitTable
from tests.lrmil.conftest import MakeBag
from wsi_pipe.cli import run_group
from wsi_pipe.seen import Seen, case_mark, slide_mark

CASES = [f"case{i}" for i in range(24)]
PARTS = ["train"] * 12 + ["val"] * 6 + ["test"] * 6


def lrmil(*arguments: object) -> int:
    return run_group(group, "lrmil", [str(a) for a in arguments])


@pytest.fixture
def cohort(make_bag: MakeBag, tmp_path: Path) -> Path:
    """24 cases of a slide each; fold 1 tests the last six, fold 2 the first six."""
    rng = np.random.default_rng(0)
    for i, case in enumerate(CASES):
        make_bag(f"s{i}", (rng.normal(size=(6, 8)) + 2 * (i % 2)).astype(np.float32), case_id=case, deep=True)
    rows = "".join(f"s{i},{case},{('no', 'yes')[i % 2]}\n" for i, case in enumerate(CASES))
    (tmp_path / "labels.csv").write_text("slide_id,case_id,label\n" + rows)
    folds = {"fold_1": tuple(PARTS), "fold_2": tuple(reversed(PARTS))}
    SplitTable("case", tuple(CASES), folds).write(tmp_path / "splits.csv")  # type: ignore[arg-type]
    return tmp_path


def train(cohort: Path, out: str, *more: object, level: str = "5x") -> int:
    data = ("--bags", cohort / "bags", "--labels", cohort / "labels.csv", "-r", level)
    small = ("--epochs", 2, "--hidden", 8, "--replicates", 20, "--device", "cpu", "--precision", "float32")
    return lrmil("train", *data, "--splits", cohort / "splits.csv", *small, "-o", cohort / out, *more)


def evaluate(cohort: Path, model: Path, *more: object) -> int:
    data = ("--bags", cohort / "bags", "--labels", cohort / "labels.csv", "--replicates", 20)
    return lrmil("evaluate", "--model", model, *data, "-o", cohort / "external", *more)


def mark_encoder(cohort: Path, saw: dict[int, str]) -> None:
    """As extraction marks features of an encoder that saw slides."""
    for i, part in saw.items():
        with h5py.File(cohort / "bags" / f"s{i}.h5", "r+") as file:
            file["levels/5x/features/net"].attrs["encoder_saw"] = part


def test_a_model_is_not_evaluated_on_what_it_was_trained_on(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cohort, "run", "--fold", 1) == 0
    model = cohort / "run" / "fold_1" / "model.safetensors"
    capsys.readouterr()
    assert evaluate(cohort, model) == 2
    said = capsys.readouterr().err
    assert "was trained on 12 of them: s0, s1, s10, s11, s2, ...; and stopped or calibrated by 6 of them" in said
    assert not (cohort / "external" / "predictions.csv").exists()
    # The other fold's test cases are this one's training cases.
    assert evaluate(cohort, model, "--splits", cohort / "splits.csv", "--fold", 2) == 2
    assert "was trained on 6 of them: s0" in capsys.readouterr().err
    assert evaluate(cohort, model, "--splits", cohort / "splits.csv", "--fold", 1) == 0
    assert evaluate(cohort, model, "--allow-seen") == 0
    assert "allowed: the model" in capsys.readouterr().err
    notes = json.loads((cohort / "external" / "figures.json").read_text())["notes"]
    assert len(notes) == 1
    assert "trained on 12 of them" in notes[0]


def test_a_new_name_hides_nothing(cohort: Path, make_bag: MakeBag, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cohort, "run", "--fold", 1) == 0
    rng = np.random.default_rng(1)
    # s0 under another slide id and case, with its own pixels; and new pixels of a case that was seen.
    for name, case, same_slide in (("renamed", "stranger", "s0"), ("second-look", "CASE1", "x"), ("new", "z", "y")):
        path = make_bag(name, rng.normal(size=(6, 8)).astype(np.float32), case_id=case, folder="others")
        with h5py.File(path, "r+") as file, h5py.File(cohort / "bags" / "s0.h5") as first:
            if same_slide == "s0":
                file.attrs["slide_fingerprint"] = first.attrs["slide_fingerprint"]
    labels = cohort / "others.csv"
    labels.write_text("slide_id,label\nrenamed,yes\nsecond-look,no\nnew,yes\n")
    arguments = ("--model", cohort / "run" / "fold_1" / "model.safetensors", "--bags", cohort / "others")
    capsys.readouterr()
    assert lrmil("evaluate", *arguments, "--labels", labels, "-o", cohort / "external") == 2
    assert "trained on 2 of them: renamed, second-look;" in capsys.readouterr().err


def test_features_of_an_encoder_that_saw_test_cases_are_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The encoder of fold 1 saw its training cases, without labels: fine there, and a leak in every other fold.
    mark_encoder(cohort, dict.fromkeys(range(12), "unlabelled"))
    assert train(cohort, "all-folds") == 2
    said = capsys.readouterr().err
    assert "whose features these fold_2 val slides have" in said
    assert "distilled from, without labels, 6 of them" in said
    assert "--fold" in said
    assert not (cohort / "all-folds" / "fold_1").exists()
    assert train(cohort, "own-fold", "--fold", 1) == 0
    assert train(cohort, "allowed", "--fold", 2, "--allow-seen") == 0
    card = load_model(cohort / "allowed" / "fold_2" / "model.safetensors")[1]
    assert any("distilled from" in note for note in card.allowed)
    # The same bags under a model that never saw them.
    mark_encoder(cohort, {20: "train"})
    capsys.readouterr()
    model = cohort / "own-fold" / "fold_1" / "model.safetensors"
    assert evaluate(cohort, model, "--splits", cohort / "splits.csv", "--fold", 1) == 2
    assert "was trained on 1 of them: s20" in capsys.readouterr().err


def test_a_teacher_away_from_its_splits_is_judged_by_its_file(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cohort, "teacher", "--fold", 1, level="20x") == 0
    lonely = cohort / "else" / "where" / "lonely.safetensors"
    lonely.parent.mkdir(parents=True)
    module, card = load_model(cohort / "teacher" / "fold_1" / "model.safetensors")
    save_model(lonely, module, card)
    capsys.readouterr()
    # Its card names fold 1, and in fold 2 it has seen the test cases.
    student = ("--teacher", lonely, "--teacher-bags", cohort / "bags")
    assert train(cohort, "student", "--fold", 2, *student) == 2
    assert "the teacher" in (said := capsys.readouterr().err)
    assert "was trained on 6 of them" in said
    # One from before there were records is not believed without splits beside it, whatever fold it names.
    save_model(lonely, module, dataclasses.replace(card, seen=Seen()))
    assert train(cohort, "student", "--fold", 1, *student) == 2
    assert "does not say whom it was trained on" in capsys.readouterr().err


def test_a_student_has_seen_whom_its_teacher_saw(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cohort, "teacher", "--fold", 1, "--model", "gated-abmil", level="20x") == 0
    path = cohort / "teacher" / "fold_1" / "model.safetensors"
    module, card = load_model(path)
    # Of another cohort: none of the student's cases, which is why it may teach.
    save_model(path, module, dataclasses.replace(card, seen=card.seen | Seen.of({"train": [("far", "f" * 64)]})))
    student = ("--teacher", cohort / "teacher", "--teacher-bags", cohort / "bags")
    assert train(cohort, "student", "--fold", 1, *student) == 0
    seen = load_model(cohort / "student" / "fold_1" / "model.safetensors")[1].seen
    assert (seen.part_of("far", None), seen.part_of("z", "f" * 64)) == ("train", "train")
    assert (seen.part_of("case0", None), seen.part_of("case12", None), seen.part_of("case20", None)) == (
        "train",
        "val",
        "",
    )


def test_runs_on_edited_splits_are_not_compared(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cohort, "a", "--fold", 1) == 0
    assert train(cohort, "b", "--fold", 1, "--seed", 1) == 0
    assert lrmil("compare", cohort / "a", cohort / "b", "--replicates", 20) == 0
    # Predictions that were relabelled afterwards: validation cases that call themselves a test.
    for run in ("a", "b"):
        table = cohort / run / "fold_1" / "predictions.csv"
        table.write_text(table.read_text().replace(",val,", ",test,"))
    capsys.readouterr()
    assert lrmil("compare", cohort / "a", cohort / "b", "--replicates", 20) == 2
    assert "stopped or calibrated by 6 of them" in capsys.readouterr().err
    assert lrmil("compare", cohort / "a", cohort / "b", "--replicates", 20, "--allow-seen") == 0


def test_marks_hold_no_names_and_come_back() -> None:
    seen = Seen.of({"train": [("Ärztin-7", "f" * 64)], "val": [("b", "")], "unlabelled": []})
    text = json.dumps(seen.to_json())
    assert "rztin" not in text
    assert "ffff" not in text
    assert Seen.from_json(json.loads(text)).part_of("A\u0308RZTIN-7", None) == "train"
    assert seen.part_of(None, "f" * 64) == "train"
    assert (seen.part_of("b", None), seen.part_of("c", "e"), bool(Seen())) == ("val", "", False)
    assert case_mark("x") != slide_mark("x")
    for damaged in ({"cases": {"train": 3}}, {"cases": ["a"]}, {"cases": {"nowhere": ["a"]}}):
        with pytest.raises(ValueError, match="record of who was seen"):
            Seen.from_json(damaged)
