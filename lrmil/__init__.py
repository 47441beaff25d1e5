"""Multiple instance learning that classifies a slide from low-resolution tiles, distilled from high-resolution ones."""

from __future__ import annotations

__version__ = "0.1.0"
