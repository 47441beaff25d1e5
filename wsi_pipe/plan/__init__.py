"""What a run would take and what would fail, before it starts."""

from __future__ import annotations

from wsi_pipe.plan.calibrate import Calibration, calibrate
from wsi_pipe.plan.metadata import NEEDS_STAGING, MetadataCache, SlideFacts, slide_facts
from wsi_pipe.plan.space import Space, SpaceCount, known_bytes_per_tile
from wsi_pipe.plan.survey import PlanTotals, SlidePlan, exact_tiles, spread_sample, survey, total

__all__ = [
    "NEEDS_STAGING",
    "Calibration",
    "MetadataCache",
    "PlanTotals",
    "SlideFacts",
    "SlidePlan",
    "Space",
    "SpaceCount",
    "calibrate",
    "exact_tiles",
    "known_bytes_per_tile",
    "slide_facts",
    "spread_sample",
    "survey",
    "total",
]
