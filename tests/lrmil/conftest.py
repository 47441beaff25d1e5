"""Bags with known features for the tests of lrmil."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.bag import Bag, BagAttrs, BagLevel, Features, write_bag
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.execute import Where
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.job import open_job
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.manifest import read_manifest
from wsi_pipe.synthetic import make_cohort

MPP_L0 = 0.25

MakeBag = Callable[..., Path]


def _grid(mpp: float, cells: NDArray[np.int32], parent: NDArray[np.int32] | None) -> TileGrid:
    side = 256 * mpp / MPP_L0
    return TileGrid(
        TileSpec(mpp),
        (mpp, mpp),
        (0.0, 0.0),
        (side, side),
        (side, side),
        cells,
        np.ones(len(cells), np.float32),
        parent,
    )


@pytest.fixture(scope="session")
def bag_writer() -> MakeBag:
    """Write a bag of this project's schema into a folder: LR tiles at 2 um/px with the given features and, on request,
    two levels below, each tile with its four children at 1 um/px and their first child at 0.5."""

    def make(
        folder: Path,
        slide_id: str,
        features: NDArray[np.floating],
        *,
        case_id: str = "",
        encoder: str = "timm:some/net",
        weights: str = "ab" * 32,
        fingerprint: str = "",
        deep: bool = False,
    ) -> Path:
        n = len(features)
        cells = np.stack([np.arange(n) % 5, np.arange(n) // 5], axis=1).astype(np.int32)

        def values(rows: NDArray[np.floating]) -> dict[str, Features]:
            mark = fingerprint or f"fp-{slide_id}"
            return {"net": Features(encoder, rows, weights, "MIT", "float32", "{}", mark)}

        levels = [BagLevel(_grid(2.0, cells, None), values(features))]
        if deep:
            # Children in an order of their own, so that a parent index that is merely counted would be wrong.
            order = np.random.default_rng(n).permutation(4 * n)
            above = np.repeat(np.arange(n, dtype=np.int32), 4)[order]
            quarter = np.tile(np.arange(4), n)[order]
            middle = np.stack([2 * cells[above, 0] + quarter % 2, 2 * cells[above, 1] + quarter // 2], axis=1)
            middle = middle.astype(np.int32)
            levels.append(BagLevel(_grid(1.0, middle, above), values(features[above] + 100)))
            shuffled = np.random.default_rng(n + 1).permutation(4 * n).astype(np.int32)
            fine = (2 * middle[shuffled]).astype(np.int32)
            levels.append(BagLevel(_grid(0.5, fine, shuffled), values(features[above[shuffled]] + 200)))
        mark_of_slide = hashlib.sha256(slide_id.encode()).hexdigest()
        attrs = BagAttrs(
            slide_id, case_id, f"/slides/{slide_id}.svs", mark_of_slide, 100_000, 80_000, (MPP_L0, MPP_L0), "file",
            "aperio", "tiff", "", "0.1.0", "2026-01-01T00:00:00Z", "done" if n else "empty",
            "" if n else "no tissue found", "seg", "tile", "5x", "net",
        )  # fmt: skip
        path = folder / f"{slide_id}.h5"
        path.parent.mkdir(exist_ok=True)
        write_bag(path, Bag(attrs, tuple(levels)))
        return path

    return make


@pytest.fixture
def make_bag(bag_writer: MakeBag, tmp_path: Path) -> MakeBag:
    """``bag_writer`` into ``tmp_path / folder``, by default "bags"."""

    def make(slide_id: str, features: NDArray[np.floating], *, folder: str = "bags", **options: Any) -> Path:
        return bag_writer(tmp_path / folder, slide_id, features, **options)

    return make


@pytest.fixture(scope="session")
def distill_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of six cases, their job with texture features at 20x and 5x, and nothing else."""
    root = tmp_path_factory.mktemp("distill")
    make_cohort(root / "slides", 6, seed=3, size_px=(512, 512), mpp=0.5, max_slides_per_case=1)
    entries = read_manifest(root / "slides" / "slides.csv")
    settings = JobSettings(
        tile=TileSettings(resolutions=(0.5, 2.0), tile_px=64), extract=ExtractSettings(encoders={"*": ("texture",)})
    )
    paths = open_job(root / "job", settings, entries)
    outcomes = list(dispatch(entries, settings, paths, Where()))
    assert [o.status for o in outcomes] == ["done"] * 6
    return root
