"""The label-efficiency experiment: its design, its pooling, and a whole tiny run."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lrmil.config import ModelSettings, TrainSettings
from lrmil.errors import LeakageError
from lrmil.metrics.auc import auc_difference, one_auc
from lrmil.store import FeatureStore, StoreMeta
from pipelines.efficiency_arms import (
    ARMS,
    CONTROLS,
    END_TO_END,
    HR,
    LONGER,
    TAUGHT,
    TUNED_BOTH,
    Parts,
    arms_at,
    linear_model,
    run_arms,
)
from pipelines.efficiency_cohort import labelled_cases, plan_slides, shifted, validation_cases
from pipelines.efficiency_features import CohortFeatures, distilled_store, thinned
from pipelines.efficiency_results import pooled_auc, pooled_difference
from pipelines.efficiency_settings import (
    EfficiencySettings,
    EndToEndSettings,
    PlannedCohort,
    ShiftSettings,
    load_efficiency,
)
from pipelines.end_to_end import train_end_to_end
from pipelines.label_efficiency import draw_file, draw_parts, main, run_cohort
from pipelines.provenance import provenance
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.lr_file import read_lr_header
from wsi_pipe.errors import ConfigError
from wsi_pipe.seen import Seen

PRESETS = Path(__file__).parents[1] / "pipelines" / "presets" / "labels"


@pytest.mark.parametrize("name", sorted(path.name for path in PRESETS.glob("*.toml")))
def test_every_preset_is_valid_and_no_reported_seed_was_met_before(name: str) -> None:
    settings = load_efficiency(PRESETS / name)
    # 11 to 13 are the cohorts of lrmil experiment, 900 and above those that settings were found on.
    assert not set(settings.seeds) & {11, 12, 13}
    assert max(settings.seeds) < 900
    assert 40 in settings.labelled or name == "tiny.toml"


def test_presets_report_different_cohorts_with_the_same_classifiers() -> None:
    found = [load_efficiency(PRESETS / f"{name}.toml") for name in ("middle", "shift", "classes")]
    seeds = [seed for settings in found for seed in settings.seeds]
    assert len(seeds) == len(set(seeds))
    assert all((s.mil, s.distill, s.end_to_end) == (found[0].mil, found[0].distill, found[0].end_to_end) for s in found)


def test_the_longer_control_is_of_middle_s_cohorts_and_settings() -> None:
    longer, middle = (load_efficiency(PRESETS / f"{name}.toml") for name in ("middle-longer", "middle"))
    same = {"name": "", "arms": (), "longer_steps": 0, "controls_at": (), "draws": middle.draws, "lr_tiles": (64,)}
    assert dataclasses.replace(longer, **same) == dataclasses.replace(middle, **same)  # type: ignore[arg-type]
    assert longer.longer_steps == 4 * longer.end_to_end.steps
    for count in longer.labelled:
        assert arms_at(longer, count) == (HR, END_TO_END, LONGER, TUNED_BOTH)
    assert LONGER not in arms_at(middle, 40)
    assert set(CONTROLS) <= set(arms_at(middle, 40))
    assert not set(CONTROLS) & set(arms_at(middle, 80))
    with pytest.raises(ConfigError, match="no arm is called 'LR, worse'"):
        arms_at(dataclasses.replace(longer, arms=("LR, worse",)), 40)


def test_draws_are_nested_balanced_and_depend_on_no_order() -> None:
    labels = {f"c{i:03d}": i % 3 for i in range(60)}
    all_of_them = labelled_cases(labels, 5, 0, 60)
    assert sorted(all_of_them) == sorted(labels)
    for count in (6, 12, 30):
        own = labelled_cases(labels, 5, 0, count)
        assert own == all_of_them[:count]
        assert np.bincount([labels[case] for case in own]).tolist() == [count // 3] * 3
    assert labelled_cases(dict(reversed(labels.items())), 5, 0, 30) == all_of_them[:30]
    assert set(labelled_cases(labels, 5, 1, 12)) != set(all_of_them[:12])
    assert set(labelled_cases(labels, 6, 0, 12)) != set(all_of_them[:12])


def test_validation_cases_are_labelled_ones_of_every_class() -> None:
    labels = {f"c{i:03d}": i % 2 for i in range(40)}
    shown = labelled_cases(labels, 1, 0, 20)
    held = validation_cases(shown, labels, 4)
    assert set(held) < set(shown)
    assert [sum(labels[c] == k for c in held) for k in (0, 1)] == [2, 2]
    assert set(held) <= set(validation_cases(labelled_cases(labels, 1, 0, 40), labels, 4))


def test_parts_share_no_case_and_test_cases_are_the_same_in_every_draw() -> None:
    settings = EfficiencySettings(labelled=(8,), draws=(2,), cohort=PlannedCohort(train=20, test=12))
    slides = {slide.slide_id: slide for slide in plan_slides(settings.cohort, 3)}
    ids = sorted(slides)
    first, second = (draw_parts(slides, ids, settings, 3, draw, 8) for draw in (0, 1))
    for parts in (first, second):
        rows = np.concatenate([parts.train, parts.val, parts.hidden, parts.test])
        assert sorted(rows.tolist()) == list(range(32))
        assert {ids[i] for i in parts.test} == {name for name in ids if slides[name].part == "test"}
        assert len(parts.labelled) == 8
    assert set(first.labelled.tolist()) != set(second.labelled.tolist())


def test_a_plan_has_as_many_of_each_class_and_the_shift_in_its_test_part_alone() -> None:
    shift = ShiftSettings(haematoxylin=1.3, quality=60)
    cohort = PlannedCohort(("middle", "coarse"), (1.0, 0.4), train=30, test=12, shift=shift)
    slides = plan_slides(cohort, 9)
    for part, count, own in (("train", 10, ShiftSettings()), ("test", 4, shift)):
        chosen = [slide for slide in slides if slide.part == part]
        assert np.bincount([slide.label for slide in chosen]).tolist() == [count] * 3
        assert all(slide.shift == own for slide in chosen)
    assert {(s.label, s.spec.label, s.spec.signal, s.spec.strength) for s in slides if s.label} == {
        (1, 1, "middle", 1.0),
        (2, 1, "coarse", 0.4),
    }
    assert len({slide.spec.seed for slide in slides}) == len(slides)
    assert plan_slides(cohort, 9) == slides
    assert {s.spec.seed for s in plan_slides(cohort, 10)}.isdisjoint({s.spec.seed for s in slides})


def test_a_shift_scales_stains_and_leaves_glass() -> None:
    rgb = np.full((8, 8, 3), 255, np.uint8)
    rgb[:, 4:] = [120, 60, 140]
    darker = shifted(rgb, ShiftSettings(haematoxylin=1.5, eosin=1.5))
    assert (darker[:, :4] == 255).all()
    assert (darker[:, 4:].astype(int) < rgb[:, 4:]).all()
    assert shifted(rgb, ShiftSettings(tint=(1.0, 0.8, 1.0)))[0, 0].tolist() == [255, 204, 255]
    same = shifted(rgb, ShiftSettings(quality=50))
    assert np.array_equal(same, rgb)


def fake_runs(values: list[list[list[float]]], labels: np.ndarray, total: int) -> list[list[list[object]]]:
    """AUC objects of scores, by cohort and draw."""
    found = []
    for number, cohort in enumerate(values):
        cases = np.arange(len(labels)) + number * len(labels)
        found.append([[one_auc(labels == 1, np.array(scores), cases, total)] for scores in cohort])
    return found


def test_pooled_differences_are_means_over_cohorts_and_draws_with_both_variances() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    a = [[(labels + rng.normal(0, 1.0, 40)).tolist() for _ in range(2)] for _ in range(3)]
    b = [[(labels + rng.normal(0, 1.5, 40)).tolist() for _ in range(2)] for _ in range(3)]
    one, other = fake_runs(a, labels, 120), fake_runs(b, labels, 120)
    found = pooled_difference(one, other)
    values = np.array(
        [[x[0].value - y[0].value for x, y in zip(p, q, strict=True)] for p, q in zip(one, other, strict=True)]
    )
    assert found.value == pytest.approx(values.mean())
    assert found.by_cohort == pytest.approx(values.mean(1))
    # By hand: three degrees of freedom, Student's 2.5 % point 3.1824.
    between_draws = 3.182446 * math.sqrt(((values - values.mean(1, keepdims=True)) ** 2).sum() / 3 / 6)
    plain = auc_difference([x[0] for p in one for x in p], [x[0] for p in other for x in p])
    assert found.value - found.low == pytest.approx(math.hypot(plain.value - plain.low, between_draws), rel=1e-5)
    assert found.high - found.value == pytest.approx(math.hypot(plain.high - plain.value, between_draws), rel=1e-5)
    mirrored = pooled_difference(other, one)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_single_draw_adds_no_variance_and_an_interval_holds_the_mean() -> None:
    labels = np.arange(40) % 2
    scores = (labels + np.random.default_rng(1).normal(0, 1.0, (3, 1, 40))).tolist()
    runs = fake_runs(scores, labels, 120)
    found = pooled_auc(runs)
    assert found.value == pytest.approx(np.mean([cohort[0][0].value for cohort in runs]))
    assert 0 < found.low < found.value < found.high < 1


class FakeEncoder:
    """Encodes tiles as zeros and says whom it saw."""

    def __init__(self, seen: Seen) -> None:
        self.info = EncoderInfo("fake", "fake", 2, "0", "none", seen=seen)

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        return np.zeros((len(tiles), 2), np.float32)


def test_a_student_that_saw_a_test_case_is_refused() -> None:
    store = FeatureStore.from_arrays([np.ones((2, 3))] * 3, ["a", "b", "c"], case_ids=["a", "b", "c"])
    tiles = [np.zeros((2, 8, 8, 3), np.uint8)] * 3
    honest = FakeEncoder(Seen.of({"unlabelled": [("a", ""), ("b", "")]}))
    assert distilled_store(honest, tiles, store, ["c"]).dim == 2  # type: ignore[arg-type]
    with pytest.raises(LeakageError, match="c"):
        distilled_store(FakeEncoder(Seen.of({"unlabelled": [("c", "")]})), tiles, store, ["c"])  # type: ignore[arg-type]


def test_thinned_bags_have_lrs_number_of_hr_tiles() -> None:
    rng = np.random.default_rng(0)
    hr = FeatureStore.from_arrays([rng.normal(size=(n, 3)) for n in (10, 2)], ["a", "b"])
    few = thinned(hr, np.array([4, 5]), 0)
    assert few.lengths.tolist() == [4, 2]
    assert {tuple(row) for row in few.bag(0)} <= {tuple(row) for row in hr.bag(0)}


def test_linear_models_see_labelled_cases_alone() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    bags = [rng.normal(label, 1.0, (4, 3)) for label in labels]
    store = FeatureStore.from_arrays(bags)
    parts = Parts(np.arange(16), np.arange(16, 20), np.arange(20, 40), np.arange(40, 60))
    settings = EfficiencySettings()
    found, _ = linear_model(store, labels, parts, settings, 0)
    other = labels.copy()
    other[20:] = 1 - other[20:]
    again, _ = linear_model(store, other, parts, settings, 0)
    assert np.array_equal(found, again)
    assert ((found[:, 1] > 0.5) == (labels[40:] == 1)).mean() > 0.8


@pytest.fixture(scope="module")
def little_cohort() -> tuple[CohortFeatures, np.ndarray, Parts]:
    """24 slides of two LR tiles of 32 px with four HR tiles each; class 1 is darker in one tile."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    names = [f"s{i:02d}" for i in range(24)]
    tiles = [rng.integers(150, 250, (2, 32, 32, 3)).astype(np.uint8) for _ in names]
    for i in np.flatnonzero(labels):
        tiles[i][0] //= 2
    hr_rows = [np.repeat(t.reshape(2, -1).mean(1) / 100, 4)[:, None] + rng.normal(0, 0.1, (8, 3)) for t in tiles]
    lr_rows = [rng.normal(0, 1, (2, 3)) for _ in names]
    parents = [np.repeat([0, 1], 4)] * 24
    hr = FeatureStore.from_arrays(
        hr_rows, names, case_ids=names, parents=parents, meta=StoreMeta("t", "0", "20x", parent_level="5x")
    )
    lr = FeatureStore.from_arrays(lr_rows, names, case_ids=names, meta=StoreMeta("t", "0", "5x"))
    parts = Parts(np.arange(6), np.array([6, 7]), np.arange(8, 16), np.arange(16, 24))
    return CohortFeatures(hr, {64: lr}, lr, Path("none"), tiles), labels, parts


