"""How far a slide's tiles lie from those that a model was trained on: Mahalanobis distance, kept in the model's file.

The distance of a tile z, standardised by the training tiles' mean and deviation, is ``sqrt(z' inv(R) z / D)``: R is the
correlation of the training tiles' D features, shrunk towards no correlation as Ledoit and Wolf (2004) do. A slide's is
the root of the mean square over its tiles, so that the training tiles themselves lie at about 1. Features that do not
vary in training count for nothing, as they do for the model.

Up to ``WHOLE_DIM`` features R is kept as it is. Above that it is kept as its ``LEADING`` largest eigenvectors, with one
variance for all other directions (the form of Tipping and Bishop, Probabilistic principal component analysis, 1999).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.store import ResidentStore

__all__ = ["Outlying", "Reference", "outlying", "reference_of", "together"]

WHOLE_DIM = 1024
LEADING = 256
SAMPLE_TILES = 20_000
"""Training tiles that the correlation is computed from, evenly drawn."""
SLIDE_TILES = 4096
"""Tiles of a slide that its distance is computed from, evenly drawn."""
LEAST_TILES = 2
CHUNK_TILES = 2048


@dataclass(frozen=True)
class Reference:
    """The training tiles' features, as far as a distance from them needs.

    mean, scale: float32 (D,); scale is one over the standard deviation, 0 for a feature that does not vary.
    correlation: float32 (D, D), shrunk; or, where D is above ``WHOLE_DIM``, vectors (D, K), values (K,) and rest, one
    variance for all other directions.
    """

    mean: Tensor
    scale: Tensor
    correlation: Tensor | None = None
    vectors: Tensor | None = None
    values: Tensor | None = None
    rest: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps, by name."""
        kept = {"mean": self.mean, "scale": self.scale}
        if self.correlation is not None:
            return kept | {"correlation": self.correlation}
        assert self.vectors is not None
        assert self.values is not None
        return kept | {"vectors": self.vectors, "values": self.values, "rest": torch.tensor([self.rest])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Reference:
        """The inverse of ``tensors``. Raises ValueError where they do not fit together."""
        try:
            mean, scale = tensors["mean"], tensors["scale"]
            dim = len(mean)
            if "correlation" in tensors:
                wanted = {"scale": (dim,), "correlation": (dim, dim)}
            else:
                count = len(tensors["values"])
                wanted = {"scale": (dim,), "vectors": (dim, count), "values": (count,), "rest": (1,)}
            odd = [name for name, shape in wanted.items() if tuple(tensors[name].shape) != shape]
        except KeyError as error:
            raise ValueError(f"the training tiles' {error.args[0]} is missing") from error
        if odd:
            raise ValueError(f"the training tiles' {odd[0]} has the shape {tuple(tensors[odd[0]].shape)}")
        if "correlation" in tensors:
            return cls(mean, scale, tensors["correlation"])
        return cls(mean, scale, None, tensors["vectors"], tensors["values"], float(tensors["rest"][0]))

    @property
    def dim(self) -> int:
        """D, the features' dimension."""
        return len(self.mean)

    @property
    def form(self) -> str:
        """In which form the correlation is kept, in words."""
        if self.correlation is not None:
            return f"all of {self.dim} x {self.dim}"
        assert self.values is not None
        return f"{len(self.values)} leading directions of {self.dim}, one variance for the others"

    @cached_property
    def _whitening(self) -> Tensor:
        """W with ``|W z|^2 = z' inv(R) z``, float32 (D, D)."""
        assert self.correlation is not None
        lower = torch.linalg.cholesky(self.correlation.double())
        eye = torch.eye(self.dim, dtype=torch.float64)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).float()
        return inverse

    def tile_distances(self, features: Tensor) -> NDArray[np.float64]:
        """The distance of each tile: features (T, D) of any float type -> float64 (T,)."""
        z = (features.to("cpu", torch.float32) - self.mean) * self.scale
        if self.correlation is not None:
            squares = (z @ self._whitening.T).square().sum(1)
        else:
            assert self.vectors is not None
            assert self.values is not None
            along = z @ self.vectors
            across = (z.square().sum(1) - along.square().sum(1)).clamp_min(0)
            squares = (along.square() / self.values).sum(1) + across / self.rest
        varying = int((self.scale > 0).sum())
        return np.sqrt(squares.double().numpy() / max(varying, 1))

    def distance(self, features: Tensor) -> float:
        """The distance of a slide from its tiles' features (T, D); NaN without tiles."""
        if not len(features):
            return float("nan")
        rows = torch.from_numpy(_evenly(len(features), SLIDE_TILES)).to(features.device)
        return float(np.sqrt(np.square(self.tile_distances(features[rows])).mean()))


