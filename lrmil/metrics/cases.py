"""Cases, of which slides are parts: what is drawn, counted and kept together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import FiguresError

__all__ = ["case_numbers"]


def case_numbers(cases: Sequence[str] | None, n: int) -> NDArray[np.int64]:
    """A number from 0 for each slide's case; every slide its own case where none are given."""
    if cases is None:
        return np.arange(n)
    if len(cases) != n:
        raise FiguresError(f"{len(cases)} cases do not fit {n} slides")
    return np.unique(np.asarray(cases, str), return_inverse=True)[1].astype(np.int64)
