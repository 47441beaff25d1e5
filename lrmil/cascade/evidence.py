"""What both resolutions say of slides whose class is known and which their models have not seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import MODEL_NAME, load_model, read_card
from lrmil.errors import FiguresError, ModelMismatchError
from lrmil.experiment.cohort import Cohort
from lrmil.experiment.figures import PREDICTIONS_NAME, FoldPredictions, fold_folders, read_predictions
from lrmil.experiment.folds import check_store
from lrmil.experiment.guided import GUIDED_NAME, attention_of_bag, match_bags, parents_of_bag
from lrmil.leaks import Judged, check_encoder, check_model, judged_of
from lrmil.predictor import Predictor
from lrmil.store import FeatureStore
from lrmil.subsets import chosen_rows
from wsi_pipe.files import parse_json

__all__ = ["Evidence", "RunModels", "on_bags", "out_of_fold", "run_models"]

Array = NDArray[np.float64]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Evidence:
    """Slides with their labels and what models that have not seen them say.

    labels: int64 (N,). low: float64 (M, N, C), probabilities of M models at low resolution. reference: (N, C), of high
    resolution with all tiles. read: (N, C), of the tiles that the budget allows; the reference where that is all.
    basis: where this comes from, in words.
    """

    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    low: Array
    reference: Array
    read: Array
    budget: float
    basis: str


@dataclass(frozen=True)
class RunModels:
    """The model files of a run by fold, the seeds of a fold together."""

    run: Path
    folders: dict[str, list[Path]]

    @property
    def files(self) -> list[Path]:
        """Every model file, folds in their order."""
        return [folder / MODEL_NAME for folders in self.folders.values() for folder in folders]


def run_models(run: Path) -> RunModels:
    """The folders of a run by fold. Raises FiguresError where there are no predictions, or folds differ in seeds."""
    found: dict[str, list[Path]] = {}
    for folder in fold_folders(run):
        found.setdefault(re.sub(r"-seed_\d+$", "", folder.name), []).append(folder)
    counts = {len(folders) for folders in found.values()}
    if len(counts) > 1:
        raise FiguresError(f"{run}: some folds have other seeds than others", remedy="train all folds with all seeds")
    return RunModels(run, found)


def out_of_fold(
    lr: Path, hr: Path, *, budget: float = 1.0, allow_seen: bool = False, say: Tell | None = None
) -> Evidence:
    """The test predictions of every fold of two runs on the same slides and folds.

    budget: the share of high-resolution tiles that the cascade reads; below 1 the tiles are chosen by each fold's own
    low-resolution model, and the high-resolution model is asked again, with the stores that ``hr`` keeps. Raises
    FiguresError where the runs differ in folds, slides or labels, or a slide is tested twice; LeakageError where a
    model has seen its test cases, unless allow_seen, which is told to ``say``.
    """
    low, high = run_models(lr), run_models(hr)
    if list(low.folders) != list(high.folders):
        raise FiguresError(
            f"{lr} has {', '.join(low.folders)}, {hr} has {', '.join(high.folders)}",
            remedy="train both runs on the same splits",
        )
    guide = None if budget == 1 else _GuidedStores.open(hr)
    if guide is not None and guide.trained != budget and say is not None:
        say(f"{hr} was trained on parts of {guide.trained:g} of the tiles, the cascade reads {budget:g}")
    parts = []
    for fold in low.folders:
        of_low = [read_predictions(folder / PREDICTIONS_NAME) for folder in low.folders[fold]]
        of_high = [read_predictions(folder / PREDICTIONS_NAME) for folder in high.folders[fold]]
        for folder, found in zip([*low.folders[fold], *high.folders[fold]], [*of_low, *of_high], strict=True):
            _check_unseen(folder, found, allow_seen, say)
        same = [_aligned(found, of_low[0], f"{lr} and {hr}, {fold}") for found in (*of_low, *of_high)]
        members = np.stack([found.probabilities for found in same[: len(of_low)]])
        reference = np.mean([found.probabilities for found in same[len(of_low) :]], axis=0)
        read = reference
        if guide is not None:
            read = guide.read(of_low[0].slide_ids, low.folders[fold], high.folders[fold], budget)
        parts.append((of_low[0], members, reference, read))
    first = parts[0][0]
    slides = [slide for own, *_ in parts for slide in own.slide_ids]
    twice = {slide for slide in slides if slides.count(slide) > 1} if len(set(slides)) < len(slides) else set()
    if twice:
        raise FiguresError(
            f"{min(twice)} is tested in several folds", remedy="train on folds that test each case once: lrmil split"
        )
    return Evidence(
        first.classes,
        tuple(slides),
        tuple(case for own, *_ in parts for case in own.case_ids),
        np.concatenate([own.labels for own, *_ in parts]),
        np.concatenate([members for _, members, _, _ in parts], axis=1),
        np.concatenate([reference for _, _, reference, _ in parts]),
        np.concatenate([read for *_, read in parts]),
        budget,
        f"out-of-fold predictions of {len(parts)} folds",
    )


def on_bags(
    lr: Sequence[Predictor],
    hr: Sequence[Predictor],
    low: Cohort,
    high: FeatureStore,
    *,
    budget: float = 1.0,
    allow_seen: bool = False,
    say: Tell | None = None,
) -> Evidence:
    """All models asked about labelled slides of their own, which none of them has seen.

    low: labelled bags of low resolution. high: those of high resolution with the rows of their low-resolution tiles.
    Raises LeakageError as ``out_of_fold`` does, ModelMismatchError for features of another kind, FiguresError where no
    slide is in both.
    """
    places = {slide: i for i, slide in enumerate(high.slide_ids) if high.lengths[i] > 0}
    chosen = np.array([i for i in low.table.usable.tolist() if low.store.slide_ids[i] in places], np.int64)
    if not len(chosen):
        raise FiguresError("no labelled slide has tiles at both resolutions", remedy="check bags and labels")
    rows = np.array([places[low.store.slide_ids[i]] for i in chosen.tolist()], np.int64)
    judged = judged_of(low.store.records, low.table.case_ids, chosen)
    for predictor, store in [*((p, low.store) for p in lr), *((p, high) for p in hr)]:
        check_store(predictor.card, store, Path(predictor.name))
        check_model(predictor.card, Path(predictor.name), judged, allow=allow_seen, say=say)
        check_encoder(store.meta.encoder or "of these bags", judged, allow=allow_seen, say=say)
    match_bags(high, low.store, rows)
    members, reference, read = [], [], []
    for i, row in zip(chosen.tolist(), rows.tolist(), strict=True):
        features, fine = _tensor(low.store, i), _tensor(high, row)
        members.append([probabilities_of(predictor, features) for predictor in lr])
        reference.append(np.mean([probabilities_of(predictor, fine) for predictor in hr], axis=0))
        if budget < 1:
            attention = mean_attention(lr, features)
            kept = torch.from_numpy(chosen_rows(attention, parents_of_bag(high, row), budget))
            read.append(np.mean([probabilities_of(predictor, fine[kept]) for predictor in hr], axis=0))
    whole = np.array(reference)
    return Evidence(
        low.table.classes,
        tuple(low.store.slide_ids[i] for i in chosen.tolist()),
        tuple(low.table.case_ids[i] for i in chosen.tolist()),
        low.table.labels[chosen],
        np.array(members).transpose(1, 0, 2),
        whole,
        np.array(read) if budget < 1 else whole,
        budget,
        "slides that no model was trained on",
    )


@torch.inference_mode()
def probabilities_of(predictor: Predictor, features: torch.Tensor) -> Array:
    """Calibrated probabilities of one bag, float64 (C,), of its features (T, D)."""
    rows = features.to(predictor.device)
    offsets = torch.tensor([0, len(rows)], dtype=torch.int64, device=predictor.device)
    logits = predictor.model(rows, offsets).logits.double().cpu().numpy()
    if not np.isfinite(logits).all():
        raise ModelMismatchError(f"{predictor.name}: its logits are not finite", remedy="check the features")
    found: Array = predictor.card.probabilities(logits)[0]
    return found


def mean_attention(predictors: Sequence[Predictor], features: torch.Tensor) -> Array:
    """The mean of the models' attention, float64 (T,)."""
    each = [attention_of_bag(p.model, features.to(p.device), p.name) for p in predictors]
    return np.asarray(np.mean(each, axis=0))


