"""What must be the same where slides of one job are worked on: else bags of one job would differ in silence."""

from __future__ import annotations

from collections.abc import Mapping

from wsi_pipe import __version__
from wsi_pipe.bag import SCHEMA_VERSION
from wsi_pipe.job.fingerprints import EXTRACT_VERSION, SEGMENT_VERSION, TILE_VERSION
from wsi_pipe.outcome import SlideOutcome

__all__ = ["versions"]


def versions() -> Mapping[str, str]:
    """Versions of the package, of what it writes, and of what results depend on, by name."""
    return {
        "wsi-pipe": __version__,
        "bag schema": str(SCHEMA_VERSION),
        "outcome": " ".join(SlideOutcome.__dataclass_fields__),
        "segment": str(SEGMENT_VERSION),
        "tile": str(TILE_VERSION),
        "extract": str(EXTRACT_VERSION),
    }
