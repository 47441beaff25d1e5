"""``lrmil`` from Python: the models, figures and requests of the command line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lrmil
import lrmil.distill.call
import wsi_pipe as wp
from lrmil.cli import group
from lrmil.distill import DistillRequest, DistillResult
from lrmil.errors import BagMismatchError, LabelError, LeakageError, ModelMismatchError
from wsi_pipe.cli import run_group
from wsi_pipe.errors import ConfigError, SlideError

MakeBag = Callable[..., Path]
QUICK: dict[str, Any] = {"epochs": 2, "hidden": 8, "attention_dim": 4, "replicates": 20, "model": "gated-abmil"}


@pytest.fixture(scope="module")
def cohort(bag_writer: MakeBag, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Twelve bags of two classes that differ in their features, at 5x and finer."""
    root = tmp_path_factory.mktemp("api")
    rng = np.random.default_rng(0)
    labels = {}
    for number in range(12):
        name = f"s{number:02d}"
        labels[name] = "ab"[number % 2]
        features = (rng.normal(size=(6, 8)) + 2 * (number % 2)).astype(np.float32)
        bag_writer(root / "bags", name, features, deep=True)
    return root / "bags", labels


def test_training_is_that_of_the_command_line(cohort: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    bags, labels = cohort
    model = lrmil.train(bags, labels, tmp_path / "own", resolution="5x", folds=3, fold=2, **QUICK)
    table = tmp_path / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "label"), *labels.items()])
    options = ["-r", "5x", "--folds", "3", "--fold", "2", "--epochs", "2", "--hidden", "8"]
    options += ["--model", "gated-abmil", "--replicates", "20"]
    settings = tmp_path / "settings.toml"
    settings.write_text("[model]\nattention_dim = 4\n")
    command = ["train", "--bags", bags, "--labels", table, "-o", tmp_path / "cli", "--config", settings, *options]
    assert run_group(group, "lrmil", [*map(str, command)]) == 0
    for name in ("predictions.csv", "config.toml", "figures.json"):
        own, other = ((tmp_path / run / "fold_2" / name).read_text() for run in ("own", "cli"))
        assert own == other, name
    assert model.path == tmp_path / "own" / "fold_2" / "model.safetensors"
    assert model.classes == ("a", "b")
    assert model.figures is not None
    assert model.figures.folds[0].slides == 4
    assert "gated-abmil" in repr(model)
    assert "auc" in model._repr_html_()

    # Another fold goes beside it, and the run is judged as the command line does.
    lrmil.train(bags, labels, tmp_path / "own", resolution="5x", folds=3, fold=1, **QUICK)
    figures = lrmil.evaluate(tmp_path / "own", replicates=20)
    assert [fold.name for fold in figures.folds] == ["fold_1", "fold_2"]
    with pytest.raises(ConfigError, match="holds other folds"):
        lrmil.train(bags, labels, tmp_path / "own", resolution="5x", folds=2, **QUICK)


