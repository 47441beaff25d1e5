"""Training over folds that share one resident store, each fold from a fresh model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lrmil.checkpoint import MODEL_NAME, ModelCard, load_model, read_card
from lrmil.config import ATTENTION_MODELS, LossSettings, TrainSettings
from lrmil.errors import ModelFileError, ModelMismatchError, SettingsError
from lrmil.experiment.cohort import Cohort
from lrmil.experiment.guided import Guide
from lrmil.experiment.model_card import write_model_card, write_run_card
from lrmil.leaks import check_encoder, check_model, judged_of
from lrmil.model import MILModel
from lrmil.splits import SPLITS_NAME, SplitTable, read_splits
from lrmil.store import FeatureStore, ResidentStore
from lrmil.targets import TargetTable
from lrmil.trainer import TrainResult, bag_logits, choose_device, choose_precision, train
from lrmil.trainer.predictions import predictions_csv
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.seen import NOBODY, Seen

__all__ = [
    "SPLITS_NAME",
    "TeacherSource",
    "check_folds",
    "check_store",
    "check_teachers",
    "keep_splits",
    "load_teacher",
    "train_folds",
]

SLIDE_PREDICTIONS_NAME = "predictions-slides.csv"
"""Of single slides, by a model of cases."""
SLIDE_TOKENS = 32768


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

    def check_leakage(
        self,
        fold: str,
        splits: SplitTable,
        cohort: Cohort,
        *,
        allow: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> None:
        """Raise LeakageError when a fold's teacher has seen cases that the student is tested on, or may have."""
        path = self.model_path(fold)
        check_model(
            read_card(path),
            path,
            judged_of(cohort.store.records, cohort.table.case_ids, cohort.fold(splits, fold).test),
            what="teacher",
            remedy="give the folder of a teacher trained with the same splits: --teacher RUN",
            splits=(splits, fold),
            identities=(cohort.store.slide_ids, cohort.table.case_ids),
            allow=allow,
            say=say,
        )


