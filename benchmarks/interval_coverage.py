"""How often intervals of an AUC, and of the difference of two, hold the truth, and how wide they are.

    python benchmarks/interval_coverage.py [--draws 4000] [--json FILE]

Scores are drawn from distributions whose AUC is known: two normal ones of equal spread, the positives' twice or half as
wide, and two exponential ones. For each number of cases, prevalence and AUC: ours, the logit of DeLong's and the
percentile bootstrap, coverage of 95 % and mean width. "1" is the share of samples whose AUC is 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from lrmil.metrics.auc import auc_difference, mean_auc, one_auc, placements
from lrmil.metrics.bootstrap import resample_weights
from lrmil.metrics.figures import weighted_figures

SHAPES = {"normal": 1.0, "positives wider": 2.0, "positives narrower": 0.5, "exponential": None}
CASES, PREVALENCES, AUCS = (20, 33, 100, 165), (0.5, 0.3), (0.9, 0.97, 0.99)
METHODS = ("ours", "logit DeLong", "bootstrap")
Array = NDArray[np.float64]


def draw(rng: np.random.Generator, shape: str, auc: float, y: NDArray[np.bool_], draws: int) -> Array:
    """Scores, (draws, N), whose AUC is ``auc``."""
    spread = SHAPES[shape]
    if spread is None:
        return rng.exponential(np.where(y, auc / (1 - auc), 1.0), (draws, len(y)))
    return rng.normal(np.where(y, norm.ppf(auc) * np.hypot(1, spread), 0.0), np.where(y, spread, 1.0), (draws, len(y)))


def logit_delong(v10: Array, v01: Array) -> tuple[float, float]:
    """The interval of DeLong's variance on the logit scale; without width where the AUC is 1."""
    auc = float(v10.mean())
    if auc in (0.0, 1.0):
        return auc, auc
    error = np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)) / (auc * (1 - auc))
    at = np.log(auc / (1 - auc))
    return float(1 / (1 + np.exp(1.96 * error - at))), float(1 / (1 + np.exp(-1.96 * error - at)))


def percentile(y: NDArray[np.bool_], row: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The percentile bootstrap's."""
    p = 1 / (1 + np.exp(-row))
    weights = resample_weights(np.arange(len(y)), 400, rng)
    drawn = weighted_figures(y.astype(np.int64), np.stack([1 - p, p], axis=1), weights)["auc"]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def one_cell(shape: str, n: int, prevalence: float, auc: float, draws: int, seed: int) -> dict[str, Any]:
    """Coverage and width of every method; the bootstrap's on a tenth of the draws."""
    rng = np.random.default_rng([seed, n, round(1000 * prevalence), round(1000 * auc), list(SHAPES).index(shape)])
    y = np.arange(n) < round(n * prevalence)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    ones = 0
    for i, row in enumerate(draw(rng, shape, auc, y, draws)):
        own = mean_auc([one_auc(y, row, np.arange(n), n)])
        ones += own.value == 1
        found["ours"].append((own.low, own.high))
        v10, v01 = placements(y, row[None])
        found["logit DeLong"].append(logit_delong(v10[0], v01[0]))
        if i % 10 == 0:
            found["bootstrap"].append(percentile(y, row, rng))
    cell: dict[str, Any] = {"shape": shape, "cases": n, "prevalence": prevalence, "auc": auc, "ones": ones / draws}
    for name, ends in found.items():
        low, high = np.array(ends).T
        cell[name] = {"coverage": float(((low <= auc) & (auc <= high)).mean()), "width": float((high - low).mean())}
    return cell


def difference_cell(n: int, a: float, b: float, draws: int, seed: int) -> dict[str, Any]:
    """Two scores that share half of their noise."""
    rng = np.random.default_rng([seed, n, round(1000 * a), round(1000 * b)])
    y = np.arange(n) < n // 2
    covered, width = 0, 0.0
    for _ in range(draws):
        shared = rng.normal(size=n)
        first, second = (
            np.sqrt(0.5) * (shared + rng.normal(size=n)) + y * np.sqrt(2) * norm.ppf(auc) for auc in (a, b)
        )
        got = auc_difference([one_auc(y, first, np.arange(n), n)], [one_auc(y, second, np.arange(n), n)])
        covered += got.low <= a - b <= got.high
        width += got.high - got.low
    return {"cases": n, "auc_a": a, "auc_b": b, "coverage": covered / draws, "width": width / draws}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Coverage and width of intervals of AUCs.")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cells = []
    print("| scores | cases | prevalence | AUC | 1 | " + " | width | ".join(METHODS) + " | width |")
    print("|---|" + "---:|" * 10)
    for shape in SHAPES:
        for prevalence in PREVALENCES:
            for n in CASES:
                for auc in AUCS:
                    cell = one_cell(shape, n, prevalence, auc, arguments.draws, arguments.seed)
                    cells.append(cell)
                    shown = " | ".join(f"{cell[m]['coverage']:.3f} | {cell[m]['width']:.3f}" for m in METHODS)
                    print(f"| {shape} | {n} | {prevalence:g} | {auc:g} | {cell['ones']:.2f} | {shown} |", flush=True)
    least = min(cell["ours"]["coverage"] for cell in cells)
    most = max(cell["ours"]["coverage"] for cell in cells if cell["ones"] < 0.05)
    print(f"\nours: least coverage {least:.3f}; greatest where an AUC of 1 is rare {most:.3f}\n")
    pairs = []
    print("| cases | AUC A | AUC B | coverage of the difference | width |")
    print("|---:|---:|---:|---:|---:|")
    for n in CASES:
        for a, b in ((0.9, 0.9), (0.97, 0.97), (0.97, 0.94), (0.95, 0.85)):
            pair = difference_cell(n, a, b, arguments.draws // 2, arguments.seed)
            pairs.append(pair)
            print(f"| {n} | {a:g} | {b:g} | {pair['coverage']:.3f} | {pair['width']:.3f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"draws": arguments.draws, "auc": cells, "difference": pairs}, indent=1))


if __name__ == "__main__":
    main()
