"""What a cascade saves and loses on synthetic slides, for each signal and several risks.

For each signal: a cohort, a job with ``texture`` features of 64 px tiles at 20x and 5x, a run of ``lrmil train`` at
either on the same folds (that at 20x also on parts of bags that attention at 5x chooses), and with them

- realised risk: the out-of-fold predictions are cut 200 times into halves; one sets the threshold, the other tells what
  the cascade lost against always reading 20x, and how many slides it read there;
- ``lrmil predict`` on new slides of the same kind, with the cascade that was fitted on all out-of-fold predictions:
  what was read and how long it took, beside the same slides all at 5x and all at 20x.

Everything is kept in ``--out``; called again it goes on. Prints tables and writes ``cascade.json``.

    python benchmarks/cascade.py --out /tmp/cascade --slides 160 --new 30
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.cascade import SlideLosses, TooFewCasesError, choose_threshold, loss_of, uncertainty
from lrmil.cascade.evidence import Evidence, out_of_fold
from wsi_pipe.synthetic import make_cohort

SIGNALS = ("coarse", "middle", "fine")
RISKS = (0.02, 0.05, 0.1)
DRAWS = 200
SIDE = 768
BUDGET = 0.25
JOB = ("--tile-px", "64", "-r", "20x", "-r", "5x", "-e", "texture")


def call(*arguments: object) -> None:
    """One command of this package in a process of its own."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def prepared(root: Path, signal: str, slides: int, new: int) -> Path:
    """The folder of a signal with cohort, job and runs."""
    folder = root / signal
    for name, count, seed in (("slides", slides, 5), ("new", new, 6)):
        if not (folder / name / "labels.csv").is_file():
            options = {"size_px": (SIDE, SIDE), "mpp": 0.5, "max_slides_per_case": 1}
            make_cohort(folder / name, count, seed=seed, signal=signal, **options)  # type: ignore[arg-type]
    call("wsi_pipe", "run", "-q", "--slides", folder / "slides" / "slides.csv", "-o", folder / "job", *JOB)
    labels = folder / "slides" / "labels.csv"
    if not (folder / "splits.csv").is_file():
        call("lrmil", "split", "--labels", labels, "--folds", 5, "--out", folder / "splits.csv")
    train = ["lrmil", "train", "-q", "--bags", folder / "job", "--labels", labels, "--splits", folder / "splits.csv"]
    train += ["--model", "gated-abmil", "--replicates", 100]
    if not (folder / "lr" / "summary.json").is_file():
        call(*train, "-r", "5x", "-o", folder / "lr")
    if not (folder / "hr" / "summary.json").is_file():
        call(*train, "-r", "20x", "-o", folder / "hr", "--guided-by", folder / "lr", "--guided-share", BUDGET)
    return folder


def realised(evidence: Evidence, loss: str, risk: float, confidence: float | None) -> dict[str, float]:
    """Mean risk and share of slides read in the other half, and the share of halves whose risk is at most promised."""
    low = evidence.low.mean(axis=0)
    kept, read, _ = loss_of(loss, evidence.labels, low, evidence.reference, read=evidence.read)
    score = uncertainty(evidence.low)["margin"]
    found, shares, sizes = [], [], []
    for draw in range(DRAWS):
        order = np.random.default_rng([3, draw]).permutation(len(kept))
        halves = [SlideLosses(kept[o], read[o], score[o], np.arange(len(o))) for o in np.array_split(order, 2)]
        try:
            control = choose_threshold(halves[0], risk, confidence)
        except TooFewCasesError:
            return {}
        if not control.holds:
            continue
        found.append(halves[1].risk(control.threshold))
        shares.append(halves[1].share_read(control.threshold))
        sizes.append(halves[1].count)
    if not found:
        return {"draws": 0}
    # The other half is no more than a sample itself: its size says by how much a mean of it errs.
    values = {"risk": np.mean(found), "read": np.mean(shares), "at_most": np.mean(np.array(found) <= risk)}
    return {"draws": len(found)} | {name: float(value) for name, value in values.items()}


