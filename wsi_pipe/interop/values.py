"""What is exported of one slide, and what a format must be able to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag import BagAttrs
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.geometry import FloatPair, TileGrid

__all__ = ["Exporter", "Given", "SlideFeatures", "case_of", "whole"]


@dataclass(frozen=True)
class SlideFeatures:
    """One encoder's features of one grid of a slide, with what other tools ask for beside them.

    encoder, slug: the encoder's name and its name in paths. features: float32 (N, D). weights: "random" where they were
    drawn. annotation: by class, the covered fraction, float32 (N,). quality: by measure, float32 (N,).
    """

    attrs: BagAttrs
    grid: TileGrid
    encoder: str
    slug: str
    weights_sha256: str
    features: NDArray[np.float32]
    weights: str = ""
    annotation: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    quality: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def slide_id(self) -> str:
        """Of the job; what files are called by."""
        return self.attrs.slide_id

    @property
    def known_as(self) -> str:
        """The slug of the encoder by its name, which counts where a bag keeps its features under another."""
        return slug_asked_for(self.encoder)

    @property
    def case_id(self) -> str:
        """Of the job; the slide's own id where it states no case."""
        return case_of(self.attrs)

    @property
    def tile_um(self) -> FloatPair:
        """Side of a tile on the glass, (x, y) in um: of what was really cut, which the request may differ from."""
        x, y = (size * mpp for size, mpp in zip(self.grid.tile_size_l0, self.attrs.mpp_l0, strict=True))
        return (x, y)

    @property
    def origins(self) -> dict[str, Any]:
        """Where the features come from: what is said in files that have room for it."""
        return {
            "slide_id": self.slide_id,
            "case_id": self.case_id,
            "encoder": self.encoder,
            "weights_sha256": self.weights_sha256,
            "level": self.grid.label,
            "mpp": self.grid.spec.mpp,
            "slide_fingerprint": self.attrs.slide_fingerprint,
            "wsi_pipe_version": self.attrs.wsi_pipe_version,
            **({"weights": self.weights} if self.weights else {}),
        }


@dataclass(frozen=True)
class Given:
    """A slide as the tables of an export list it; dim, tiles: of its features."""

    slide_id: str
    case_id: str
    tiles: int
    dim: int


def case_of(attrs: BagAttrs) -> str:
    """The case of a slide; its own id where it states none."""
    return attrs.case_id or attrs.slide_id


def whole(value: float) -> int | float:
    """A whole number as an int, as the tools write magnifications, which name their folders by them."""
    near = round(value)
    return near if abs(value - near) < 1e-9 else value


class Exporter(Protocol):
    """Writes the features of slides as one tool reads them.

    name: on the command line. title: the tool. version: of the files; another one has them written anew. takes_empty:
    whether the tool can read a slide without tiles. shared: whether features of several encoders or resolutions would
    have the same place in one folder.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int]
    takes_empty: ClassVar[bool]
    shared: ClassVar[bool]

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """The files of a slide, relative to the folder of the export."""
        ...

    def of_grid(self, place: Path) -> bool:
        """Whether a file depends on the tiles alone, so that exports of several encoders share it."""
        ...

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """Write one of ``files`` to the temporary path ``out``; ``place``: which one, as ``files`` gives it."""
        ...

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """Tables of all slides that go with the files: relative path and text."""
        ...