def quick_settings() -> EfficiencySettings:
    mil = TrainSettings(ModelSettings("gated-abmil", hidden=8, attention_dim=4), epochs=2, precision="float32")
    steps = EndToEndSettings(steps=2, bags=4)
    return EfficiencySettings(lr_tiles=(64,), mil=mil, end_to_end=steps, longer_steps=4, c_grid=(0.1, 1.0))


def test_no_arm_reads_the_labels_of_hidden_and_test_cases(
    little_cohort: tuple[CohortFeatures, np.ndarray, Parts],
) -> None:
    features, labels, parts = little_cohort
    # Those that need no distilled student.
    arms = [arm for arm in ARMS if "stage 1" not in arm and "stages 1" not in arm]
    found = run_arms(features, labels, parts, quick_settings(), 0, arms=arms)
    other = labels.copy()
    other[8:] = 1 - other[8:]
    assert run_arms(features, other, parts, quick_settings(), 0, arms=arms) == found
    assert set(found) == set(arms)
    for own in found.values():
        assert np.array(own["probabilities"]).shape == (8, 2)
        assert np.array(own["probabilities"]).sum(1) == pytest.approx(1, abs=1e-5)
    known = labels.copy()
    known[:8] = 1 - known[:8]
    assert run_arms(features, known, parts, quick_settings(), 0, arms=[END_TO_END]) != {
        arm: found[arm] for arm in (HR, END_TO_END)
    }


