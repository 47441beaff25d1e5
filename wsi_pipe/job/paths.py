"""Where a job keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["JobPaths"]


@dataclass(frozen=True)
class JobPaths:
    """The files of a job directory, by slide id."""

    root: Path

    @property
    def config(self) -> Path:
        """Settings of the job, TOML."""
        return self.root / "config.toml"

    @property
    def slides(self) -> Path:
        """The slides of the job, CSV."""
        return self.root / "slides.csv"

    @property
    def outcomes(self) -> Path:
        """One JSON line for each slide finished, in the order of finishing; a later line of a slide replaces its
        earlier one."""
        return self.root / "outcomes.jsonl"

    @property
    def changes(self) -> Path:
        """One JSON line for each setting, and each value of a slide, that a later call changed."""
        return self.root / "changes.jsonl"

    @property
    def failures(self) -> Path:
        """The slides that failed, CSV."""
        return self.root / "failures.csv"

    @property
    def passed_over(self) -> Path:
        """What the search of folders passed over, JSON; only where it passed over anything."""
        return self.root / "passed_over.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.root / "report.html"

    @property
    def quarantine(self) -> Path:
        """What ``wsi-pipe verify --repair`` put aside, as it lay in the job. Nothing reads it or needs it."""
        return self.root / "quarantine"

    @property
    def identities(self) -> Path:
        """Where the slides lie whose paths the other files do not tell, CSV, for the owner alone."""
        return self.root / "private" / "identities.csv"

    @property
    def salt(self) -> Path:
        """What the ids of an anonymised job are hashed with, for the owner alone."""
        return self.root / "private" / "salt"

    @property
    def marker(self) -> Path:
        """What tells that the folder is a job, JSON: schema, version, created."""
        return self.root / ".wsi-pipe-job"

    @property
    def lock(self) -> Path:
        """The file whose lock a run holds."""
        return self.root / ".lock"

    @property
    def index(self) -> Path:
        """What is known of finished slides' files, so that a run that resumes need not open them."""
        return self.root / ".index.jsonl"

    @property
    def own_names(self) -> set[str]:
        """Names of the job's own files and folders in the folder itself, apart from those of results."""
        own = (self.config, self.slides, self.outcomes, self.failures, self.passed_over, self.changes)
        hidden = (self.marker, self.lock, self.index, self.salt.parent)
        reports = (self.report.with_suffix(suffix) for suffix in (".html", ".csv", ".json"))
        return {path.name for path in (*own, *hidden, *reports)}

    @property
    def bags(self) -> Path:
        """The folder of bags."""
        return self.root / "bags"

    @property
    def written(self) -> tuple[Path, ...]:
        """The folders that runs write into; whatever else lies in the job directory is somebody else's."""
        return tuple(self.root / name for name in ("tissue", "thumbnails", "tiles", "features", "partial", "bags"))

    def tissue(self, slide_id: str) -> Path:
        """Tissue mask as GeoJSON."""
        return self.root / "tissue" / f"{slide_id}.geojson"

    def overview_picture(self, slide_id: str) -> Path:
        """The bare overview, from which the other pictures are drawn."""
        return self.root / "thumbnails" / f"{slide_id}.raw.jpg"

    def tissue_picture(self, slide_id: str) -> Path:
        """Overview with tissue contours."""
        return self.root / "thumbnails" / f"{slide_id}.jpg"

    def grid_picture(self, slide_id: str) -> Path:
        """Overview with the grids."""
        return self.root / "thumbnails" / f"{slide_id}.grid.jpg"

    def tiles(self, slide_id: str) -> Path:
        """Grids, in the schema of a bag without features."""
        return self.root / "tiles" / f"{slide_id}.h5"

    def tile_images(self, slide_id: str, label: str) -> Path:
        """Folder of tiles written as images."""
        return self.root / "tiles" / slide_id / label

    def features(self, slide_id: str, label: str, slug: str) -> Path:
        """One encoder's features of one grid, until the bag holds them."""
        return self.root / "features" / slide_id / f"{label}.{slug}.h5"

    def partial(self, slide_id: str) -> Path:
        """Features of a slide that is not finished, until it is; see ``wsi_pipe.job.partial``."""
        return self.root / "partial" / f"{slide_id}.npz"

    def bag(self, slide_id: str) -> Path:
        """The slide's bag."""
        return self.bags / f"{slide_id}.h5"
