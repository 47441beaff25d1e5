"""The LRMIL experiment: presets, the leakage check, and a whole small run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lrmil.cli import group
from lrmil.errors import LeakageError
from lrmil.experiment import whole
from lrmil.experiment.folds import SPLITS_NAME
from lrmil.experiment.presets import find_preset, preset_names
from lrmil.experiment.settings import ABLATIONS, CohortSettings, ExperimentSettings, load_experiment
from lrmil.experiment.whole import HR, LR, STAGE1, STAGE2, Experiment
from lrmil.splits import read_splits
from lrmil.store import FeatureStore
from wsi_pipe.cli import run_group
from wsi_pipe.config import load_toml
from wsi_pipe.errors import ConfigError

CPU, SMALL = find_preset("cpu"), find_preset("cpu-small")


def main(arguments: list[str]) -> int:
    return run_group(group, "lrmil", ["experiment", *arguments])


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name: str) -> None:
    settings = load_toml(ExperimentSettings, find_preset(name))
    job = settings.job(("lr.safetensors",))
    assert job.extract.encoders_of(settings.hr) == (settings.teacher,)
    assert job.extract.encoders_of(settings.lr) == (settings.teacher, "lr.safetensors")
    assert {spec.mpp for spec in job.tile.specs} == {settings.hr_mpp, settings.lr_mpp}
    assert settings.student_loss.needs_teacher
    assert not settings.mil_settings().loss.needs_teacher


def test_every_ablation_changes_a_setting_of_its_own() -> None:
    base = ExperimentSettings().distill
    changed = [dataclasses.replace(base, **changes) for changes in ABLATIONS.values()]
    assert base not in changed
    assert len({repr(settings) for settings in changed}) == len(ABLATIONS)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="finer"):
        ExperimentSettings(hr_mpp=2.0, lr_mpp=0.5)
    with pytest.raises(ConfigError, match="signal"):
        CohortSettings(signal="loud")
    with pytest.raises(ConfigError, match="2 or more"):
        ExperimentSettings(folds=1)


def test_settings_over_the_preset() -> None:
    preset = CPU
    plain = load_toml(ExperimentSettings, preset)
    assert load_experiment(preset) == plain
    found = load_experiment(
        preset,
        [
            "cohort.slides=60", "cohort.signal=fine", "distill.epochs = 3", "distill.epochs=8", "distill.lr=1",
            "mil.model.hidden=32", "teacher=timm:test_vit", 'student="copy"', "random_student=false",
            "distill.layers=[0, -1]", "student_px=96",
        ],
    )  # fmt: skip
    assert found.cohort == dataclasses.replace(plain.cohort, slides=60, signal="fine")
    assert found.distill == dataclasses.replace(plain.distill, epochs=8, lr=1.0, layers=(0, -1))
    assert found.mil.model == dataclasses.replace(plain.mil.model, hidden=32)
    assert (found.teacher, found.student, found.random_student, found.student_px) == (
        "timm:test_vit",
        "copy",
        False,
        96,
    )
    assert found.mil.epochs == plain.mil.epochs
    # Two settings that must change together.
    coarse = load_experiment(preset, ["hr_mpp=4.0", "lr_mpp=8.0"])
    assert (coarse.hr, coarse.lr) == ("2.5x", "1.25x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "cohort.slidez=60",
            r"--set cohort\.slidez=60: unknown setting 'cohort\.slidez'; did you mean cohort\.slides\?",
        ),
        ("cohort.slides=many", "settings.cohort.slides: 'many' is not a valid int"),
        ("cohort.slides=1.5", "settings.cohort.slides: 1.5 is not a valid int"),
        ("random_student=True", "'True' is not a valid bool"),
        ("teacher.name=x", "--set teacher.name=x: unknown setting 'teacher.name'"),
        ("cohort.signal=loud", "signal 'loud' must be one of"),
        ("distill.epochs=0", "epochs 0 must be at least 1"),
        ("folds=1", "2 or more"),
        ("folds", "is not of the form KEY=VALUE"),
        ("cohort..slides=60", "is not of the form KEY=VALUE"),
        ("=60", "is not of the form KEY=VALUE"),
        ("folds=3\nprecision='float32'", "is not a valid int"),
    ],
)
def test_wrong_settings_over_the_preset_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(CPU, ["split_seed=1", change])
    assert main(["cpu", "-o", str(tmp_path / "out"), "--set", change]) == 2
    assert capsys.readouterr().err.startswith(f"lrmil: error: --set {change}: ")
    assert not (tmp_path / "out").exists()


def test_a_signal_and_settings_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ExperimentSettings] = []

    def stop(self: Experiment, **options: object) -> None:
        seen.append(self.settings)
        raise ConfigError("enough")

    monkeypatch.setattr(Experiment, "run", stop)
    arguments = ["cpu", "-o", str(tmp_path / "out"), "--signal", "coarse"]
    assert main([*arguments, "--set", "cohort.slides=7", "--set", "cohort.seed=3"]) == 2
    assert seen[0].cohort == CohortSettings(signal="coarse", slides=7, seed=3)


def test_slides_without_labels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides.csv").write_text("slide\n")
    arguments = ["cpu-small", "-o", str(tmp_path / "out"), "--slides", str(tmp_path / "slides.csv")]
    assert main(arguments) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize("idle", [["--set", " cohort.slides=60"], ["--set", "cohort={}"], ["--signal", "fine"]])
def test_settings_of_a_cohort_that_is_not_made_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], idle: list[str]
) -> None:
    monkeypatch.setattr(Experiment, "run", lambda self, **_: (_ for _ in ()).throw(ConfigError("went on")))
    for name in ("slides.csv", "labels.csv"):
        (tmp_path / name).touch()
    slides = ["--slides", str(tmp_path / "slides.csv"), "--labels", str(tmp_path / "labels.csv")]
    preset = ["cpu-small", "-o", str(tmp_path / "out")]
    assert main([*preset, *slides, *idle]) == 2
    assert f"{' '.join(idle)}: is about the synthetic cohort, which --slides" in capsys.readouterr().err
    for fine in ([*preset, *idle], [*preset, *slides, "--set", "folds=3"]):
        assert main(fine) == 2
        assert "went on" in capsys.readouterr().err


def test_only_the_command_draws_its_cohort_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def drawn(*_: object, workers: int, **options: object) -> None:
        asked.append(workers)
        raise ConfigError("enough")

    monkeypatch.setattr(whole, "make_cohort", drawn)
    monkeypatch.setattr("wsi_pipe.cores.available_cores", lambda: 3)
    with pytest.raises(ConfigError, match="enough"):
        Experiment(ExperimentSettings(), tmp_path).run(progress=str)
    assert main(["cpu-small", "-o", str(tmp_path)]) == 2
    assert asked == [1, 3]


def cohort_lengths(folder: Path, store: str) -> np.ndarray:
    return FeatureStore.open(folder / "stores" / store).lengths


@pytest.mark.slow
def test_a_whole_small_experiment_runs_and_runs_again_at_once(tmp_path: Path) -> None:
    settings = load_toml(ExperimentSettings, SMALL)
    lines: list[str] = []
    experiment = Experiment(settings, tmp_path)
    results = experiment.run(progress=lines.append)
    # Each fold's encoder saw what the other fold tests.
    splits = read_splits(experiment.run_folder(HR) / SPLITS_NAME)
    hr = experiment.cohort(settings.teacher_features, settings.hr, "hr", parents=True)
    with pytest.raises(LeakageError, match=r"lr-fold1.* was trained on"):
        experiment.train_student(
            "fold_2", tmp_path / "encoders" / "lr-fold1.safetensors", splits, hr.store, tmp_path / "leak", None
        )
    found = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.png").stat().st_size > 1000
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| LR") == 6  # of the figures and of the folds
    assert table.count("not inferior") == 2 + len(settings.baselines)
    # Baselines read what they say: as many random HR tiles as there are LR tiles, 25 and one LR tile's children more.
    tiles = {arm.name: arm.tiles for arm in results.arms}
    low = float(cohort_lengths(tmp_path, "lr").mean())
    high = cohort_lengths(tmp_path, "hr")
    assert tiles["HR, random tiles, as many as LR"] == pytest.approx(low)
    assert tiles["HR, 25 tiles by LR attention (EAGLE)"] == pytest.approx(low + np.minimum(high, 25).mean(), abs=1)
    assert low < (tiles["HR and LR where LR attends (ZoomMIL-like)"] or 0) <= low + 16
    assert tiles["HR and LR together"] == pytest.approx(low + high.mean())
    assert tiles["HR, DTFD-MIL"] == pytest.approx(high.mean())
    # The mean over folds, not that of what the folds have together.
    for arm, values in found["fold_auc"].items():
        assert found["figures"][arm]["auc"]["value"] == pytest.approx(sum(values.values()) / len(values))
    assert results.slides == 16
    predictions = {
        arm: np.loadtxt(tmp_path / "runs" / arm / "fold_1" / "predictions.csv", delimiter=",", dtype=str, skiprows=1)
        for arm in ("hr", "lr", "lr-stage1", "lr-stage2")
    }
    assert len({repr(p[:, 0].tolist()) for p in predictions.values()}) == 1
    assert found["figures"][STAGE2]["auc"]["value"] == results.figures[STAGE2]["auc"].value
    difference = found["differences"][STAGE2][LR]["auc"]
    auc = {arm: found["figures"][arm]["auc"]["value"] for arm in (STAGE2, LR)}
    assert difference["value"] == pytest.approx(auc[STAGE2] - auc[LR])
    # One LR tile covers 16 HR tiles.
    assert set(found["cost"]) == {HR, LR, STAGE1}
    assert found["cost"][HR]["tiles"] > 8 * found["cost"][STAGE1]["tiles"]
    again: list[str] = []
    encoders = [path.read_bytes() for path in sorted((tmp_path / "encoders").glob("*.safetensors"))]
    Experiment(settings, tmp_path).run(progress=again.append)
    assert [line for line in lines if line.startswith("epoch")]
    assert not [line for line in again if line.startswith("epoch")]
    assert [path.read_bytes() for path in sorted((tmp_path / "encoders").glob("*.safetensors"))] == encoders