def test_a_teacher_reaches_slides_whose_labels_are_hidden(
    little_cohort: tuple[CohortFeatures, np.ndarray, Parts],
) -> None:
    features, labels, parts = little_cohort
    with_all = run_arms(features, labels, parts, quick_settings(), 0, arms=[TAUGHT])
    labelled_alone = dataclasses.replace(quick_settings(), stage2_unlabelled=False)
    assert run_arms(features, labels, parts, labelled_alone, 0, arms=[TAUGHT])[TAUGHT] != with_all[TAUGHT]


def test_a_network_learns_end_to_end_and_the_same_from_the_same_seed(
    little_cohort: tuple[CohortFeatures, np.ndarray, Parts],
) -> None:
    features, labels, _ = little_cohort
    settings = EndToEndSettings(steps=12, bags=8, lr=3e-3, dropout=0.0)

    def trained(seed: int) -> np.ndarray:
        return train_end_to_end(
            features.tiles, labels, range(16), range(16, 24), classes="ab", student="timm:test_resnet",
            head=ModelSettings("gated-abmil", hidden=8, attention_dim=4), settings=settings, seed=seed,
        )  # fmt: skip

    first = trained(0)
    assert np.array_equal(first, trained(0))
    assert not np.array_equal(first, trained(1))
    positive = labels[16:] == 1
    assert first[positive, 1].min() > first[~positive, 1].max()


