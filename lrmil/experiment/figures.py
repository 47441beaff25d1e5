"""Figures and pictures of runs, from their tables of predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import no_nan
from lrmil.errors import FiguresError
from lrmil.experiment.answered import Answered, answered_of, mean_answered
from lrmil.experiment.cohort import Cohort
from lrmil.experiment.model_card import write_model_card, write_run_card
from lrmil.experiment.target_figures import case_estimates, is_target_run, read_fold, several_slides, target_in
from lrmil.leaks import check_encoder, check_model, judged_of
from lrmil.metrics import (
    LOWER_IS_BETTER,
    Estimate,
    OperatingPoint,
    at_threshold,
    evaluate,
    evaluate_folds,
    softmax,
    summarise_folds,
    threshold_at_sensitivity,
)
from lrmil.metrics.selective import Abstention, AbstentionRule, choose_threshold
from lrmil.splits import SplitTable
from lrmil.store import ResidentStore
from lrmil.targets import Classification, Fold, TargetTable
from lrmil.targets.cases import averaged
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import written_cell

__all__ = [
    "FoldFigures",
    "FoldPredictions",
    "RunFigures",
    "evaluate_model",
    "evaluate_run",
    "fold_folders",
    "read_predictions",
    "write_json",
]

PREDICTIONS_NAME = "predictions.csv"
FIGURES_NAME = "figures.json"


@dataclass(frozen=True)
class FoldPredictions:
    """Predictions of one part of one fold.

    labels: int64 (N,). logits, probabilities: float64 (N, C), calibrated probabilities.
    """

    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class FoldFigures:
    """Figures of one fold with intervals by case.

    slides, cases: how many they rest on. prevalence: share of slides by class. operating: at thresholds that were
    chosen on the validation slides. answered: with abstention, where it was asked for. by_case: figures of cases, by
    the mean of their slides' predictions, where a case has several; torn: cases that are not in them, since their
    slides are labelled differently. extra: what a target that is no plain class says besides, such as a log-rank test.
    """

    name: str
    slides: int
    cases: int
    estimates: Mapping[str, Estimate]
    prevalence: Mapping[str, float] = field(default_factory=dict)
    operating: tuple[OperatingPoint, ...] = ()
    answered: Answered | None = None
    by_case: Mapping[str, Estimate] = field(default_factory=dict)
    torn: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFigures:
    """Figures of a run: by fold, their mean with an interval by case, and their spread.

    positive: which of two classes is looked for in AUC, average precision, sensitivity; None for more classes.
    answered: the mean over the folds of the slides that are answered, where abstention was asked for; empty elsewhere.
    """

    part: str
    classes: tuple[str, ...]
    folds: tuple[FoldFigures, ...]
    mean: Mapping[str, Estimate]
    spread: Mapping[str, Mapping[str, float]]
    positive: str | None = None
    answered: Mapping[str, Estimate] = field(default_factory=dict)
    by_case: Mapping[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; NaN becomes null."""
        plain: dict[str, Any] = no_nan(asdict(self))
        return plain


def write_json(path: Path, value: Any) -> None:
    """Write JSON with null for NaN. Raises OutputError when it cannot be written."""
    write_text_atomically(path, json.dumps(no_nan(value), indent=1, allow_nan=False) + "\n")


def fold_folders(run: Path | str) -> list[Path]:
    """The folders of a run that hold predictions: its folds in their order, or the run itself.

    Raises FiguresError when there are none.
    """
    run = Path(run)
    inside = [p.parent for p in run.glob(f"*/{PREDICTIONS_NAME}")]
    inside.sort(key=lambda p: (len(p.name), p.name))
    found = inside or ([run] if (run / PREDICTIONS_NAME).is_file() else [])
    if not found:
        raise FiguresError(
            f"{run} holds no {PREDICTIONS_NAME}, neither itself nor in folders of folds",
            remedy="give the --out folder of lrmil train",
        )
    return found


def parts_of(path: Path) -> set[str]:
    """The parts that a table of predictions holds; none where there is no such table."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8", newline="") as file:
        return {row.get("part") or "" for row in csv.DictReader(file)}


def read_predictions(path: Path, part: str = "test") -> FoldPredictions:
    """The table that training writes, one part of it. Raises FiguresError when there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [row for row in reader if row["part"] == part]
        classes = tuple(name.removeprefix("logit_") for name in columns if name.startswith("logit_"))
        if not rows:
            raise FiguresError(f"{path} has no predictions of the part {part!r}", remedy="choose another: --part")
        return FoldPredictions(
            classes,
            tuple(written_cell(row["slide_id"]) for row in rows),
            tuple(written_cell(row["case_id"]) for row in rows),
            np.array([classes.index(written_cell(row["label"])) for row in rows], np.int64),
            np.array([[float(row[f"logit_{name}"]) for name in classes] for row in rows]),
            np.array([[float(row[f"probability_{name}"]) for name in classes] for row in rows]),
        )
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, FiguresError):
            raise
        raise FiguresError(
            f"{path} is no table of predictions: {error}", remedy="give a folder of lrmil train"
        ) from error


