"""One slide through the stages as a callable that runs in any process: what workers and clusters execute."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_pipe.config import JobSettings, fingerprint
from wsi_pipe.errors import OutputError
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.run import load_encoders, process
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage

if TYPE_CHECKING:
    from wsi_pipe.encoders.base import Encoder

__all__ = ["slide_task", "warm_up"]

_encoders: dict[str, dict[str, Encoder]] = {}
"""Encoders of this process, by settings: loaded once, kept for the next slide."""
_encoding = threading.Lock()
"""Held by the slide that uses them: a Dask worker may run several threads, which share them and the device."""


def slide_task(settings: JobSettings, root: str, until: Stage, keep_features: bool, entry: SlideEntry) -> SlideOutcome:
    """Take one slide to ``until`` in the job at ``root``; the caller notes the outcome.

    Raises OutputError, EncoderError and ConfigError, which concern the whole job; all else is in the outcome. Told to
    stop, it keeps the features that there are for the next run and raises StopRequested.
    """
    paths = JobPaths(Path(root))
    if not paths.config.is_file():
        raise OutputError(
            f"cannot write {root}: the job folder is not there", remedy="workers must see the job's folder"
        )
    if STAGES.index(until) < STAGES.index("extract"):
        return _process(settings, paths, until, keep_features, entry, None)
    with _encoding:
        return _process(settings, paths, until, keep_features, entry, _loaded(settings))


def warm_up(settings: JobSettings, until: Stage) -> None:
    """Load what every slide needs, before the first one's time begins. Raises as ``slide_task``."""
    if STAGES.index(until) >= STAGES.index("extract"):
        with _encoding:
            _loaded(settings)


def _loaded(settings: JobSettings) -> dict[str, Encoder]:
    # Of one call only, and so no part of a fingerprint.
    key = f"{settings.extract.random_weights} {fingerprint(settings.extract, settings.tile.resolutions)}"
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = load_encoders(settings)
    return _encoders[key]


def _process(
    settings: JobSettings,
    paths: JobPaths,
    until: Stage,
    keep_features: bool,
    entry: SlideEntry,
    encoders: dict[str, Encoder] | None,
) -> SlideOutcome:
    (outcome,) = process(
        [entry],
        settings,
        paths,
        until=until,
        encoders=encoders,
        keep_features=keep_features,
        record=False,
    )
    return outcome
