"""Training over folds that share one resident store, each fold from a fresh model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrmil.checkpoint import ModelCard, load_model, read_card
from lrmil.config import TrainSettings
from lrmil.errors import LeakageError, ModelFileError, ModelMismatchError
from lrmil.experiment.cohort import Cohort
from lrmil.model import MILModel
from lrmil.splits import SPLITS_NAME, SplitTable, read_splits, seen_cases
from lrmil.store import FeatureStore, ResidentStore
from lrmil.trainer import TrainResult, choose_device, choose_precision, train
from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.errors import ConfigError

__all__ = ["SPLITS_NAME", "TeacherSource", "check_store", "train_folds"]

MODEL_NAME = "model.safetensors"


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher of each fold comes from: a model file, or the folder of a run with one model a fold."""

    path: Path

    def model_path(self, fold: str) -> Path:
        """The teacher's file for a fold. Raises ModelFileError when the run has none."""
        if self.path.is_file():
            return self.path
        for candidate in (self.path / fold / MODEL_NAME, self.path / MODEL_NAME):
            if candidate.is_file():
                return candidate
        raise ModelFileError(f"{self.path} has no {fold}/{MODEL_NAME}", remedy="train the teacher on the same folds")

    def any_card(self, folds: Sequence[str]) -> ModelCard:
        """The card of the first fold's teacher, which says what HR features are needed."""
        return read_card(self.model_path(folds[0]))

    def check_leakage(self, fold: str, splits: SplitTable, cohort: Cohort) -> None:
        """Raise LeakageError when a fold's teacher has seen cases that the student is tested on.

        Known from the splits beside the teacher's run, else from the fold that its card names.
        """
        path = self.model_path(fold)
        card = read_card(path)
        if card.fold is None:
            return
        remedy = "give the folder of a teacher trained with the same splits: --teacher RUN"
        torn = seen_cases(path, card.fold, fold, splits, cohort.store.slide_ids, cohort.table.case_ids)
        if torn is None:
            if card.fold != fold:
                raise LeakageError(f"{path} is of {card.fold}, the student of {fold}", remedy=remedy)
            return
        if torn:
            raise LeakageError(
                f"the teacher {path} was trained on {len(torn)} test cases of {fold}: {', '.join(torn[:5])}",
                remedy=remedy,
            )


def check_store(card: ModelCard, store: FeatureStore, model: Path) -> None:
    """Raise ModelMismatchError when a store's features are not of the kind that a model was trained on."""
    meta = store.meta
    same_encoder = (
        meta.weights_sha256 == card.weights_sha256
        if card.weights_sha256 and meta.weights_sha256
        else encoder_slug(meta.encoder) == encoder_slug(card.encoder)
    )
    facts = [
        ("encoder", same_encoder, f"{meta.encoder or 'unnamed'} ({meta.weights_sha256[:12]})"),
        ("level", meta.level == card.level, meta.level or "not stated"),
        ("tile size in px", card.tile_px is None or meta.tile_px == card.tile_px, str(meta.tile_px)),
        ("feature dimension", store.dim == card.model.in_dim, str(store.dim)),
    ]
    for what, same, found in facts:
        if not same:
            trained = f"{card.encoder or 'unnamed'} ({card.weights_sha256[:12]}) at {card.level or 'an unstated level'}"
            raise ModelMismatchError(
                f"{store.path or 'the store'}: {what} {found}, but {model} was trained on {trained}",
                remedy="give bags of the encoder, weights and level of training",
            )


def train_folds(
    cohort: Cohort,
    splits: SplitTable,
    folds: Sequence[str],
    settings: TrainSettings,
    out: Path,
    *,
    seeds: Sequence[int] = (),
    teacher: TeacherSource | None = None,
    hr_store: FeatureStore | None = None,
    progress: Callable[[str, Mapping[str, float | None]], object] | None = None,
) -> dict[str, TrainResult]:
    """Train each fold into ``out/<fold>`` over one resident store; the splits are written beside them.

    Every fold starts from fresh weights and, with a teacher, has that fold's own. seeds: train each fold with every
    one of them, into ``out/<fold>-seed_<seed>``; none is the settings' own seed alone. progress: called with folder
    name and figures of each epoch. Returns results by folder name.

    Raises LeakageError before anything is trained; the rest as ``lrmil.trainer.train`` does.
    """
    names = [splits.fold_name(fold) for fold in folds]
    indices = {name: cohort.fold(splits, name) for name in names}
    if teacher is not None:
        for name in names:
            teacher.check_leakage(name, splits, cohort)
            if hr_store is not None:
                check_store(read_card(teacher.model_path(name)), hr_store, teacher.model_path(name))
    there = out / SPLITS_NAME
    if not there.is_file() or read_splits(there) != splits:
        if there.is_file() and any((out / name).is_dir() for name in splits.folds):
            raise ConfigError(f"{there} holds other folds", remedy=f"give --splits {there}, or another --out")
        splits.write(there)
    device = choose_device(settings.device)
    resident = ResidentStore.of(cohort.store, device, choose_precision(settings.precision, device))
    hr_resident: ResidentStore | None = None if hr_store is None else ResidentStore.of(hr_store, device)
    results = {}
    for name in names:
        master = None if teacher is None else _master(teacher.model_path(name), cohort)
        for seed in seeds or (settings.seed,):
            folder = f"{name}-seed_{seed}" if seeds else name

            def report(row: Mapping[str, float | None], folder: str = folder) -> None:
                if progress is not None:
                    progress(folder, row)

            results[folder] = train(
                resident,
                cohort.table,
                indices[name],
                replace(settings, seed=seed),
                out / folder,
                teacher=master,
                hr_store=hr_resident,
                fold=name,
                progress=report,
            )
    return results


def _master(path: Path, cohort: Cohort) -> MILModel:
    """A fold's teacher. Raises ModelMismatchError when it knows other classes."""
    master, card = load_model(path)
    if card.classes != cohort.table.classes:
        raise ModelMismatchError(
            f"the teacher knows {', '.join(card.classes)}, the labels {', '.join(cohort.table.classes)}",
            remedy="train the teacher on the same labels",
        )
    return master
