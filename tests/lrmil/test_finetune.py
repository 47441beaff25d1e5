"""Fine-tuning an encoder with its classifier: the loop, who is seen, and the whole command from bags to predictions."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lrmil
from lrmil.checkpoint import read_card
from lrmil.cli import group
from lrmil.config import LossSettings, ModelSettings
from lrmil.distill import DistillRequest, DistillSettings, run_distillation
from lrmil.errors import LeakageError, ResumeError, SettingsError
from lrmil.experiment.cohort import Cohort, load_cohort
from lrmil.finetuning import (
    FinetuneSettings,
    HeldTiles,
    SlideTiles,
    TileClassifier,
    cohort_notes,
    fit_tiles,
    load_finetune_settings,
    load_start,
    open_tiles,
    seen_by,
    slide_logits,
)
from lrmil.finetuning.batches import make_batch, plan_steps
from lrmil.finetuning.cohort import fold_tiles
from lrmil.splits import SplitTable
from lrmil.trainer.steps import plain_step
from lrmil.trainer.targets import TeacherTargets
from wsi_pipe.bag import read_attrs
from wsi_pipe.cli import run_group
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.lr_file import read_lr_header
from wsi_pipe.errors import BagError, ConfigError, ResolutionError
from wsi_pipe.seen import Seen

CPU = torch.device("cpu")
HEAD = ModelSettings("gated-abmil", hidden=8, attention_dim=4)
LABELS = "no", "yes", "no", "yes", "no", "yes"
QUICK = FinetuneSettings(model=HEAD, steps=5, max_bags=2, max_tiles=3, device="cpu", threads=1, precision="float32")


def little(seed: int = 0) -> tuple[HeldTiles, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(6) % 2
    return HeldTiles([rng.integers(0, 256, (4 + i, 32, 32, 3), dtype=np.uint8) for i in range(6)]), labels


def network(seed: int = 0, model: ModelSettings = HEAD) -> TileClassifier:
    torch.manual_seed(seed)
    return TileClassifier(load_start("timm:test_resnet", 32, random_weights=True), model, 32)


STEP = plain_step(torch.ones(2))


def test_a_plan_takes_every_slide_before_one_comes_again_and_some_of_its_tiles() -> None:
    pixels, labels = little()
    settings = dataclasses.replace(QUICK, steps=7, max_bags=2, max_tiles=5)
    plans = list(plan_steps(pixels.lengths, [0, 2, 5], settings, np.random.default_rng(3)))
    assert [plan.step for plan in plans] == list(range(7))
    assert [plan.last for plan in plans] == [False, True, False, True, False, True, True]
    for first, second in zip(plans[0:6:2], plans[1:6:2], strict=True):
        assert sorted(number for number, _ in (*first.bags, *second.bags)) == [0, 2, 5]
    for plan in plans:
        for number, rows in plan.bags:
            # Slides 0, 2 and 5 have 4, 6 and 9 tiles.
            assert (rows is None) == (number == 0)
            assert rows is None or (len(rows) == 5 and (np.diff(rows) > 0).all() and rows[-1] < 4 + number)
    batch = make_batch(pixels, labels, dataclasses.replace(plans[0], symmetry=plans[0].symmetry * 0, stain=None), CPU)
    place = 0
    assert batch.rows is not None
    for number, rows in plans[0].bags:
        own = pixels.fetch([(number, rows)])[0]
        assert np.array_equal(batch.features[place : place + len(own)].numpy(), own)
        assert batch.rows[place : place + len(own)].tolist() == (list(range(4)) if rows is None else rows.tolist())
        place += len(own)
    assert batch.labels.tolist() == [number % 2 for number, _ in plans[0].bags]


def test_a_teacher_s_word_is_that_of_the_tiles_that_a_step_takes() -> None:
    pixels, labels = little()
    offsets = torch.from_numpy(np.cumsum([0, *pixels.lengths]))
    mass = torch.arange(int(offsets[-1]), dtype=torch.float32)
    targets = TeacherTargets(torch.zeros(6, 2), mass, mass >= 0, offsets)
    (plan,) = plan_steps(pixels.lengths, [5], dataclasses.replace(QUICK, steps=1), np.random.default_rng(0))
    ((_, rows),) = plan.bags
    assert rows is not None
    found = targets.of(make_batch(pixels, labels, plan, CPU)).mass
    assert found is not None
    assert found.tolist() == [float(offsets[5]) + row for row in rows.tolist()]


@pytest.mark.parametrize("every", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, every: int) -> None:
    pixels, labels = little()
    settings = dataclasses.replace(QUICK, steps=8, save_every=every)

    def run(state: Path | None, stop_after: int = 0) -> tuple[np.ndarray, Any]:
        seen = itertools.count(1)

        def progress(row: Any) -> None:
            if next(seen) == stop_after:
                raise KeyboardInterrupt

        model = network()
        history = fit_tiles(
            model, STEP, pixels, labels, range(4), settings, device=CPU, state=state, run="a", progress=progress
        )
        return slide_logits(model, pixels, range(6), device=CPU), history

    whole, history = run(None)
    assert [row["step"] for row in history.rows] == [2, 4, 6, 8]
    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(state, stop_after=3)
    torch.rand(3)
    again, resumed = run(state)
    assert np.array_equal(whole, again)
    assert resumed.rows == history.rows
    # A finished run takes no further step.
    assert np.array_equal(run(state)[0], whole)
    with pytest.raises(ResumeError, match="another --out"):
        fit_tiles(network(), STEP, pixels, labels, range(4), settings, device=CPU, state=state, run="b")


def test_the_encoder_learns_and_not_the_classifier_alone() -> None:
    pixels, labels = little()
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_tiles(model, STEP, pixels, labels, range(6), dataclasses.replace(QUICK, steps=2), device=CPU)
    changed = {name.partition(".")[0] for name, value in model.named_parameters() if not value.equal(before[name])}
    assert changed == {"network", "head"}
    assert not model.training


def test_settings_are_checked_and_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("steps = 7\n[model]\nname = 'abmil'\n")
    assert load_finetune_settings(tmp_path / "a.toml").steps == 7
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}, {"max_tiles": -1}, {"precision": "half"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FinetuneSettings(**wrong)  # type: ignore[arg-type]
    for name in ("mean", "linear", "auto"):
        with pytest.raises(ConfigError, match="together with an encoder"):
            FinetuneSettings(model=ModelSettings(name))
    with pytest.raises(SettingsError, match="no network"):
        load_start("texture", 32, random_weights=False)
    with pytest.raises(SettingsError, match="not drawn anew"):
        load_start("lr.safetensors", 32, random_weights=True)


# From here on with slides: the six of ``distill_cohort``, of six cases.


@pytest.fixture(scope="module")
def cases(distill_cohort: Path) -> tuple[str, ...]:
    return tuple(read_attrs(bag).case_id for bag in sorted((distill_cohort / "job/bags").glob("*.h5")))


def splits_of(cases: tuple[str, ...]) -> SplitTable:
    return SplitTable("case", cases, {"fold_1": ("train", "train", "train", "val", "test", "test")})


@pytest.fixture(scope="module")
def given(distill_cohort: Path, cases: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of all slides and of all but one, splits, an encoder distilled on the training cases, and a teacher."""
    root = tmp_path_factory.mktemp("finetune")
    bags = sorted((distill_cohort / "job/bags").glob("*.h5"))
    rows = [(read_attrs(bag).slide_id, case, label) for bag, case, label in zip(bags, cases, LABELS, strict=True)]
    for name, kept in (("labels.csv", rows), ("few.csv", [row for i, row in enumerate(rows) if i != 2])):
        text = "\n".join(",".join(row) for row in [("slide_id", "case_id", "label"), *kept])
        (root / name).write_text(text + "\n")
    splits_of(cases).write(root / "splits.csv")
    run_distillation(
        DistillRequest(
            bags=distill_cohort / "job/bags", teacher="texture", student="timm:test_resnet", lr="5x", hr="20x",
            out=root / "lr.safetensors", splits=splits_of(cases), fold="1", random_student=True,
            settings=DistillSettings(epochs=1, batch_size=16, device="cpu", precision="float32", threads=1),
        )
    )  # fmt: skip
    lrmil.train(
        distill_cohort / "job/bags", root / "labels.csv", root / "hr", resolution="20x", splits=root / "splits.csv",
        model="gated-abmil", small_cohorts="off", epochs=2, hidden=8, attention_dim=4, device="cpu", replicates=20,
    )  # fmt: skip
    return root


