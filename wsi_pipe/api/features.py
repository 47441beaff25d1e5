"""Features of one grid, as ``encode`` gives them and ``write_bag`` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.layout import Layout, frame_of
from wsi_pipe.api.show import card
from wsi_pipe.job.alone import LevelFeatures
from wsi_pipe.job.prepared import Prepared

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TileFeatures"]


class TileFeatures:
    """One encoder's features of one grid: row i belongs to tile i.

    ``numpy.asarray`` gives ``values``. What a bag says of features (weights, transform, fingerprint) goes with them.
    """

    def __init__(self, level: Layout, prepared: Prepared, computed: LevelFeatures) -> None:
        self.grid = level
        self.prepared = prepared
        self.computed = computed

    @property
    def values(self) -> NDArray[np.floating[Any]]:
        """The features, float16 or float32 (N, D)."""
        return self.computed.features.values

    @property
    def encoder(self) -> str:
        """The encoder's name."""
        return self.computed.features.encoder

    @property
    def label(self) -> str:
        """The grid's name, such as "20x"."""
        return self.grid.label

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the grid and everything that the features depend on, as a bag has it."""
        return self.computed.features.fingerprint

    @property
    def layers(self) -> Mapping[str, NDArray[np.floating[Any]]]:
        """CLS tokens of the blocks that were asked for, (N, C) each, by block number as text."""
        return self.computed.features.layers

    @property
    def quality(self) -> Mapping[str, NDArray[np.float32]]:
        """What was measured of the tiles while they were read ("sharpness", "fold", "bubble"), float32 (N,) each."""
        return {name: item.values for name, item in self.computed.quality.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return (self.values.shape[0], self.values.shape[1])

    def to_frame(self) -> pd.DataFrame:
        """One row a tile: place, quality and the features as columns ``NAME_0`` and so on (pandas)."""
        return frame_of(self.grid, {**self.quality, self.computed.wanted.info.slug: self.values})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Any:
        return self.values[rows]

    def __repr__(self) -> str:
        return f"<TileFeatures {self.encoder} at {self.label}: {self.shape[0]:,} x {self.shape[1]} {self.values.dtype}>"

    def _repr_html_(self) -> str:
        info = self.computed.features
        facts = [
            ("slide", self.prepared.attrs.slide_id),
            ("tiles x features", f"{self.shape[0]:,} x {self.shape[1]:,} {self.values.dtype}"),
            ("precision", info.precision),
            ("weights", info.weights or info.weights_sha256[:12]),
        ]
        return card(f"{self.encoder} at {self.label}", facts)
