"""How often an AUC that loses just the margin is called "not worse": by DeLong's interval, and by lrmil resolve's.

Normal scores of two resolutions on the same cases, correlated; the true difference is minus the margin, so that
"enough" and "loses" should each be said in at most 2.5 % of draws.

    python benchmarks/resolve_interval.py --draws 600
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy.stats import norm

from lrmil.metrics.auc import Auc, auc_difference, one_auc
from lrmil.resolve.paired import paired_difference

SETTINGS = (
    (200, 0.92, 0.87, 0.7, 0.5),
    (100, 0.92, 0.87, 0.7, 0.5),
    (200, 0.98, 0.95, 0.7, 0.5),
    (200, 0.92, 0.89, 0.9, 0.5),
    (200, 0.92, 0.87, 0.3, 0.3),
    (60, 0.90, 0.85, 0.7, 0.5),
)
"""Cases, AUC at the fine and the coarse resolution, correlation of scores, share of positives."""


def aucs(y: np.ndarray, score: np.ndarray, folds: int) -> list[Auc]:
    """The AUC of each fold; folds of different cases, drawn alike for both resolutions."""
    fold = np.random.default_rng(1).permutation(len(y)) % folds
    rows = [np.flatnonzero(fold == k) for k in range(folds)]
    return [one_auc(y[own] == 1, score[own], own, len(y)) for own in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=600)
    arguments = parser.parse_args()
    print("folds cases AUCs correlation positives: enough and loses by DeLong, here; widths")
    for folds in (1, 5):
        for n, fine, coarse, shared, share in SETTINGS:
            y = (np.arange(n) < n * share).astype(int)
            said = np.zeros(4)
            widths = []
            for draw in range(arguments.draws):
                rng = np.random.default_rng([5, draw])
                common = rng.normal(size=n)
                scores = [
                    math.sqrt(shared) * common
                    + math.sqrt(1 - shared) * rng.normal(size=n)
                    + math.sqrt(2) * norm.ppf(auc) * y
                    for auc in (fine, coarse)
                ]
                a, b = (aucs(y, score, folds) for score in scores)
                delong, own, margin = auc_difference(b, a), paired_difference(b, a), fine - coarse
                said += [delong.low > -margin, delong.high < -margin, own.low > -margin, own.high < -margin]
                widths.append((delong.high - delong.low, own.high - own.low))
            shares = " ".join(f"{100 * value / arguments.draws:.1f} %" for value in said)
            width = " ".join(f"{value:.4f}" for value in np.mean(widths, axis=0))
            print(f"{folds} {n} {fine} {coarse} {shared} {share}: {shares}; {width}", flush=True)


if __name__ == "__main__":
    main()
