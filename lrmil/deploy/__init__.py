"""A classifier in one ONNX file: normalisation, encoder, MIL head and calibration, and what is needed to use them.

``export`` writes it, from a model and its encoder, with torch. ``runtime`` runs it with onnxruntime alone: nothing that
is imported for that imports torch. ``header`` says what stands in the file's metadata.
"""

from __future__ import annotations

__all__: list[str] = []
