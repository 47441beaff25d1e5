"""Slide readers behind one protocol."""

from __future__ import annotations

from wsi_pipe.slides.opening import READERS, open_slide

__all__ = ["READERS", "open_slide"]
