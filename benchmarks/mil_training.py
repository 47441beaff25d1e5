"""Speed of MIL training against a plain loop, on the same files in one run.

The plain loop is what most code does, CLAM's among it: one bag a step, its HDF5 file opened each time, features turned
into float32, torch's own modules, Adam. Packed training is ``lrmil``'s: features packed once into a flat store, several
bags a step, the same widths and dropout, AdamW. Reading and packing the store is timed apart, since it happens once.

For each size of bag the batch is chosen by a short trial, then both are timed in turn, round by round, and the figure
is the median of the rounds' ratios.

    python benchmarks/mil_training.py --json training.json [--device cuda]

``--fold`` measures something else: processor seconds of one fold of a small cohort (130 bags of 6 tiles of 162 features
to train on, 30 to validate, 40 to test), each model in a process of its own, start-up apart. Processor time counts
threads that spin, which is what small steps used to spend it on.

    python benchmarks/mil_training.py --fold
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lrmil.config import ModelSettings, TrainSettings
from lrmil.data import batches
from lrmil.losses import cross_entropy
from lrmil.model import build_model
from lrmil.store import FeatureStore, ResidentStore, pack_bags
from lrmil.trainer.compute import rounding
from lrmil.trainer.optimise import make_optimizer

DIM = 1024
# Bags of each size: an epoch of them takes about a second.
COUNTS = {120: 64, 1_200: 16, 12_000: 4}
# At least so many times the loop in bfloat16 on a CPU; everything else has to be no slower.
WANTED = {("cpu", 1_200): 2.2, ("cpu", 12_000): 1.3, ("cuda", 1_200): 10.0}
TRIED_BAGS = (1, 4, 16)
LARGEST_BATCH = 50_000


class PlainGatedAttention(nn.Module):
    """CLAM's single-branch attention network, as a plain module on one bag."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tiles = nn.Sequential(nn.Linear(DIM, 512), nn.ReLU(), nn.Dropout(dropout))
        self.value = nn.Sequential(nn.Linear(512, 256), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(512, 256), nn.Sigmoid(), nn.Dropout(dropout))
        self.score = nn.Linear(256, 1)
        self.classifier = nn.Linear(512, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        h = self.tiles(features)
        attention = torch.softmax(self.score(self.value(h) * self.gate(h)).T, dim=1)
        logits: torch.Tensor = self.classifier(attention @ h)
        return logits


def make_bags(folder: Path, size: int, count: int) -> list[Path]:
    """Files of random float16 features under the names that CLAM and TRIDENT use."""
    rng = np.random.default_rng(size)
    paths = []
    for i in range(count):
        path = folder / f"{size}_{i}.h5"
        with h5py.File(path, "w") as file:
            file["features"] = rng.standard_normal((size, DIM), dtype=np.float32).astype(np.float16)
            file["coords"] = np.stack([np.arange(size) % 100, np.arange(size) // 100], 1) * 256
        paths.append(path)
    return paths


def plain_loop(paths: list[Path], device: torch.device, dropout: float) -> Callable[[], None]:
    """One pass over the bags, one bag a step."""
    torch.manual_seed(0)
    model = PlainGatedAttention(dropout).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)

    def epoch() -> None:
        for i in np.random.default_rng(0).permutation(len(paths)).tolist():
            with h5py.File(paths[i]) as file:
                features = torch.from_numpy(file["features"][:]).float().to(device)
            loss = F.cross_entropy(model(features), torch.tensor([i % 2], device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # as loops that print their loss do

    return epoch


def packed_training(
    store: FeatureStore, device: torch.device, precision: torch.dtype, bags: int, dropout: float
) -> Callable[[], None]:
    """One pass over the bags, ``bags`` a step, as the trainer's."""
    torch.manual_seed(0)
    settings = TrainSettings(model=ModelSettings(name="gated-abmil", in_dim=DIM, dropout=dropout))
    model = build_model(settings.model).to(device).train()
    optimizer = make_optimizer(model, settings)
    resident = ResidentStore.of(store, device, precision)
    labels = np.arange(len(store)) % 2
    everything = np.arange(len(store))

    def epoch() -> None:
        total = torch.zeros((), device=device)
        plan: dict[str, Any] = {"token_budget": sys.maxsize, "max_bags": bags, "shuffle_seed": 0}
        for batch in batches(resident, labels, everything, **plan):
            optimizer.zero_grad(set_to_none=True)
            with rounding(device, precision):
                loss = cross_entropy(model(batch.features, batch.offsets).logits, batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += loss.detach()
        total.item()

    return epoch


def timed(work: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(
    paths: list[Path], store: FeatureStore, size: int, device: torch.device, precision: torch.dtype, **how: Any
) -> dict[str, Any]:
    """The loop and packed training in turn."""
    dropout, rounds, clock = how["dropout"], how["rounds"], how["clock"]
    tried = [b for b in TRIED_BAGS if b <= len(paths) and (b == 1 or b * size <= LARGEST_BATCH)]
    candidates = {bags: packed_training(store, device, precision, bags, dropout) for bags in tried}
    for work in candidates.values():
        work()
    trial = {bags: min(timed(work, device, clock) for _ in range(2)) for bags, work in candidates.items()}
    bags = min(trial, key=lambda b: trial[b])
    packed, loop = candidates[bags], plain_loop(paths, device, dropout)
    loop()
    pairs = [(timed(loop, device, clock), timed(packed, device, clock)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return {
        "tiles": size,
        "precision": str(precision).removeprefix("torch."),
        "dropout": dropout,
        "bags_per_step": bags,
        "loop_bags_per_s": len(paths) / statistics.median(a for a, _ in pairs),
        "packed_bags_per_s": len(paths) / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "trial_bags_per_s": {str(b): len(paths) / t for b, t in trial.items()},
    }


def fold_seconds(name: str, how: str) -> tuple[float, float, bool]:
    """Processor seconds of the first and of a second training of a fold, and whether torch's compiler was imported."""
    from lrmil.splits import FoldIndices
    from lrmil.trainer import train

    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    shift = 0.25 * (np.arange(162) < 20)
    store = FeatureStore.from_arrays([(rng.normal(size=(6, 162)) + y * shift).astype(np.float32) for y in labels])
    every = np.arange(200)
    split = FoldIndices(every[:130], every[130:160], every[160:])
    settings = TrainSettings(model=ModelSettings(name=name), device="cpu", small_cohorts=how)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        train(store, labels, split, settings)
        seconds.append(time.process_time() - start)
    return seconds[0], seconds[1], "torch._dynamo" in sys.modules


def main() -> int:
    if sys.argv[1:] == ["--fold"]:
        print(f"{'model':12} {'small cohorts':>13} {'first fold, s':>14} {'next fold, s':>13}  compiler imported")
        for name, how in (("linear", "auto"), ("gated-abmil", "off"), ("gated-abmil", "auto"), ("auto", "auto")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first, following, compiler = pool.apply(fold_seconds, (name, how))
            print(f"{name:12} {how:>13} {first:14.2f} {following:13.2f}  {'yes' if compiler else 'no'}", flush=True)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch, by default its own choice")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.25, 0.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor time is the fairer one on a busy machine, with --threads 1",
    )
    parser.add_argument("--folder", type=Path, help="where the bags are made, by default a temporary folder")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    rows: list[dict[str, Any]] = []
    good = True
    print(f"{device}, {torch.get_num_threads()} threads, {arguments.clock} time")
    header = ("tiles", "dropout", "precision", "bags/step", "loop bags/s", "packed bags/s", "ratio", "range")
    print("{:>7} {:>7} {:>9} {:>9} {:>12} {:>14} {:>6} {:>12}".format(*header))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for size in arguments.sizes:
            paths = make_bags(Path(name), size, COUNTS[size])
            start = time.perf_counter()
            store = pack_bags(paths, None, None, Path(name) / f"store{size}")
            packing = time.perf_counter() - start
            for dropout in arguments.dropout:
                for precision in (torch.float32, torch.bfloat16):
                    how = {"dropout": dropout, "rounds": arguments.rounds, "clock": clock}
                    row = measure(paths, store, size, device, precision, **how)
                    row["packing_s"] = packing
                    # The target is for bfloat16 with CLAM's dropout; nothing may be slower than the loop.
                    stated = precision == torch.bfloat16 and dropout == 0.25
                    row["wanted"] = WANTED.get((device.type, size), 1.0) if stated else 1.0
                    row["passed"] = row["ratio"] >= row["wanted"]
                    good &= row["passed"]
                    rows.append(row)
                    print(
                        f"{size:>7} {dropout:>7} {row['precision']:>9} {row['bags_per_step']:>9}"
                        f" {row['loop_bags_per_s']:>12.1f} {row['packed_bags_per_s']:>14.1f} {row['ratio']:>6.2f}"
                        f" {row['ratio_low']:>5.2f}-{row['ratio_high']:.2f}" + ("" if row["passed"] else "  FAILED"),
                        flush=True,
                    )
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            "clock": arguments.clock,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