def reference_of(store: ResidentStore, indices: Sequence[int] | NDArray[np.int64]) -> Reference | None:
    """The reference of some bags' tiles, of ``SAMPLE_TILES`` evenly drawn at most; None for fewer than two tiles, and
    where no feature varies."""
    tiles = torch.cat(list(_sampled(store, np.asarray(indices, np.int64))))
    if len(tiles) < LEAST_TILES:
        return None
    mean = tiles.mean(0, dtype=torch.float64)
    parts = [tiles[start : start + CHUNK_TILES] for start in range(0, len(tiles), CHUNK_TILES)]
    std = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0).div(len(tiles)).sqrt()
    # Below half a step of float16 a feature shows its rounding alone, as in ``ResidentStore.moments``.
    varying = std > mean.abs() * 2.0**-11
    if not varying.any():
        return None
    scale = torch.where(varying, 1 / torch.where(varying, std, 1.0), 0.0)
    correlation = torch.eye(store.dim, dtype=torch.float64)
    own = torch.nonzero(varying)[:, 0]
    correlation[own[:, None], own] = _shrunk([((part - mean) * scale)[:, varying].float() for part in parts])
    mean, scale = mean.float(), scale.float()
    if store.dim <= WHOLE_DIM:
        return Reference(mean, scale, correlation.float())
    values, vectors = _leading(correlation)
    rest = (float(correlation.trace()) - float(values.sum())) / (store.dim - len(values))
    return Reference(mean, scale, None, vectors.float(), values.float(), max(rest, 1e-6))


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """``most`` of ``count`` rows, evenly spaced; all where there are no more."""
    if count <= most:
        return np.arange(count)
    return np.arange(most, dtype=np.int64) * count // most


def _sampled(store: ResidentStore, indices: NDArray[np.int64]) -> Iterable[Tensor]:
    """Rows of the bags, evenly drawn over all of them together."""
    lengths = store.lengths[indices]
    chosen = _evenly(int(lengths.sum()), SAMPLE_TILES)
    yield torch.empty((0, store.dim))
    for index, start, length in zip(indices, np.cumsum(lengths) - lengths, lengths, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + length)] - start
        if len(own):
            rows = store.gather(np.array([index])).features
            yield rows[torch.from_numpy(own).to(rows.device)].to("cpu", torch.float32)


def _shrunk(parts: Sequence[Tensor]) -> Tensor:
    """The second moments (D, D) of rows (T, D), given in parts, shrunk to a multiple of the identity; float64.

    Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004, lemma 3.3.
    """
    count, dim = sum(map(len, parts)), parts[0].shape[1]
    eye = torch.eye(dim, dtype=torch.float64)
    sample = torch.zeros((dim, dim), dtype=torch.float64)
    fourth = 0.0
    for z in parts:
        sample += (z.T @ z).double()
        fourth += float(z.double().square().sum(1).square().sum())
    sample /= count
    middle = sample.trace() / dim
    spread = float((sample - middle * eye).square().sum()) / dim
    noise = (fourth / count - float(sample.square().sum())) / (count * dim)
    share = min(max(noise, 0.0) / spread, 1.0) if spread > 0 else 1.0
    # A hair of the identity always, or features that are copies of each other would leave no inverse.
    share = max(share, 1e-4)
    return (1 - share) * sample + share * middle * eye


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The ``LEADING`` largest eigenvalues (K,) of a symmetric matrix (D, D) and their vectors (D, K)."""
    from scipy.linalg import eigh

    dim = len(matrix)
    values, vectors = eigh(matrix.numpy(), subset_by_index=[dim - LEADING, dim - 1])
    return torch.from_numpy(values), torch.from_numpy(vectors)


@dataclass(frozen=True)
class Outlying:
    """How far a slide lies from the training tiles, beside the model's validation slides.

    distance: see the module. percentile: of 100, validation slides that lie nearer, ties counted half; NaN without any.
    slides: validation slides. beyond: whether it lies farther than all of them. note: in words.
    """

    distance: float
    percentile: float
    slides: int
    beyond: bool
    note: str


def outlying(distance: float, validation: Sequence[float]) -> Outlying:
    """A slide's distance beside those of validation slides."""
    count = len(validation)
    if not count:
        note = f"at {distance:.3g} times the spread of the training tiles; no validation slides to compare with"
        return Outlying(distance, float("nan"), 0, False, note)
    there = np.asarray(validation, np.float64)
    share = float((there < distance).mean() + (there == distance).mean() / 2)
    beyond = bool(distance > there.max())
    if beyond:
        note = (
            f"farther from the training tiles than all {count} validation slides, {distance / there.max():.3g} times "
            f"the farthest; of slides like those of training 1 in {count + 1} is"
        )
    else:
        note = f"as far from the training tiles as validation slides are (farther than {100 * share:.0f} % of {count})"
    return Outlying(distance, 100 * share, count, beyond, note)


def together(found: Sequence[Outlying]) -> Outlying:
    """What several models' distances come to: means of distance and percentile, ``beyond`` by more than half."""
    if len(found) == 1:
        return found[0]
    votes = sum(one.beyond for one in found)
    beyond = 2 * votes > len(found)
    slides = sum(one.slides for one in found)
    known = [one.percentile for one in found if one.slides]
    percentile = float(np.mean(known)) if known else float("nan")
    distance = float(np.mean([one.distance for one in found]))
    if not slides:
        note = f"at {distance:.3g} times the spread of the training tiles; no validation slides to compare with"
    elif votes:
        note = f"farther from the training tiles than all their validation slides by {votes} of {len(found)} models"
    else:
        note = f"as far from the training tiles as validation slides are (percentile {percentile:.0f})"
    return Outlying(distance, percentile, slides, beyond, note)
