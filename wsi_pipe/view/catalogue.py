"""Which slides there are to look at: those of a job with what became of them, or slides alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.job import JobPaths, load_settings, load_slides, read_outcomes
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome

__all__ = ["Catalogue", "Listed"]


@dataclass(frozen=True)
class Listed:
    """One slide: the entry, and what became of it in the job, if it is of one."""

    entry: SlideEntry
    outcome: SlideOutcome | None = None

    def to_json(self) -> dict[str, Any]:
        """What the list of slides shows."""
        outcome = self.outcome
        return {
            "id": self.entry.slide_id,
            "case": self.entry.case_id,
            "path": self.entry.shown_path,
            "status": outcome.status if outcome else "",
            "reason": (outcome.reason or "") if outcome else "",
            "tissue_mm2": outcome.counts.get("tissue_mm2") if outcome else None,
            "tiles": dict(outcome.tiles) if outcome else {},
        }


@dataclass(frozen=True)
class Catalogue:
    """The slides in their order, and the job that they are of, if any.

    title: heading of the page. settings: of the job, or the defaults.
    """

    slides: tuple[Listed, ...]
    job: JobPaths | None = None
    settings: JobSettings = field(default_factory=JobSettings)
    title: str = "slides"

    @classmethod
    def of_job(cls, root: Path) -> Catalogue:
        """Every slide of a job. Raises ConfigError where the folder is none, ManifestError for a broken list."""
        settings = load_settings(root)
        if settings is None:
            raise ConfigError(f"{root}: is not a job (no config.toml)", remedy="give the folder given to run --out")
        outcomes: Mapping[str, SlideOutcome] = read_outcomes(root)
        listed = tuple(Listed(entry, outcomes.get(entry.slide_id)) for entry in load_slides(root))
        return cls(listed, JobPaths(root), settings, root.resolve().name or "job")

    @classmethod
    def of_slides(cls, entries: Sequence[SlideEntry], settings: JobSettings | None = None) -> Catalogue:
        """Slides that are of no job."""
        title = entries[0].slide_id if len(entries) == 1 else f"{len(entries)} slides"
        return cls(tuple(Listed(entry) for entry in entries), None, settings or JobSettings(), title)

    def bag(self, number: int) -> Path | None:
        """The slide's bag, or None where there is none."""
        if self.job is None:
            return None
        path = self.job.bag(self.slides[number].entry.slide_id)
        return path if path.is_file() else None
