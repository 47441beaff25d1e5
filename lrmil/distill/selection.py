"""Who is seen: the slides that a student learns from and is stopped by, and those that it must never see."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrmil.distill.request import DistillRequest
from lrmil.distill.settings import DistillSettings
from lrmil.distill.targets import DistillSlide
from lrmil.errors import BagMismatchError, SplitError
from lrmil.leaks import Judged
from lrmil.splits import FoldIndices
from lrmil.store import check_readable
from wsi_pipe.bag import BagAttrs, read_attrs
from wsi_pipe.ids import joined
from wsi_pipe.seen import Seen

__all__ = ["Selection", "inner_split", "select"]


@dataclass(frozen=True)
class Selection:
    """The bags that are learned from, and what is known of the others.

    bags: file -> root attributes, sorted. held_out: slides of the fold's test part. identities: slide and case ids of
    every bag. name: the fold's, or what stands for it.
    """

    bags: Mapping[Path, BagAttrs]
    held_out: Judged
    identities: tuple[tuple[str, ...], tuple[str, ...]]
    name: str

    def seen(self, *, with_labels: bool) -> Seen:
        """The record for the encoder's file. with_labels: a MIL teacher's attention, made from labels, was learned."""
        part = "train" if with_labels else "unlabelled"
        return Seen.of({part: [(a.case_id, a.slide_fingerprint) for a in self.bags.values()]})


def select(request: DistillRequest) -> Selection:
    """Bags of the fold's training slides, or of all, or of the cases named.

    Raises BagMismatchError when the folder holds none, StoreError where HDF5 loops or crashes on one, BagError for what
    is no bag, SplitError when no bag is left or a case that is named has none, LeakageError for cases in two parts.
    """
    paths = sorted(request.bags.glob("*.h5"))
    if not paths:
        raise BagMismatchError(f"{request.bags}: holds no bags", remedy="give JOB/bags of wsi-pipe run")
    attrs = [_attrs(path) for path in paths]
    known = joined(request.cases, [a.slide_id for a in attrs])
    attrs = [dataclasses.replace(a, case_id=known.get(a.slide_id, a.case_id)) for a in attrs]
    slides, cases = tuple(a.slide_id for a in attrs), tuple(a.case_id for a in attrs)
    if request.splits is not None:
        indices = request.splits.indices(request.fold, slides, cases)
        name = request.splits.fold_name(request.fold)
    else:
        indices, name = _chosen(request, cases), "cases" if request.only_cases else "all"
    chosen = {paths[i]: attrs[i] for i in indices.train.tolist() if attrs[i].status == "done"}
    test = [attrs[i] for i in indices.test.tolist()]
    held_out = Judged(
        tuple(a.slide_id for a in test),
        tuple(a.case_id for a in test),
        tuple(a.slide_fingerprint for a in test),
        ("",) * len(test),
    )
    return Selection(chosen, held_out, (slides, cases), name)


def _chosen(request: DistillRequest, cases: Sequence[str]) -> FoldIndices:
    wanted = set(request.only_cases)
    unknown = sorted(wanted - set(cases))
    if unknown:
        shown = ", ".join(unknown[:5])
        raise SplitError(f"no bag is of the case {shown}", remedy="check the ids, or leave the case out")
    train = np.array([i for i, case in enumerate(cases) if not wanted or case in wanted], np.int64)
    nothing = np.zeros(0, np.int64)
    return FoldIndices(train, nothing, nothing)


def _attrs(path: Path) -> BagAttrs:
    """The root attributes of a bag, which nothing of this run opened before.

    Raises StoreError where HDF5 loops or crashes on it, BagError when it is no bag.
    """
    check_readable(path)
    return read_attrs(path)


def inner_split(
    slides: Sequence[DistillSlide], settings: DistillSettings
) -> tuple[list[DistillSlide], list[DistillSlide]]:
    """Training and validation slides, whole cases, about ``val_fraction`` of the cases; none for a single case."""
    cases = sorted({slide.case_id for slide in slides})
    count = min(math.ceil(settings.val_fraction * len(cases)), len(cases) - 1) if settings.val_fraction else 0
    order = np.random.default_rng(settings.seed).permutation(len(cases))
    held = {cases[i] for i in order[:count]}
    return [s for s in slides if s.case_id not in held], [s for s in slides if s.case_id in held]
