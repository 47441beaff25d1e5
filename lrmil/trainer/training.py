"""``train``: a fold from features to a model file and predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lrmil.checkpoint import MODEL_KIND, MODEL_NAME, ModelCard, read_card, read_tensors, save_model
from lrmil.config import ATTENTION_MODELS, MODELS, TrainSettings, deciding
from lrmil.data import LabelTable
from lrmil.errors import ModelFileError, ResumeError, SettingsError, SplitError, TrainingError
from lrmil.leaks import seen_of
from lrmil.model import MILModel
from lrmil.ood import Reference
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore
from lrmil.targets import Classification, Target, TargetTable
from lrmil.trainer.compute import bag_logits, choose_device, choose_precision, deterministic, place
from lrmil.trainer.fitting import fit_model
from lrmil.trainer.loop import HISTORY_NAME, STATE_NAME, EpochFigures, Run, write_history
from lrmil.trainer.outcome import model_card, weights_hash
from lrmil.trainer.predictions import PREDICTIONS_NAME, Prediction, predictions_csv, truth_of, write_predictions
from lrmil.trainer.record import with_record
from lrmil.trainer.state import STATE_KIND, check_state, run_fingerprint
from lrmil.trainer.steps import Step, WholeStep, target_step, taught_step
from lrmil.trainer.targets import TeacherTargets, teacher_targets
from wsi_pipe.config import dump_toml
from wsi_pipe.files import remove_partial_files, write_text_atomically
from wsi_pipe.locking import hold_file
from wsi_pipe.ownership import claim_folder
from wsi_pipe.seen import NOBODY, Seen

__all__ = [
    "MODEL_NAME",
    "PREDICTIONS_NAME",
    "Prediction",
    "TrainResult",
    "hold_run",
    "predictions_csv",
    "train",
]

MARKER = ".lrmil-run"
LOCK_NAME = ".lock"


@dataclass(frozen=True)
class TrainResult:
    """What training gives.

    model: with the weights of the best epoch, in evaluation mode. card: what its file says. history: figures of every
    epoch. best_epoch: from 1. predictions: of validation and test bags. model_path: None without an output folder.
    reference: the training tiles, by which new slides are told from them; None without an output folder.
    """

    model: MILModel
    card: ModelCard
    history: tuple[EpochFigures, ...]
    best_epoch: int
    predictions: tuple[Prediction, ...]
    model_path: Path | None = None
    reference: Reference | None = None


def train(
    store: FeatureStore | ResidentStore,
    labels: LabelTable | ArrayLike,
    split: FoldIndices,
    settings: TrainSettings,
    out_dir: str | os.PathLike[str] | None = None,
    *,
    teacher: MILModel | None = None,
    hr_store: FeatureStore | ResidentStore | None = None,
    classes: Sequence[str] | None = None,
    fold: str | None = None,
    progress: Callable[[EpochFigures], object] | None = None,
    allowed: Sequence[str] = (),
    teacher_saw: Seen = NOBODY,
    say: Callable[[str], object] | None = None,
    sites: Mapping[str, object] | None = None,
) -> TrainResult:
    """Train a model on one fold, calibrate it on the validation bags, and then look at the test bags once.

    store: the features; give the same resident store to all folds and seeds. labels: of every bag of the store, int64
    (bags,), a LabelTable, or a TargetTable of another target than a class. ``settings.model.in_dim`` and ``classes``
    are taken from features and labels. out_dir: where ``config.toml``, ``metrics.csv``, ``state.safetensors``,
    ``model.safetensors`` and ``predictions.csv`` go; a run that was interrupted there goes on; None keeps all in
    memory. teacher, hr_store: for a student, whose terms ``settings.loss`` weighs; the teacher is frozen. classes:
    names, by default those of the LabelTable. fold: for the record. progress: called with the figures of each epoch.
    allowed: overlaps of seen and judged cases that were let pass. teacher_saw: the record of the teacher's file, which
    the student's takes over. say: told what was chosen inside the training cases, in words. sites: how labels and sites
    hang together, for the record.

    Without validation bags the last epoch is kept, and only the weights of the classes are corrected for. The caller's
    random state and the models given are left as they are, apart from moving the teacher to the device.

    Raises SplitError when a class has no training bag or a bag of the split no rows or label; SettingsError,
    DivergedError, ResumeError, BagMismatchError as documented at ``fit`` and ``teacher_targets``; OutputError when a
    file cannot be written.
    """
    asked = _labels(store, labels, classes)
    _check_split(store, asked.known, split)
    names = asked.target.outputs
    model_settings = replace(settings.model, in_dim=store.dim, classes=len(names))
    settings = replace(settings, model=model_settings)
    _check_model(settings, asked.target)
    _check_teacher(settings, teacher, hr_store)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    resident = place(store, device, precision)
    out = None if out_dir is None else Path(out_dir)
    fingerprint = ""
    hashes: dict[str, str] = {}
    if out is not None:
        hashes = {"features": resident.store.content_hash}
        if teacher is not None and hr_store is not None:
            hr = hr_store.store if isinstance(hr_store, ResidentStore) else hr_store
            hashes |= {"teacher": weights_hash(teacher), "hr_features": hr.content_hash}
        fingerprint = run_fingerprint(settings, split, torch.from_numpy(asked.fingerprinted), names, hashes)
    with nullcontext() if out is None else hold_run(out):
        if out is not None:
            _check_resumable(out, settings, fingerprint, hashes, device)
            write_text_atomically(out / "config.toml", dump_toml(settings))
        return _train(
            settings, split, asked, resident, precision, out, fingerprint, hashes,
            teacher=teacher, hr_store=hr_store, fold=fold, progress=progress, allowed=allowed, teacher_saw=teacher_saw,
            say=say,
            sites=sites or {},
        )  # fmt: skip


@contextmanager
def hold_run(out: Path) -> Iterator[None]:
    """Hold the folder of one training: no other trains into it meanwhile, and what earlier ones left half is removed.

    Raises NotOursError when it holds files that no training made, ResumeError when another is at work in it.
    """

    def busy(who: str) -> ResumeError:
        return ResumeError(
            f"{out}: another training is at work in this folder ({who})",
            remedy="wait for it, end it, or give another output folder",
        )

    claim_folder(out, MARKER, "the folder of a training", earlier=_is_earlier_run, passed_over=[LOCK_NAME])
    with hold_file(out / LOCK_NAME, {"started_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}, busy):
        remove_partial_files(out, ())
        yield


def _is_earlier_run(out: Path) -> bool:
    """Whether a version that set no mark trained here."""
    for name, kind in ((STATE_NAME, STATE_KIND), (MODEL_NAME, MODEL_KIND)):
        with suppress(ModelFileError):
            read_tensors(out / name, kind)
            return True
    return False


def _check_resumable(
    out: Path, settings: TrainSettings, fingerprint: str, hashes: Mapping[str, str], device: torch.device
) -> None:
    """Refuse, before anything in the folder is written, what would not go on there. Raises ResumeError."""
    if (out / STATE_NAME).exists():
        check_state(out / STATE_NAME, fingerprint, device)
        return
    if not (out / MODEL_NAME).exists():
        return
    # Nothing to go on from, but a model that would be lost: only the very same training may make it again.
    remedy = "give another output folder, or move the model elsewhere"
    try:
        card = read_card(out / MODEL_NAME)
    except ModelFileError as error:
        raise ResumeError(error.message, remedy=remedy) from error
    same = {**card.training, "device": "", "save_every": 0, "tensorboard": False}
    wanted = deciding(replace(settings, device="", save_every=0, tensorboard=False))
    if json.dumps(deciding(same), sort_keys=True) != json.dumps(wanted, sort_keys=True) or (
        card.features_sha256 and card.features_sha256 != hashes.get("features")
    ):
        raise ResumeError(f"{out / MODEL_NAME} is a model of other settings or features", remedy=remedy)


def _train(
    settings: TrainSettings,
    split: FoldIndices,
    asked: _Labels,
    resident: ResidentStore,
    precision: torch.dtype,
    out: Path | None,
    fingerprint: str,
    hashes: Mapping[str, str],
    *,
    teacher: MILModel | None,
    hr_store: FeatureStore | ResidentStore | None,
    fold: str | None,
    progress: Callable[[EpochFigures], object] | None,
    allowed: Sequence[str],
    teacher_saw: Seen,
    say: Callable[[str], object] | None,
    sites: Mapping[str, object],
) -> TrainResult:
    device = resident.device
    devices = [device] if device.type == "cuda" else []
    with deterministic(settings.deterministic), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        target = asked.target.fitted(asked.truth[split.train], balanced=settings.class_weights == "balanced")
        step = _step(settings, split, target, asked.truth, resident, teacher, hr_store)
        run = Run(resident, asked.truth, split, settings, precision, out, fingerprint, progress, target)
        taught = teacher is not None and settings.loss.needs_teacher
        fitted = fit_model(run, step, asked.cases, taught=taught)
        target, predictions = _predict(fitted.model, run, asked, target)
    if say is not None and fitted.choice:
        say(str(fitted.choice["said"]))
    seen = seen_of(resident.store.records, asked.cases, {"train": split.train, "val": split.val}) | teacher_saw
    card = model_card(settings, fitted.model.settings, target, resident.store.meta, predictions)
    card = replace(
        card,
        choice=fitted.choice,
        fold=fold,
        features_sha256=hashes.get("features", ""),
        teacher={} if teacher is None else {"model": teacher.settings.name, "sha256": hashes.get("teacher", "")},
        seen=seen,
        allowed=tuple(allowed),
        sites=sites,
    )
    val = np.array([p.logits for p in predictions if p.part == "val"]).reshape(-1, len(target.outputs))
    card, reference = with_record(card, resident, split, asked.strata, asked.cases, val, keep_tiles=out is not None)
    result = TrainResult(fitted.model, card, fitted.history, fitted.best_epoch, predictions, reference=reference)
    if out is None:
        return result
    write_predictions(out, predictions, card)
    if fitted.history:
        write_history(out / HISTORY_NAME, fitted.history)
    save_model(out / MODEL_NAME, fitted.model, card, reference)
    return replace(result, model_path=out / MODEL_NAME)


@dataclass(frozen=True)
class _Labels:
    """Truth of every bag: int64 (bags,) classes, or float64 (bags, W) of another target. known: bool (bags,)."""

    target: Target
    truth: NDArray[Any]
    cases: tuple[str, ...]
    strata: NDArray[np.int64]

    @property
    def known(self) -> NDArray[np.bool_]:
        return self.target.known(self.truth)

    @property
    def fingerprinted(self) -> NDArray[Any]:
        """Truth without NaN, which is unequal to itself."""
        return self.truth if self.truth.ndim == 1 else np.nan_to_num(self.truth, nan=-1e30)


def _labels(
    store: FeatureStore | ResidentStore, labels: LabelTable | ArrayLike, classes: Sequence[str] | None
) -> _Labels:
    plain = store.store if isinstance(store, ResidentStore) else store
    if isinstance(labels, TargetTable):
        return _Labels(labels.target, labels.truth, labels.case_ids, labels.labels)
    if isinstance(labels, LabelTable):
        names, table, cases = tuple(classes or labels.classes), labels.labels, labels.case_ids
    else:
        table, cases = np.asarray(labels, np.int64), plain.case_ids
        if table.shape != (len(store),):
            raise SettingsError(f"labels of the shape {table.shape} do not fit {len(store)} bags")
        names = tuple(classes) if classes is not None else tuple(str(c) for c in range(max(2, int(table.max()) + 1)))
    return _Labels(Classification(classes=names), table, cases, table)


def _check_model(settings: TrainSettings, target: Target) -> None:
    if settings.model.name == "clam-sb" and not isinstance(target, Classification):
        raise SettingsError(
            "clam-sb clusters tiles by the bag's class, and this target has none",
            remedy=f"choose one of {', '.join(name for name in MODELS if name != 'clam-sb')}",
        )


def _check_split(store: FeatureStore | ResidentStore, known: NDArray[np.bool_], split: FoldIndices) -> None:
    plain = store.store if isinstance(store, ResidentStore) else store
    if not len(split.train):
        raise SplitError("there is no training bag", remedy="check that the ids of splits and bags agree")
    chosen = np.concatenate([split.train, split.val, split.test]).astype(np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise SplitError("a bag stands in two parts of the split", remedy="give each bag one part")
    for bad, what in ((plain.lengths[chosen] < 1, "has no tiles"), (~known[chosen], "has no label")):
        if bad.any():
            slide = plain.slide_ids[int(chosen[bad.argmax()])]
            raise SplitError(f"{slide} is in the split but {what}", remedy="leave it out of the split")


def _check_teacher(settings: TrainSettings, teacher: MILModel | None, hr_store: object | None) -> None:
    if (teacher is None) != (hr_store is None):
        raise SettingsError("a student needs both a teacher and HR features", remedy="give both, or neither")
    if teacher is None or not settings.loss.needs_teacher:
        return
    if teacher.settings.classes != settings.model.classes:
        raise SettingsError(
            f"the teacher has {teacher.settings.classes} classes, the labels {settings.model.classes}",
            remedy="train the teacher on the same labels",
        )
    if settings.model.name == "linear":
        raise SettingsError(
            "a linear model is fitted to labels alone and learns nothing from a teacher",
            remedy=f"choose one of {', '.join(ATTENTION_MODELS)}, or train it without a teacher",
        )
    if settings.loss.soft > 0 and settings.model.name not in ("auto", *ATTENTION_MODELS):
        raise SettingsError(
            f"a {settings.model.name} model has no attention to distil into",
            remedy=f"choose one of {', '.join(ATTENTION_MODELS)}, or set the soft weight to 0",
        )


def _step(
    settings: TrainSettings,
    split: FoldIndices,
    target: Target,
    truth: NDArray[Any],
    store: ResidentStore,
    teacher: MILModel | None,
    hr_store: FeatureStore | ResidentStore | None,
) -> Step:
    if target.relative:
        if teacher is not None:
            raise SettingsError(
                "a target that compares bags with each other learns nothing from a teacher",
                remedy="take survival-discrete, or leave out the teacher",
            )
        return WholeStep(target, truth, split.train, len(store))
    if teacher is None or hr_store is None:
        return target_step(target)
    targets: TeacherTargets | None = None
    if settings.loss.needs_teacher:
        attention = settings.loss.soft > 0 or settings.loss.hard > 0
        # Each HR tile is read once, so it is not copied into a CPU's memory, and keeps its stored type.
        where = "mapped" if store.device.type == "cpu" else "auto"
        hr_resident = (
            hr_store if isinstance(hr_store, ResidentStore) else ResidentStore.of(hr_store, store.device, place=where)
        )
        targets = teacher_targets(
            teacher,
            hr_resident,
            store,
            split.train,
            attention=attention,
            token_budget=settings.token_budget,
            parents=settings.loss.parents,
        )
    return taught_step(target, settings.loss, targets)


def _predict(model: MILModel, run: Run, asked: _Labels, target: Target) -> tuple[Target, tuple[Prediction, ...]]:
    """The target with what training and validation bags settle, and the predictions of validation and test bags."""
    # From the features as stored, and in float32, whatever the training computed in: these logits are what figures and
    # calibration are made of, and what predicting from the bags gives again.
    exact = ResidentStore.of(run.store.store, run.store.device, place="mapped")
    budget = run.settings.token_budget
    if not isinstance(target, Classification):
        train = run.split.train
        outputs = bag_logits(model, exact, train, token_budget=budget).double().numpy()
        target = target.settled(outputs, asked.truth[train])
    found = []
    for part, indices in (("val", run.split.val), ("test", run.split.test)):
        logits = bag_logits(model, exact, indices, token_budget=budget)
        for i, row in zip(indices.tolist(), logits.tolist(), strict=True):
            slide = run.store.store.slide_ids[i]
            truth = () if asked.truth.ndim == 1 else tuple(map(float, asked.truth[i]))
            found.append(Prediction(slide, asked.cases[i], part, int(asked.strata[i]), tuple(row), truth))
    bad = [p.slide_id for p in found if not np.isfinite(p.logits).all()]
    if bad:
        raise TrainingError(f"the logits of {bad[0]} are not finite", remedy="look for NaN in its features")
    val = [p for p in found if p.part == "val"]
    outputs = np.array([p.logits for p in val], np.float64).reshape(len(val), len(target.outputs))
    return target.calibrated(outputs, truth_of(val, target), [p.case_id for p in val]), tuple(found)