def evaluate_run(
    run: str | Path,
    *,
    part: str = "test",
    positive: str | None = None,
    at_sensitivity: Sequence[float] = (),
    replicates: int = 2000,
    seed: int = 0,
    pictures: bool = True,
    notes: Sequence[str] = (),
    abstain: AbstentionRule | Abstention | str | None = None,
) -> RunFigures:
    """Figures of every fold of a run from its predictions; writes ``figures.json`` and pictures beside them.

    positive: which of two classes is looked for, by default the second. at_sensitivity: operating points whose
    thresholds are chosen on each fold's validation slides. notes: stated in ``figures.json``. abstain: figures of the
    slides that are answered too, see ``lrmil.metrics.selective``; the threshold of a rule is chosen on each fold's
    validation slides. Writes ``summary.json`` and ``summary.csv`` into the run when it has several folds. Nothing is
    predicted anew. Raises FiguresError when there are no predictions, OutputError when a file cannot be written.
    """
    run = Path(run)
    rule = AbstentionRule.parse(abstain) if isinstance(abstain, str) else abstain
    folders = fold_folders(run)
    if is_target_run(folders[0]):
        if at_sensitivity or positive is not None:
            raise FiguresError("positive classes and operating points are for two classes", remedy="leave them out")
        return _evaluate_targets(run, folders, part, replicates, seed, pictures, notes)
    found = [read_predictions(folder / PREDICTIONS_NAME, part) for folder in folders]
    sought = positive_class(found[0].classes, positive)
    folds = []
    for folder, p in zip(folders, found, strict=True):
        estimates = evaluate(
            p.labels,
            p.probabilities,
            p.case_ids,
            classes=p.classes,
            positive=sought,
            replicates=replicates,
            seed=seed,
        )
        points = _operating_points(folder, p, sought, at_sensitivity)
        answered = None
        if rule is not None:
            answered = answered_of(p, _abstention(folder, rule), positive=sought, replicates=replicates, seed=seed)
        by_case, torn = case_estimates([as_fold(p, sought)], replicates=replicates, seed=seed)
        cases = len(set(p.case_ids))
        folds.append(
            FoldFigures(folder.name, len(p.labels), cases, estimates, prevalences(p), points, answered, by_case, torn)
        )
        name = FIGURES_NAME if part == "test" else f"figures-{part}.json"
        write_json(folder / name, asdict(folds[-1]) | {"part": part, "replicates": replicates, "notes": [*notes]})
        if part == "test":
            write_model_card(folder)
        if pictures:
            draw_fold(folder, p, part)
    result = summarise(part, folds, found, positive=sought, replicates=replicates, seed=seed)
    by_case, _ = case_estimates([as_fold(p, sought) for p in found], replicates=replicates, seed=seed)
    return _written(run, folders, replace(result, by_case=by_case))


def _written(run: Path, folders: Sequence[Path], result: RunFigures) -> RunFigures:
    if list(folders) != [run]:
        suffix = "" if result.part == "test" else f"-{result.part}"
        write_json(run / f"summary{suffix}.json", result.to_json())
        write_text_atomically(run / f"summary{suffix}.csv", _table(result))
        write_run_card(run)
    return result


def as_fold(p: FoldPredictions, positive: int = 1) -> Fold:
    """Classes as their target has them: outputs whose softmax is the calibrated probabilities."""
    with np.errstate(divide="ignore"):
        outputs = np.maximum(np.log(p.probabilities), -700.0)
    return Fold(Classification(classes=p.classes, positive=positive), p.labels, outputs, p.case_ids)


def _evaluate_targets(
    run: Path, folders: Sequence[Path], part: str, replicates: int, seed: int, pictures: bool, notes: Sequence[str]
) -> RunFigures:
    """``evaluate_run`` of a target that is no plain class: figures and pictures are the target's own."""
    found = [read_fold(folder, PREDICTIONS_NAME, part)[0] for folder in folders]
    suffix = "" if part == "test" else f"-{part}"
    folds = []
    for folder, fold in zip(folders, found, strict=True):
        target = fold.target
        estimates = target.estimates([fold], replicates=replicates, seed=seed)
        by_case, torn = case_estimates([fold], replicates=replicates, seed=seed)
        # Tests and pictures count cases: slides of one patient are no patients.
        judged = averaged(fold).fold if several_slides([fold]) else fold
        names, strata = target.strata(fold.truth)
        shares = {name: float((strata == k).mean()) for k, name in enumerate(names)}
        own = FoldFigures(
            folder.name,
            len(fold.cases),
            len(set(fold.cases)),
            estimates,
            shares,
            by_case=by_case,
            torn=torn,
            extra=target.extra(judged),
        )
        folds.append(own)
        name = FIGURES_NAME if part == "test" else f"figures-{part}.json"
        write_json(folder / name, asdict(own) | {"part": part, "replicates": replicates, "notes": [*notes]})
        if pictures:
            target.draw(folder, suffix, judged)
            _draw_history(folder)
    target = found[0].target
    mean = target.estimates(found, replicates=replicates, seed=seed)
    points = [{name: fold.estimates[name].value for name in mean if name in fold.estimates} for fold in folds]
    by_case, _ = case_estimates(found, replicates=replicates, seed=seed)
    result = RunFigures(part, target.outputs, tuple(folds), mean, summarise_folds(points), None, by_case)
    return _written(run, folders, result)


