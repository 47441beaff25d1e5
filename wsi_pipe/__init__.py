"""Whole-slide images to verified multi-resolution feature bags."""

from __future__ import annotations

__version__ = "0.1.0"
