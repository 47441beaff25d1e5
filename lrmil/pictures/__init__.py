"""Pictures of a run and of a slide's attention, PNG or SVG by the file's name."""

from __future__ import annotations

from lrmil.pictures.heatmap import draw_attention
from lrmil.pictures.run import draw_calibration, draw_confusion, draw_curves, draw_roc

__all__ = ["draw_attention", "draw_calibration", "draw_confusion", "draw_curves", "draw_roc"]
