"""Attention-guided subsets of high-resolution bags as further training bags, so that a model is used to seeing parts.

Each training slide stands in the store as itself and with ``draws`` subsets of its tiles. The first is the one that a
cascade would read; the others are drawn with chances in proportion to the low-resolution model's attention. Validation
and test slides stay whole. A subset has its slide's case, so inner folds keep them together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import MODEL_NAME, load_model, read_card
from lrmil.config import TrainSettings
from lrmil.data import LabelTable
from lrmil.errors import BagMismatchError, ModelFileError, SettingsError
from lrmil.experiment.cohort import Cohort
from lrmil.leaks import check_model, judged_of
from lrmil.metrics import softmax
from lrmil.model import MILModel
from lrmil.splits import FoldIndices, SplitTable
from lrmil.store import FeatureStore, ResidentStore
from lrmil.subsets import chosen_rows, drawn_rows
from lrmil.trainer import choose_precision
from wsi_pipe.files import write_text_atomically

__all__ = ["GUIDED_NAME", "Guide", "attention_of_bag", "match_bags", "parents_of_bag", "with_subsets"]

GUIDED_NAME = "guided.json"


@dataclass(frozen=True)
class Guide:
    """Who says where to look, and how much is read.

    run: of low resolution. store: its features of the slides. budget: share of a slide's tiles. draws: subsets a slide.
    """

    run: Path
    store: FeatureStore
    budget: float
    draws: int

    def model_path(self, fold: str, seed: int = 0) -> Path:
        """The model of a fold, of the same seed where the run has several. Raises ModelFileError where it has none."""
        seeds = sorted(
            self.run.glob(f"{fold}-seed_*"), key=lambda folder: (folder.name != f"{fold}-seed_{seed}", folder)
        )
        for folder in (self.run / fold, *seeds):
            if (folder / MODEL_NAME).is_file():
                return folder / MODEL_NAME
        raise ModelFileError(
            f"{self.run} has no {fold}/{MODEL_NAME}", remedy="train the run of low resolution on the same folds"
        )

    def check(
        self,
        folds: Sequence[str],
        splits: SplitTable,
        cohort: Cohort,
        *,
        allow: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> None:
        """Raise LeakageError where a fold's guide has seen its test cases, BagMismatchError where tiles do not fit."""
        for fold in folds:
            split, path = cohort.fold(splits, fold), self.model_path(fold)
            match_bags(cohort.store, self.store, np.concatenate([split.train, split.test]))
            check_model(
                read_card(path),
                path,
                judged_of(cohort.store.records, cohort.table.case_ids, split.test),
                what="guide",
                remedy="give a run of low resolution with the same splits: --guided-by RUN",
                splits=(splits, fold),
                identities=(cohort.store.slide_ids, cohort.table.case_ids),
                allow=allow,
                say=say,
            )

    def extend(
        self, whole: tuple[ResidentStore, LabelTable, FoldIndices], fold: str, seed: int, settings: TrainSettings
    ) -> tuple[ResidentStore, LabelTable, FoldIndices]:
        """A fold's store, labels and bags with the subsets of its training bags."""
        resident, table, split = whole
        path = self.model_path(fold, seed)
        store, table, split = with_subsets(resident.store, table, split, load_model(path)[0], path, self, seed=seed)
        device = resident.device
        return ResidentStore.of(store, device, choose_precision(settings.precision, device)), table, split

    def write(self, out: Path) -> None:
        """Note in ``out/guided.json`` what a run was guided by. Raises OutputError when it cannot be written."""
        told = {"lr": str(self.run), "level": self.store.meta.level, "budget": self.budget, "draws": self.draws}
        write_text_atomically(out / GUIDED_NAME, json.dumps(told, indent=1) + "\n")


