"""Whose slides a model or an encoder was trained on, as hashes that travel in its file and are checked later.

A case is known by its id, a slide by its fingerprint, so that neither a renamed file nor a new case id hides one. The
hashes keep names out of files that are passed on; who holds a list of ids can still look them up in it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LABELLED", "NOBODY", "SEEN_PARTS", "Seen", "case_mark", "slide_mark"]

SEEN_PARTS = ("train", "val", "unlabelled")
"""With labels, to learn from; with labels, to stop and calibrate by; without labels, as in distillation."""
LABELLED = ("train", "val")
MARK_LENGTH = 24
"""Hexadecimal digits of a mark: 96 bits, in which no two of a million ids meet by chance."""


def case_mark(case_id: str) -> str:
    """The mark of a case; ids that differ in case of letters or in how accents are written are one."""
    return _mark("case", unicodedata.normalize("NFC", case_id).strip().casefold())


def slide_mark(fingerprint: str) -> str:
    """The mark of a slide with that fingerprint."""
    return _mark("slide", fingerprint)


def _mark(kind: str, text: str) -> str:
    return hashlib.sha256(f"{kind}\0{text}".encode()).hexdigest()[:MARK_LENGTH]


@dataclass(frozen=True)
class Seen:
    """Marks of cases and slides by part of ``SEEN_PARTS``; empty where nothing is known or nobody was seen."""

    cases: Mapping[str, frozenset[str]] = field(default_factory=dict)
    slides: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, Iterable[tuple[str, str]]]) -> Seen:
        """From (case id, slide fingerprint) pairs by part; an empty id or fingerprint is left out."""
        pairs = {part: list(found) for part, found in parts.items()}
        return cls(
            {part: frozenset(case_mark(case) for case, _ in found if case) for part, found in pairs.items()},
            {part: frozenset(slide_mark(mark) for _, mark in found if mark) for part, found in pairs.items()},
        )

    def __bool__(self) -> bool:
        return any(self.cases.values()) or any(self.slides.values())

    def __or__(self, other: Seen) -> Seen:
        """Who was seen by either: what learns from a model has seen, through it, whom the model saw."""

        def both(a: Mapping[str, frozenset[str]], b: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
            empty: frozenset[str] = frozenset()
            return {part: a.get(part, empty) | b.get(part, empty) for part in SEEN_PARTS if part in a or part in b}

        return Seen(both(self.cases, other.cases), both(self.slides, other.slides))

    def only(self, part: str) -> Seen:
        """Those of one part."""
        return Seen(*({part: kind[part]} if part in kind else {} for kind in (self.cases, self.slides)))

    def part_of(self, case_id: str | None, slide_fingerprint: str | None) -> str:
        """The part that a slide or its case was in, the gravest first; "" where it was in none."""
        case = case_mark(case_id) if case_id else ""
        slide = slide_mark(slide_fingerprint) if slide_fingerprint else ""
        for part in SEEN_PARTS:
            if case in self.cases.get(part, ()) or slide in self.slides.get(part, ()):
                return part
        return ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "version": 1,
            "cases": {part: sorted(marks) for part, marks in self.cases.items() if marks},
            "slides": {part: sorted(marks) for part, marks in self.slides.items() if marks},
        }

    @classmethod
    def from_json(cls, values: Any) -> Seen:
        """The inverse of ``to_json``; nothing where there is nothing. Raises ValueError where it is damaged."""
        if not values:
            return cls()
        try:
            found = [
                {str(part): frozenset(map(str, marks)) for part, marks in values.get(kind, {}).items()}
                for kind in ("cases", "slides")
            ]
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the record of who was seen is damaged: {error}") from error
        unknown = {part for kind in found for part in kind} - set(SEEN_PARTS)
        if unknown:
            raise ValueError(f"the record of who was seen has an unknown part {min(unknown)!r}")
        return cls(*found)


NOBODY = Seen()
