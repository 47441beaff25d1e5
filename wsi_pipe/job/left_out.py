"""What the search for a job's slides passed over, kept for its report."""

from __future__ import annotations

import json
from pathlib import Path

from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["note_passed_over", "read_passed_over"]


def note_passed_over(paths: JobPaths, passed_over: PassedOver) -> None:
    """Keep what the last search of folders passed over, instead of what one before it did.

    Raises OutputError when it cannot be written.
    """
    if passed_over:
        write_text_atomically(paths.passed_over, json.dumps(passed_over.to_json(), indent=1) + "\n")
        return
    try:
        paths.passed_over.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(paths.passed_over, error) from error


def read_passed_over(root: Path) -> PassedOver:
    """What ``note_passed_over`` kept; nothing where there is none, or it is damaged."""
    try:
        return PassedOver.from_json(json.loads(JobPaths(root).passed_over.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return PassedOver()
