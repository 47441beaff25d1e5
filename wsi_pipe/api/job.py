"""A job: many slides to bags, resumable, as ``wsi-pipe run`` does it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipe.api.bags import Bag, open_bag
from wsi_pipe.api.bars import Bars
from wsi_pipe.api.grids import as_mpp
from wsi_pipe.api.show import table
from wsi_pipe.asked import Say
from wsi_pipe.care import Finding, job_status, verify_job
from wsi_pipe.config import (
    CacheSettings,
    ExtractSettings,
    JobSettings,
    SegmentSettings,
    TileSettings,
    typed_setting,
)
from wsi_pipe.errors import BagError, ConfigError
from wsi_pipe.job import JobPaths, load_settings, load_slides, read_outcomes
from wsi_pipe.job.changes import Call
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage
from wsi_pipe.running import Watch, begin_lines, run_stages
from wsi_pipe.tissue.frame import FRAMES

if TYPE_CHECKING:
    import pandas as pd

    from wsi_pipe.execute import Where

__all__ = ["Job"]

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Progress = Callable[[str, str, int], object]

_GROUPS = {"segment": SegmentSettings, "tile": TileSettings, "extract": ExtractSettings}
_OTHERWISE = {"resolutions", "encoders", "devices", "layers", "mpp"}
"""Settings that go by an argument of their own."""


class Job:
    """A job directory, which need not be there yet: ``run`` makes it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @property
    def settings(self) -> JobSettings | None:
        """The job's settings, None where there is no job yet."""
        return load_settings(self.root)

    @property
    def slide_ids(self) -> list[str]:
        """Its slides."""
        return [entry.slide_id for entry in load_slides(self.root)]

    @property
    def outcomes(self) -> Mapping[str, SlideOutcome]:
        """The last outcome of each slide, by slide id."""
        return read_outcomes(self.root)

    def bag_path(self, slide_id: str) -> Path:
        """Where a slide's bag lies."""
        return JobPaths(self.root).bag(slide_id)

    def bag(self, slide_id: str) -> Bag:
        """A slide's bag. Raises BagError where there is none or it is damaged."""
        path = self.bag_path(slide_id)
        if not path.is_file():
            end = self.outcomes.get(slide_id)
            why = f": {end.reason}" if end is not None and end.reason else ""
            raise BagError(f"{self.root}: has no bag of {slide_id}{why}", remedy="see job.status()")
        return open_bag(path)

    @property
    def bags(self) -> list[Path]:
        """The bags that are there, in the order of the slides."""
        return [path for slide_id in self.slide_ids if (path := self.bag_path(slide_id)).is_file()]

    def run(
        self,
        slides: Sources | None = None,
        *,
        resolutions: str | float | Sequence[str | float] | None = None,
        encoder: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        primary: str | float | None = None,
        until: Stage = "assemble",
        slide_list: str | os.PathLike[str] | None = None,
        slide_mpp: float | tuple[float, float] | None = None,
        override_mpp: bool = False,
        mask: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        tissue_class: str | Sequence[str] = (),
        frame: str | None = None,
        scene: int | None = None,
        z: int | None = None,
        reader: str | None = None,
        config: str | os.PathLike[str] | None = None,
        device: str | None = None,
        layers: Sequence[int] | None = None,
        random_weights: bool = False,
        mask_mpp: float | None = None,
        only: str | Sequence[str] = (),
        limit: int | None = None,
        shard: str | None = None,
        retry_failed: bool = False,
        redo: bool = False,
        anonymise: bool | None = None,
        salt: str | os.PathLike[str] | None = None,
        workers: int = 1,
        scheduler: str | None = None,
        resources: str | None = None,
        wait_workers_s: float | None = None,
        timeout_s: float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_gib: float | None = None,
        keep_features: bool = False,
        report: bool = True,
        progress: Progress | bool | None = None,
        say: Say | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Take slides to bags, doing just what is missing: what ``wsi-pipe run`` does, with its checks and refusals.

        slides: files, folders, URLs, slide lists, one or several; by default those that the job has. resolutions: such
        as "20x", "0.5um" or 0.5 (um/px). encoder: one, several, or by resolution: ``{"20x": "uni", "5x": FILE}``.
        primary: the resolution that other programs find in bags. shard: of ``--shard``, such as "3/16".
        until: an earlier stage, "segment", "tile" or "extract". slide_list: of ``--slides``. settings: any other of
        segmentation, tiling and extraction by its name, as ``tile_px=256``, ``min_tissue=0.5``, ``stain_min=0.02``,
        ``dtype="float32"``, ``batch_size=32``; mask_mpp: that of the mask. What is not given is as the job has it, else
        the default. progress: True shows bars of slides and tiles; a function is called
        with slide id, what is going on and by how much it advanced, from any thread.
        say: told what is to be known, a line at a time; by default the logger "wsi_pipe", as warnings. The others: as
        of ``wsi-pipe run``.

        Gives one row for each slide of this call, as ``status`` does. A slide that fails is a row, and never an error.
        Raises, before any work, ConfigError, ManifestError, StaleWorkError, EncoderError, NotOursError and OutputError
        for what the command line refuses, JobLockedError while another run is at work; and what ended a run early.
        """
        _check(until=until, frame=frame, workers=workers, limit=limit, scene=scene, z=z, timeout_s=timeout_s)
        values = _values(settings) | {
            "sources": [] if slides is None else _paths(slides),
            "manifest": _path(slide_list),
            "resolutions": None if resolutions is None else [as_mpp(item) for item in _several(resolutions)],
            "encoders": None if encoder is None else _encoders(encoder),
            "primary": None if primary is None else as_mpp(primary),
            "slide_mpp": _shown_mpp(slide_mpp),
            "override_mpp": override_mpp,
            "mask": _path(mask),
            "annotations": _path(annotations),
            "tissue_class": (tissue_class,) if isinstance(tissue_class, str) else tuple(tissue_class),
            "frame": frame,
            "scene": scene,
            "z": z,
            "reader": reader,
            "config": _path(config),
            "devices": device,
            "layers": None if layers is None else ",".join(map(str, layers)) or "none",
            "extract_random_weights": random_weights,
            "segment_mpp": mask_mpp,
            "only": (only,) if isinstance(only, str) else tuple(only),
            "limit": limit,
            "shard": shard,
            "retry_failed": retry_failed,
            "redo": redo,
            "anonymise": anonymise,
            "salt": _path(salt),
            "workers": workers,
            "scheduler": scheduler,
            "resources": resources,
            "wait_workers": wait_workers_s,
            "timeout": timeout_s,
            "cache_dir": _path(cache_dir),
            "cache_size": None if cache_gib is None else CacheSettings(gib=cache_gib).gib,
            "keep_features": keep_features,
        }
        end = run_stages(
            self.root, values, until=until, report=report and until == "assemble", watch=_Told(say, progress)
        )
        if end.stopped:
            raise end.stopped
        if end.unwritten:
            raise end.unwritten
        return _frame(end.outcomes)

    def status(self) -> pd.DataFrame:
        """How far the job is: one row a slide, in the order of its list (pandas).

        Columns: slide_id, status ("done", "empty", "failed", "waiting" or "stale"), tiles_20x and so on, seconds,
        reason, remedy. ``attrs`` of the frame holds the ``JobStatus`` under "job". Raises ManifestError where there is
        no job.
        """
        now = job_status(self.root)
        ends = self.outcomes
        rows = []
        for slide_id, state in now.states.items():
            end = ends.get(slide_id)
            if state == "waiting" or end is None:
                end = SlideOutcome(slide_id, "done")
            row = _row(end) | {"status": state}
            rows.append(row | ({"reason": now.why_stale[slide_id], "remedy": ""} if state == "stale" else {}))
        frame = _of_rows(rows)
        frame.attrs["job"] = now
        return frame

    def verify(self, *, sources: bool = True) -> list[Finding]:
        """Check every slide's bag, as ``wsi-pipe verify`` does. Raises ManifestError where there is no job."""
        return list(verify_job(self.root, sources=sources))

    def __repr__(self) -> str:
        return f"<Job {self.root}: {len(self.slide_ids):,} slides, {len(self.bags):,} bags>"

    def _repr_html_(self) -> str:
        if not self.slide_ids:
            return table(f"Job {self.root}: not there yet", ["slide_id"], [])
        rows = self.status()
        cells = [[_shown(value) for value in row] for row in rows.itertuples(index=False)]
        return table(f"Job {self.root}", [str(name) for name in rows.columns], cells)


class _Told(Watch):
    """Hands on what a run tells."""

    def __init__(self, say: Say | None, progress: Progress | bool | None) -> None:
        # What is left out is never left out in silence.
        self._say: Say = say or logging.getLogger("wsi_pipe").warning
        self._progress = progress
        self._bars: Bars | None = None

    def say(self, line: str) -> None:
        self._say(line)

    def begun(self, call: Call, paths: JobPaths, where: Where, about: Mapping[str, Any]) -> None:
        for line in begin_lines(call, paths):
            self.say(line)

    @contextmanager
    def working(self, slides: int) -> Iterator[Callable[[str, str, int], None] | None]:
        given = self._progress
        if given is True:
            with Bars(slides) as self._bars:
                yield self._bars.step
        elif not given:
            yield None
        else:

            def advance(slide_id: str, what: str, amount: int) -> None:
                given(slide_id, what, amount)

            yield advance

    def finished(self, outcome: SlideOutcome) -> None:
        if self._bars is not None:
            self._bars.finished()


def _values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Single settings under the names that the command line's options have. Raises ConfigError for an unknown one."""
    groups = {
        item.name: stage
        for stage, cls in _GROUPS.items()
        for item in dataclasses.fields(cls)
        if item.name not in _OTHERWISE and not item.metadata.get("call_only")
    }
    unknown = [name for name in settings if name not in groups]
    if unknown:
        raise ConfigError(f"there is no setting {unknown[0]!r}", remedy=f"known ones are {', '.join(sorted(groups))}")
    return {
        f"{groups[name]}_{name}": typed_setting(_GROUPS[groups[name]], name, value, "run")
        for name, value in settings.items()
    }


def _check(**values: Any) -> None:
    """What the command line's options refuse by themselves. Raises ConfigError."""
    if values["until"] not in STAGES[1:]:
        raise ConfigError(f"until {values['until']!r} is no stage", remedy=f"write one of {', '.join(STAGES[1:])}")
    if values["frame"] not in (None, *FRAMES):
        raise ConfigError(f"the frame {values['frame']!r} is unknown", remedy=f"write {' or '.join(FRAMES)}")
    for name, least in (("workers", 1), ("limit", 1), ("timeout_s", 1), ("scene", 0), ("z", 0)):
        value = values[name]
        if value is not None and (isinstance(value, bool) or not value >= least):
            raise ConfigError(f"{name} {value!r} must be at least {least}")


def _several(value: str | float | Sequence[str | float]) -> Sequence[str | float]:
    return [value] if isinstance(value, (str, int, float)) else value


def _paths(slides: Sources) -> list[str]:
    given = [slides] if isinstance(slides, (str, os.PathLike)) else slides
    return [os.fspath(item) for item in given]


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _shown_mpp(value: float | tuple[float, float] | None) -> str | None:
    if value is None:
        return None
    return repr(float(value)) if isinstance(value, (int, float)) else "x".join(repr(float(item)) for item in value)


def _encoders(given: str | Sequence[str] | Mapping[str, str | Sequence[str]]) -> list[str]:
    """Encoders as the command line names them: NAME, or RES=NAME."""
    if not isinstance(given, Mapping):
        return [given] if isinstance(given, str) else list(given)
    found = []
    for resolution, names in given.items():
        head = "" if resolution == "*" else f"{resolution}="
        found += [f"{head}{name}" for name in ([names] if isinstance(names, str) else names)]
    return found


def _row(end: SlideOutcome) -> dict[str, Any]:
    return {
        "slide_id": end.slide_id,
        "status": end.status,
        **{f"tiles_{label}": count for label, count in end.tiles.items()},
        "seconds": round(sum(end.seconds.values()), 3),
        "reason": end.reason or "",
        "remedy": end.remedy or "",
    }


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    labels = list(dict.fromkeys(name for row in rows for name in row if name.startswith("tiles_")))
    columns = ["slide_id", "status", *labels, "seconds", "reason", "remedy"]
    frame = pd.DataFrame([dict(row) for row in rows], columns=columns)
    return frame.astype(dict.fromkeys(labels, "Int64"))


def _frame(outcomes: Sequence[SlideOutcome]) -> pd.DataFrame:
    return _of_rows([_row(end) for end in outcomes])


def _shown(value: object) -> str:
    return "" if value is None or str(value) in ("nan", "<NA>") else str(value)
