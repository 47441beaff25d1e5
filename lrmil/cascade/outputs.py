"""What a cascade decided, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrmil.cascade.predict import CascadePrediction, CascadePredictor, Cost
from lrmil.checkpoint import no_nan
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

__all__ = ["predictions_table", "summary", "write_cascade_predictions"]


def predictions_table(found: Sequence[CascadePrediction], classes: Sequence[str]) -> str:
    """One row a slide: class, probabilities, by which resolution, why, and what was read for it."""
    figures = ("tiles", "of_tiles", "blocks", "bytes", "seconds")
    costs = [f"{part}_{name}" for part in ("low", "high") for name in figures]
    columns = ["slide_id", "case_id", "status", "predicted", *(f"probability_{name}" for name in classes)]
    columns += ["resolution", "level", "uncertainty", *(f"low_probability_{name}" for name in classes), *costs]
    rows: list[list[object]] = []
    for p in found:
        done = p.status == "done"
        row: list[object] = [p.slide_id, p.case_id or "", p.status, p.predicted or ""]
        row += [f"{p.probabilities[name]:.6g}" if done else "" for name in classes]
        row += [p.resolution, p.level, "" if math.isnan(p.score) else f"{p.score:.6g}"]
        row += [f"{p.low_probabilities[name]:.6g}" if done else "" for name in classes]
        ood: list[object] = ["", ""] if p.ood is None else [f"{p.ood.distance:.4g}", f"{p.ood.percentile:.4g}"]
        rows.append([*row, *_cells(p.low), *_cells(p.high), *ood, "; ".join(p.notes), p.reason or ""])
    return csv_text([*columns, "ood_distance", "ood_percentile", "notes", "reason"], rows)


def _cells(cost: Cost) -> list[object]:
    known = ["" if value is None else value for value in (cost.blocks, cost.bytes)]
    return [cost.tiles, cost.of_tiles, *known, f"{cost.seconds:.4g}"]


def write_cascade_predictions(out: Path, found: Sequence[CascadePrediction], cascade: CascadePredictor) -> None:
    """Write ``predictions.csv`` and ``predictions.json`` into ``out``. Raises OutputError where it cannot."""
    card = cascade.card
    write_text_atomically(out / "predictions.csv", predictions_table(found, card.classes))
    head: dict[str, Any] = {"name": cascade.name, "sha256": cascade.sha256, "budget": cascade.budget}
    # Who the calibration cases were concerns nobody who reads predictions.
    head |= {name: value for name, value in card.to_json().items() if name not in ("seen", "budget")}
    head |= {"calibrated_budget": card.budget, "promise": card.promise}
    body = {"model": head, "slides": [no_nan(asdict(p)) for p in found]}
    write_text_atomically(out / "predictions.json", json.dumps(body, indent=1, allow_nan=False) + "\n")


def summary(found: Sequence[CascadePrediction]) -> str:
    """How many slides were read at high resolution, and what was read, in words."""
    done = [p for p in found if p.status == "done"]
    high = [p for p in done if p.resolution == "high"]
    if not done:
        return "no slide could be predicted"
    seconds = sum(p.low.seconds + p.high.seconds for p in done) / len(done)
    tiles = sum(p.high.tiles for p in done)
    text = f"{len(high)} of {len(done)} slides ({len(high) / len(done):.0%}) read at high resolution"
    if high:
        text += f", {tiles:,} of their {sum(p.high.of_tiles for p in high):,} tiles"
    text += f"; {seconds:.3g} s a slide"
    blocks = [cost.blocks for p in done for cost in (p.low, p.high) if cost.blocks is not None]
    size = [cost.bytes for p in done for cost in (p.low, p.high) if cost.bytes is not None]
    return f"{text}, {sum(blocks):,} blocks and {sum(size) / 1e6:,.1f} MB read" if blocks else text
