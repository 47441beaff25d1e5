"""Bags of handwritten digits: does the bag's label alone teach attention to find the 9s?

Images of scikit-learn's digits (8 x 8, 1797 of them) are divided into training and test images first, stratified, and
only then drawn into bags of about ten (normal, mean 10, spread 2); a bag is positive where it holds a 9. 200 training
bags, 1000 test bags. After Ilse, Tomczak and Welling (2018), section 4.2, who did so with MNIST.

    python benchmarks/mil_digits.py --json digits.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from lrmil.config import ModelSettings, TrainSettings
from lrmil.data import batches
from lrmil.model.segments import segment_softmax
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore
from lrmil.trainer import train

TARGET = 9
TRAIN_BAGS, TEST_BAGS = 200, 1000
WANTED_AUC, WANTED_INSTANCE_AUC = 0.93, 0.90
SETTINGS = TrainSettings(
    model=ModelSettings(name="gated-abmil", hidden=128, attention_dim=64, dropout=0.25),
    epochs=60,
    learning_rate=1e-3,
    weight_decay=0.01,
    token_budget=100_000,
    max_bags=8,
    class_weights="none",
    precision="float32",
    standardise=False,  # pixels, all of one scale
    device="cpu",
    small_cohorts="off",  # one network, the epochs as given
)


def draw_bags(images: NDArray[np.int64], digits: NDArray[np.int64], count: int, rng: np.random.Generator) -> list[Any]:
    """Rows of the images of each bag; half of the bags hold at least one target."""
    bags: list[NDArray[np.int64]] = []
    while len(bags) < count:
        size = max(2, round(rng.normal(10, 2)))
        rows = rng.choice(images, size)
        if (digits[rows] == TARGET).any() == (len(bags) % 2 == 0):
            bags.append(rows)
    return bags


def run(seed: int, name: str) -> dict[str, float]:
    """Train on one drawing; AUC over test bags, and of attention over the tiles of the positive ones."""
    from dataclasses import replace

    features, digits = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    # A third of each digit's images is kept for the test bags.
    is_test = np.zeros(len(digits), bool)
    for digit in range(10):
        own = rng.permutation(np.flatnonzero(digits == digit))
        is_test[own[: len(own) // 3]] = True
    bags = draw_bags(np.flatnonzero(~is_test), digits, TRAIN_BAGS, rng)
    bags += draw_bags(np.flatnonzero(is_test), digits, TEST_BAGS, rng)
    labels = np.array([(digits[rows] == TARGET).any() for rows in bags], np.int64)
    store = FeatureStore.from_arrays([features[rows] for rows in bags])
    everything = np.arange(len(bags))
    test = everything[TRAIN_BAGS:]
    split = FoldIndices(everything[:TRAIN_BAGS], everything[:0], test)
    settings = replace(SETTINGS, seed=seed, model=replace(SETTINGS.model, name=name))
    result = train(store, labels, split, settings)
    scores = [p.logits[1] - p.logits[0] for p in result.predictions]
    positive = test[labels[test] == 1]
    found = {"bag_auc": float(roc_auc_score(labels[test], scores))}
    batch = next(iter(batches(store, labels, positive, token_budget=10**9, shuffle_seed=None)))
    with torch.no_grad():
        output = result.model(batch.features, batch.offsets)
    if output.attention_logits is None:
        return found
    attention = segment_softmax(output.attention_logits, batch.offsets).numpy()
    is_target = np.concatenate([digits[bags[i]] == TARGET for i in positive])
    found["instance_auc"] = float(roc_auc_score(is_target, attention))
    # Over all tiles a long bag's attention is lower; within each bag it is what a heatmap shows.
    ends = batch.offsets.tolist()
    mixed = [(a, b) for a, b in itertools.pairwise(ends) if 0 < is_target[a:b].sum() < b - a]
    found["instance_auc_within_bags"] = float(
        np.mean([roc_auc_score(is_target[a:b], attention[a:b]) for a, b in mixed])
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["gated-abmil", "abmil", "clam-sb", "dsmil", "max", "mean"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in arguments.models:
        runs = [run(seed, name) for seed in range(arguments.seeds)]
        results[name] = {
            figure: {"mean": float(np.mean(values)), "least": float(np.min(values))}
            for figure in runs[0]
            for values in [[r[figure] for r in runs]]
        }
        print(name, *(f"{figure} {v['mean']:.3f} (least {v['least']:.3f})" for figure, v in results[name].items()))
    seconds = time.perf_counter() - start
    judged = results.get("gated-abmil")
    good = judged is None or (
        judged["bag_auc"]["mean"] >= WANTED_AUC and judged["instance_auc"]["mean"] >= WANTED_INSTANCE_AUC
    )
    print(f"{seconds:.0f} s" + ("" if good else f"  FAILED: wanted {WANTED_AUC} and {WANTED_INSTANCE_AUC}"))
    if arguments.json:
        report = {"seeds": arguments.seeds, "results": results, "seconds": seconds, "passed": good}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
