"""Has a model, or the encoder of some features, seen the cases that it is to be judged on? Every command asks here.

Three sources, from the surest: the record in a model's file, the record in the bags of what their encoder was trained
on, and, for models from before there were records, the splits that lie beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard
from lrmil.errors import LeakageError
from lrmil.splits import SplitTable, seen_cases
from lrmil.store import BagRecord
from wsi_pipe.seen import Seen, case_mark

__all__ = ["Judged", "check_encoder", "check_model", "check_tuned", "judged_of", "seen_of"]

SHOWN = 5
WORDS = {
    "train": "trained on",
    "val": "stopped or calibrated by",
    "unlabelled": "distilled from, without labels,",
    "tuned": "made on",
}


@dataclass(frozen=True)
class Judged:
    """Slides that something is to be judged on. slide_fingerprints: "" where a bag states none."""

    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    slide_fingerprints: tuple[str, ...]
    encoder_saw: tuple[str, ...]


def judged_of(
    records: Sequence[BagRecord], case_ids: Sequence[str], indices: Sequence[int] | NDArray[np.int64]
) -> Judged:
    """The slides of a store at ``indices``. case_ids: of all its bags."""
    chosen = [(i, mark) for i in np.asarray(indices, np.int64).tolist() for mark in _marks(records[i])]
    return Judged(
        tuple(records[i].slide_id for i, _ in chosen),
        tuple(case_ids[i] for i, _ in chosen),
        tuple(mark for _, mark in chosen),
        tuple(records[i].encoder_saw for i, _ in chosen),
    )


def _marks(record: BagRecord) -> list[str]:
    """The fingerprints of a bag's slides, of which a case that is joined to one bag has several."""
    return record.slide_fingerprint.split(" ")


def seen_of(
    records: Sequence[BagRecord], case_ids: Sequence[str], parts: dict[str, Sequence[int] | NDArray[np.int64]]
) -> Seen:
    """The record of a model that was trained on these parts of a store."""
    return Seen.of(
        {
            part: [(case_ids[i], mark) for i in np.asarray(indices, np.int64).tolist() for mark in _marks(records[i])]
            for part, indices in parts.items()
        }
    )


def check_model(
    card: ModelCard,
    path: Path,
    judged: Judged,
    *,
    what: str = "model",
    remedy: str = "give other slides, or the model of a fold that these cases test",
    splits: tuple[SplitTable, str] | None = None,
    identities: tuple[Sequence[str], Sequence[str]] | None = None,
    allow: bool = False,
    say: Callable[[str], object] | None = None,
) -> None:
    """Raise LeakageError, naming the overlap, when a model has seen slides or cases that it is to be judged on.

    what: the model's role, for the message. splits: the table and the fold whose test part is judged; identities: slide
    and case ids of all bags: both for models without a record, for which the splits beside them are read; where none
    lie there the model is not believed. allow: the overlap is said through ``say`` and not refused.
    """
    tell = say or (lambda text: None)
    if card.seen:
        overlap = [(slide, card.seen.part_of(case, mark)) for slide, case, mark in _slides(judged)]
        found = [(slide, part) for slide, part in overlap if part]
        if found:
            _refuse(f"the {what} {path}", found, remedy, allow, tell)
        return
    torn: list[str] | None = None
    if splits is not None and identities is not None and card.fold is not None:
        torn = seen_cases(path, card.fold, splits[1], splits[0], *identities)
    if torn is None:
        text = f"the {what} {path} does not say whom it was trained on, and no splits lie beside it"
        if allow:
            tell(f"{text}: it may have seen these slides")
            return
        raise LeakageError(text, remedy="train it again, or say --allow-seen if you know that it saw none of these")
    if torn:
        _refuse(f"the {what} {path}", [(case, "train") for case in torn], remedy, allow, tell)


def check_encoder(
    encoder: str,
    judged: Judged,
    *,
    part: str = "test",
    allow: bool = False,
    say: Callable[[str], object] | None = None,
) -> None:
    """Raise LeakageError when the encoder of some slides' features has seen these slides, by what their bags say."""
    found = [(slide, saw) for slide, saw in zip(judged.slide_ids, judged.encoder_saw, strict=True) if saw]
    if found:
        remedy = (
            "train and judge only on the fold that the encoder was distilled for (--fold), with its splits, "
            "or take features of an encoder that saw none of these"
        )
        _refuse(f"encoder {encoder}, whose features these {part} slides have,", found, remedy, allow, say or print)


def check_tuned(
    marks: Collection[str],
    path: Path,
    judged: Judged,
    *,
    allow: bool = False,
    say: Callable[[str], object] | None = None,
) -> None:
    """Raise LeakageError when settings were chosen on cases that a model of them is to be judged on.

    marks: of these cases, as the settings file keeps them. path: of that file.
    """
    found = [
        (slide, "tuned")
        for slide, case in zip(judged.slide_ids, judged.case_ids, strict=True)
        if case_mark(case) in marks
    ]
    if found:
        _refuse(
            f"the choice of the settings {path}",
            found,
            "tune them on this fold: lrmil tune --fold",
            allow,
            say or print,
        )


def _slides(judged: Judged) -> list[tuple[str, str, str]]:
    return list(zip(judged.slide_ids, judged.case_ids, judged.slide_fingerprints, strict=True))


def _refuse(who: str, found: Sequence[tuple[str, str]], remedy: str, allow: bool, say: Callable[[str], object]) -> None:
    counts = [
        f"{WORDS[part]} {len(names)} of them: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for part in WORDS
        if (names := [name for name, own in found if own == part])
    ]
    text = f"{who} was {'; and '.join(counts)}"
    if not allow:
        raise LeakageError(text, remedy=f"{remedy}; or say --allow-seen, which the result then states")
    say(f"allowed: {text}")
