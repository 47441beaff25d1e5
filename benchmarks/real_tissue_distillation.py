"""How much of HR features can be had from LR pixels on real slides, against a linear map of LR features.

    python benchmarks/real_tissue_distillation.py --data FOLDER --json out.json
    python benchmarks/real_tissue_distillation.py --data FOLDER --teacher tissue --packages FOLDER --json out.json

The teacher is ``texture``, any other encoder of the registry, or one that was trained on real pictures and is fetched
from the Python index into the folder of ``--packages``: ``tissue`` or ``natural``, see ``shipped_teachers.py``.
One spatial half of each slide trains, the other tests, with a strip of one LR tile left out between them, so that no
tile touches one of the other part. Crops are jittered: several grids, each moved by a part of a tile. A slide and its
twin in another format count once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from shipped_teachers import load_teacher

from lrmil.distill import DistillSettings
from lrmil.distill.children import ChildMap, child_map
from lrmil.distill.evaluate import linear_baseline, mean_baseline
from lrmil.distill.student import Student
from lrmil.distill.targets import DistillSlide, target_stats, uniform_weights
from lrmil.distill.train import distill
from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.geometry import TileGrid
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

SLIDES = (
    ("CMU-1-Small-Region.svs", None, 0.5),
    # It states no resolution; taken as 1 um/px, so that both levels are there, at twice the scale.
    ("TCGA-CR-7395-01A-01-TS1.svs", 1.0, 1.0),
)
FACTOR = 4
PENALTIES = tuple(10.0**power for power in range(-4, 4))


def moved(grid: TileGrid, offset_l0: tuple[float, float]) -> TileGrid:
    """The grid with its origin moved."""
    x, y = grid.origin_l0
    return dataclasses.replace(grid, origin_l0=(x + offset_l0[0], y + offset_l0[1]))


def inside(lr: TileGrid, size_l0: tuple[int, int]) -> np.ndarray:
    """Rows of the tiles that lie wholly on the slide."""
    corner = np.asarray(lr.origin_l0) + lr.cells * np.asarray(lr.stride_l0)
    end = corner + np.asarray(lr.tile_size_l0)
    return np.flatnonzero((corner >= 0).all(1) & (end <= np.asarray(size_l0)).all(1))


def encode(slide: Slide, grid: TileGrid, encoder: Encoder) -> np.ndarray:
    """Features of all tiles of a grid, (N, D)."""
    out = np.zeros((len(grid), encoder.info.dim), np.float32)
    for batch in stream_tiles(slide, grid):
        out[batch.index] = encoder.encode(batch.pixels)
    return out


def halves(
    path: Path, mpp: float | None, hr_mpp: float, encoder: Encoder, jitters: int
) -> dict[str, list[DistillSlide]]:
    """Training and test tiles of one slide, one DistillSlide a jittered grid."""
    slide = open_slide(path, mpp=mpp)
    try:
        overview = read_overview(slide, SegmentSettings().mpp)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, SegmentSettings())
        settings = TileSettings(resolutions=(hr_mpp, hr_mpp * FACTOR), tile_px=64)
        lr, hr = plan_grids(slide.pyramid, mask, settings)
        middle = float(np.median(lr.cells[:, 0])) * lr.stride_l0[0] + lr.origin_l0[0]
        rng = np.random.default_rng(0)
        found: dict[str, list[DistillSlide]] = {"train": [], "test": []}
        for number in range(jitters):
            # Whole HR pixels, so that both grids stay on the pixels of the slide.
            step = lr.stride_l0[0] / 64 / FACTOR
            offset = tuple(float(v) for v in rng.integers(0, 64 * FACTOR, 2) * step) if number else (0.0, 0.0)
            low, high = moved(lr, offset), moved(hr, offset)  # type: ignore[arg-type]
            children = child_map(low, high, path.name)
            features, baseline = encode(slide, high, encoder), encode(slide, low, encoder)
            kept = set(inside(low, slide.pyramid.size_l0).tolist())
            left = low.cells[:, 0] * low.stride_l0[0] + low.origin_l0[0]
            for part, there in (
                ("train", left + low.tile_size_l0[0] <= middle - low.tile_size_l0[0] / 2),
                ("test", left >= middle + low.tile_size_l0[0] / 2),
            ):
                if part == "test" and number:
                    continue
                pick = np.array([i for i, row in enumerate(children.rows) if row in kept and there[row]], np.int64)
                if not len(pick):
                    continue
                chosen = ChildMap(children.k, children.rows[pick], children.children[pick])
                found[part].append(
                    DistillSlide(
                        f"{path.stem}-{part}", path.stem, str(path), slide.pyramid.mpp or (0, 0),
                        low.take(chosen.rows), chosen, (features,), features, uniform_weights(chosen),
                        baseline[chosen.rows],
                    )
                )  # fmt: skip
        return found
    finally:
        slide.close()


def main() -> None:
    """Distil, test on the other halves, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slides/")
    parser.add_argument("--teacher", default="texture", help="tissue, natural, or an encoder of the registry")
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="where shipped teachers are fetched to")
    parser.add_argument("--student", default="timm:test_resnet")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--jitters", type=int, default=12, help="jittered grids of the training halves")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    encoder = load_teacher(given.teacher, given.packages, 64)
    train: list[DistillSlide] = []
    test: list[DistillSlide] = []
    for name, mpp, hr_mpp in SLIDES:
        path = given.data / "slides" / name
        if path.is_file():
            found = halves(path, mpp, hr_mpp, encoder, given.jitters)
            train += found["train"]
            test += found["test"]
    print(f"{sum(map(len, train))} tiles to train, {sum(map(len, test))} to test", flush=True)
    stats = target_stats(train, standardise=True)
    source = load_encoder(given.student, device="cpu", precision="float32", random_weights=True)
    assert isinstance(source, TorchEncoder)
    pre = dataclasses.replace(source.recipe.preprocessing, input_px=64, resize_px=None)
    torch.manual_seed(0)
    dim = encoder.info.dim
    student = Student(source.network, blocks=[], layer_dims=[dim], final_dim=dim, k=FACTOR, side_px=64)
    settings = DistillSettings(epochs=given.epochs, lr=2e-3, patience=given.epochs, precision="float32")
    with tempfile.TemporaryDirectory() as folder:
        # The test halves stop nothing: training ends after its last epoch, and these are its figures.
        history = distill(
            student, pre, train, test, stats, settings, device=torch.device("cpu"), precision=torch.float32,
            state=Path(folder) / "state.safetensors",
            progress=lambda figures, epoch: print(
                f"epoch {epoch}: loss {figures['loss']:.3f}, of the mean {figures['final_explained_variance']:.3f}, "
                f"of each child {figures['layer0_explained_variance']:.3f}", flush=True
            ),
        )  # fmt: skip
    last = history.epochs[-1]
    mean = mean_baseline(test, stats)
    linear = linear_baseline(train, test, stats)
    # And at the penalty that does best on the test halves themselves, which flatters the linear map.
    tried = [linear_baseline(train, test, stats, penalty=penalty) for penalty in PENALTIES]
    best = {name: max((found[name] for found in tried), key=lambda a: a.explained_variance) for name in linear}
    result = {
        "teacher": encoder.info.name,
        "slides": sorted({s.path.rsplit("/", 1)[-1] for s in train}),
        "train_tiles": sum(map(len, train)),
        "test_tiles": sum(map(len, test)),
        "epochs": given.epochs,
        "jitters": given.jitters,
        "processor_s": round(time.process_time()),
        "mean": {name: dataclasses.asdict(a) for name, a in mean.items()},
        "student": {k: v for k, v in last.items() if k.endswith(("_variance", "_cosine"))},
        "linear": {name: dataclasses.asdict(a) for name, a in linear.items()},
        "linear, penalty chosen on the test halves": {name: dataclasses.asdict(a) for name, a in best.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
