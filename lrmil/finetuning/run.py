"""From bags, labels and an encoder to fine-tuned encoders with their models, a fold at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import MODEL_NAME, ModelCard, read_card, save_model
from lrmil.config import LossSettings
from lrmil.distill.pupil import load_student
from lrmil.errors import ModelFileError, ResumeError, SettingsError, SplitError, TrainingError
from lrmil.experiment.cohort import Cohort
from lrmil.experiment.folds import TeacherSource, check_folds, check_teachers, keep_splits, load_teacher
from lrmil.finetuning.cohort import FoldTiles, TileBags, fold_tiles
from lrmil.finetuning.loop import Row, fit_tiles, slide_logits
from lrmil.finetuning.network import TileClassifier
from lrmil.finetuning.settings import FinetuneSettings
from lrmil.finetuning.tiles import SlideTiles
from lrmil.leaks import seen_of
from lrmil.model import MILModel
from lrmil.splits import SplitTable
from lrmil.store import FeatureStore, ResidentStore
from lrmil.targets import Classification, Target
from lrmil.trainer import choose_device
from lrmil.trainer.loop import HISTORY_NAME, STATE_NAME, write_history
from lrmil.trainer.outcome import model_card, weights_hash
from lrmil.trainer.predictions import Prediction, truth_of, write_predictions
from lrmil.trainer.steps import Step, target_step, taught_step
from lrmil.trainer.targets import TeacherTargets, teacher_targets
from lrmil.trainer.training import hold_run
from wsi_pipe.config import dump_toml, fingerprint, to_mapping
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.files import file_sha256, write_text_atomically
from wsi_pipe.seen import NOBODY, Seen

__all__ = ["SETTINGS_NAME", "FinetuneRequest", "FinetunedFold", "encoder_name", "finetune_folds"]

SETTINGS_NAME = "finetune.toml"


@dataclass(frozen=True)
class FinetuneRequest:
    """What to fine-tune.

    cohort: labels over the store of ``tiles``. encoder: name or file, the same for every fold. random_weights: draw the
    weights of a named encoder anew. teacher, hr_store: whose word is learned too, see ``LossSettings``. unlabelled: on
    slides without a label as well, whose class is then the one that the teacher names.
    """

    cohort: Cohort
    tiles: TileBags
    splits: SplitTable
    folds: Sequence[str]
    settings: FinetuneSettings
    out: Path
    encoder: str
    random_weights: bool = False
    teacher: TeacherSource | None = None
    hr_store: FeatureStore | None = None
    unlabelled: bool = True
    allow_seen: bool = False


@dataclass(frozen=True)
class FinetunedFold:
    """One fold. encoder, model: files. history: figures of each pass over the slides."""

    encoder: Path
    model: Path
    card: ModelCard
    predictions: tuple[Prediction, ...]
    history: tuple[Row, ...] = field(default=())


def encoder_name(out: Path, fold: str) -> str:
    """Name of a fold's encoder file: folds and runs differ in it, so that one job holds the features of all."""
    return f"{out.absolute().name}-{fold}.safetensors"


def load_start(encoder: str, side_px: int, *, random_weights: bool) -> TorchEncoder:
    """The encoder to begin with. Raises SettingsError where it cannot be trained, and as ``load_encoder`` does."""
    if random_weights and encoder.endswith(".safetensors"):
        raise SettingsError(
            f"{encoder} is a file of weights, which are not drawn anew",
            remedy="give the network's name, such as timm:MODEL, or leave out --random-weights",
        )
    return load_student(encoder, side_px, random_weights=random_weights)