def check_store(card: ModelCard, store: FeatureStore, model: Path) -> None:
    """Raise ModelMismatchError when a store's features are not of the kind that a model was trained on."""
    meta = store.meta
    same_encoder = (
        meta.weights_sha256 == card.weights_sha256
        if card.weights_sha256 and meta.weights_sha256
        else slug_asked_for(meta.encoder) == slug_asked_for(card.encoder)
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
    guide: Guide | None = None,
    progress: Callable[[str, Mapping[str, float | None]], object] | None = None,
    allow_seen: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict[str, TrainResult]:
    """Train each fold into ``out/<fold>`` over one resident store; the splits are written beside them.

    Every fold starts from fresh weights and, with a teacher, has that fold's own. seeds: train each fold with every
    one of them, into ``out/<fold>-seed_<seed>``; none is the settings' own seed alone. guide: train on parts of bags
    too, see ``lrmil.experiment.guided``. progress: called with folder name and figures of each epoch. Returns results
    by folder name.

    Raises SettingsError where a teacher has no attention to learn from, and
    LeakageError before anything is trained where the features' encoder or the teacher saw validation or test
    cases; with allow_seen such an overlap is told to ``say`` and stated in the models' cards. The rest as
    ``lrmil.trainer.train`` does.
    """
    names = [splits.fold_name(fold) for fold in folds]
    indices = {name: cohort.fold(splits, name) for name in names}
    allowed = check_folds(cohort, splits, names, teacher=teacher, hr_store=hr_store, allow_seen=allow_seen, say=say)
    check_teachers(teacher, names, settings.loss)
    keep_splits(splits, out)
    if guide is not None:
        if teacher is not None:
            raise ConfigError("a student is not trained on parts of bags", remedy="leave out --guided-by or --teacher")
        guide.check(names, splits, cohort, allow=allow_seen, say=say)
        guide.write(out)
    device = choose_device(settings.device)
    resident = ResidentStore.of(cohort.store, device, choose_precision(settings.precision, device))
    hr_resident: ResidentStore | None = None if hr_store is None else ResidentStore.of(hr_store, device)
    results = {}
    confounded = cohort.confounding(splits)
    for name in names:
        master, saw = (None, NOBODY) if teacher is None else load_teacher(teacher.model_path(name), cohort)
        for seed in seeds or (settings.seed,):
            folder = f"{name}-seed_{seed}" if seeds else name

            def report(row: Mapping[str, float | None], folder: str = folder) -> None:
                if progress is not None:
                    progress(folder, row)

            def tell(text: str, folder: str = folder) -> None:
                if say is not None:
                    say(f"{folder}: {text}")

            whole = (resident, cohort.table, indices[name])
            store, table, split = whole if guide is None else guide.extend(whole, name, seed, settings)
            results[folder] = train(
                store,
                table,
                split,
                replace(settings, seed=seed),
                out / folder,
                teacher=master,
                hr_store=hr_resident,
                fold=name,
                progress=report,
                allowed=allowed[name],
                teacher_saw=saw,
                say=tell,
                sites=confounded.to_json() if confounded else {},
            )
            if cohort.slides is not None:
                _write_slides(out / folder / SLIDE_PREDICTIONS_NAME, results[folder], cohort, device)
            write_model_card(out / folder)
    write_run_card(out)
    return results


def _write_slides(path: Path, result: TrainResult, cohort: Cohort, device: torch.device) -> None:
    """What a model of joined bags says of each slide alone, which has its case's truth."""
    assert cohort.slides is not None
    resident = ResidentStore.of(cohort.slides, device, place="mapped")
    place = {case: i for i, case in enumerate(cohort.store.slide_ids)}
    rows = []
    for case in result.predictions:
        own = [i for i in cohort.members[place[case.slide_id]].tolist() if resident.lengths[i]]
        logits = bag_logits(result.model, resident, own, token_budget=SLIDE_TOKENS).tolist()
        rows += [
            replace(case, slide_id=cohort.slides.slide_ids[i], logits=tuple(z))
            for i, z in zip(own, logits, strict=True)
        ]
    write_text_atomically(path, predictions_csv(rows, result.card))


def check_folds(
    cohort: Cohort,
    splits: SplitTable,
    names: Sequence[str],
    *,
    teacher: TeacherSource | None = None,
    hr_store: FeatureStore | None = None,
    allow_seen: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict[str, list[str]]:
    """What was let pass in each fold, in words, which is told to ``say`` too.

    Raises LeakageError where the encoder of the cohort's store or the fold's teacher saw validation or test cases,
    unless ``allow_seen``; ModelMismatchError where ``hr_store`` is not what the teacher was trained on.
    """
    allowed: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        fold, notes = cohort.fold(splits, name), allowed[name]
        for part in ("val", "test"):
            judged = judged_of(cohort.store.records, cohort.table.case_ids, getattr(fold, part))
            encoder = cohort.store.meta.encoder or "of these bags"
            check_encoder(encoder, judged, part=f"{name} {part}", allow=allow_seen, say=notes.append)
    if teacher is not None:
        for name in names:
            teacher.check_leakage(name, splits, cohort, allow=allow_seen, say=allowed[name].append)
            if hr_store is not None:
                check_store(read_card(teacher.model_path(name)), hr_store, teacher.model_path(name))
    for name, notes in allowed.items():
        for note in notes:
            (say or (lambda text: None))(f"{name}: {note}")
    return allowed


def check_teachers(teacher: TeacherSource | None, names: Sequence[str], loss: LossSettings) -> None:
    """Raise SettingsError where a fold's teacher has no attention, but its attention is to be learned.

    A linear model's mean over tiles is no attention: taken for one, it would teach that every tile matters alike.
    """
    if teacher is None or not (loss.soft > 0 or loss.hard > 0):
        return
    for name in names:
        path = teacher.model_path(name)
        card = read_card(path)
        if card.model.name in ATTENTION_MODELS:
            continue
        asked = card.training.get("model", {}).get("name")
        chosen = ", which auto chose for this fold" if asked == "auto" else ""
        raise SettingsError(
            f"the teacher {path} is a {card.model.name} model{chosen}, and has no attention to learn from",
            remedy="train it with --model gated-abmil in a folder of its own, or learn from its probabilities alone: "
            "--l-soft 0 --l-hard 0",
        )


def keep_splits(splits: SplitTable, out: Path) -> None:
    """Write the splits of a run into its folder. Raises ConfigError where it holds folds of others."""
    there = out / SPLITS_NAME
    if not there.is_file() or read_splits(there) != splits:
        if there.is_file() and any((out / name).is_dir() for name in splits.folds):
            raise ConfigError(f"{there} holds other folds", remedy=f"give --splits {there}, or another --out")
        splits.write(there)


def load_teacher(path: Path, cohort: Cohort) -> tuple[MILModel, Seen]:
    """A fold's teacher, and whom it saw. Raises ModelMismatchError when it knows other classes."""
    master, card = load_model(path)
    table = cohort.table
    wanted = table.target.outputs if isinstance(table, TargetTable) else table.classes
    if card.classes != wanted or bool(card.target_state) != isinstance(table, TargetTable):
        raise ModelMismatchError(
            f"the teacher knows {', '.join(card.classes)}, the labels {', '.join(wanted)}",
            remedy="train the teacher on the same labels",
        )
    return master, card.seen
