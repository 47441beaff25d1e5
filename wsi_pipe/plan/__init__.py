"""What a run would take and what would fail, before it starts."""

from __future__ import annotations

from wsi_pipe.plan.calibrate import Calibration, bytes_per_tile, calibrate
from wsi_pipe.plan.checks import (
    encoder_problems,
    kept_share,
    lack_of_room,
    refuse_bad_encoders,
    refuse_lack_of_room,
    refuse_read_only,
)
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
    "bytes_per_tile",
    "calibrate",
    "encoder_problems",
    "exact_tiles",
    "kept_share",
    "known_bytes_per_tile",
    "lack_of_room",
    "refuse_bad_encoders",
    "refuse_lack_of_room",
    "refuse_read_only",
    "slide_facts",
    "spread_sample",
    "survey",
    "total",
]
