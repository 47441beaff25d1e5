"""Networks as students: what each costs on a processor, and what each reaches when all learn from one teacher.

Speed is in images per processor second of one thread, times two for two cores, so that other programs on the machine
change it less; float32 and bfloat16 in turns. The distillations see the same tiles of the same synthetic slides of one
teacher (texture features at 20x) for the same few epochs from random weights: they compare the networks, and say
nothing of what long training on real slides reaches. Beside them the two controls: a linear map from the teacher's own
features at 5x, and the mean of the teacher's features.

    python benchmarks/students.py speed students-speed.json
    python benchmarks/students.py distil students-distil.json --epochs 6 --slides 12
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

STUDENTS = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-S/16": "vit_small_patch16_224",
    "MobileNetV4-S": "mobilenetv4_conv_small",
    "RepViT-M0.9": "repvit_m0_9",
    "FastViT-T8": "fastvit_t8",
    "EfficientViT-B0": "efficientvit_b0",
    "ConvNeXt-atto": "convnext_atto",
}
SIDES = (128, 192, 256)
BATCH = 16


def loaded(model: str, side: int, precision: str) -> Any:
    """The encoder as the program runs it."""
    from wsi_pipe.encoders import load_encoder

    return load_encoder(f"timm:{model}", device="cpu", precision=precision, random_weights=True, input_px=side)


def macs(network: Any, side: int) -> float:
    """Multiply-adds of one image, by torch's own counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2


def speed(names: list[str], sides: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each network and side."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    rows = []
    for name in names:
        for side in sides:
            tiles = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
            encoders = {precision: loaded(STUDENTS[name], side, precision) for precision in ("float32", "bfloat16")}
            spent = dict.fromkeys(encoders, 0.0)
            for turn in range(repeats + 1):
                for precision, encoder in encoders.items():
                    started = time.process_time()
                    encoder.encode(tiles)
                    # The first turn pays for memory and for choosing kernels.
                    spent[precision] += (time.process_time() - started) if turn else 0.0
            network = encoders["float32"].network
            row = {
                "student": name,
                "timm": STUDENTS[name],
                "px": side,
                "dim": encoders["float32"].info.dim,
                "parameters_m": sum(p.numel() for p in network.parameters()) / 1e6,
                "gmacs": macs(network, side) / 1e9,
            }
            row |= {f"{p}_per_s_2_cores": 2 * repeats * BATCH / s for p, s in spent.items()}
            rows.append(row)
            print(row, flush=True)
    return rows


def cohort(root: Path, slides: int, px: int) -> Path:
    """A job with the teacher's features at 20x and 5x, in tiles of ``px``."""
    from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
    from wsi_pipe.execute import Where
    from wsi_pipe.job import open_job
    from wsi_pipe.job.dispatch import dispatch
    from wsi_pipe.manifest import read_manifest
    from wsi_pipe.synthetic import make_cohort

    make_cohort(root / "slides", slides, seed=3, size_px=(2048, 2048), mpp=0.5, max_slides_per_case=1)
    entries = read_manifest(root / "slides" / "slides.csv")
    settings = JobSettings(
        tile=TileSettings(resolutions=(0.5, 2.0), tile_px=px), extract=ExtractSettings(encoders={"*": ("texture",)})
    )
    job = open_job(root / "job", settings, entries)
    for outcome in dispatch(entries, settings, job, Where()):
        assert outcome.status == "done", outcome
    return root / "job"


def distil(names: list[str], sides: list[int], slides: int, epochs: int) -> list[dict[str, Any]]:
    """A row for each network and side, and the controls in each."""
    import torch

    from lrmil.distill import DistillRequest, DistillSettings, run_distillation

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            job = cohort(Path(folder) / str(side), slides, side)
            for name in names:
                settings = DistillSettings(layers=(), epochs=epochs, batch_size=32, warmup=0.1, threads=1)
                request = DistillRequest(
                    bags=job / "bags",
                    teacher="texture",
                    student=f"timm:{STUDENTS[name]}",
                    hr="20x",
                    lr="5x",
                    out=Path(folder) / f"{STUDENTS[name]}-{side}.safetensors",
                    settings=settings,
                    random_student=True,
                    student_px=side,
                )
                started = time.process_time()
                try:
                    result = run_distillation(request)
                except Exception as error:
                    rows.append({"student": name, "px": side, "failed": f"{type(error).__name__}: {error}"})
                    print(rows[-1], flush=True)
                    continue
                rows.append(
                    {
                        "student": name,
                        "px": side,
                        "epochs": epochs,
                        "best_epoch": result.history.best,
                        "figures": dict(result.figures),
                        "linear": {
                            key: {"explained_variance": v.explained_variance, "cosine": v.cosine}
                            for key, v in result.baseline.items()
                        },
                        "mean": {
                            key: {"explained_variance": v.explained_variance, "cosine": v.cosine}
                            for key, v in result.mean.items()
                        },
                        "train_cpu_s": time.process_time() - started,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "distil"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--px", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    if args.what == "speed":
        rows = speed(args.students, args.px, args.repeats)
    else:
        rows = distil(args.students, args.px, args.slides, args.epochs)
    facts = {"machine": platform.processor() or platform.machine(), "rows": rows}
    args.out.write_text(json.dumps(facts | {"arguments": {k: str(v) for k, v in vars(args).items()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
