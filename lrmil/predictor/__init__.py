"""A trained model on bags or slides: calibrated probabilities, attention, and files that other programs open."""

from __future__ import annotations

from lrmil.predictor.cases import CasePrediction, case_predictions, case_table, write_case_predictions
from lrmil.predictor.ensemble import EnsemblePredictor, load_predictor, model_files, read_cards
from lrmil.predictor.outputs import attention_geojson, predictions_table, write_attention, write_predictions
from lrmil.predictor.predict import Disagreement, Predictor, SlidePrediction, TopTile
from lrmil.predictor.slides import find_encoder, predict_slides

__all__ = [
    "CasePrediction",
    "Disagreement",
    "EnsemblePredictor",
    "Predictor",
    "SlidePrediction",
    "TopTile",
    "attention_geojson",
    "case_predictions",
    "case_table",
    "find_encoder",
    "load_predictor",
    "model_files",
    "predict_slides",
    "predictions_table",
    "read_cards",
    "write_attention",
    "write_case_predictions",
    "write_predictions",
]