def opened(distill_cohort: Path, given: Path, labels: str, info: EncoderInfo | None = None) -> Cohort:
    info = info or load_encoder(str(given / "lr.safetensors"), device="cpu").info
    tiles = open_tiles(distill_cohort / "job/bags", None, {}, info)
    return seen_by(info, load_cohort(tiles.store, given / labels))


def test_slides_without_a_label_are_learned_from_unless_their_case_is_judged(
    distill_cohort: Path, given: Path, cases: tuple[str, ...]
) -> None:
    cohort, splits = opened(distill_cohort, given, "few.csv"), splits_of(cases)
    assert fold_tiles(cohort, splits, "fold_1", unlabelled=False).hidden.tolist() == []
    found = fold_tiles(cohort, splits, "fold_1", unlabelled=True)
    assert found.hidden.tolist() == [2]
    assert found.split.train.tolist() == [0, 1]
    assert any("without a label" in note for note in cohort_notes(cohort, splits, learned=False))
    assert not any("without a label" in note for note in cohort_notes(cohort, splits, learned=True))
    # Splits that do not name it leave it free to be learned from.
    rest = tuple(case for i, case in enumerate(cases) if i != 2)
    unnamed = SplitTable("case", rest, {"fold_1": ("train", "train", "val", "test", "test")})
    assert fold_tiles(cohort, unnamed, "fold_1", unlabelled=True).hidden.tolist() == [2]
    # It is another slide of a test case, by the labels' case or by its file.
    table = dataclasses.replace(cohort.table, case_ids=(*cases[:2], cases[4], *cases[3:]))
    slides = cohort.store.slide_ids
    by_slide = SplitTable("slide", tuple(s for i, s in enumerate(slides) if i != 2), unnamed.folds)
    torn = dataclasses.replace(cohort, table=table)
    assert fold_tiles(torn, by_slide, "fold_1", unlabelled=True).hidden.tolist() == []
    records = list(cohort.store.records)
    records[2] = dataclasses.replace(records[2], slide_fingerprint=records[5].slide_fingerprint)
    cohort.store.records = tuple(records)
    assert fold_tiles(cohort, unnamed, "fold_1", unlabelled=True).hidden.tolist() == []