def attention_of_bag(model: MILModel, features: NDArray[Any] | torch.Tensor, where: str) -> NDArray[np.float64]:
    """Attention of one bag's tiles, float64 (L,), sums to 1. Raises SettingsError for a model without attention."""
    rows = torch.as_tensor(features)
    offsets = torch.tensor([0, len(rows)], dtype=torch.int64, device=rows.device)
    with torch.inference_mode():
        scores = model(rows, offsets).attention_logits
    if scores is None:
        raise SettingsError(
            f"{where} is a {model.settings.name} model, which has no attention to say where to look",
            remedy="train it with --model gated-abmil, or read all tiles: a budget of 1",
        )
    return np.asarray(softmax(scores.double().cpu().numpy()[None])[0])


def match_bags(hr: FeatureStore, lr: FeatureStore, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in ``lr`` of the bags ``indices`` of ``hr``, by slide id.

    Raises BagMismatchError, naming slides, where bags are missing or ``hr`` does not know the rows of ``lr``'s level.
    """
    if hr.parents is None or hr.meta.parent_level != lr.meta.level:
        raise BagMismatchError(
            f"{hr.path or 'the HR features'} do not know their tiles at {lr.meta.level}",
            remedy=f"make bags with both resolutions, and pack the finer with --parents {lr.meta.level}",
        )
    place = {slide: i for i, slide in enumerate(lr.slide_ids) if lr.lengths[i] > 0}
    slides = [hr.slide_ids[i] for i in np.asarray(indices, np.int64).tolist()]
    missing = [slide for slide in slides if slide not in place]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BagMismatchError(
            f"{len(missing)} slides have no tiles at {lr.meta.level}: {', '.join(missing[:5])}{more}",
            remedy="extract them, or leave these slides out of the splits",
        )
    return np.array([place[slide] for slide in slides], np.int64)


def parents_of_bag(store: FeatureStore, index: int) -> NDArray[np.int64]:
    """Low-resolution row of each tile of a bag, int64 (H,)."""
    assert store.parents is not None
    return np.asarray(store.parents[store.offsets[index] : store.offsets[index + 1]], np.int64)


def with_subsets(
    store: FeatureStore,
    table: LabelTable,
    split: FoldIndices,
    model: MILModel,
    path: Path,
    guide: Guide,
    *,
    seed: int,
) -> tuple[FeatureStore, LabelTable, FoldIndices]:
    """The store, labels and fold with the subsets of the training bags behind all bags, in memory.

    model, path: the low-resolution model of this fold, in evaluation mode on the CPU. seed: of the draws.
    """
    rng = np.random.default_rng([seed, 0x5B5E7])
    places = match_bags(store, guide.store, split.train)
    parts, sources = [], []
    for index, lower in zip(split.train.tolist(), places.tolist(), strict=True):
        attention = attention_of_bag(model, np.array(guide.store.bag(lower)), str(path))
        parents = parents_of_bag(store, index)
        rows = [chosen_rows(attention, parents, guide.budget)]
        rows += [drawn_rows(attention, parents, guide.budget, rng) for _ in range(guide.draws - 1)]
        parts += [store.offsets[index] + own for own in rows]
        sources += [index] * len(rows)
    chosen = np.concatenate(parts)
    flat = np.concatenate([np.asarray(store.flat), np.asarray(store.flat)[chosen]])
    offsets = np.concatenate([store.offsets, store.offsets[-1] + np.cumsum([len(part) for part in parts])])
    extra = [
        dataclasses.replace(store.records[index], slide_id=f"{store.records[index].slide_id} (subset {n})")
        for n, index in enumerate(sources)
    ]
    larger = FeatureStore(
        flat,
        offsets.astype(np.int64),
        [*store.records, *extra],
        dtype=store.dtype,
        meta=store.meta,
        coords=np.concatenate([np.asarray(store.coords), np.asarray(store.coords)[chosen]]),
    )
    count = len(store)
    added = np.arange(count, count + len(sources), dtype=np.int64)
    labels = dataclasses.replace(
        table,
        labels=np.concatenate([table.labels, table.labels[sources]]),
        case_ids=(*table.case_ids, *(table.case_ids[i] for i in sources)),
        usable=np.concatenate([table.usable, added]),
    )
    return larger, labels, FoldIndices(np.concatenate([split.train, added]), split.val, split.test)