def summarise(
    part: str,
    folds: Sequence[FoldFigures],
    found: Sequence[FoldPredictions],
    *,
    positive: int = 1,
    replicates: int,
    seed: int,
) -> RunFigures:
    """The figures of folds and what they come to together."""
    mean = evaluate_folds(
        [p.labels for p in found],
        [p.probabilities for p in found],
        [p.case_ids for p in found],
        positive=positive,
        replicates=replicates,
        seed=seed,
    )
    points = [{name: e.value for name, e in fold.estimates.items()} for fold in folds]
    classes = found[0].classes
    sought = classes[positive] if len(classes) == 2 else None
    answered = mean_answered(
        found, [fold.answered for fold in folds], positive=positive, replicates=replicates, seed=seed
    )
    return RunFigures(part, classes, tuple(folds), mean, summarise_folds(points), sought, answered)


def _abstention(folder: Path, rule: AbstentionRule | Abstention) -> Abstention:
    """A rule's threshold, chosen on the fold's validation slides; one that is chosen already as it is."""
    if isinstance(rule, Abstention):
        return rule
    if rule.kind == "threshold":
        return choose_threshold([], [], rule)
    val = read_predictions(folder / PREDICTIONS_NAME, "val")
    return choose_threshold(val.probabilities.max(axis=1), val.probabilities.argmax(axis=1) == val.labels, rule)


def positive_class(classes: Sequence[str], name: str | None) -> int:
    """The number of the positive class of two, by default the second.

    Raises FiguresError when it is no class, or classes are more than two.
    """
    if name is None:
        return 1
    if len(classes) != 2:
        raise FiguresError(f"a positive class is for two classes, not for {len(classes)}", remedy="leave it out")
    if name not in classes:
        raise FiguresError(f"{name!r} is no class", remedy=f"the classes are {' and '.join(classes)}")
    return list(classes).index(name)


def prevalences(p: FoldPredictions) -> dict[str, float]:
    """The share of slides of each class."""
    return {name: float((p.labels == c).mean()) for c, name in enumerate(p.classes)}


def _operating_points(
    folder: Path, p: FoldPredictions, positive: int, sensitivities: Sequence[float]
) -> tuple[OperatingPoint, ...]:
    if not sensitivities:
        return ()
    if len(p.classes) != 2:
        raise FiguresError("operating points are for two classes", remedy="leave out --at-sensitivity")
    val = read_predictions(folder / PREDICTIONS_NAME, "val")
    points = []
    for wanted in sensitivities:
        threshold = threshold_at_sensitivity(val.labels == positive, val.probabilities[:, positive], wanted)
        points.append(at_threshold(p.labels == positive, p.probabilities[:, positive], p.case_ids, threshold, wanted))
    return tuple(points)


def draw_fold(folder: Path, p: FoldPredictions, part: str) -> None:
    """ROC, calibration, confusion matrix and curves of one fold, as PNG in its folder."""
    from lrmil.pictures import draw_calibration, draw_confusion, draw_roc

    suffix = "" if part == "test" else f"-{part}"
    draw_roc(folder / f"roc{suffix}.png", p.labels, p.probabilities, p.classes, p.case_ids)
    draw_calibration(folder / f"calibration{suffix}.png", p.labels, softmax(p.logits), p.probabilities)
    draw_confusion(folder / f"confusion{suffix}.png", p.labels, p.probabilities.argmax(axis=1), p.classes)
    _draw_history(folder)


def _draw_history(folder: Path) -> None:
    from lrmil.pictures import draw_curves

    history = read_history(folder / "metrics.csv")
    if history:
        monitor, best = _monitor(folder, history)
        draw_curves(folder / "curves.png", history, best, monitor)


