"""What a run would take and what would fail, before it starts."""

from __future__ import annotations

from wsi_pipe.plan.calibrate import Calibration, calibrate
from wsi_pipe.plan.metadata import NEEDS_STAGING, MetadataCache, SlideFacts, slide_facts
from wsi_pipe.plan.space import Space, space_for
from wsi_pipe.plan.survey import PlanTotals, SlidePlan, exact_tiles, spread_sample, survey, total

__all__ = [
    "NEEDS_STAGING",
    "Calibration",
    "MetadataCache",
    "PlanTotals",
    "SlideFacts",
    "SlidePlan",
    "Space",
    "calibrate",
    "exact_tiles",
    "slide_facts",
    "space_for",
    "spread_sample",
    "survey",
    "total",
]