def _tensor(store: FeatureStore, index: int) -> torch.Tensor:
    return torch.from_numpy(np.array(store.bag(index)))


@dataclass(frozen=True)
class _GuidedStores:
    """The features that a run with guided subsets keeps: its own with parents, and those that guide it.

    trained: share of the tiles in the parts that it was trained on.
    """

    low: FeatureStore
    high: FeatureStore
    trained: float

    @classmethod
    def open(cls, hr: Path) -> _GuidedStores:
        try:
            trained = float(parse_json((hr / GUIDED_NAME).read_text(encoding="utf-8"))["budget"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FiguresError(
                f"{hr} was not trained with guided subsets of its tiles, so a part of them is strange to it",
                remedy="train it with --guided-by RUN_LR, or fit the cascade with --hr-budget 1",
            ) from error
        return cls(FeatureStore.open(hr / "store-lr"), FeatureStore.open(hr / "store"), trained)

    def read(self, slides: Sequence[str], lr: Sequence[Path], hr: Sequence[Path], budget: float) -> Array:
        """Probabilities (N, C) of a fold's high-resolution models on the tiles that its low-resolution ones choose."""
        place = {slide: i for i, slide in enumerate(self.high.slide_ids)}
        rows = np.array([place[slide] for slide in slides], np.int64)
        below = match_bags(self.high, self.low, rows)
        guides, readers = ([Predictor.load(f / MODEL_NAME, device="cpu") for f in folders] for folders in (lr, hr))
        for predictor, store in [*((p, self.low) for p in guides), *((p, self.high) for p in readers)]:
            check_store(predictor.card, store, Path(predictor.name))
        found = []
        for row, lower in zip(rows.tolist(), below.tolist(), strict=True):
            attention = mean_attention(guides, _tensor(self.low, lower))
            kept = torch.from_numpy(chosen_rows(attention, parents_of_bag(self.high, row), budget))
            fine = _tensor(self.high, row)[kept]
            found.append(np.mean([probabilities_of(reader, fine) for reader in readers], axis=0))
        return np.array(found)


def _check_unseen(folder: Path, found: FoldPredictions, allow: bool, say: Tell | None) -> None:
    path = folder / MODEL_NAME
    blank = ("",) * len(found.slide_ids)
    check_model(read_card(path), path, Judged(found.slide_ids, found.case_ids, blank, blank), allow=allow, say=say)


def _aligned(found: FoldPredictions, first: FoldPredictions, where: str) -> FoldPredictions:
    """In the order of the first. Raises FiguresError where slides, cases, classes or labels differ."""
    if found.classes != first.classes or set(found.slide_ids) != set(first.slide_ids):
        odd = sorted(set(found.slide_ids) ^ set(first.slide_ids))
        what = f"the same slides: {', '.join(odd[:5])}" if odd else "the same classes"
        raise FiguresError(f"{where}: did not predict {what}", remedy="train both runs on the same labels and splits")
    place = {slide: i for i, slide in enumerate(found.slide_ids)}
    order = [place[slide] for slide in first.slide_ids]
    if not np.array_equal(found.labels[order], first.labels):
        slide = first.slide_ids[int((found.labels[order] != first.labels).argmax())]
        raise FiguresError(f"{where}: {slide} has two labels", remedy="train both runs on the same labels")
    return FoldPredictions(
        first.classes, first.slide_ids, first.case_ids, first.labels, found.logits[order], found.probabilities[order]
    )


def as_predictors(models: RunModels, device: str = "auto") -> list[Predictor]:
    """Every model of a run, named by its folder."""
    found = []
    for path in models.files:
        module, card = load_model(path)
        if card.target_state:
            raise ModelMismatchError(
                f"{path} predicts {card.target.kind}: a cascade decides between classes",
                remedy="give runs that were trained on a label column",
            )
        found.append(Predictor(module, card, device=device, name=path.parent.name))
    return found