def read_history(path: Path) -> list[dict[str, float | None]]:
    """Figures of every epoch, None where undefined; empty where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(v) if v else None for name, v in row.items()} for row in csv.DictReader(file)]


def _monitor(folder: Path, history: Sequence[Mapping[str, float | None]]) -> tuple[str, int]:
    """The monitored figure and the epoch that it chose."""
    from lrmil.config import load_settings

    inner = [(value, row["epoch"]) for row in history if (value := row.get("inner_loss")) is not None]
    if inner:
        return "loss", int(min(inner)[1] or 0)
    monitor = load_settings(folder / "config.toml").monitor if (folder / "config.toml").is_file() else "loss"
    values = [row.get(f"val_{monitor}") for row in history]
    defined = [(v, i) for i, v in enumerate(values, start=1) if v is not None]
    if not defined:
        return monitor, len(history)
    lower = target_in(folder).lower_is_better if is_target_run(folder) else LOWER_IS_BETTER
    best = min(v for v, _ in defined) if monitor.rpartition(".")[2] in lower else max(v for v, _ in defined)
    return monitor, next(i for v, i in defined if v == best)


def _table(result: RunFigures) -> str:
    lines = ["fold,slides,cases," + ",".join(f"{n},{n}_low,{n}_high" for n in result.mean)]
    for fold in result.folds:
        numbers = (f"{e.value:.6g},{e.low:.6g},{e.high:.6g}" for e in fold.estimates.values())
        lines.append(f"{fold.name},{fold.slides},{fold.cases}," + ",".join(numbers))
    slides, cases = sum(f.slides for f in result.folds), sum(f.cases for f in result.folds)
    numbers = (f"{e.value:.6g},{e.low:.6g},{e.high:.6g}" for e in result.mean.values())
    lines.append(f"mean,{slides},{cases}," + ",".join(numbers))
    return "\n".join(lines) + "\n"


def evaluate_model(
    model: Path | str,
    cohort: Cohort,
    out: Path | str,
    *,
    abstain: AbstentionRule | str | None = None,
    indices: NDArray[np.int64] | None = None,
    splits: tuple[SplitTable, str] | None = None,
    positive: str | None = None,
    allow_seen: bool = False,
    say: Callable[[str], object] | None = None,
    device: str = "auto",
    replicates: int = 2000,
    seed: int = 0,
) -> RunFigures:
    """A trained model on labelled bags that it has not seen: predictions, figures and pictures into ``out``.

    model: its file, or the folder of a run, whose folds are asked together; then none of them may have seen the bags.
    cohort: its classes must be the model's, in the model's order. abstain: figures of the slides that are answered too;
    the threshold is chosen on the validation slides that the model's file keeps. indices: bags to evaluate, by default
    all usable. splits: the table and the fold that these are the test part of. The calibration is the model's own;
    nothing is fitted here. Raises ModelMismatchError when the features are others than in training, FiguresError when
    no bag is left, LeakageError when the model or the encoder of the features has seen some of them, or may have; with
    allow_seen that is told to ``say`` and stands in ``figures.json``.
    """
    from lrmil.experiment.folds import check_store
    from lrmil.predictor import load_predictor
    from lrmil.trainer import Prediction
    from lrmil.trainer.predictions import write_predictions

    model, out = Path(model), Path(out)
    predictor = load_predictor(model, device=device)
    abstention = None if abstain is None else predictor.abstain(abstain)
    check_store(predictor.card, cohort.store, model)
    chosen = cohort.table.usable if indices is None else indices
    if not len(chosen):
        raise FiguresError("no bag is left to evaluate", remedy="check labels and splits")
    judged = judged_of(cohort.store.records, cohort.table.case_ids, chosen)
    notes: list[str] = []
    for member in predictor.members:
        check_model(
            member.card,
            member.path or model,
            judged,
            splits=splits,
            identities=(cohort.store.slide_ids, cohort.table.case_ids),
            allow=allow_seen,
            say=notes.append,
        )
    check_encoder(cohort.store.meta.encoder or "of these bags", judged, allow=allow_seen, say=notes.append)
    for note in notes:
        (say or (lambda text: None))(note)
    if predictor.classifier is not None:
        logits = np.stack([predictor.forward(cohort.store.bag(i))[0] for i in chosen.tolist()])
        probabilities = predictor.card.probabilities(logits)
    else:
        resident = ResidentStore.of(cohort.store, predictor.device, place="mapped")
        logits, probabilities = predictor.answers(resident, chosen, token_budget=32768)
    rows = [
        Prediction(
            cohort.store.slide_ids[i],
            cohort.table.case_ids[i],
            "test",
            int(cohort.table.labels[i]),
            tuple(z),
            tuple(map(float, cohort.table.truth[i])) if isinstance(cohort.table, TargetTable) else (),
        )
        for i, z in zip(chosen.tolist(), logits.tolist(), strict=True)
    ]
    write_predictions(out, rows, predictor.card, None if predictor.card.target_state else probabilities)
    return evaluate_run(out, positive=positive, replicates=replicates, seed=seed, notes=notes, abstain=abstention)
