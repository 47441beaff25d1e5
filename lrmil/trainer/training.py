"""``train``: a fold from features to a model file and predictions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrmil.checkpoint import MODEL_KIND, MODEL_NAME, ModelCard, read_card, read_tensors, save_model
from lrmil.config import ATTENTION_MODELS, TrainSettings, deciding
from lrmil.data import LabelTable
from lrmil.errors import ModelFileError, ResumeError, SettingsError, SplitError, TrainingError
from lrmil.leaks import seen_of
from lrmil.model import MILModel
from lrmil.ood import Reference
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore
from lrmil.trainer.compute import bag_logits, choose_device, choose_precision, deterministic, place
from lrmil.trainer.fitting import fit_model
from lrmil.trainer.loop import HISTORY_NAME, STATE_NAME, EpochFigures, Run, write_history
from lrmil.trainer.optimise import class_weights
from lrmil.trainer.outcome import PREDICTIONS_NAME, Prediction, model_card, predictions_csv, weights_hash
from lrmil.trainer.record import with_record
from lrmil.trainer.state import STATE_KIND, check_state, run_fingerprint
from lrmil.trainer.steps import Step, plain_step, student_step
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
    (bags,) or a LabelTable. ``settings.model.in_dim`` and ``classes`` are taken from features and labels. out_dir:
    where ``config.toml``, ``metrics.csv``, ``state.safetensors``, ``model.safetensors`` and ``predictions.csv`` go; a
    run that was interrupted there goes on; None keeps all in memory. teacher, hr_store: for a student, whose terms
    ``settings.loss`` weighs; the teacher is frozen. classes: names, by default those of the LabelTable. fold: for the
    record. progress: called with the figures of each epoch.
    allowed: overlaps of seen and judged cases that were let pass. teacher_saw: the record of the teacher's file, which
    the student's takes over. say: told what was chosen inside the training cases, in words. sites: how labels and sites
    hang together, for the record.

    Without validation bags the last epoch is kept, and only the weights of the classes are corrected for. The caller's
    random state and the models given are left as they are, apart from moving the teacher to the device.

    Raises SplitError when a class has no training bag or a bag of the split no rows or label; SettingsError,
    DivergedError, ResumeError, BagMismatchError as documented at ``fit`` and ``teacher_targets``; OutputError when a
    file cannot be written.
    """
    table, cases, names = _labels(store, labels, classes)
    _check_split(store, table, split)
    model_settings = replace(settings.model, in_dim=store.dim, classes=len(names))
    settings = replace(settings, model=model_settings)
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
        fingerprint = run_fingerprint(settings, split, torch.from_numpy(table), names, hashes)
    with nullcontext() if out is None else hold_run(out):
        if out is not None:
            _check_resumable(out, settings, fingerprint, hashes, device)
            write_text_atomically(out / "config.toml", dump_toml(settings))
        return _train(
            settings, split, table, cases, names, resident, precision, out, fingerprint, hashes,
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
    table: NDArray[np.int64],
    cases: Sequence[str],
    names: tuple[str, ...],
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
        balanced = settings.class_weights == "balanced"
        loss_weights = class_weights(table, split.train, names, balanced=balanced)
        step = _step(settings, split, loss_weights.to(resident.device), resident, teacher, hr_store)
        weights = loss_weights.tolist()
        prior = tuple(-math.log(weight) for weight in weights)
        run = Run(resident, table, split, settings, precision, out, fingerprint, progress, prior)
        taught = teacher is not None and settings.loss.needs_teacher
        fitted = fit_model(run, step, cases, loss_weights, taught=taught)
        predictions = _predict(fitted.model, run, cases)
    if say is not None and fitted.choice:
        say(str(fitted.choice["said"]))
    seen = seen_of(resident.store.records, cases, {"train": split.train, "val": split.val}) | teacher_saw
    card = model_card(settings, fitted.model.settings, names, resident.store.meta, predictions, weights)
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
    val = np.array([p.logits for p in predictions if p.part == "val"]).reshape(-1, len(names))
    card, reference = with_record(card, resident, split, table, cases, val, keep_tiles=out is not None)
    result = TrainResult(fitted.model, card, fitted.history, fitted.best_epoch, predictions, reference=reference)
    if out is None:
        return result
    write_text_atomically(out / PREDICTIONS_NAME, predictions_csv(predictions, card))
    if fitted.history:
        write_history(out / HISTORY_NAME, fitted.history)
    save_model(out / MODEL_NAME, fitted.model, card, reference)
    return replace(result, model_path=out / MODEL_NAME)


def _labels(
    store: FeatureStore | ResidentStore, labels: LabelTable | ArrayLike, classes: Sequence[str] | None
) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[str, ...]]:
    """Labels int64 (bags,), case ids and class names."""
    plain = store.store if isinstance(store, ResidentStore) else store
    if isinstance(labels, LabelTable):
        return labels.labels, labels.case_ids, tuple(classes or labels.classes)
    table = np.asarray(labels, np.int64)
    if table.shape != (len(store),):
        raise SettingsError(f"labels of the shape {table.shape} do not fit {len(store)} bags")
    names = tuple(classes) if classes is not None else tuple(str(c) for c in range(max(2, int(table.max()) + 1)))
    return table, plain.case_ids, names


def _check_split(store: FeatureStore | ResidentStore, labels: NDArray[np.int64], split: FoldIndices) -> None:
    plain = store.store if isinstance(store, ResidentStore) else store
    if not len(split.train):
        raise SplitError("there is no training bag", remedy="check that the ids of splits and bags agree")
    chosen = np.concatenate([split.train, split.val, split.test]).astype(np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise SplitError("a bag stands in two parts of the split", remedy="give each bag one part")
    for bad, what in ((plain.lengths[chosen] < 1, "has no tiles"), (labels[chosen] < 0, "has no label")):
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
    weights: Tensor,
    store: ResidentStore,
    teacher: MILModel | None,
    hr_store: FeatureStore | ResidentStore | None,
) -> Step:
    if teacher is None or hr_store is None:
        return plain_step(weights)
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
    return student_step(weights, settings.loss, targets)


def _predict(model: MILModel, run: Run, cases: Sequence[str]) -> tuple[Prediction, ...]:
    # From the features as stored, and in float32, whatever the training computed in: these logits are what figures and
    # calibration are made of, and what predicting from the bags gives again.
    exact = ResidentStore.of(run.store.store, run.store.device, place="mapped")
    found = []
    for part, indices in (("val", run.split.val), ("test", run.split.test)):
        logits = bag_logits(model, exact, indices, token_budget=run.settings.token_budget)
        for i, row in zip(indices.tolist(), logits.tolist(), strict=True):
            slide = run.store.store.slide_ids[i]
            found.append(Prediction(slide, cases[i], part, int(run.labels[i]), tuple(row)))
    bad = [p.slide_id for p in found if not np.isfinite(p.logits).all()]
    if bad:
        raise TrainingError(f"the logits of {bad[0]} are not finite", remedy="look for NaN in its features")
    return tuple(found)
