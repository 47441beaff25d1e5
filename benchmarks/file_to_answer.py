"""From a slide's file to its probability, process start included, on the cores that are given.

One synthetic 40x slide with about 3,000 HR tiles (256 px at 20x) and their LR tiles (256 px at 5x) is predicted by
``lrmil predict`` in a process of its own, by each arm in turns. Beside them the HR way through the same program, ViT-B
at 20x, in the same precision. It runs on a part of the slide (``--hr-blocks``); what it would take for all tiles is its
fixed cost, measured on a slide of a few tiles, and the rest in proportion: such numbers are marked "extrapolated".
Weights are random: cost does not depend on them. int8 files are calibrated on small synthetic slides.

    python benchmarks/file_to_answer.py out.json --student mobilenetv4_conv_small --student-px 128
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import wsi_pipe

BLOCK = 8192
HR, LR = 0.5, 2.0


class Repeated:
    """A level of a slide that shows one picture again and again."""

    def __init__(self, pixels: np.ndarray, times: tuple[int, int]) -> None:
        self.pixels, self.tile_px = pixels, 256
        self.size_px = (pixels.shape[1] * times[0], pixels.shape[0] * times[1])

    def tile(self, column: int, row: int) -> np.ndarray:
        """Pixels of a tile, uint8 (h, w, 3)."""
        height, width = self.pixels.shape[:2]
        t = min(self.tile_px, self.size_px[0]), min(self.tile_px, self.size_px[1])
        rows = np.arange(row * t[1], min((row + 1) * t[1], self.size_px[1])) % height
        columns = np.arange(column * t[0], min((column + 1) * t[0], self.size_px[0])) % width
        return self.pixels[rows][:, columns]


def write_slide(path: Path, times: tuple[int, int], block: int = BLOCK) -> None:
    """A pyramid of 0.25 um/px that repeats one synthetic section."""
    if path.is_file():
        return
    from wsi_pipe.slides.writing.write import write_pyramid
    from wsi_pipe.synthetic import SlideSpec, SyntheticSlide
    from wsi_pipe.synthetic.slide import average

    whole = SyntheticSlide(SlideSpec(7, (block, block), 0.25, 1)).region(0, 0, block, block)
    levels = [Repeated(average(whole, d), times) for d in (1, 4, 16)]
    write_pyramid(path, levels, mpp=0.25)


def make_model(folder: Path, name: str, architecture: str, px: int, mpp: float, seen: Any) -> Path:
    """A MIL model and its encoder, random weights, as files; returns the model's."""
    import torch

    from lrmil.checkpoint import ModelCard, save_model
    from lrmil.config import ModelSettings
    from lrmil.model import build_model
    from wsi_pipe.encoders.architectures import build, timm_recipe
    from wsi_pipe.encoders.lr_file import write_lr_encoder
    from wsi_pipe.encoders.weights import file_sha256
    from wsi_pipe.geometry import TileSpec, level_label

    torch.manual_seed(0)
    recipe, _ = timm_recipe(architecture)
    recipe = dataclasses.replace(
        recipe, preprocessing=dataclasses.replace(recipe.preprocessing, input_px=px, resize_px=None)
    )
    place = folder / name
    if (place / "model.safetensors").is_file():
        return place / "model.safetensors"
    place.mkdir(exist_ok=True)
    network = build(recipe, name=name, input_px=px)
    encoder = place / f"{name}.safetensors"
    write_lr_encoder(encoder, network, recipe=recipe, tile=TileSpec(mpp, 256), licence="none")
    model = build_model(ModelSettings("gated-abmil", in_dim=recipe.dim))
    card = ModelCard(
        model.settings, ("no", "yes"), str(encoder), file_sha256(encoder), level_label(mpp), mpp, 256, seen=seen
    )
    save_model(place / "model.safetensors", model, card)
    return place / "model.safetensors"


def training_job(folder: Path) -> tuple[Path, Any]:
    """A small job that int8 is calibrated on, and the marks of its slides."""
    from wsi_pipe.bag import read_attrs
    from wsi_pipe.seen import Seen

    if not (folder / "job").is_dir():
        make_training(folder)
    attrs = [read_attrs(path) for path in sorted((folder / "job" / "bags").glob("*.h5"))]
    pairs = [(a.case_id, a.slide_fingerprint) for a in attrs]
    return folder / "job", Seen.of({"train": pairs[:2], "val": pairs[2:]})


def make_training(folder: Path) -> None:
    """Four small slides and their job."""
    from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
    from wsi_pipe.execute import Where
    from wsi_pipe.job import open_job
    from wsi_pipe.job.dispatch import dispatch
    from wsi_pipe.manifest import read_manifest
    from wsi_pipe.synthetic import make_cohort

    make_cohort(folder / "training", 4, seed=3, size_px=(2048, 2048), mpp=0.5, max_slides_per_case=1)
    entries = read_manifest(folder / "training" / "slides.csv")
    settings = JobSettings(
        tile=TileSettings(resolutions=(LR,), tile_px=256), extract=ExtractSettings(encoders={"*": ("texture",)})
    )
    paths = open_job(folder / "job", settings, entries)
    assert all(outcome.status == "done" for outcome in dispatch(entries, settings, paths, Where()))


