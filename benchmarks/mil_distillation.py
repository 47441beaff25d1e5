"""Does a teacher at high resolution help a student at low resolution? Synthetic slides, paired over seeds.

A positive slide holds one or two LR tiles, of 30 to 59, with a lesion. At HR it is plain: the 16 children of such a
tile are shifted by 5 standard deviations along one of 32 directions. At LR the tile is shifted by 3 along one of 128,
which 60 slide labels hardly show. The teacher's attention says which tiles hold it, on all training slides.

Each seed makes new slides, trains a teacher on HR bags, and then the same student twice from the same random numbers:
with the teacher's terms, and with their weights at 0. Test AUCs are compared in pairs.

    python benchmarks/mil_distillation.py --json distillation.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

from lrmil.config import LossSettings, ModelSettings, TrainSettings
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, StoreMeta
from lrmil.trainer import train

TRAIN, VAL, TEST = 60, 30, 300
LR_DIM, HR_DIM, CHILDREN = 128, 32, 16
LR_SHIFT, HR_SHIFT = 3.0, 5.0
SETTINGS = TrainSettings(
    model=ModelSettings(name="gated-abmil", hidden=64, attention_dim=32, dropout=0.25),
    epochs=40,
    learning_rate=1e-3,
    weight_decay=0.01,
    max_bags=8,
    token_budget=1_000_000,
    patience=0,
    precision="float32",
    standardise=False,  # the generator makes features of one scale
    device="cpu",
    small_cohorts="off",  # one network, the epochs as given
)
STUDENT = LossSettings(ce=1.0, bag=0.5, soft=1.0, hard=0.1, temperature=2.0, attention_temperature=1.0, instances=2)
ALONE = LossSettings(ce=1.0, bag=0.0, soft=0.0, hard=0.0)


def make_slides(seed: int) -> tuple[FeatureStore, FeatureStore, np.ndarray[Any, np.dtype[np.int64]]]:
    """LR and HR stores of the same slides, and their labels."""
    rng = np.random.default_rng(seed)
    lr_direction, hr_direction = (v / np.linalg.norm(v) for v in (rng.normal(size=LR_DIM), rng.normal(size=HR_DIM)))
    lr, hr, parents = [], [], []
    labels = np.arange(TRAIN + VAL + TEST, dtype=np.int64) % 2
    for label in labels:
        tiles = int(rng.integers(30, 60))
        lesion = np.zeros(tiles, bool)
        if label:
            lesion[rng.choice(tiles, int(rng.integers(1, 3)), replace=False)] = True
        lr.append(rng.normal(size=(tiles, LR_DIM)) + LR_SHIFT * np.outer(lesion, lr_direction))
        parent = np.repeat(np.arange(tiles), CHILDREN)
        hr.append(rng.normal(size=(len(parent), HR_DIM)) + HR_SHIFT * np.outer(lesion[parent], hr_direction))
        parents.append(parent)
    ids = [f"slide{i:03d}" for i in range(len(labels))]
    lr_store = FeatureStore.from_arrays(lr, ids, meta=StoreMeta(level="5x"))
    hr_store = FeatureStore.from_arrays(hr, ids, parents=parents, meta=StoreMeta(level="20x", parent_level="5x"))
    return lr_store, hr_store, labels


def run(seed: int) -> dict[str, float]:
    """Test AUC of the teacher, of the student with it, and of the student alone."""
    lr_store, hr_store, labels = make_slides(seed)
    order = np.arange(len(labels))
    split = FoldIndices(order[:TRAIN], order[TRAIN : TRAIN + VAL], order[TRAIN + VAL :])
    settings = replace(SETTINGS, seed=seed)
    teacher = train(hr_store, labels, split, replace(settings, learning_rate=2e-3))
    found = {"teacher": teacher.card.metrics["test_auc"]}
    for name, loss in (("student", STUDENT), ("alone", ALONE)):
        chosen = replace(settings, loss=loss)
        result = train(lr_store, labels, split, chosen, teacher=teacher.model, hr_store=hr_store)
        found[name] = result.card.metrics["test_auc"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    runs = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        runs.append(run(seed))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in runs[-1].items()), flush=True)
    gains = np.array([r["student"] - r["alone"] for r in runs])
    half = float(student_t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains)))
    low, high = float(gains.mean()) - half, float(gains.mean()) + half
    means = {name: float(np.mean([r[name] for r in runs])) for name in runs[0]}
    seconds = time.perf_counter() - start
    print("mean AUC: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    print(f"gain by distillation {gains.mean():+.3f}, 95 % interval {low:+.3f} to {high:+.3f}; {seconds:.0f} s")
    good = low > 0
    if not good:
        print("FAILED: the interval does not exclude 0")
    if arguments.json:
        report = {"runs": runs, "means": means, "gain": float(gains.mean()), "low": low, "high": high, "passed": good}
        arguments.json.write_text(json.dumps({**report, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
