"""Which model for a small cohort? ``--model auto`` against each single choice, on cohorts whose answer differs.

Every draw is a training part, of which a fifth is for validation, and test bags. Families: ``mean`` (every tile is
shifted a little, a linear model's case) and ``rare`` (one tile in twenty of positive bags is shifted much, attention's
case), each of 30, 60 and 120 slides with 300 to test; bags of digits (a 9 or none; 40 and 100 slides); and random
two-thirds of the five classic MIL sets. A figure is the AUC of the test bags.

    python benchmarks/small_cohorts.py --data ../shared/mil --first-seed 1000 --json docs/results/small-cohorts.json
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
from scipy.stats import t as student

from lrmil.config import ModelSettings, TrainSettings
from lrmil.metrics import figures, softmax
from lrmil.model import MILModel
from lrmil.model.ensemble import Ensemble, member_settings
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore
from lrmil.trainer import TrainResult, bag_logits, train

CLASSICS = ("musk1", "musk2", "elephant", "tiger", "fox")
FAMILIES = (
    "mean-30", "mean-60", "mean-120", "rare-30", "rare-60", "rare-120", "digits-40", "digits-100", *CLASSICS,
)  # fmt: skip
DIM, TEST = 64, 300
SINGLE = ("linear", "gated-abmil")
CHOICES = (*SINGLE, "auto")
Bags = tuple[list[NDArray[np.float32]], NDArray[np.int64], int]


def synthetic(kind: str, count: int, rng: np.random.Generator) -> Bags:
    """Bags of 20 to 40 tiles that also differ from slide to slide, as stains do: bags, labels, how many to train on."""
    labels = np.arange(count + TEST) % 2
    direction = rng.normal(size=DIM)
    direction /= np.linalg.norm(direction)
    bags = []
    for label in labels:
        tiles = rng.normal(size=(rng.integers(20, 41), DIM)) + 0.3 * rng.normal(size=DIM)
        if label and kind == "mean":
            tiles += 0.6 * direction
        elif label:
            chosen = rng.random(len(tiles)) < 0.05
            chosen[0] = True
            tiles[chosen] += 4.5 * direction
        bags.append(tiles.astype(np.float32))
    return bags, labels.astype(np.int64), count


def digits(count: int, rng: np.random.Generator) -> Bags:
    """About ten images a bag, positive where one is a 9; training and test bags share no image."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    order = rng.permutation(len(digit))
    parts = (order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :])
    bags, labels = [], []
    for images, wanted in zip(parts, (count, TEST), strict=True):
        made = 0
        while made < wanted:
            rows = rng.choice(images, max(2, round(rng.normal(10, 2))))
            if (digit[rows] == 9).any() == (made % 2 == 0):
                bags.append((pixels[rows] / 16).astype(np.float32))
                labels.append(int(made % 2 == 0))
                made += 1
    return bags, np.array(labels, np.int64), count