def on_new_slides(folder: Path, model: str, out: Path, *options: object) -> dict[str, float]:
    """``lrmil predict`` on the new slides: seconds, tiles, blocks and bytes a slide, and the share of right answers."""
    start = time.perf_counter()
    if not (out / "predictions.json").is_file():
        slides = folder / "new" / "slides.csv"
        call("lrmil", "predict", "--model", model, "--slides", slides, "-o", out, "--no-heatmaps", *options)
        (out / "wall_s").write_text(f"{time.perf_counter() - start:.3f}")
    labels = dict(row.split(",")[::2] for row in (folder / "new" / "labels.csv").read_text().split()[1:])
    slides = json.loads((out / "predictions.json").read_text())["slides"]
    right = np.mean([slide["predicted"] == labels[slide["slide_id"]] for slide in slides])
    found = {"slides": len(slides), "right": float(right)}
    if "low" in slides[0]:
        for name in ("seconds", "tiles", "blocks", "bytes"):
            found[name] = float(np.mean([(s["low"][name] or 0) + (s["high"][name] or 0) for s in slides]))
        found["read_at_20x"] = float(np.mean([s["resolution"] == "high" for s in slides]))
        found["tiles_20x"] = float(np.mean([s["high"]["tiles"] for s in slides]))
        return found
    outcomes = [json.loads(line) for line in (out / "job" / "outcomes.jsonl").read_text().splitlines()]
    found["seconds"] = float(np.mean([sum(o["seconds"].values()) for o in outcomes]))
    found["tiles"] = float(np.mean([sum(o["tiles"].values()) for o in outcomes]))
    found["blocks"] = float(np.mean([o["counts"].get("blocks_decoded", 0) for o in outcomes]))
    keys = ("bytes_fetched", "prepare_bytes_fetched")
    found["bytes"] = float(np.mean([sum(o["counts"].get(key, 0) for key in keys) for o in outcomes]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slides", type=int, default=160)
    parser.add_argument("--new", type=int, default=30)
    parser.add_argument("--signal", action="append", choices=SIGNALS)
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    for signal in arguments.signal or SIGNALS:
        folder = prepared(arguments.out, signal, arguments.slides, arguments.new)
        own: dict[str, Any] = {"auc": {}, "draws": {}, "new": {}}
        for run in ("lr", "hr"):
            mean = json.loads((folder / run / "summary.json").read_text())["mean"]["auc"]
            own["auc"][run] = [mean[name] for name in ("value", "low", "high")]
        print(f"\n{signal}: AUC {own['auc']}")
        whole = out_of_fold(folder / "lr", folder / "hr")
        part = out_of_fold(folder / "lr", folder / "hr", budget=BUDGET)
        for loss in ("disagree", "error"):
            for risk in RISKS:
                for confidence in (None, 0.9):
                    for budget, evidence in ((1, whole), (BUDGET, part)):
                        key = f"{loss}, {risk:g}, {confidence or 'mean'}, {budget:g}"
                        own["draws"][key] = found = realised(evidence, loss, risk, confidence)
                        print(key, {name: round(value, 4) for name, value in found.items()} or "too few cases")
        models = {"5x": f"{folder}/lr/fold_1/model.safetensors", "20x": f"{folder}/hr/fold_1/model.safetensors"}
        for risk in RISKS:
            path = folder / f"cascade-{risk:g}.safetensors"
            fit = ["lrmil", "cascade", "fit", "--lr", folder / "lr", "--hr", folder / "hr", "--risk", risk]
            fit += ["--loss", "error", "--score", "margin", "--hr-budget", BUDGET]
            command = [sys.executable, "-m", *map(str, fit), "-o", str(path)]
            if path.is_file() or subprocess.run(command, check=False).returncode == 0:
                models[f"cascade {risk:g}"] = str(path)
        for name, model in models.items():
            own["new"][name] = on_new_slides(folder, model, folder / f"predict-{name.replace(' ', '-')}")
            print(name, {key: round(value, 3) for key, value in own["new"][name].items()})
        record[signal] = own
        (arguments.out / "cascade.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
