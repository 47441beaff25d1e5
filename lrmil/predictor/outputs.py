"""Predictions as CSV, JSON, GeoJSON for QuPath, and attention in the bag."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.checkpoint import no_nan
from lrmil.errors import StoreError
from lrmil.predictor.predict import Predictor, SlidePrediction
from lrmil.store import check_readable
from wsi_pipe.errors import BagError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.pictures import viridis
from wsi_pipe.tables import csv_text
from wsi_pipe.tissue import frame_statement, qupath_origin
from wsi_pipe.tissue.frame import MEMBER

__all__ = ["attention_geojson", "predictions_table", "write_attention", "write_predictions"]


def predictions_table(predictions: Sequence[SlidePrediction], predictor: Predictor) -> str:
    """The predictions as CSV text, one row a slide; failed and empty slides have their reason and no numbers.

    Columns of abstention, of the members of an ensemble and of the distance from the training tiles are there where
    the predictor has them.
    """
    classes = () if predictor.card.target_state else predictor.card.classes
    said = list(dict.fromkeys(name for p in predictions for name in p.said))
    # Another target than a class has columns of its own.
    columns = said or [f"probability_{name}" for name in classes]
    last = ["entropy_nats", "tiles", "top_tile_x", "top_tile_y", *_more_columns(predictor), "reason"]
    rows: list[list[object]] = []
    for p in predictions:
        numbers: list[object] = (
            [_cell(p.said.get(name, "")) for name in said]
            if said
            else [f"{p.probabilities[name]:.6g}" if p.probabilities else "" for name in classes]
        )
        entropy = "" if math.isnan(p.entropy_nats) else f"{p.entropy_nats:.6g}"
        place = [f"{p.top_tiles[0].x:.10g}", f"{p.top_tiles[0].y:.10g}"] if p.top_tiles else ["", ""]
        row: list[object] = [
            p.slide_id,
            p.case_id or "",
            p.status,
            p.predicted or "",
            *numbers,
            entropy,
            p.tiles,
            *place,
            *_more_cells(p, predictor),
        ]
        rows.append([*row, p.reason or ""])
    return csv_text(["slide_id", "case_id", "status", "predicted", *columns, *last], rows)


def _more_columns(predictor: Predictor) -> list[str]:
    """The columns that not every predictor has: ``_more_cells`` fills them in this order."""
    columns = ["abstained"] if predictor.abstention is not None else []
    if len(predictor.members) > 1:
        columns += ["members", *(f"sd_{name}" for name in predictor.card.classes)]
        columns += ["mutual_information_nats", "vote_share"]
    return [*columns, *(["ood_distance", "ood_percentile", "ood", "ood_note"] if predictor.keeps_tiles else [])]


def _more_cells(p: SlidePrediction, predictor: Predictor) -> list[object]:
    cells: list[object] = []
    if predictor.abstention is not None:
        cells.append("" if p.abstained is None else _yes(p.abstained))
    if len(predictor.members) > 1:
        d = p.disagreement
        classes = predictor.card.classes
        cells += (
            [""] * (3 + len(classes)) if d is None else [len(d.probabilities), *(_digits(d.sd[c]) for c in classes)]
        )
        cells += [] if d is None else [_digits(d.mutual_information_nats), _digits(d.vote_share)]
    if predictor.keeps_tiles:
        o = p.ood
        cells += [""] * 4 if o is None else [_digits(o.distance), _digits(o.percentile), _yes(o.beyond), o.note]
    return cells


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_predictions(out: Path, predictions: Sequence[SlidePrediction], predictor: Predictor) -> None:
    """Write ``predictions.csv`` and ``predictions.json`` into ``out``. Raises OutputError when it cannot."""
    write_text_atomically(out / "predictions.csv", predictions_table(predictions, predictor))
    card = predictor.card
    head: dict[str, Any] = {
        "name": predictor.name,
        "sha256": predictor.sha256,
        "architecture": card.model.name,
        "classes": list(card.classes),
        "encoder": card.encoder,
        "weights_sha256": card.weights_sha256,
        "level": card.level,
        "temperature": card.temperature,
        "bias": list(card.bias),
        "calibration": card.calibration,
    }
    if len(predictor.members) > 1:
        # Calibration is each member's own.
        for name in ("temperature", "bias", "calibration"):
            del head[name]
        head["members"] = [_member(member) for member in predictor.members]
    if predictor.abstention is not None:
        head["abstention"] = {**dataclasses.asdict(predictor.abstention), "rule": str(predictor.abstention.rule)}
    if card.target_state:
        head["target"] = dict(card.target_state)
    body = {"model": head, "slides": [_plain(p) for p in predictions]}
    write_text_atomically(out / "predictions.json", json.dumps(no_nan(body), indent=1, allow_nan=False) + "\n")


def _plain(p: SlidePrediction) -> dict[str, Any]:
    values: dict[str, Any] = {"slide_id": p.slide_id, "case_id": p.case_id, "status": p.status, "tiles": p.tiles}
    if p.status == "done":
        values |= {
            "predicted": p.predicted,
            "probabilities": dict(p.probabilities),
            "entropy_nats": p.entropy_nats,
            **({"said": dict(p.said)} if p.said else {}),
            "logits": list(p.logits),
            "top_tiles": [{"row": t.row, "x": t.x, "y": t.y, "attention": t.attention} for t in p.top_tiles],
        }
        if p.abstained is not None:
            values["abstained"] = p.abstained
        for name, found in (("disagreement", p.disagreement), ("ood", p.ood)):
            if found is not None:
                values[name] = dataclasses.asdict(found)
    if p.bag is not None:
        values |= {"bag": p.bag.path, "coords_unit": p.bag.coords_unit}
    if p.reason:
        values |= {"reason": p.reason, "remedy": p.remedy}
    return values


def _member(member: Predictor) -> dict[str, Any]:
    card = member.card
    return {
        "file": str(member.path or member.name),
        "sha256": member.sha256,
        "architecture": card.model.name,
        "fold": card.fold,
        "temperature": card.temperature,
        "bias": list(card.bias),
        "calibration": card.calibration,
    }


def write_attention(prediction: SlidePrediction, model: str) -> bool:
    """Put a slide's attention into its bag as ``/levels/<level>/attention/<model>``; False where there is none to put.

    What holds the bag together is looked at first, in a process of its own: a damaged one may hang who opens it. All of
    what would replace the bag is checked before it does. Raises StoreError for a bag of another tool, BagError for a
    damaged one, OutputError when it cannot be written.
    """
    from wsi_pipe.bag import read_header
    from wsi_pipe.bag import write_attention as write_into_bag
    from wsi_pipe.job.guard import read_guarded

    info = prediction.bag
    if prediction.attention is None or info is None:
        return False
    if info.format != "wsi-pipe":
        raise StoreError(
            f"{info.path} is a bag of {info.format}, which has no place for attention",
            remedy="write GeoJSON instead: --geojson",
        )
    path = Path(info.path)
    try:
        check_readable(path)
        read_guarded(read_header, path)
    except (StoreError, BagError) as error:
        cause = error.message.removeprefix(f"{path.absolute()}: ")
        raise BagError(f"{path}: attention is not written into it: {cause}", remedy="make the bag again") from error
    write_into_bag(path, info.level, model, prediction.attention)
    return True


def attention_geojson(prediction: SlidePrediction, model: str) -> dict[str, Any]:
    """Tiles as a GeoJSON that QuPath opens: one tile object each, coloured by its attention as a share of the highest.

    Measurements: attention, that share, and its percentile.

    Coordinates are level-0 pixels from where QuPath counts, the corner of the scan's bounds; of bags that do not state
    them, from the whole image's. The file says which. Raises StoreError when the bag's coordinates are not level-0
    pixels, or the tile size is unknown.
    """
    info = prediction.bag
    assert info is not None
    if prediction.attention is None or prediction.coords is None:
        raise StoreError(f"{info.path}: the model has no attention per tile", remedy="choose an attention model")
    if info.coords_unit != "px_l0" or info.tile_size_l0 is None or not np.isfinite(prediction.coords).all():
        raise StoreError(
            f"{info.path} does not say where its tiles lie in level-0 pixels",
            remedy="leave out --geojson, or make the bag with wsi-pipe",
        )
    width, height = info.tile_size_l0
    origin = qupath_origin(info.bounds_l0)
    stated = frame_statement(origin) if info.bounds_l0 else {"frame": "image"}
    attention = prediction.attention
    # Attention is spread over thousands of tiles: the percentile is what a colour scale can show.
    order = np.argsort(np.argsort(attention, kind="stable"), kind="stable")
    percentile = 100.0 * (order + 1) / len(attention)
    share = attention / max(float(attention.max(initial=0.0)), 1e-30)
    colours = viridis()[np.rint(255 * share).astype(np.uint8)]
    features = []
    coords = prediction.coords - origin
    values = zip(
        coords.tolist(), attention.tolist(), share.tolist(), percentile.tolist(), colours.tolist(), strict=True
    )
    for (x, y), value, part, rank, colour in values:
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        measurements = {
            f"{model} attention": value,
            f"{model} attention, share of the highest": part,
            f"{model} attention percentile": rank,
        }
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "color": colour, "measurements": measurements},
            }
        )
    return {"type": "FeatureCollection", "features": features, MEMBER: stated}