def test_labels_come_as_table_mapping_or_frame(cohort: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    import pandas as pd

    bags, labels = cohort
    columns = {"slide_id": [*labels, "elsewhere"], "case_id": [*labels, "x"], "label": [*labels.values(), None]}
    frame = pd.DataFrame(columns)
    told: list[str] = []
    one = lrmil.train(bags, frame, tmp_path / "a", resolution="5x", folds=2, say=told.append, **QUICK)
    two = lrmil.train(str(bags), labels, str(tmp_path / "b"), resolution=2.0, folds=2, **QUICK)
    assert (tmp_path / "a/fold_1/predictions.csv").read_text() == (tmp_path / "b/fold_1/predictions.csv").read_text()
    assert one.card.classes == two.card.classes
    with pytest.raises(ConfigError, match="a list holds no labels"):
        lrmil.train(bags, ["a", "b"], tmp_path / "c")
    with pytest.raises(LabelError, match="no bag has a label"):
        lrmil.train(bags, {"other": "a"}, tmp_path / "c", resolution="5x")


def test_settings_go_by_name(cohort: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    bags, labels = cohort
    out = tmp_path / "run"
    base = lrmil.TrainSettings(epochs=1, seed=3)
    model = lrmil.train(
        bags, labels, out, resolution="5x", folds=2, settings=base, model="mean", hidden=4, replicates=20
    )
    assert (model.card.model.name, model.card.model.hidden, model.card.training["seed"]) == ("mean", 4, 3)
    for options, text in (
        ({"epoch": 3}, "there is no setting 'epoch'"),
        ({"epochs": "many"}, "is not a valid int"),
        ({"soft": 0.5}, "no teacher"),
        ({"model": "resnet"}, "no model is called 'resnet'"),
    ):
        with pytest.raises(ConfigError, match=text):
            lrmil.train(bags, labels, tmp_path / "none", resolution="5x", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "none").exists()
    with pytest.raises(BagMismatchError):
        lrmil.train(bags, labels, tmp_path / "none", resolution="7x", **QUICK)


def test_a_student_learns_from_a_teacher_of_the_same_folds(cohort: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    bags, labels = cohort
    splits = lrmil.make_splits(labels, folds=3, seed=1)
    splits.write(tmp_path / "splits.csv")
    teacher = lrmil.train(bags, labels, tmp_path / "hr", resolution="10x", splits=splits, **QUICK)
    student = lrmil.train(
        bags, labels, tmp_path / "lr", resolution="5x", splits=tmp_path / "splits.csv", teacher=teacher, **QUICK
    )
    assert student.card.teacher
    assert student.card.level == "5x"
    # Of other folds it has seen whom the student is tested on.
    with pytest.raises(LeakageError):
        lrmil.train(bags, labels, tmp_path / "x", resolution="5x", folds=2, split_seed=5, teacher=teacher, **QUICK)
    with pytest.raises(LeakageError):
        lrmil.evaluate(student, bags, labels, tmp_path / "judged", replicates=20)
    figures = lrmil.evaluate(student, bags, labels, tmp_path / "judged", splits=splits, fold=1, replicates=20)
    assert figures.folds[0].slides == 4
    assert (tmp_path / "judged" / "predictions.csv").is_file()
    with pytest.raises(ConfigError, match="give bags, labels and out"):
        lrmil.evaluate(student)


@pytest.fixture(scope="module")
def trained(distill_cohort: Path) -> lrmil.Model:
    return lrmil.train(
        distill_cohort / "job" / "bags",
        distill_cohort / "slides" / "labels.csv",
        distill_cohort / "run",
        resolution="5x",
        encoder="texture",
        folds=2,
        val_fraction=0.0,
        **QUICK,
    )


@pytest.mark.slow
def test_a_slide_is_predicted_as_its_bag_is(distill_cohort: Path, trained: lrmil.Model, tmp_path: Path) -> None:
    slides = sorted((distill_cohort / "slides").glob("*.tif"))
    bags = [distill_cohort / "job" / "bags" / f"{path.stem}.h5" for path in slides]
    of_bag = trained.predict(bags[0])
    of_slide = trained.predict(str(slides[0]))
    assert isinstance(of_bag, lrmil.SlidePrediction)
    assert isinstance(of_slide, lrmil.SlidePrediction)
    assert of_slide.probabilities == of_bag.probabilities
    assert of_slide.predicted in trained.classes
    assert of_slide.attention is not None
    assert of_slide.attention.sum() == pytest.approx(1, abs=1e-5)
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no slide")
    with wp.open(slides[2]) as opened:
        several = trained.predict([bags[1], slides[0], bad, opened], job=tmp_path / "job")
    assert isinstance(several, list)
    assert [(p.slide_id, p.status) for p in several] == [
        (slides[1].stem, "done"), (slides[0].stem, "done"), ("bad", "failed"), (slides[2].stem, "done"),
    ]  # fmt: skip
    assert several[1].probabilities == of_bag.probabilities
    assert (tmp_path / "job" / "bags" / f"{slides[0].stem}.h5").is_file()
    with pytest.raises(SlideError):
        trained.predict(bad)
    with pytest.raises(SlideError, match="given twice"):
        trained.predict([slides[0], slides[0]])
    with pytest.raises(ModelMismatchError, match="level 20x"):
        trained.predict(bags[0], resolution="20x")


def test_a_heatmap_lies_over_the_slide(distill_cohort: Path, trained: lrmil.Model) -> None:
    slide_path = sorted((distill_cohort / "slides").glob("*.tif"))[0]
    bag = distill_cohort / "job" / "bags" / f"{slide_path.stem}.h5"
    prediction = trained.predict(bag)
    assert isinstance(prediction, lrmil.SlidePrediction)
    with wp.open(slide_path) as slide:
        over = trained.heatmap(prediction, slide)
    assert over is not None
    assert over.shape[2] == 3
    # Where tiles with tissue are the stain is tinted, and nothing else is touched; below it is the panel.
    held = wp.open_bag(bag)
    with wp.open(slide_path) as slide:
        plain = np.asarray(Image.fromarray(slide.thumbnail(2000)).resize((over.shape[1], over.shape[1]), 3))
    changed = np.abs(over[: over.shape[1]].astype(int) - plain).max(axis=2) > 12
    side = np.asarray(held["5x"].tile_size_l0) * over.shape[1] / held.size[0]
    assert prediction.coords is not None
    assert 0.3 < changed.sum() / (len(prediction.coords) * side.prod()) <= 1
    assert over.shape[0] > over.shape[1]
    assert trained.heatmap(prediction) is not None


def test_distil_asks_for_what_the_command_line_asks(
    distill_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[DistillRequest] = []

    class AskedError(Exception):
        pass

    def note(request: DistillRequest, progress: object = None) -> DistillResult:
        asked.append(request)
        raise AskedError

    monkeypatch.setattr("lrmil.distill.run_distillation", note)
    monkeypatch.setattr("lrmil.distill.call.run_distillation", note)
    bags, slides, out = distill_cohort / "job/bags", distill_cohort / "slides/slides.csv", tmp_path / "lr.safetensors"
    labels = distill_cohort / "slides/labels.csv"
    for options, call in (
        ("--all", {"everything": True}),
        ("--all --layers none --jitters 2 --epochs 3", {"everything": True, "layers": (), "jitters": 2, "epochs": 3}),
        ("--all -r 20x -r 10x --student timm:x --student-px 32 --targets compute",
         {"everything": True, "resolutions": (0.5, "10x"), "student": "timm:x", "student_px": 32, "compute": True}),
    ):  # fmt: skip
        command = ["distill", "--bags", bags, "--slides", slides, "--labels", labels, "--teacher", "texture", "-o", out]
        with pytest.raises(AskedError):
            run_group(group, "lrmil", [*map(str, command), *options.split()])
        with pytest.raises(AskedError):
            lrmil.distill(str(bags), out, teacher="texture", slides=slides, labels=labels, **call)
        one, two = asked[-2:]
        assert one == two
    for call in ({}, {"everything": True, "cases": ["a"]}, {"fold": 1}, {"cases": ()}):
        with pytest.raises(ConfigError, match="whom the student may see is not clear"):
            lrmil.distill(bags, out, teacher="texture", **call)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown setting 'epoch'"):
        lrmil.distill(bags, out, teacher="texture", everything=True, epoch=1)
    with pytest.raises(AskedError):
        lrmil.distill(bags, out, teacher="texture", cases=["case-of-nobody"])
    assert asked[-1].only_cases == ("case-of-nobody",)
