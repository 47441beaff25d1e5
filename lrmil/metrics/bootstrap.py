"""Drawing cases with replacement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["resample_weights"]


def resample_weights(cases: NDArray[np.int64], replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each slide is in each replicate, (R, N): whole cases are drawn with replacement."""
    count = int(cases.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=replicates)
    return drawn[:, cases].astype(np.float64)
