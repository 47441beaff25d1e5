"""Draw the pictures of docs/tissue.md, annotations.md, synthetic.md, lrmil.md and targets.md.

``python docs/make_pictures.py`` draws them all.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from wsi_pipe.config import TileSettings
from wsi_pipe.geometry import Pyramid
from wsi_pipe.pictures import thumbnail_with_contours, thumbnail_with_grids, write_image
from wsi_pipe.synthetic import SIGNALS, SlideSpec, SyntheticSlide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue, place_areas, regions_of

OUT = Path(__file__).parent / "images"
RESULTS = Path(__file__).parent / "results"


def slide_pictures() -> None:
    spec = SlideSpec(45, (9216, 7168), 0.5, 1, pen=True, debris=True, pale=True)
    slide = SyntheticSlide(spec)
    rgb, um_per_px, scale_l0 = slide.overview(8.0)
    mask = find_tissue(rgb, um_per_px, scale_l0)
    sharp, _, _ = slide.overview(4.0)
    um = (um_per_px[0] / 2, um_per_px[1] / 2)
    picture = thumbnail_with_contours(sharp, mask, um_per_px=um, title="synthetic slide 45")
    write_image(OUT / "tissue.jpg", picture, quality=85)
    pyramid = Pyramid.from_sizes([spec.size_px], (0.5, 0.5))
    grids = plan_grids(pyramid, mask, TileSettings())
    picture = thumbnail_with_grids(
        sharp, (scale_l0[0] / 2, scale_l0[1] / 2), grids, mask=mask, um_per_px=um, title="synthetic slide 45"
    )
    write_image(OUT / "grids.jpg", picture, quality=85)


def annotation_picture() -> None:
    """The lesions of a synthetic slide as annotations, with necrosis within one and a margin around it."""
    spec = SlideSpec(51, (8192, 6144), 0.5, 1, pen=True, debris=True, pale=True, holes=True)
    slide = SyntheticSlide(spec)
    sharp, um_per_px, scale_l0 = slide.overview(4.0)
    mask = find_tissue(*slide.overview(8.0))
    lesions = slide.truth().lesion_polygons
    centre = lesions[0].mean(axis=0)
    drawn = [("Tumour", (200, 0, 0), ring) for ring in lesions]
    drawn.append(("Necrosis", (60, 60, 60), centre + (lesions[0] - centre) * 0.4))
    drawn.append(("Invasive margin", (0, 100, 220), centre + (lesions[0] - centre) * 1.6))
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()]]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": list(colour)}},
        }
        for name, colour, ring in drawn
    ]
    regions, _ = regions_of(place_areas(features, spec.size_px))
    grids = plan_grids(Pyramid.from_sizes([spec.size_px], (0.5, 0.5)), mask, TileSettings())
    picture = thumbnail_with_grids(
        sharp, scale_l0, grids, mask=mask, um_per_px=um_per_px, title="synthetic slide 51", regions=regions
    )
    write_image(OUT / "annotations.jpg", picture, quality=85)


def signal_picture() -> None:
    side, gap = 320, 12
    rows = []
    for signal in SIGNALS:
        specs = [SlideSpec(21, (1024, 1024), 0.5, label, signal) for label in (0, 1)]
        without, with_ = (SyntheticSlide(spec) for spec in specs)
        lesion = cv2.distanceTransform(with_.truth((1024, 1024)).lesion.astype(np.uint8), cv2.DIST_L2, 3)
        y, x = np.unravel_index(int(lesion.argmax()), lesion.shape)
        x0, y0 = (int(np.clip(v - side // 2, 0, 1024 - side)) // 4 * 4 for v in (x, y))
        tiles = [s.region(x0, y0, side, side) for s in (without, with_)]
        for tile in list(tiles):
            small = cv2.resize(tile, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
            tiles.append(np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), np.uint8))
        rows.append(np.concatenate([np.pad(t, ((0, gap), (0, gap), (0, 0)), constant_values=255) for t in tiles], 1))
    write_image(OUT / "signals.png", np.concatenate(rows)[:-gap, :-gap])


def settings_picture() -> None:
    """AUC of the four arms with their intervals, in the three settings of the signal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"HR": "#222222", "LR": "#c0392b", "LR, stage 1": "#5b9bd5", "LR, stages 1 and 2": "#1f5fa8"}
    for place, signal in enumerate(SIGNALS):
        found = json.loads((RESULTS / f"lrmil-{signal}.json").read_text(encoding="utf-8"))["figures"]
        axes = figure.add_subplot(1, len(SIGNALS), place + 1)
        for x, (arm, colour) in enumerate(colours.items()):
            auc = found[arm]["auc"]
            spread = [[auc["value"] - auc["low"]], [auc["high"] - auc["value"]]]
            axes.errorbar([x], [auc["value"]], spread, fmt="o", color=colour, capsize=4)
            axes.annotate(f"{auc['value']:.3f}", (x, auc["value"]), (7, -12), textcoords="offset points", fontsize=8)
        axes.axhline(0.5, color="#999999", lw=1, ls=":")
        axes.set_xticks(range(len(colours)), ["HR", "LR", "LR,\nstage 1", "LR,\nboth"], fontsize=8)
        axes.set(title=f"signal {signal}", xlim=(-0.5, len(colours) - 0.3), ylim=(0.38, 1.04))
        if not place:
            axes.set_ylabel("AUC, mean over 5 folds")
    figure.savefig(OUT / "lrmil-settings.png", dpi=110)


def target_pictures() -> None:
    """A survival time and a number of 120 made-up cases, of which a model knows something, as runs draw them."""
    from lrmil.targets import Fold
    from lrmil.targets.cox import Cox
    from lrmil.targets.regression import Regression

    rng = np.random.default_rng(3)
    cases = tuple(f"case {i}" for i in range(120))
    known = rng.normal(size=120)
    true, lost = rng.exponential(40 * np.exp(-0.9 * known)), rng.uniform(12, 90, size=120)
    truth = np.stack([np.minimum(true, lost), true <= lost], axis=1).astype(float)
    outputs = (known + 0.5 * rng.normal(size=120))[:, None]
    cox = Cox("os").fitted(truth[:60]).settled(outputs[:60], truth[:60])
    age = 62 + 9 * known[:, None] + 4 * rng.normal(size=(120, 1))
    regression = Regression("age").fitted(age[:60])
    cox.draw(OUT, "", Fold(cox, truth[60:], outputs[60:], cases[60:]))
    regression.draw(OUT, "", Fold(regression, age[60:], 0.7 * outputs[60:], cases[60:]))
    for name in ("os-survival", "age-agreement"):
        (OUT / f"{name}.png").replace(OUT / f"targets-{name}.png")


if __name__ == "__main__":
    slide_pictures()
    annotation_picture()
    signal_picture()
    settings_picture()
    target_pictures()
