"""How well features that were not trained on it tell the lesions of synthetic slides, at 20x and at 5x.

For each signal: a cohort, ``texture`` features of 64 px tiles with a quarter of tissue, pooled over the slide (mean,
standard deviation, 90th percentile), logistic regression at one fixed strength, 5 folds by case. Prints the area under
the ROC curve of the pooled out-of-fold scores, with a 95 % interval from 1,000 resamplings of cases.

    python benchmarks/synthetic_signal.py --slides 120
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsi_pipe.encoders.texture import TextureEncoder
from wsi_pipe.synthetic import SIGNALS, CohortSlide, SyntheticSlide, plan_cohort

TILE_PX = 64
INVERSE_PENALTY = 0.01


def pooled(item: CohortSlide, encoder: TextureEncoder) -> dict[str, NDArray[np.float32]]:
    slide = SyntheticSlide(item.spec)
    features = {}
    for label, pixels in zip(("20x", "5x"), slide.levels((1, 4)), strict=True):
        n = pixels.shape[0] // TILE_PX
        tissue = slide.truth((n * 4, n * 4)).tissue.mask.reshape(n, 4, n, 4).mean(axis=(1, 3)) >= 0.25
        tiles = pixels[: n * TILE_PX, : n * TILE_PX].reshape(n, TILE_PX, n, TILE_PX, 3).swapaxes(1, 2)
        f = encoder.encode(np.ascontiguousarray(tiles[tissue]))
        features[label] = np.concatenate([f.mean(0), f.std(0), np.percentile(f, 90, axis=0)])
    return features


def interval(labels: NDArray[Any], scores: NDArray[Any], cases: NDArray[Any]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(cases == case) for case in np.unique(cases)]
    values: list[float] = []
    while len(values) < 1000:
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        if 0 < labels[rows].mean() < 1:
            values.append(roc_auc_score(labels[rows], scores[rows]))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=120)
    parser.add_argument("--size-px", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    encoder = TextureEncoder()
    size = (arguments.size_px, arguments.size_px)
    for signal in SIGNALS:
        slides = plan_cohort(Path(), arguments.slides, seed=arguments.seed, signal=signal, size_px=size)
        found = [pooled(item, encoder) for item in slides]
        labels = np.array([item.spec.label for item in slides])
        cases = np.array([item.case_id for item in slides])
        for label in ("20x", "5x"):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000))
            table = np.stack([f[label] for f in found])
            scores = cross_val_predict(model, table, labels, groups=cases, cv=GroupKFold(5), method="decision_function")
            low, high = interval(labels, scores, cases)
            print(f"{signal:7} {label:4} AUC {roc_auc_score(labels, scores):.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
