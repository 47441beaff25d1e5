"""What each resolution of a job took, from the outcomes that the job keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ArmCost", "job_costs"]

SHARED = ("open", "segment", "tile", "extract", "assemble")
"""Stages that every resolution needs, whichever are asked for."""


@dataclass(frozen=True)
class ArmCost:
    """Means over slides: seconds of work a slide (of which read, encode are the resolution's own), and tiles.

    slides: whose cost is known. The seconds of stages that overlap are added up, so a run takes less wall time.
    """

    seconds: float
    read: float
    encode: float
    tiles: float
    slides: int


def job_costs(bags: Path, slide_ids: Sequence[str], level: str, slug: str) -> ArmCost | None:
    """The cost of one encoder's features at one level; None where ``bags`` is no job, or it knows no such costs.

    bags: the job's folder, or its ``bags``. A slide whose features a later call found valid counts with the seconds of
    the call that made them.
    """
    from wsi_pipe.job.record import read_outcomes

    root = next((p for p in (bags, bags.parent) if (p / "outcomes.jsonl").is_file()), None)
    if root is None:
        return None
    wanted = set(slide_ids)
    rows = []
    for slide_id, outcome in read_outcomes(root).items():
        own = outcome.costs.get(f"{level}/{slug}", {})
        if slide_id in wanted and {"read", "encode"} <= own.keys():
            shared = sum(outcome.seconds.get(stage, 0.0) for stage in SHARED)
            rows.append((shared, own["read"], own["encode"], outcome.tiles.get(level, 0)))
    if not rows:
        return None
    shared, read, encode, tiles = np.array(rows, float).mean(axis=0).tolist()
    return ArmCost(shared + read + encode, read, encode, tiles, len(rows))