def test_provenance_names_commit_and_what_differs_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert provenance(tmp_path / "no")["commit"] is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "one")
    clean = provenance(tmp_path)
    assert (clean["commit"], clean["dirty"]) == (git("rev-parse", "HEAD"), [])
    assert clean["packages"]["torch"]
    assert clean["cores"] >= 1
    (tmp_path / "a.py").write_text("2")
    assert provenance(tmp_path)["dirty"] == ["a.py"]


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"labelled": (20, 40), "draws": (1,)},
        {"labelled": (20, 400), "draws": (1, 1)},
        {"tile_px": 96},
        {"hr_mpp": 2.0},
        {"seeds": (1, 1)},
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(EfficiencySettings(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        PlannedCohort(("middle",), (1.0, 1.0))


@pytest.mark.slow
def test_a_whole_tiny_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = PRESETS / "tiny.toml"
    assert main([str(preset), "-o", str(tmp_path)]) == 0
    settings = load_efficiency(preset)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    for arm in ARMS:
        assert f"| {arm} |" in shown
        for count in settings.labelled:
            if arm in CONTROLS and count not in settings.controls_at:
                assert arm not in results["auc"][str(count)]
                continue
            p = results["auc"][str(count)][arm]
            assert 0 <= p["value"] <= 1
    assert set(results["origins"][0]) >= {"commit", "dirty", "packages", "processor"}
    back, there = (results["differences"]["8"][x][y]["value"] for x, y in ((HR, ARMS[-1]), (ARMS[-1], HR)))
    assert back == pytest.approx(-there)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    cohort = tmp_path / f"cohort-{settings.seeds[0]}"
    # Whom the student saw, by its own file: all training cases, and no test case.
    header = read_lr_header(cohort / "student.safetensors").training
    saw = {*header["train_slides"], *header["val_slides"]}
    assert len(saw) == settings.cohort.train
    assert all(name.startswith("train") for name in saw)
    path = draw_file(cohort, settings.labelled[0], 0)
    before = path.read_bytes()
    path.unlink()
    run_cohort(settings, settings.seeds[0], cohort, progress=lambda text: None)
    again, first = json.loads(path.read_bytes()), json.loads(before)
    assert again["arms"] == first["arms"]
    other = dataclasses.replace(settings, validation_every=3)
    with pytest.raises(ConfigError, match="other settings"):
        run_cohort(other, settings.seeds[0], cohort, progress=lambda text: None)
