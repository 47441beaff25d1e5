"""The commands from bags to predictions, their exit codes, and their one-line errors."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lrmil.checkpoint import ModelCard, read_card, save_model
from lrmil.cli import group
from lrmil.config import ModelSettings
from lrmil.experiment import evaluate_run
from lrmil.model import build_model
from wsi_pipe.bag import check_bag
from wsi_pipe.cli import run_group
from wsi_pipe.errors import in_words

MakeBag = Callable[..., Path]
SMALL = [
    "--model",
    "gated-abmil",
    "--small-cohorts",
    "off",
    "--epochs",
    "3",
    "--hidden",
    "16",
    "--replicates",
    "50",
    "--learning-rate",
    "0.01",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def cohort_files(bag_writer: MakeBag, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four slides of eighteen cases; in "tumour" slides a fifth of the tiles have a shifted feature."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        case, label = f"p{i % 18}", ["benign", "tumour"][(i % 18) % 2]
        features = rng.normal(size=(10 + i % 5, 8))
        if label == "tumour":
            features[:3, 0] += 4.0
        bag_writer(folder / "bags", f"s{i}", features.astype(np.float16), case_id=case, deep=True)
        rows.append(f"s{i},{case},{label}")
    bag_writer(folder / "bags", "blank", np.zeros((0, 8), np.float16), case_id="p99", deep=True)
    rows += ["blank,p99,benign", "lost,p98,tumour"]
    (folder / "labels.csv").write_text("slide_id,case_id,label\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def cohort(cohort_files: Path, tmp_path: Path) -> Path:
    """A copy of the cohort to work in."""
    return shutil.copytree(cohort_files, tmp_path / "cohort")


def lrmil(*arguments: object) -> int:
    return run_group(group, "lrmil", [str(a) for a in arguments])


def trained(cohort: Path, out: str = "run", *more: object) -> Path:
    base = ["--bags", cohort / "bags", "--labels", cohort / "labels.csv", "-o", cohort / out, "--folds", 2]
    assert lrmil("train", *base, *SMALL, *more) == 0
    return cohort / out


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_train_evaluate_compare_predict(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(cohort, "run", "-r", "5x")
    told = capsys.readouterr()
    assert "1 in the labels but without a bag: lost" in told.err
    assert "1 without tiles: blank (no tissue found)" in told.err
    for name in ("model.safetensors", "predictions.csv", "figures.json", "roc.png", "calibration.png"):
        assert (run / "fold_1" / name).stat().st_size > 0
    assert {"confusion.png", "curves.png"} <= {p.name for p in (run / "fold_2").iterdir()}
    tested = [
        r["slide_id"] for k in (1, 2) for r in rows_of(run / f"fold_{k}" / "predictions.csv") if r["part"] == "test"
    ]
    assert sorted(tested) == sorted(f"s{i}" for i in range(24))

    assert lrmil("evaluate", run, "--replicates", 50, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    fold_aucs = [fold["estimates"]["auc"]["value"] for fold in figures["folds"]]
    assert figures["mean"]["auc"]["value"] == pytest.approx(np.mean(fold_aucs))

    other = trained(cohort, "other", "-r", "5x", "--model", "mean")
    capsys.readouterr()
    assert lrmil("compare", run, other, "--replicates", 50, "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["slides"] == 24
    assert compared["differences"]["auc"]["a"] == pytest.approx(figures["mean"]["auc"]["value"])
    assert set(compared["delong"]) == {"fold_1", "fold_2"}
    assert lrmil("compare", run, run) == 0
    assert "A - B" in capsys.readouterr().out

    model = run / "fold_1" / "model.safetensors"
    arguments = ["--bags", cohort / "bags", "-o", cohort / "out", "--geojson", "--attention", "--name", "m"]
    assert lrmil("predict", "--model", model, *arguments) == 0
    got = {row["slide_id"]: row for row in rows_of(cohort / "out" / "predictions.csv")}
    assert got["blank"]["status"] == "empty"
    assert got["blank"]["reason"] == "no tissue found"
    for row in rows_of(run / "fold_1" / "predictions.csv"):
        # Predicting from the bags gives what training has noted down for the test cases.
        assert float(got[row["slide_id"]]["probability_tumour"]) == pytest.approx(
            float(row["probability_tumour"]), abs=1e-5
        )
    with h5py.File(cohort / "bags" / "s1.h5") as file:
        attention = file["levels/5x/attention/m"][()]
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert check_bag(cohort / "bags" / "s1.h5") == []
    slides = {s["slide_id"]: s for s in json.loads((cohort / "out" / "predictions.json").read_text())["slides"]}
    assert slides["s1"]["top_tiles"][0]["row"] == int(attention.argmax())
    shapes = json.loads((cohort / "out" / "geojson" / "s1.geojson").read_text())["features"]
    assert [f["properties"]["measurements"]["m attention"] for f in shapes] == pytest.approx(attention.tolist())
    assert (cohort / "out" / "heatmaps" / "s1.png").stat().st_size > 0


def test_external_evaluation_equals_the_runs_own(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(cohort, "run", "-r", "5x", "--fold", 2)
    capsys.readouterr()
    data = ["--bags", cohort / "bags", "--labels", cohort / "labels.csv"]
    fold = ["--splits", run / "splits.csv", "--fold", 2, "--replicates", 50, "--json"]
    model = run / "fold_2" / "model.safetensors"
    assert lrmil("evaluate", "--model", model, *data, *fold, "-o", cohort / "external") == 0
    external = json.loads(capsys.readouterr().out)["folds"][0]["estimates"]["loss"]["value"]
    own = json.loads((run / "fold_2" / "figures.json").read_text())["estimates"]["loss"]["value"]
    assert external == pytest.approx(own, abs=1e-5)


@pytest.mark.slow
def test_student_of_a_teacher_needs_no_high_resolution_to_predict(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = trained(cohort, "teacher", "-r", "20x", "--fold", 1)
    folds = ["--splits", teacher / "splits.csv", "--fold", 1]
    student = trained(cohort, "student", "-r", "5x", "--teacher", teacher, *folds)
    header = (student / "fold_1" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_bag", "train_soft", "train_hard"} <= set(header)
    for path in (cohort / "bags").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            del file["levels/20x"], file["levels/10x"]
    (student / "store-teacher" / "features.bin").unlink()
    model = student / "fold_1" / "model.safetensors"
    assert lrmil("predict", "--model", model, "--bags", cohort / "bags", "-o", cohort / "out") == 0


def test_a_teacher_that_saw_the_test_cases_is_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = trained(cohort, "teacher", "-r", "20x", "--fold", 2)
    capsys.readouterr()
    base = ["--bags", cohort / "bags", "--labels", cohort / "labels.csv", "-r", "5x", "-o", cohort / "student"]
    swapped = ["--teacher", teacher / "fold_2" / "model.safetensors", "--splits", teacher / "splits.csv", "--fold", 1]
    assert lrmil("train", *base, *SMALL, *swapped) == 2
    assert "was trained on" in capsys.readouterr().err
    assert not (cohort / "student" / "fold_1").exists()


@pytest.mark.slow
def test_seeds_share_a_run(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(cohort, "run", "-r", "5x", "--fold", 1, "--seed", 3, "--seed", 4)
    assert sorted(p.name for p in run.glob("fold*")) == ["fold_1-seed_3", "fold_1-seed_4"]
    logits = [[row["logit_tumour"] for row in rows_of(p / "predictions.csv")] for p in sorted(run.glob("fold*"))]
    assert logits[0] != logits[1]
    alone = trained(cohort, "alone", "-r", "5x", "--fold", 1, "--seed", 4)
    assert [row["logit_tumour"] for row in rows_of(alone / "fold_1" / "predictions.csv")] == logits[1]
    capsys.readouterr()
    assert lrmil("compare", run, run, "--replicates", 20, "--json") == 0
    assert json.loads(capsys.readouterr().out)["delong_mean"] is None


def test_split_and_pack(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = cohort / "splits.csv"
    assert lrmil("split", "--labels", cohort / "labels.csv", "-o", splits, "--folds", 3, "--seed", 4) == 0
    rows = rows_of(splits)
    assert len(rows) == 20
    assert set(rows[0]) == {"case_id", "fold_1", "fold_2", "fold_3"}
    store = cohort / "store"
    assert lrmil("pack", "--bags", cohort / "bags", "-r", "20x", "-o", store, "--parents", "5x") == 0
    assert "no tiles: blank" in capsys.readouterr().err
    out = ["-o", cohort / "run", "--splits", splits, "--fold", 2]
    assert lrmil("train", "--bags", store, "--labels", cohort / "labels.csv", *out, *SMALL) == 0
    assert [p.name for p in (cohort / "run").glob("fold_*")] == ["fold_2"]


def test_bags_of_another_kind_are_refused_by_name(
    cohort: Path, make_bag: MakeBag, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(cohort, "run", "-r", "5x", "--fold", 1)
    capsys.readouterr()
    features = np.zeros((3, 8), np.float16)
    good = make_bag("good", features, folder="mixed")
    make_bag("other", features, weights="cd" * 32, folder="mixed")
    model = run / "fold_1" / "model.safetensors"
    assert lrmil("predict", "--model", model, "--bags", good.parent, "-o", cohort / "out") == 1
    told = capsys.readouterr()
    assert "other: failed" in told.err
    assert "encoder weights cdcdcdcdcdcd" in told.err
    got = {row["slide_id"]: row["status"] for row in rows_of(cohort / "out" / "predictions.csv")}
    assert got == {"good": "done", "other": "failed"}


@pytest.mark.parametrize("tool", ["trident", "clam", "stamp"])
def test_bags_of_other_tools_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "bags").mkdir()
    lines = ["slide_id,label"]
    for i in range(16):
        features = rng.normal(size=(1, 9, 6) if tool == "trident" else (9, 6)).astype(np.float32)
        features[..., :4, 0] += 3 * (i % 2)
        places = 512 * np.stack([np.arange(9) % 3, np.arange(9) // 3], axis=1)
        with h5py.File(tmp_path / "bags" / f"s{i}.h5", "w") as file:
            file["feats" if tool == "stamp" else "features"] = features
            file["coords"] = places[None] if tool == "trident" else places
            if tool == "trident":
                file["coords"].attrs.update(patch_size=256, patch_size_level0=512, target_magnification=20)
            if tool == "stamp":
                file.attrs.update(extractor="uni", unit="um", tile_size_um=128.0, tile_size_px=256)
        lines.append(f"s{i}.svs,{i % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    features_of = ["-r", "20x", "-e", "uni"]
    data = ["--bags", tmp_path / "bags", "--labels", tmp_path / "labels.csv", *features_of]
    assert lrmil("train", *data, "-o", tmp_path / "run", "--folds", 2, "--fold", 1, *SMALL) == 0
    assert "every slide counts as a case of its own" in capsys.readouterr().err
    model = tmp_path / "run" / "fold_1" / "model.safetensors"
    assert lrmil("predict", "--model", model, "--bags", tmp_path / "bags", "-o", tmp_path / "out") == 0
    got = {row["slide_id"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    for row in rows_of(tmp_path / "run" / "fold_1" / "predictions.csv"):
        assert float(got[row["slide_id"]]["probability_1"]) == pytest.approx(float(row["probability_1"]), abs=2e-3)
    assert (tmp_path / "out" / "heatmaps" / "s3.png").is_file()
    options = ["--bags", tmp_path / "bags", "-o", tmp_path / "other", "-e", "conch"]
    assert lrmil("predict", "--model", model, *options) == 1
    assert "conch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--bags", "BAGS", "--labels", "LABELS", "-o", "OUT", "-r", "40x"], "has no level '40x'"),
        (["train", "--bags", "BAGS", "--labels", "LABELS", "-o", "OUT", "-r", "5x", "--l-soft", "1"], "no teacher"),
        (["train", "--bags", "BAGS", "--labels", "LABELS", "-o", "OUT", "--dropout", "2"], "dropout 2.0 must be"),
        (["train", "--bags", "BAGS", "--labels", "LABELS", "-o", "OUT", "-r", "quick"], "'quick' is not understood"),
        (["split", "--labels", "LABELS", "-o", "OUT", "--folds", "50"], "too few for 50 folds"),
        (["evaluate", "BAGS"], "holds no predictions.csv"),
        (["evaluate"], "give a RUN, or --model"),
        (["predict", "--model", "LABELS", "--bags", "BAGS", "-o", "OUT"], "is no readable safetensors file"),
        (["predict", "--model", "LABELS", "-o", "OUT"], "give SLIDES, or --bags"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    cohort: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places: dict[str, Any] = {"BAGS": cohort / "bags", "LABELS": cohort / "labels.csv", "OUT": cohort / "out"}
    assert lrmil(*(places.get(a, a) for a in arguments)) == 2
    told = capsys.readouterr()
    assert message in told.err
    errors = [line for line in told.err.splitlines() if "rror:" in line]
    assert len(errors) == 1
    assert "Traceback" not in told.err


def test_help_starts_without_torch() -> None:
    code = "import sys, lrmil.cli as c, wsi_pipe.cli as w; w.run_group(c.group, 'lrmil', ['--help'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "predict" in done.stdout


def test_interrupted_is_130(cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(cohort, "run", "-r", "5x", "--fold", 1)
    from lrmil.predictor import Predictor

    real = Predictor.predict_bag
    asked: list[Path] = []

    def interrupt(self: Predictor, path: Path, **options: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(path)
        return real(self, path, **options)

    monkeypatch.setattr(Predictor, "predict_bag", interrupt)
    model = run / "fold_1" / "model.safetensors"
    assert lrmil("predict", "--model", model, "--bags", cohort / "bags", "-o", cohort / "out") == 130
    assert len(rows_of(cohort / "out" / "predictions.csv")) == 3


def test_other_folds_in_the_same_run_are_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(cohort, "run", "-r", "5x", "--fold", 1)
    base = ["--bags", cohort / "bags", "--labels", cohort / "labels.csv", "-r", "5x", "-o", run]
    capsys.readouterr()
    assert lrmil("train", *base, *SMALL, "--folds", 3) == 2
    assert "holds other folds" in capsys.readouterr().err


def test_features_of_random_weights_are_refused(
    make_bag: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    lines = ["slide_id,label"]
    for number in range(12):
        make_bag(
            f"s{number}",
            rng.normal(number % 2, 1, (6, 8)).astype(np.float16),
            encoder="uni-random",
            case_id=f"c{number}",
        )
        lines.append(f"s{number},{'ab'[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    call = ["train", "--bags", tmp_path / "bags", "--labels", tmp_path / "labels.csv", "--folds", 1, *SMALL]
    assert lrmil(*call, "-o", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "features of uni-random were made with random weights" in said
    assert "--allow-random" in said
    assert not (tmp_path / "run").exists()
    assert lrmil(*call, "-o", tmp_path / "run", "--allow-random") == 0
    card = read_card(tmp_path / "run/fold_1/model.safetensors")
    assert (card.weights, card.encoder) == ("random", "uni-random")


def test_a_failed_prediction_leaves_no_empty_folder(
    make_slide: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ModelSettings("gated-abmil", in_dim=8, classes=2, hidden=8, attention_dim=4)
    card = ModelCard(settings, ("a", "b"), encoder=str(tmp_path / "lost.safetensors"), mpp=2.0, tile_px=256)
    save_model(tmp_path / "model.safetensors", build_model(settings), card)
    slide = make_slide(tmp_path / "s.svs")
    assert lrmil("predict", slide, "--model", tmp_path / "model.safetensors", "-o", tmp_path / "out") == 2
    assert "lost.safetensors, is neither in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_may_be_named_by_text(tmp_path: Path) -> None:
    rows = ["slide_id,case_id,part,label,logit_a,logit_b,probability_a,probability_b"]
    rows += [f"s{i},c{i},test,{'ab'[i % 2]},{-i % 3},{i % 3},0.4,0.6" for i in range(8)]
    (tmp_path / "predictions.csv").write_text("\n".join(rows) + "\n")
    assert evaluate_run(str(tmp_path), replicates=20, pictures=False).part == "test"


def test_a_package_that_is_not_there_is_one_line(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    assert in_words(ModuleNotFoundError("no", name="s3fs")) == (
        "the package s3fs is not installed", "install it: pip install 'wsi-pipe[s3]'",
    )  # fmt: skip
    assert in_words(ModuleNotFoundError("no", name="tensorboard.summary"))[1].endswith("'wsi-pipe[tensorboard]'")
    assert in_words(ModuleNotFoundError("no", name="other"))[1] == "install it: pip install 'other'"
    monkeypatch.setattr("lrmil.experiment.cohort.find_bags", lacking)
    assert lrmil("train", "--bags", cohort / "bags", "--labels", cohort / "labels.csv", "-o", cohort / "out") == 2
    said = capsys.readouterr().err
    assert said.strip() == "lrmil: error: the package s3fs is not installed; install it: pip install 'wsi-pipe[s3]'"


def test_training_says_that_sites_give_labels_away_and_the_card_states_it(
    cohort_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (cohort_files / "labels.csv").read_text().splitlines()
    # Each class from a hospital of its own, but for every sixth case.
    rows = [f"{line},{'AB'[('tumour' in line) ^ (int(line.split(',')[1][1:]) % 6 == 0)]}" for line in lines[1:]]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join([f"{lines[0]},clinic", *rows]) + "\n")
    base = ["--bags", cohort_files / "bags", "-r", "5x", "--labels", labels, "-o", tmp_path / "run", "--folds", 2]
    assert lrmil("train", *base, "--fold", 1, *SMALL, "--site-column", "clinic") == 0
    told = capsys.readouterr().err
    assert "labels and sites are confounded: 2 sites (clinic)" in told
    card = read_card(tmp_path / "run" / "fold_1" / "model.safetensors")
    assert card.sites["sites"] == 2
    # 18 cases, 3 of them at the other hospital.
    assert card.sites["accuracy"] == pytest.approx(15 / 18)
    assert 0.5 < card.sites["v"] < 0.8
    assert card.sites["torn"]["fold_1"] == 2
