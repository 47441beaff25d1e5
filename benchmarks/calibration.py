"""What calibration on validation cases costs and gains in negative log-likelihood on test cases.

    python benchmarks/calibration.py [--draws 200] [--json FILE]

Logits come from a model whose best probabilities are known, trained with balanced class weights. For each prevalence,
number of validation cases and known miscalibration: the loss above the best of the model as it is ("as trained"), of
temperature scaling alone, as is usual, of the prior-corrected model, and of ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from lrmil.metrics import calibrate, softmax

Array = NDArray[np.float64]
SHOWN = {
    "trained": "as trained",
    "temperature_alone": "temperature",
    "prior_corrected": "prior-corrected",
    "ours": "ours",
}


def draw(
    rng: np.random.Generator, n: int, prevalence: float, scale: float, shift: float
) -> tuple[Array, NDArray[np.int64], Array]:
    """Logits of the trained model, labels, logits of the best there is."""
    y = (rng.random(n) < prevalence).astype(np.int64)
    odds = 2 * (rng.normal(size=n) + 2 * (y - 0.5)) + np.log(prevalence / (1 - prevalence))
    off = scale * odds + shift - np.log(prevalence / (1 - prevalence))  # what balanced weights add
    return np.stack([-off / 2, off / 2], axis=1), y, np.stack([-odds / 2, odds / 2], axis=1)


def loss(p: Array, y: NDArray[np.int64]) -> float:
    """Mean negative log-likelihood."""
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean())


def temperature_alone(z: Array, y: NDArray[np.int64]) -> float:
    """The usual temperature, between 0.05 and 20; 1 where one class is missing."""
    if len(set(y.tolist())) < 2:
        return 1.0
    found = minimize_scalar(lambda t: loss(softmax(z, float(np.exp(t))), y), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def one_cell(prevalence: float, n: int, scale: float, shift: float, draws: int, seed: int) -> dict[str, Any]:
    """Means over draws."""
    rng = np.random.default_rng([seed, n, round(1000 * prevalence), round(10 * scale), round(10 * shift)])
    weights = [1 / (2 * (1 - prevalence)), 1 / (2 * prevalence)]
    rows, fitted = [], 0
    for _ in range(draws):
        z, y, _ = draw(rng, n, prevalence, scale, shift)
        test_z, test_y, best = draw(rng, 2000, prevalence, scale, shift)
        ours = calibrate(z, y, class_weights=weights)
        prior = calibrate(z[:0], y[:0], class_weights=weights)
        fitted += ours.method == "fitted"
        scores = {
            "trained": softmax(test_z),
            "temperature_alone": softmax(test_z, temperature_alone(z, y)),
            "prior_corrected": prior.probabilities(test_z),
            "ours": ours.probabilities(test_z),
        }
        rows.append({name: loss(p, test_y) - loss(softmax(best), test_y) for name, p in scores.items()})
    cell: dict[str, Any] = {"prevalence": prevalence, "validation_cases": n, "scale": scale, "shift": shift}
    return cell | {name: float(np.mean([row[name] for row in rows])) for name in SHOWN} | {"fitted": fitted / draws}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Loss of calibrated probabilities above the best.")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("| prevalence | validation cases | scale | shift | " + " | ".join(SHOWN.values()) + " | fitted |")
    print("|" + "---:|" * 9)
    cells = []
    for scale, shift in ((1.0, 0.0), (3.0, 0.0), (0.4, 0.0), (1.0, 1.5), (2.0, 1.0)):
        for prevalence in (0.05, 0.2, 0.5):
            for n in (10, 20, 33, 60, 100, 200) if (scale, shift) == (1.0, 0.0) else (33, 200):
                cell = one_cell(prevalence, n, scale, shift, arguments.draws, arguments.seed)
                cells.append(cell)
                shown = " | ".join(f"{cell[name]:+.3f}" for name in SHOWN)
                print(f"| {prevalence:g} | {n} | {scale:g} | {shift:g} | {shown} | {cell['fitted']:.0%} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"draws": arguments.draws, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