def test_tiles_are_those_that_the_encoder_was_made_for(distill_cohort: Path, given: Path) -> None:
    info = load_encoder(str(given / "lr.safetensors"), device="cpu").info
    bags = distill_cohort / "job/bags"
    tiles = open_tiles(bags, None, {}, info)
    assert (tiles.store.meta.level, tiles.store.meta.tile_px, tiles.store.dim) == ("5x", 64, 0)
    with pytest.raises(ResolutionError, match="20x"):
        open_tiles(bags, "20x", {}, info)
    with pytest.raises(BagError, match="choose with -r"):
        open_tiles(bags, "40x", {}, info)
    first = tiles.slides[0]
    assert open_tiles(bags, "5x", {first.slide_id: "elsewhere.tif"}, info).slides[0].path == "elsewhere.tif"
    kept, read = (SlideTiles(tiles.slides, 64, cache_mib=mib, threads=1) for mib in (100, 0))
    rows = np.array([0, 2])
    for wanted in ([(1, None), (0, rows)], [(0, rows)]):
        for a, b in zip(kept.fetch(wanted), read.fetch(wanted), strict=True):
            assert np.array_equal(a, b)
    assert (kept.reads, read.reads) == (2, 3)


def test_an_encoder_that_saw_judged_cases_is_refused_and_the_overlap_is_recorded(
    distill_cohort: Path, given: Path, cases: tuple[str, ...], tmp_path: Path
) -> None:
    other = SplitTable("case", cases, {"fold_1": ("test", "train", "train", "val", "train", "train")})
    options: dict[str, Any] = {
        "encoder": given / "lr.safetensors", "splits": other, "settings": QUICK, "steps": 2, "replicates": 20,
    }  # fmt: skip
    bags = distill_cohort / "job/bags"
    with pytest.raises(LeakageError, match="distilled from, without labels"):
        lrmil.finetune(bags, given / "labels.csv", tmp_path / "a", **options)
    assert not (tmp_path / "a" / "fold_1").exists()
    said: list[str] = []
    model = lrmil.finetune(bags, given / "labels.csv", tmp_path / "a", allow_seen=True, say=said.append, **options)
    assert any("allowed" in text for text in said)
    assert any("distilled from" in text for text in model.card.allowed)
    assert read_lr_header(Path(model.card.encoder)).training["allowed"] == list(model.card.allowed)


