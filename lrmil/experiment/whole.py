"""The whole LRMIL experiment: slides and labels in; one table, one JSON and one picture out.

Run again, it goes on where it stopped: every stage keeps what is done and still fits the settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.config import LossSettings
from lrmil.distill import DistillRequest, DistillResult, run_distillation
from lrmil.experiment.baselines import (
    BASELINES,
    EAGLE_TILES,
    guided_rows,
    kept,
    model_of,
    random_rows,
    tile_attention,
    with_parents,
    zoomed_rows,
)
from lrmil.experiment.cohort import Cohort, load_cohort, open_features
from lrmil.experiment.figures import evaluate_run
from lrmil.experiment.folds import SPLITS_NAME, TeacherSource, train_folds
from lrmil.experiment.report import write_results
from lrmil.experiment.results import Arm, Results, measure_cost, summarise
from lrmil.experiment.settings import ABLATIONS, ExperimentSettings
from lrmil.pictures.distill import draw_distillation
from lrmil.splits import SplitTable, make_splits
from lrmil.store import FeatureStore
from wsi_pipe.config import fingerprint, to_mapping
from wsi_pipe.encoders import load_encoder
from wsi_pipe.errors import ConfigError, JobError
from wsi_pipe.execute import Where
from wsi_pipe.files import write_text_atomically
from wsi_pipe.job import open_job, utc_now
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.job.lock import hold_job
from wsi_pipe.manifest import read_manifest
from wsi_pipe.synthetic import make_cohort

__all__ = ["HR", "LR", "STAGE1", "STAGE2", "Experiment"]

HR, LR, STAGE1, STAGE2 = "HR", "LR", "LR, stage 1", "LR, stages 1 and 2"
FOLDERS = {HR: "hr", LR: "lr", STAGE1: "lr-stage1", STAGE2: "lr-stage2"}


@dataclass
class Experiment:
    """Settings, folder, slides and labels of one experiment; each method is a stage.

    workers: processes that draw a synthetic cohort. A script that gives more than 1 must keep its work below
    ``if __name__ == "__main__"``.
    """

    settings: ExperimentSettings
    out: Path
    slides: Path | None = None
    labels: Path | None = None
    splits: SplitTable | None = None
    cases: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1

    def run(self, *, ablation: str | None = None, progress: Callable[[str], object] = str) -> Results:
        """Every stage in turn; ``ablation``: a fold on which the loss terms are left out one by one as well.

        Raises LeakageError when a case is in two parts of a fold or a fold's student saw its test slides, and what the
        stages raise.
        """
        self.say = progress
        synthetic = self.slides is None
        self.prepare_slides()
        self.extract(())
        cohort = self.cohort(self.settings.teacher_features, self.settings.lr, "lr")
        hr_cohort = self.cohort(self.settings.teacher_features, self.settings.hr, "hr", parents=True)
        splits = self.make_folds(cohort)
        folds = list(splits.folds)
        train = self.settings.mil_settings
        progress("HR classifiers")
        train_folds(hr_cohort, splits, folds, train(), self.run_folder(HR))
        progress("LR classifiers on the undistilled encoder")
        train_folds(cohort, splits, folds, train(), self.run_folder(LR))
        self.cases = dict(zip(cohort.store.slide_ids, cohort.table.case_ids, strict=True))
        students = {fold: self.distil(fold, splits) for fold in folds}
        self.extract([result.path for result in students.values()])
        for fold, result in students.items():
            self.train_student(fold, result.path, splits, hr_cohort.store, self.run_folder(STAGE1), None)
            for rule, loss in self.settings.taught.items():
                self.train_student(fold, result.path, splits, hr_cohort.store, self.run_folder(STAGE2, rule), loss)
        arms = [
            Arm(HR, self.settings.hr, self.settings.teacher, self.run_folder(HR)),
            Arm(LR, self.settings.lr, self.settings.teacher, self.run_folder(LR)),
            Arm(STAGE1, self.settings.lr, self.settings.student, self.run_folder(STAGE1)),
            *(
                Arm(_with(STAGE2, rule), self.settings.lr, self.settings.student, self.run_folder(STAGE2, rule), STAGE1)
                for rule in self.settings.taught
            ),
            *(self.baseline(name, cohort, hr_cohort, splits) for name in self.settings.baselines),
        ]
        results = dataclasses.replace(summarise(self.settings, arms, students), synthetic=synthetic)
        # Written before the dear parts, so that an interrupted run leaves its figures.
        write_results(self.out, results)
        results = dataclasses.replace(
            results, cost=self.cost(students[folds[0]].path, cohort.fold(splits, folds[0]).test.tolist(), cohort)
        )
        write_results(self.out, results)
        if ablation is not None:
            results = dataclasses.replace(results, ablation=self.ablate(splits.fold_name(ablation), splits, hr_cohort))
            write_results(self.out, results)
        return results

    def run_folder(self, arm: str, rule: str = "") -> Path:
        """Where the classifiers of an arm are. rule: for parents, where there are several arms of that name."""
        return self.out / "runs" / (f"{FOLDERS[arm]}-{rule}" if rule else FOLDERS[arm])

    def prepare_slides(self) -> None:
        """The given slides, or a synthetic cohort. Raises ConfigError when only one of slides and labels is given."""
        if (self.slides is None) != (self.labels is None):
            raise ConfigError("slides and labels go together", remedy="give --slides and --labels, or neither")
        if self.slides is not None:
            return
        folder = self.out / "slides"
        self.slides, self.labels = folder / "slides.csv", folder / "labels.csv"
        c = self.settings.cohort
        mark, stamp = folder / "cohort.txt", fingerprint(to_mapping(c))
        if mark.is_file() and mark.read_text(encoding="utf-8") == stamp and self.labels.is_file():
            return
        self.say(f"cohort: {c.slides} slides of {c.size_px} px, signal {c.signal}")
        make_cohort(
            folder,
            c.slides,
            seed=c.seed,
            signal=c.signal,  # type: ignore[arg-type]
            size_px=(c.size_px, c.size_px),
            mpp=c.mpp,
            tissue_fraction=c.tissue_fraction,
            workers=self.workers,
        )
        write_text_atomically(mark, stamp)

    def extract(self, lr_encoders: Sequence[Path]) -> None:
        """Bags with the teacher at both levels, and LR encoders at theirs. Raises JobError naming slides that fail."""
        assert self.slides is not None
        # A bag is made anew with what is asked for, so what earlier stages and runs put there is asked for again.
        found = (self.out / "encoders").glob("lr-*.safetensors")
        earlier = {path for path in found if not path.name.endswith(".state.safetensors")}
        lr_encoders = sorted(earlier | set(lr_encoders))
        settings = self.settings.job(tuple(str(path) for path in lr_encoders))
        entries = read_manifest(self.slides)
        teacher = load_encoder(
            self.settings.teacher, precision=self.settings.precision, random_weights=self.settings.random_teacher
        )
        encoders = {self.settings.teacher: teacher}
        encoders |= {str(path): load_encoder(str(path), precision=self.settings.precision) for path in lr_encoders}
        self.say(f"features of {len(entries)} slides by {', '.join(e.info.slug for e in encoders.values())}")
        paths = open_job(self.out / "job", settings, entries)
        with hold_job(self.out / "job", {"started_utc": utc_now(), "until": "extract"}):
            results = dispatch(entries, settings, paths, Where(), encoders=encoders)
            failed = [outcome for outcome in results if outcome.status == "failed"]
        if failed:
            raise JobError(
                f"{len(failed)} of {len(entries)} slides failed, first {failed[0].slide_id}: {failed[0].reason}",
                remedy=failed[0].remedy or "mend or leave out these slides, then run again",
            )

    def cohort(self, encoder: str, level: str, store: str, *, parents: bool = False) -> Cohort:
        """Features of an encoder at a level, with the labels."""
        assert self.labels is not None
        features = open_features(
            self.out / "job" / "bags",
            level=level,
            encoder=encoder,
            store_dir=self.out / "stores" / store,
            parent_level=self.settings.lr if parents else None,
        )
        return load_cohort(features, self.labels)

    def make_folds(self, cohort: Cohort) -> SplitTable:
        """The given folds or new ones by case, checked."""
        s = self.settings
        splits = self.splits or make_splits(cohort.table.case_labels(), s.folds, s.split_seed, s.val_fraction)
        splits.check_leakage(cohort.store.slide_ids, cohort.table.case_ids)
        splits.write(self.out / SPLITS_NAME)
        return splits

    def distil(self, fold: str, splits: SplitTable, *, name: str = "", **changes: object) -> DistillResult:
        """An LR encoder of one fold."""
        s = self.settings
        number = fold.removeprefix("fold_")
        out = self.out / "encoders" / f"lr-{name + '-' if name else ''}fold{number}.safetensors"
        request = DistillRequest(
            bags=self.out / "job" / "bags",
            teacher=s.teacher,
            student=s.student,
            lr=s.lr,
            hr=s.hr,
            splits=splits,
            fold=fold,
            out=out,
            settings=dataclasses.replace(s.distill, **changes),  # type: ignore[arg-type]
            mil_teacher=self.run_folder(HR) / fold / "model.safetensors" if s.attention_weights else None,
            compute=s.compute_targets,
            targets_dir=self.out / "targets",
            cases=self.cases,
            random_teacher=s.random_teacher,
            random_student=s.random_student,
            student_px=s.student_px,
        )
        self.say(f"distilling {out.stem}")
        result = run_distillation(request, self.say)
        draw_distillation(out.with_suffix(".png"), result.history, result.baseline)
        return result

    def train_student(
        self, fold: str, encoder: Path, splits: SplitTable, hr: FeatureStore, out: Path, loss: LossSettings | None
    ) -> None:
        """The classifier of a fold on its own LR encoder, with a teacher where there is a loss for it."""
        # The bags say whom the encoder saw, and train_folds asks them.
        cohort = self.cohort(str(encoder), self.settings.lr, encoder.stem)
        self.say(f"{out.name}: {fold}")
        teacher = TeacherSource(self.run_folder(HR)) if loss else None
        settings = self.settings.mil_settings(loss)
        train_folds(cohort, splits, [fold], settings, out, teacher=teacher, hr_store=hr if loss else None)

    def baseline(self, name: str, lr: Cohort, hr: Cohort, splits: SplitTable) -> Arm:
        """The classifiers of a baseline, every fold."""
        found = BASELINES[name]
        out = self.out / "runs" / f"baseline-{name}"
        plain = self.settings.mil_settings()
        settings = dataclasses.replace(plain, model=model_of(plain.model, found))
        self.say(found.name)
        own: FeatureStore = hr.store
        guided = found.features in ("guided", "zoomed")
        if found.features == "random":
            own = kept(hr.store, random_rows(hr.store.lengths.tolist(), lr.store.lengths.tolist(), settings.seed))
        elif found.features == "both":
            own = with_parents(hr.store, lr.store)
        tiles = [float(own.lengths.mean())]
        if not guided:
            train_folds(dataclasses.replace(hr, store=own), splits, list(splits.folds), settings, out)
        else:
            tiles = []
            joint = with_parents(hr.store, lr.store) if found.features == "zoomed" else hr.store
            for fold in splits.folds:
                # The fold's own LR classifier looks, which has not seen the fold's test cases.
                attention = tile_attention(self.run_folder(LR) / fold / "model.safetensors", lr.store)
                own = kept(joint, self._looked_at(found.features, attention, hr.store))
                tiles.append(float(own.lengths.mean()))
                train_folds(dataclasses.replace(hr, store=own), splits, [fold], settings, out)
        # Those that look at LR tiles, or use them, read them too.
        also = float(lr.store.lengths.mean()) if guided or found.features == "both" else 0.0
        return Arm(found.name, self.settings.hr, self.settings.teacher, out, "", float(np.mean(tiles)) + also)

    def _looked_at(
        self, features: str, attention: Sequence[NDArray[np.float32]], hr: FeatureStore
    ) -> list[NDArray[np.int64]]:
        """The rows of each HR bag that the attention on its LR tiles leads to."""
        assert hr.parents is not None
        rows = []
        for own, start, stop in zip(attention, hr.offsets[:-1], hr.offsets[1:], strict=True):
            parents = np.asarray(hr.parents[start:stop], np.int64)
            if features == "guided":
                rows.append(guided_rows(own, parents, EAGLE_TILES))
            else:
                rows.append(zoomed_rows(own, parents, self.settings.zoom_tiles))
        return rows

    def cost(self, encoder: Path, test: Sequence[int], cohort: Cohort) -> Mapping[str, Mapping[str, object]]:
        """What inference costs on some test slides, HR and LR."""
        assert self.slides is not None
        wanted = [cohort.store.slide_ids[i] for i in test][: self.settings.cost_slides]
        entries = [entry for entry in read_manifest(self.slides) if entry.slide_id in wanted]
        self.say(f"cost of {len(entries)} slides at {self.settings.hr} and {self.settings.lr}")
        return measure_cost(self.settings, str(encoder), entries, (HR, LR, STAGE1))

    def ablate(self, fold: str, splits: SplitTable, hr: Cohort) -> Mapping[str, Mapping[str, float]]:
        """Figures of one fold with each part of the losses left out: of the encoder, and AUC of the LR classifier."""
        found: dict[str, dict[str, float]] = {}
        results = {"full": self.distil(fold, splits)}
        for name, changes in ABLATIONS.items():
            if any(getattr(self.settings.distill, key) != value for key, value in changes.items()):
                results[name] = self.distil(fold, splits, name=name.replace(" ", "-"), **changes)
        self.extract([result.path for result in results.values()])
        for name, result in results.items():
            out = self.out / "ablation" / name.replace(" ", "-")
            self.train_student(fold, result.path, splits, hr.store, out, None)
            found[name] = ablation_figures(out, fold, self.settings) | dict(result.figures)
        parts = {"labels and probabilities": {"soft": 0.0, "hard": 0.0}, "no attention": {"soft": 0.0}}
        parts |= {"all of stage 2": {}, "no instances": {"hard": 0.0}, "no probabilities": {"bag": 0.0}}
        for name, changes in parts.items():
            out = self.out / "ablation" / f"stage2-{name.replace(' ', '-')}"
            loss = dataclasses.replace(self.settings.student_loss, **changes)  # type: ignore[arg-type]
            self.train_student(fold, results["full"].path, splits, hr.store, out, loss)
            found[f"stage 2: {name}"] = ablation_figures(out, fold, self.settings)
        return found


def ablation_figures(out: Path, fold: str, settings: ExperimentSettings) -> dict[str, float]:
    """Test AUC of one fold and its interval."""
    estimate = evaluate_run(out / fold, replicates=settings.replicates, pictures=False).folds[0].estimates["auc"]
    return {"auc": estimate.value, "auc_low": estimate.low, "auc_high": estimate.high}


def _with(arm: str, rule: str) -> str:
    """The name of an arm with its rule for parents, where there are several."""
    return f"{arm}, {rule} of children" if rule else arm