def classic(name: str, folder: Path, rng: np.random.Generator) -> Bags:
    """Two thirds of a classic set to train, the others to test."""
    with np.load(folder / f"{name}.npz") as data:
        x, offsets, y = data["X"].astype(np.float32), data["offsets"], data["y"].astype(np.int64)
    parts = [rng.permutation(np.flatnonzero(y == c)) for c in (0, 1)]
    cut = [len(part) * 2 // 3 for part in parts]
    order = np.concatenate(
        [p[:n] for p, n in zip(parts, cut, strict=True)] + [p[n:] for p, n in zip(parts, cut, strict=True)]
    )
    return [x[offsets[i] : offsets[i + 1]] for i in order], y[order], sum(cut)


def draw(family: str, seed: int, folder: Path) -> Bags:
    """One cohort of a family; every seed another."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    if family in CLASSICS:
        return classic(family, folder, rng)
    kind, count = family.split("-")
    return digits(int(count), rng) if kind == "digits" else synthetic(kind, int(count), rng)


def one(job: tuple[str, int, str, bool]) -> dict[str, Any]:
    """AUC and loss of each choice on one draw, and processor seconds of ``auto``.

    The single choices are the parts that ``auto`` weighed: the same linear model, the same networks. What it left out
    is trained by itself. before: the attention model trained as on a large cohort, which was the default once.
    """
    family, seed, folder, before = job
    torch.set_num_threads(1)
    bags, labels, count = draw(family, seed, Path(folder))
    store = FeatureStore.from_arrays(bags, dtype="float32")
    own = np.random.default_rng(seed).permutation(count)
    # A fifth of each class validates.
    val = np.concatenate([own[labels[own] == c][: int((labels[own] == c).sum() // 5)] for c in (0, 1)])
    split = FoldIndices(np.setdiff1d(own, val), np.sort(val), np.arange(count, len(labels)))

    def trained(name: str, **how: Any) -> TrainResult:
        return train(
            store, labels, split, TrainSettings(model=ModelSettings(name=name), device="cpu", seed=seed, **how)
        )

    def judged(model: MILModel) -> dict[str, float]:
        logits = bag_logits(model, ResidentStore.of(store), split.test, token_budget=100_000).double().numpy()
        got = figures(labels[split.test], softmax(logits, 1.0, auto.card.bias))
        return {"auc": got["auc"], "loss": got["loss"]}

    start = time.process_time()
    auto = trained("auto")
    seconds = time.process_time() - start
    model, share = auto.model, auto.card.choice["linear_share"]
    mixed = isinstance(model, Ensemble)
    linear = model.linear if mixed and model.linear is not None else model if share == 1 else trained("linear").model
    if mixed:
        attention: MILModel = Ensemble(member_settings(model.settings), list(model.members))
    else:
        attention = trained("gated-abmil").model
    found = {"family": family, "seed": seed, "share": share, "seconds": seconds}
    found |= {"linear": judged(linear), "gated-abmil": judged(attention), "auto": judged(model)}
    if before:
        start = time.process_time()
        found["before"] = judged(trained("gated-abmil", small_cohorts="off").model)
        found["seconds_before"] = time.process_time() - start
    return found


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t."""
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by family and over all draws, and the differences that are judged, over all draws."""
    auc = {c: np.array([r[c]["auc"] for r in rows]) for c in CHOICES}
    family = np.array([r["family"] for r in rows])
    by_family = {f: {c: float(auc[c][family == f].mean()) for c in CHOICES} for f in dict.fromkeys(family.tolist())}
    best = np.empty(len(rows))
    for f, means in by_family.items():
        # The best single choice of a family is known only in hindsight: the one with the best mean over its draws.
        best[family == f] = auc[max(SINGLE, key=lambda c: means[c])][family == f]
    old = [r for r in rows if "before" in r]
    return {
        "families": by_family,
        "mean": {c: float(auc[c].mean()) for c in CHOICES},
        "loss": {c: float(np.mean([r[c]["loss"] for r in rows])) for c in CHOICES},
        "seconds": float(np.mean([r["seconds"] for r in rows])),
        "auto - best of family": interval(auc["auto"] - best),
        "auto - linear": interval(auc["auto"] - auc["linear"]),
        "auto - gated-abmil": interval(auc["auto"] - auc["gated-abmil"]),
        **(
            {"auto - before": interval(np.array([r["auto"]["auc"] - r["before"]["auc"] for r in old]))}
            if len(old) > 1
            else {}
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the five .npz files")
    parser.add_argument("--json", type=Path, help="write the results here, after every draw; what is there is kept")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--draws", type=int, default=8, help="of each family")
    parser.add_argument("--before", type=int, default=0, help="draws of each family on which the earlier default runs")
    parser.add_argument("--first-seed", type=int, default=1000)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["draws"]
    done = {(r["family"], r["seed"]) for r in rows}
    for i, family in itertools.product(range(arguments.draws), arguments.families):
        seed = arguments.first_seed + i
        if (family, seed) in done:
            continue
        rows.append(one((family, seed, str(arguments.data), i < arguments.before)))
        if arguments.json:
            report = {**(summary(rows) if len(rows) > 1 else {}), "draws": rows}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    found = summary(rows)
    print(f"{'family':12}" + "".join(f"{c:>14}" for c in CHOICES) + "  shares of the linear model")
    for name, means in found["families"].items():
        shares = [f"{r['share']:g}" for r in rows if r["family"] == name]
        print(f"{name:12}" + "".join(f"{means[c]:14.3f}" for c in CHOICES) + "  " + " ".join(shares))
    for what in ("mean", "loss"):
        print(f"{what:12}" + "".join(f"{found[what][c]:14.3f}" for c in CHOICES))
    for what, values in found.items():
        if what.startswith("auto - "):
            print(f"{what}: {values[0]:+.4f}, 95 % {values[1]:+.4f} to {values[2]:+.4f}")
    print(f"{len(rows)} draws, {found['seconds']:.2f} processor seconds a training of auto")
    return 0 if found["auto - linear"][1] > -0.01 and found["auto - best of family"][0] > -0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
