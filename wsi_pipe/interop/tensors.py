"""Files of ``torch.save`` that hold one plain tensor: what ``torch.load`` reads with ``weights_only=True``."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["save_tensor"]


def save_tensor(path: Path, values: NDArray[np.float32]) -> None:
    """Write values as a tensor of their own memory. Raises OSError when the disk is full."""
    import torch

    # Through memory: torch's own writer turns a full disk into a RuntimeError, or into a crash.
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.array(values, np.float32, order="C")), buffer)
    path.write_bytes(buffer.getbuffer())