def finetune_folds(
    request: FinetuneRequest,
    *,
    progress: Callable[[str, Row], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> dict[str, FinetunedFold]:
    """Fine-tune the encoder with a model on each fold, into ``out/<fold>``; results by fold.

    Every fold begins with the encoder as given. Calibration is fitted on the validation cases, and nothing else is
    chosen by them; test cases are looked at once, in the end. A run that was interrupted goes on.

    Raises LeakageError before anything is trained where encoder or teacher saw validation or test cases; with
    allow_seen such an overlap is told to ``say`` and stated in the model's card and the encoder's file. SplitError when
    a class has no training slide, SettingsError for settings that do not fit together, ResumeError when the folder
    holds another run, and what reading a slide raises.
    """
    tell = say or (lambda text: None)
    cohort, splits, settings = request.cohort, request.splits, request.settings
    if request.unlabelled and request.teacher is not None and not settings.loss.needs_teacher:
        raise SettingsError("a teacher is given, but nothing is learned from it", remedy="give a weight above 0")
    names = [splits.fold_name(fold) for fold in request.folds]
    allowed = check_folds(
        cohort,
        splits,
        names,
        teacher=request.teacher,
        hr_store=request.hr_store,
        allow_seen=request.allow_seen,
        say=tell,
    )
    check_teachers(request.teacher, names, settings.loss)
    keep_splits(splits, request.out)
    device = choose_device(settings.device)
    hr_resident = None if request.hr_store is None else ResidentStore.of(request.hr_store, device)
    pixels = SlideTiles(
        request.tiles.slides, request.tiles.grid.spec.size_px, cache_mib=settings.cache_mib, threads=settings.threads
    )
    found = {}
    for name in names:
        one = _Fold(request, name, device, pixels, hr_resident, tuple(allowed[name]))

        def report(row: Row, name: str = name) -> None:
            if progress is not None:
                progress(name, row)

        found[name] = one.run(report, lambda text, name=name: tell(f"{name}: {text}"))  # type: ignore[misc]
    return found


@dataclass(frozen=True)
class _Fold:
    request: FinetuneRequest
    name: str
    device: torch.device
    pixels: SlideTiles
    hr_store: ResidentStore | None
    allowed: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.request.out / self.name

    def run(self, progress: Callable[[Row], object], say: Callable[[str], object]) -> FinetunedFold:
        request, settings, cohort = self.request, self.request.settings, self.request.cohort
        table, classes = cohort.table, cohort.table.classes
        fold = fold_tiles(
            cohort, request.splits, self.name, unlabelled=request.unlabelled and request.teacher is not None
        )
        if not len(fold.split.train):
            raise SplitError(f"{self.name} has no labelled training slide", remedy="check labels and splits")
        self.pixels.check([*fold.split.train, *fold.split.val, *fold.split.test, *fold.hidden])
        source = load_start(request.encoder, self.pixels.side_px, random_weights=request.random_weights)
        master, teacher_saw = self._teacher()
        targets = self._targets(master, fold)
        labels = table.labels.copy()
        if targets is not None and len(fold.hidden):
            labels[fold.hidden] = targets.logits[torch.from_numpy(fold.hidden).to(self.device)].argmax(1).cpu().numpy()
            say(f"{len(fold.hidden)} slides without a label learn from the teacher's word alone")
        learned = np.sort(np.concatenate([fold.split.train, fold.hidden]))
        target = Classification(classes=classes).fitted(labels[learned], balanced=settings.class_weights == "balanced")
        settings = dataclasses.replace(
            settings, loss=settings.loss if targets is not None else LossSettings(settings.loss.ce, 0.0, 0.0, 0.0)
        )
        marks = self._hashes(source.info, master)
        run = self._fingerprint(settings, fold, labels, source, marks)
        with hold_run(self.out):
            self._check_resumable(run)
            write_text_atomically(self.out / SETTINGS_NAME, dump_toml(settings))
            step = _step(settings, target, targets)
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(settings.seed)
                head = dataclasses.replace(settings.model, classes=len(classes))
                model = TileClassifier(source, head, self.pixels.side_px)
                history = fit_tiles(
                    model, step, self.pixels, labels, learned.tolist(), settings,
                    device=self.device, precision=_precision(settings, self.device), state=self.out / STATE_NAME,
                    run=run, progress=progress,
                )  # fmt: skip
            predictions = self._predict(model, fold)
            seen = source.info.seen | teacher_saw | self._learned_from(fold)
            encoder = self._write_encoder(model, source, seen, history.steps, settings)
            card = self._card(settings, model, encoder, predictions, target, master, marks, run)
            told = seen | seen_of(cohort.store.records, table.case_ids, {"val": fold.split.val})
            card = dataclasses.replace(card, seen=told)
            write_predictions(self.out, predictions, card)
            write_history(self.out / HISTORY_NAME, history.rows)
            save_model(self.out / MODEL_NAME, model.head, card)
        return FinetunedFold(encoder, self.out / MODEL_NAME, card, predictions, tuple(history.rows))

    def _teacher(self) -> tuple[MILModel | None, Seen]:
        if self.request.teacher is None:
            return None, NOBODY
        return load_teacher(self.request.teacher.model_path(self.name), self.request.cohort)

    def _targets(self, master: MILModel | None, fold: FoldTiles) -> TeacherTargets | None:
        """The teacher's word on all slides to learn from."""
        loss = self.request.settings.loss
        if master is None or self.hr_store is None or not loss.needs_teacher:
            return None
        return teacher_targets(
            master,
            self.hr_store,
            ResidentStore.of(self.request.cohort.store, self.device, place="mapped"),
            np.sort(np.concatenate([fold.split.train, fold.hidden])),
            attention=loss.soft > 0 or loss.hard > 0,
            token_budget=16384,
        )

    def _learned_from(self, fold: FoldTiles) -> Seen:
        store, table = self.request.cohort.store, self.request.cohort.table
        return seen_of(store.records, table.case_ids, {"train": fold.split.train, "unlabelled": fold.hidden})

    def _hashes(self, info: EncoderInfo, master: MILModel | None) -> dict[str, str]:
        found = {"encoder": info.weights_sha256}
        if master is not None and self.request.hr_store is not None:
            found |= {"teacher": weights_hash(master), "hr_features": self.request.hr_store.content_hash}
        return found

    def _fingerprint(
        self,
        settings: FinetuneSettings,
        fold: FoldTiles,
        labels: NDArray[np.int64],
        source: TorchEncoder,
        marks: Mapping[str, str],
    ) -> str:
        """Of everything that decides the numbers."""
        deciding = dataclasses.replace(settings, device="", cache_mib=0, threads=0, save_every=0)
        store = self.request.cohort.store
        slides = [(r.slide_id, r.slide_fingerprint, r.fingerprint) for r in store.records]
        parts = [part.tolist() for part in (fold.split.train, fold.split.val, fold.split.test, fold.hidden)]
        return fingerprint(
            to_mapping(deciding), parts, labels.tolist(), list(self.request.cohort.table.classes), slides,
            store.lengths.tolist(), json.dumps(source.recipe.transform(), sort_keys=True), dict(marks),
        )  # fmt: skip

    def _check_resumable(self, run: str) -> None:
        """Raises ResumeError where another training's model would be lost."""
        path = self.out / MODEL_NAME
        if (self.out / STATE_NAME).exists() or not path.exists():
            return
        try:
            made = read_card(path).features_sha256
        except ModelFileError as error:
            raise ResumeError(error.message, remedy="give another output folder, or move it elsewhere") from error
        if made != run:
            raise ResumeError(
                f"{path} is a model of other settings, slides or labels",
                remedy="give another output folder, or move the model elsewhere",
            )

    def _predict(self, model: TileClassifier, fold: FoldTiles) -> tuple[Prediction, ...]:
        table, found = self.request.cohort.table, []
        slides = self.request.cohort.store.slide_ids
        for part, indices in (("val", fold.split.val), ("test", fold.split.test)):
            logits = slide_logits(model, self.pixels, indices.tolist(), device=self.device)
            for i, row in zip(indices.tolist(), logits.tolist(), strict=True):
                found.append(Prediction(slides[i], table.case_ids[i], part, int(table.labels[i]), tuple(row)))
        bad = [p.slide_id for p in found if not np.isfinite(p.logits).all()]
        if bad:
            raise TrainingError(f"the logits of {bad[0]} are not finite", remedy="lower the learning rate")
        return tuple(found)

    def _write_encoder(
        self, model: TileClassifier, source: TorchEncoder, seen: Seen, steps: int, settings: FinetuneSettings
    ) -> Path:
        path, info = self.out / encoder_name(self.request.out, self.name), source.info
        write_lr_encoder(
            path,
            model.network.cpu(),
            recipe=source.recipe,
            tile=dataclasses.replace(self.request.tiles.grid.spec, overlap_px=0),
            licence=f"{info.licence} (fine-tuned from {info.name})",
            training={
                "method": "fine-tuned with a MIL model",
                "encoder": info.name,
                "encoder_weights_sha256": info.weights_sha256,
                **({"encoder_weights": RANDOM} if info.random else {}),
                "taught": self.request.teacher is not None,
                "fold": self.name,
                "steps": steps,
                "settings": to_mapping(settings),
                "seen": seen.to_json(),
                "allowed": list(self.allowed),
            },
        )
        return path

    def _card(
        self,
        settings: FinetuneSettings,
        model: TileClassifier,
        encoder: Path,
        predictions: Sequence[Prediction],
        target: Target,
        master: MILModel | None,
        marks: Mapping[str, str],
        run: str,
    ) -> ModelCard:
        cohort = self.request.cohort
        meta = dataclasses.replace(
            cohort.store.meta, encoder=str(encoder.absolute()), weights_sha256=file_sha256(encoder)
        )
        val = [p for p in predictions if p.part == "val"]
        outputs = np.array([p.logits for p in val], np.float64).reshape(len(val), len(target.outputs))
        calibrated = target.calibrated(outputs, truth_of(val, target), [p.case_id for p in val])
        card = model_card(settings, model.head.settings, calibrated, meta, predictions)
        confounded = cohort.confounding(self.request.splits)
        return dataclasses.replace(
            card,
            choice={"said": f"trained together with its encoder, {encoder.name}, for {settings.steps} steps"},
            fold=self.name,
            features_sha256=run,
            teacher={} if master is None else {"model": master.settings.name, "sha256": marks.get("teacher", "")},
            allowed=self.allowed,
            sites=confounded.to_json() if confounded else {},
        )


def _step(settings: FinetuneSettings, target: Target, targets: TeacherTargets | None) -> Step:
    return target_step(target) if targets is None else taught_step(target, settings.loss, targets)


def _precision(settings: FinetuneSettings, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes with it, as in distillation."""
    if settings.precision == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        half = settings.precision == "bfloat16"
    return torch.bfloat16 if half else torch.float32