def exported(model: Path, job: Path, precision: str) -> Path:
    """The model's exported file."""
    from lrmil.checkpoint import read_card
    from lrmil.deploy.export import ExportRequest, export_classifier

    out = model.with_name(f"{model.parent.name}-{precision}.onnx")
    if out.is_file():
        return out
    encoder = read_card(model).encoder
    # Random weights mean nothing, so neither does what int8 does to their answers.
    export_classifier(ExportRequest(model, encoder, out, precision, bags=job, tiles=48, most_change=1e9))
    return out


def predict(model: Path, slide: Path, precision: str, cores: int) -> dict[str, Any]:
    """One call of ``lrmil predict`` in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.toml"
        config.write_text(f'[extract]\nprecision = "{precision}"\n')
        command = [sys.executable, "-W", "ignore", "-m", "lrmil", "predict", "--model", model, slide, "-o", folder]
        more = ["--no-heatmaps", *([] if model.suffix == ".onnx" else ["--config", config])]
        names = ("WSI_PIPE_CORES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
        environment = os.environ | dict.fromkeys(names, str(cores))
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            list(map(str, [*command, *more])), env=environment, capture_output=True, text=True, check=False
        )
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        answer = json.loads((Path(folder) / "predictions.json").read_text())["slides"][0]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "tiles": answer["tiles"]}


def measured(arm: str, runs: Callable[[], dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> None:
    found.setdefault(arm, []).append(runs())
    print(arm, found[arm][-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="Folder that keeps slides and models for the next call.")
    parser.add_argument("--only-prepare", action="store_true", help="With --work: write slides and models and end.")
    parser.add_argument("--student", default="mobilenetv4_conv_small", help="A timm model.")
    parser.add_argument("--student-px", type=int, default=128)
    parser.add_argument("--vit-px", type=int, default=224)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2, help="Of the LR arms; the HR arms run once.")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 4), help="Sections side by side.")
    parser.add_argument("--onnx", nargs="*", default=["int8", "float32"], help="Precisions of exported files.")
    parser.add_argument("--torch", nargs="*", default=["float32", "bfloat16"], help="Precisions of model.safetensors.")
    parser.add_argument("--vit-onnx", nargs="*", default=["float32"], help="The same of ViT-S.")
    parser.add_argument("--hr-blocks", type=int, nargs=2, default=(1, 1))
    parser.add_argument("--hr-block-px", type=int, default=4096, help="Side of the sections of the HR way's part.")
    parser.add_argument("--hr-precisions", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = args.work or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        slide, part, one = root / "slide.svs", root / "part.svs", root / "one.svs"
        write_slide(slide, tuple(args.blocks))
        write_slide(part, tuple(args.hr_blocks), args.hr_block_px)
        write_slide(one, (1, 1), 1024)
        job, seen = training_job(root)
        student = make_model(root, "student", args.student, args.student_px, LR, seen)
        small = make_model(root, "vit-s", "vit_small_patch16_224", args.vit_px, LR, seen)
        large = make_model(root, "vit-b-hr", "vit_base_patch16_224", 224, HR, seen)
        arms: dict[str, tuple[Path, str]] = {}
        for name, model in (("student", student), ("ViT-S", small)):
            for precision in args.onnx if name == "student" else args.vit_onnx:
                arms[f"{name} {precision}, onnxruntime"] = (exported(model, job, precision), precision)
            for precision in args.torch:
                arms[f"{name} {precision}, torch"] = (model, precision)
        if args.only_prepare:
            return
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in range(args.turns):
            for arm, (model, precision) in arms.items():
                measured(arm, lambda m=model, p=precision: predict(m, slide, p, args.cores), found)
            if turn == 0:
                for precision in args.hr_precisions:
                    for where, path in (("one", one), ("part", part)):
                        arm = f"HR ViT-B {precision}, torch, {where}"
                        measured(arm, lambda s=path, p=precision: predict(large, s, p, args.cores), found)
        with wsi_pipe.open(slide) as opened:
            hr_tiles = len(opened.grids("20x", tile_px=256)["20x"])
    best = {arm: min(runs, key=lambda run: run["cpu_s"]) for arm, runs in found.items()}
    summary: dict[str, Any] = {"hr_tiles": hr_tiles, "arms": best, "extrapolated": {}, "ratios": {}}
    for precision in args.hr_precisions:
        fixed, run = best[f"HR ViT-B {precision}, torch, one"], best[f"HR ViT-B {precision}, torch, part"]
        each = {key: (run[key] - fixed[key]) / (run["tiles"] - fixed["tiles"]) for key in ("wall_s", "cpu_s")}
        whole = {key: run[key] + each[key] * (hr_tiles - run["tiles"]) for key in each}
        summary["extrapolated"][f"HR ViT-B {precision}"] = whole
        for arm in arms:
            if precision in arm or "int8" in arm:
                summary["ratios"][f"HR ViT-B {precision} over {arm}"] = {k: whole[k] / best[arm][k] for k in whole}
    print(json.dumps(summary, indent=1))
    said = {"summary": summary, "runs": found, "arguments": {key: str(value) for key, value in vars(args).items()}}
    args.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
