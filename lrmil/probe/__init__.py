"""What features tell without a MIL model: linear, nearest-neighbour and few-shot figures with intervals by case.

``given`` brings vectors of slides or features of tiles together with labels, ``methods`` classifies, ``run`` goes
through the folds.
"""

from __future__ import annotations

from lrmil.probe.given import Samples, slide_samples, tile_samples
from lrmil.probe.run import METHODS, ProbeResult, probe

__all__ = ["METHODS", "ProbeResult", "Samples", "probe", "slide_samples", "tile_samples"]
