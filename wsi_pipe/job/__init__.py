"""The four stages as tasks, composed into a run."""

from __future__ import annotations

from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.record import (
    OutcomeLog,
    append_outcome,
    load_settings,
    load_slides,
    open_job,
    read_outcomes,
    utc_now,
    write_failures,
)

__all__ = [
    "JobPaths",
    "OutcomeLog",
    "append_outcome",
    "load_settings",
    "load_slides",
    "open_job",
    "read_outcomes",
    "utc_now",
    "write_failures",
]
