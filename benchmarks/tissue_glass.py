"""Tissue on tinted glass: intersection over union with the truth, by stain and tint, and bare glass on real slides.

    python benchmarks/tissue_glass.py --seeds 6 --slides FOLDER --pictures FOLDER

Synthetic slides (3 x 3 mm) of several kinds are made once a seed; their overviews at 8 um/px are then seen through
glass of several tints, as a lamp, a white balance or a stitching scanner gives. Real slides are seen in the same way;
of their tiles at 20x it counts those on which fewer than 2 % of the pixels exceed an HSV saturation of 0.1 (0.1 plus
that of the tint), which are bare glass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import TileSettings
from wsi_pipe.geometry import FloatPair, TissueMask
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

Picture = NDArray[np.uint8]
Gain = NDArray[np.float64]

KINDS: dict[str, dict[str, Any]] = {
    "H&E": {},
    "pale": {"pale": True},
    "DAB": {"stain": "dab"},
    "PAS": {"stain": "pas"},
    "pen, debris": {"pen": True, "debris": True, "pale": True},
    "red pen, bled": {"pen": True, "ink": "red", "ink_bleed_um": 30.0},
    "black around": {"unscanned": "black", "tissue_fraction": 0.25},
}


def even(*gain: float) -> Callable[[int, int, FloatPair, int], Gain]:
    return lambda height, width, um, seed: np.ones((height, width, 3)) * gain


def fields(green: float, size_um: float = 620.0) -> Callable[[int, int, FloatPair, int], Gain]:
    """Half of the fields of view lose a share of green and a quarter as much red."""

    def gains(height: int, width: int, um: FloatPair, seed: int) -> Gain:
        columns, rows = (np.arange(width) * um[0] // size_um).astype(int), (np.arange(height) * um[1] // size_um)
        lilac = np.random.default_rng(seed).random((500, 500)) < 0.5
        out = np.ones((height, width, 3))
        out[lilac[rows.astype(int)[:, None], columns[None]]] = (1 - green / 4, 1 - green, 1)
        return out

    return gains


def uneven(height: int, width: int, um: FloatPair, seed: int) -> Gain:
    """Each field of view has a tint of its own, up to 6 % of any channel."""
    columns, rows = (np.arange(n) * u // 620 for n, u in ((width, um[0]), (height, um[1])))
    own = 1 - 0.06 * np.random.default_rng(seed).random((500, 500, 3))
    return own[rows.astype(int)[:, None], columns.astype(int)[None]]


def drift(height: int, width: int, um: FloatPair, seed: int) -> Gain:
    """The lamp loses 7 % of green from left to right."""
    out = np.ones((height, width, 3))
    out[..., 1] -= 0.07 * np.linspace(0, 1, width)
    return out


def vignette(height: int, width: int, um: FloatPair, seed: int) -> Gain:
    """Violet glass, and 12 % less light in the corners of the slide."""
    y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    return (1 - 0.06 * (x**2 + y**2)) * np.array([0.98, 0.93, 1.0])


TINTS: dict[str, Callable[[int, int, FloatPair, int], Gain]] = {
    "none": even(1, 1, 1),
    "green -5 %": even(1, 0.95, 1),
    "red, green -5 %": even(0.95, 0.95, 1),
    "violet -8 %": even(0.98, 0.92, 1),
    "yellow -8 %": even(1, 1, 0.92),
    "greenish -6 %": even(0.94, 1, 0.95),
    "fields -2 %": fields(0.02),
    "fields -5 %": fields(0.05),
    "fields -8 %": fields(0.08, 400.0),
    "fields, any tint": uneven,
    "lamp drifts": drift,
    "violet, vignette": vignette,
}


def seen(rgb: Picture, um: FloatPair, tint: str, seed: int) -> Picture:
    """The picture under a tint; what was not scanned has none."""
    gain = TINTS[tint](*rgb.shape[:2], um, seed)
    gain[(rgb.min(axis=2) == 255) | (rgb.max(axis=2) <= 12)] = 1
    return np.clip(np.rint(rgb * gain), 0, 255).astype(np.uint8)


def iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def outlined(rgb: Picture, mask: NDArray[np.bool_]) -> Picture:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(rgb.copy(), contours, -1, (0.0, 130.0, 0.0), 1), np.uint8)


def bare_tiles(pixels: Picture, gain: Gain, scale: FloatPair, mask: TissueMask, slide: Any) -> tuple[int, int]:
    """(bare tiles, all tiles) at 20x; gain: of the overview."""
    grid = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(0.5,), allow_upsampling=True))[-1]
    bare = 0
    for (x, y), (w, h) in zip(
        grid.coords, np.tile(np.rint(grid.tile_size_l0).astype(int), (len(grid), 1)), strict=True
    ):
        tile = pixels[y : y + h, x : x + w]
        part = gain[int(y / scale[1]) : int((y + h) / scale[1]) + 1, int(x / scale[0]) : int((x + w) / scale[0]) + 1]
        # What a tint of the glass itself gives every pixel is no stain.
        limit = 0.1 + float((1 - part.min(axis=2) / part.max(axis=2)).max())
        saturation = cv2.cvtColor(np.ascontiguousarray(tile), cv2.COLOR_RGB2HSV)[..., 1] / 255
        bare += float(np.mean(saturation > limit)) < 0.02
    return bare, len(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--slides", type=Path, help="folder of real slides")
    parser.add_argument("--pictures", type=Path, help="where outlines are drawn")
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    print("IoU with the truth, mean (worst) over", args.seeds, "seeds")
    print("| tint | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    found: dict[str, dict[str, list[float]]] = {tint: {kind: [] for kind in KINDS} for tint in TINTS}
    for kind, options in KINDS.items():
        for seed in range(args.seeds):
            slide = SyntheticSlide(SlideSpec(seed + 100, (1536, 1536), 2.0, seed % 2, **options))
            rgb, um, scale = slide.overview(8.0)
            truth = slide.truth((rgb.shape[1], rgb.shape[0])).tissue.mask
            for tint in TINTS:
                picture = seen(rgb, um, tint, seed)
                mask = find_tissue(picture, um, scale).mask
                found[tint][kind].append(iou(mask, truth))
                if args.pictures and seed == 0:
                    name = f"{kind}-{tint}".replace(" ", "_").replace("%", "").replace(",", "")
                    cv2.imwrite(str(args.pictures / f"{name}.png"), outlined(picture, mask)[..., ::-1])
        print(kind, "done", file=sys.stderr)
    for tint, by_kind in found.items():
        print(f"| {tint} | " + " | ".join(f"{np.mean(v):.3f} ({min(v):.2f})" for v in by_kind.values()) + " |")
    for name, mpp in (("TCGA-CR-7395-01A-01-TS1.svs", 0.5), ("CMU-1-Small-Region.svs", None)):
        if not args.slides:
            continue
        slide = open_slide(args.slides / name, mpp=mpp)
        full = slide.read_region(0, 0, 0, *slide.pyramid.size_l0)
        view = read_overview(slide, 8.0)
        plain = find_tissue(view.rgb, view.um_per_px, view.scale_l0).mask
        print(f"\n{name}: bare 20x tiles, tissue, IoU with the mask under no tint\n")
        print("| tint | bare | tissue | IoU |\n|---|---|---|---|")
        for tint in TINTS:
            picture = seen(view.rgb, view.um_per_px, tint, 1)
            mask = find_tissue(picture, view.um_per_px, view.scale_l0)
            gain = TINTS[tint](*view.rgb.shape[:2], view.um_per_px, 1)
            large = cv2.resize(gain, (full.shape[1], full.shape[0]), interpolation=cv2.INTER_NEAREST)
            tinted = np.clip(np.rint(full * large), 0, 255).astype(np.uint8)
            bare, tiles = bare_tiles(tinted, gain, view.scale_l0, mask, slide)
            print(f"| {tint} | {bare} of {tiles} | {mask.mask.mean():.1%} | {iou(mask.mask, plain):.3f} |")
            if args.pictures:
                label = f"{name[:4]}-{tint}".replace(" ", "_").replace("%", "").replace(",", "")
                cv2.imwrite(str(args.pictures / f"{label}.png"), outlined(picture, mask.mask)[..., ::-1])
        slide.close()


if __name__ == "__main__":
    main()