def test_the_command_makes_an_encoder_and_a_model_that_predict_the_same(
    distill_cohort: Path, given: Path, cases: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    command = [
        "finetune", "--bags", distill_cohort / "job", "--labels", given / "few.csv", "-e", given / "lr.safetensors",
        "--splits", given / "splits.csv", "--teacher", given / "hr", "-o", out, "--steps", "4", "--max-bags", "2",
        "--max-tiles", "3", "--hidden", "8", "--set", "model.attention_dim=4", "--device", "cpu", "--replicates", "20",
        "--threads", "1",
    ]  # fmt: skip
    assert run_group(group, "lrmil", list(map(str, command))) == 0
    told = capsys.readouterr()
    assert "fold_1 step 4/4: loss" in told.err
    assert "1 slides without a label learn from the teacher's word alone" in told.err
    encoder, model = out / "fold_1/tuned-fold_1.safetensors", out / "fold_1/model.safetensors"
    card, header = read_card(model), read_lr_header(encoder)
    assert (card.encoder, card.level, card.tile_px) == (str(encoder), "5x", 64)
    assert card.teacher["model"] == "gated-abmil"
    slides = [read_attrs(bag) for bag in sorted((distill_cohort / "job/bags").glob("*.h5"))]
    parts = [card.seen.part_of(a.case_id, a.slide_fingerprint) for a in slides]
    # The teacher knew the third slide's label, and what it learned has gone into the student.
    assert parts == ["train", "train", "train", "val", "", ""]
    saw = Seen.from_json(header.training["seen"])
    assert [saw.part_of(a.case_id, a.slide_fingerprint) for a in slides[:3]] == ["train"] * 3
    with open(out / "fold_1/predictions.csv", encoding="utf-8", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert [row["part"] for row in rows.values()] == ["val", "test", "test"]
    weights = encoder.read_bytes()
    # Run again it finds itself finished, and the encoder stays the same file.
    assert run_group(group, "lrmil", list(map(str, command))) == 0
    assert encoder.read_bytes() == weights
    predicted = lrmil.load(model, device="cpu").predict(slides[5].slide_path, job=tmp_path / "job")
    wanted = float(rows[slides[5].slide_id]["logit_yes"])
    assert predicted.logits[1] == pytest.approx(wanted, abs=0.02)  # type: ignore[union-attr]
    capsys.readouterr()
    assert run_group(group, "lrmil", list(map(str, [*command, "--learning-rate", "0.1"]))) == 2
    assert "another --out" in capsys.readouterr().err


def test_a_teacher_without_attention_is_refused_before_anything_is_trained(
    distill_cohort: Path, given: Path, tmp_path: Path
) -> None:
    bags, labels = distill_cohort / "job/bags", given / "labels.csv"
    options: dict[str, Any] = {"splits": given / "splits.csv", "device": "cpu", "replicates": 20}
    lrmil.train(bags, labels, tmp_path / "hr", resolution="20x", model="linear", **options)
    student: dict[str, Any] = {"resolution": "5x", "teacher": tmp_path / "hr", "model": "gated-abmil", **options}
    student |= {"epochs": 1, "hidden": 8, "attention_dim": 4}
    with pytest.raises(SettingsError, match="is a linear model, and has no attention") as refused:
        lrmil.train(bags, labels, tmp_path / "lr", **student)
    assert "--l-soft 0 --l-hard 0" in str(refused.value.remedy)
    assert not (tmp_path / "lr/fold_1").exists()
    with pytest.raises(SettingsError, match="is a linear model"):
        lrmil.finetune(
            bags, labels, tmp_path / "ft", encoder=given / "lr.safetensors", teacher=tmp_path / "hr", **options
        )
    # Its probabilities alone can be learned.
    assert lrmil.train(bags, labels, tmp_path / "lr", soft=0.0, hard=0.0, **student).card.teacher["model"] == "linear"
    weighed = tmp_path / "hr/fold_1/model.safetensors"
    with pytest.raises(SettingsError, match="to weigh tiles by"):
        lrmil.distill(
            bags, tmp_path / "lr.safetensors", teacher="texture", student="timm:test_resnet", random_student=True,
            splits=given / "splits.csv", fold=1, mil_teacher=weighed,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1, "loss": LossSettings(bag=0.0, soft=0.0, hard=0.0)}, "nothing is learned from it"),
        ({"unknown": 1}, "there is no setting 'unknown'"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    distill_cohort: Path, given: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = dataclasses.replace(QUICK, **changes) if "loss" in changes else QUICK
    single = {} if "loss" in changes else changes
    with pytest.raises((ConfigError, SettingsError), match=message):
        lrmil.finetune(
            distill_cohort / "job/bags", given / "labels.csv", tmp_path, encoder=given / "lr.safetensors",
            splits=given / "splits.csv", teacher=given / "hr", settings=settings, **single,
        )  # fmt: skip
