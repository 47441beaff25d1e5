"""What lies where on a synthetic slide: maps of 8 um, and lists of glands, pen strokes and debris."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.synthetic.chance import field, generator, uniform
from wsi_pipe.synthetic.spec import SlideSpec

__all__ = ["MAP_UM", "Glands", "Mark", "SlidePlan", "Stain", "draw_marks", "make_plan", "sample_map"]

MAP_UM = 8.0
"""Side of a pixel of the maps; pixel (c, r) covers [c, c + 1) x [r, r + 1) times this."""

_GLAND_PITCH_UM = 132.0
_CLIP_UM = 60.0

Floats = NDArray[np.float32]


class Stain(NamedTuple):
    """Optical density of haematoxylin and eosin in red, green and blue, and the glass: what varies between slides."""

    haematoxylin: NDArray[np.float64]
    eosin: NDArray[np.float64]
    glass: NDArray[np.float64]


class Glands(NamedTuple):
    """One entry a gland: centre and radius in um, share of the lumen, amplitudes and phases of the outline (n, 3)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]
    lumen: NDArray[np.float64]
    sizes: NDArray[np.float64]
    phases: NDArray[np.float64]
    key: NDArray[np.int64]


class Mark(NamedTuple):
    """Pen or debris: a line of some width (closed and filled where width is 0), and its absorption in R, G, B (OD)."""

    points_um: NDArray[np.float64]
    width_um: float
    od: NDArray[np.float64]


@dataclass(frozen=True)
class SlidePlan:
    """Maps are float32 (H, W) at MAP_UM.

    edge_um, lesion_um: signed distance to the edge of the tissue or lesions, positive inside, within 60 um. gland, fat,
    crowd, nest: 0 to 1, where glands lie, fat, lymphocytes, nests of tumour. mix: which of two textures of fibres
    shows. thick: of the section, about 1, less where the tissue is pale. fold: 0 to 1, where it lies twice. blur: 0 to
    1, where it is out of focus.
    """

    spec: SlideSpec
    stain: Stain
    edge_um: Floats
    lesion_um: Floats
    gland: Floats
    fat: Floats
    crowd: Floats
    thick: Floats
    mix: Floats
    nest: Floats
    glands: Glands
    pen: tuple[Mark, ...]
    debris: tuple[Mark, ...]
    fold: Floats
    blur: Floats
    bubbles: tuple[Mark, ...]


def make_plan(spec: SlideSpec) -> SlidePlan:
    """Lay out a slide."""
    width_um, height_um = spec.size_um
    shape = (max(4, int(np.ceil(height_um / MAP_UM))), max(4, int(np.ceil(width_um / MAP_UM))))
    rng = generator(spec.seed, "layout")
    tissue = _tissue(spec, shape, rng)
    edge = _signed_distance_um(tissue)
    inside = edge > 0
    structure = generator(spec.seed, "structure")
    gland = _share(field(shape, 700 / MAP_UM, structure), inside, 0.62)
    fat_field = field(shape, 600 / MAP_UM, structure) - 2.0 * (edge > 100)
    fat = _share(fat_field, inside, 0.12 if spec.fat else 0.0)
    crowd = _share(field(shape, 160 / MAP_UM, structure), inside, 0.07) * (1 - fat)
    thick = np.exp(0.10 * field(shape, 900 / MAP_UM, structure) + 0.05 * field(shape, 120 / MAP_UM, structure))
    nest = _smoothstep(np.asarray(np.abs(field(shape, 190 / MAP_UM, structure)) - 0.22, np.float32), 0.10)
    mix = _smoothstep(field(shape, 260 / MAP_UM, structure), 0.35)
    if spec.pale:
        pale = _share(field(shape, 900 / MAP_UM, generator(spec.seed, "pale")), inside, 0.22)
        thick = thick * (1 - 0.80 * pale * (1 - 0.7 * fat))
    sheets = spec.signal == "coarse" and spec.strength > 0.5  # of tumour take the place of glands
    lesion_um = np.full(shape, -_CLIP_UM, np.float32)
    if spec.label == 1:
        lesion = _lesion(spec, edge, fat, shape)
        if lesion.any():
            lesion_um = _signed_distance_um(lesion)
    return SlidePlan(
        spec=spec,
        stain=_stain(spec),
        edge_um=edge,
        lesion_um=lesion_um,
        gland=gland.astype(np.float32),
        fat=fat.astype(np.float32),
        crowd=crowd.astype(np.float32),
        thick=thick.astype(np.float32),
        mix=mix.astype(np.float32),
        nest=nest.astype(np.float32),
        glands=_glands(spec, edge, gland * (lesion_um < -30) if sheets else gland, fat),
        pen=_pen(spec) if spec.pen else (),
        debris=_debris(spec) if spec.debris else (),
        fold=_folds(spec, edge) if spec.folds else np.zeros(shape, np.float32),
        blur=_blurred(spec, shape),
        bubbles=_bubbles(spec) if spec.bubbles else (),
    )


def sample_map(values: Floats, x_um: NDArray[np.floating], y_um: NDArray[np.floating]) -> Floats:
    """Nearest values of a map at points."""
    rows = np.clip((y_um / MAP_UM).astype(np.int64), 0, values.shape[0] - 1)
    columns = np.clip((x_um / MAP_UM).astype(np.int64), 0, values.shape[1] - 1)
    return values[rows, columns]


def _tissue(spec: SlideSpec, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    import cv2

    rows, columns = (np.arange(n, dtype=np.float32)[:, None] + 0.5 for n in shape)
    v, u = rows / shape[0] * 2 - 1, columns.T / shape[1] * 2 - 1
    side = min(shape)
    wavelength = max(0.55 * side, 40.0)
    # Glass around the tissue, as on a real slide: the field falls off towards the borders.
    turn, long = rng.uniform(0, np.pi), rng.uniform(1.0, 1.35)
    a, b = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    bowl = 1.1 - 1.3 * ((a / long) ** 2 + (b * long) ** 2) - 1.2 * np.maximum(np.abs(u), np.abs(v)) ** 8
    height = 1.3 * bowl + 0.55 * field(shape, wavelength, rng) + 0.12 * field(shape, wavelength / 4, rng)
    height += 0.05 * field(shape, 10.0, rng)
    tissue = height > np.quantile(height, 1 - spec.tissue_fraction)
    if spec.tissue_fraction >= 1:
        tissue[:] = True
    holes = generator(spec.seed, "holes")
    if spec.holes and side * MAP_UM > 800:
        smallest_um, largest_um = 110.0, max(130.0, min(420.0, 0.07 * side * MAP_UM))
        count = max(1, round(1.1e-6 * tissue.sum() * MAP_UM**2))
        distance = np.minimum(cv2.distanceTransform(tissue.astype(np.uint8), cv2.DIST_L2, 3), side) * MAP_UM
        canvas = np.zeros(shape, np.uint8)
        for _ in range(min(count, 60)):
            radius = holes.uniform(smallest_um, largest_um)
            places = np.flatnonzero(distance > radius + 60)
            if len(places) == 0:
                continue
            place = int(places[int(holes.uniform() * len(places))])
            centre = (place % shape[1], place // shape[1])
            axes = (max(1, int(radius / MAP_UM)), max(1, int(radius * holes.uniform(0.6, 1.0) / MAP_UM)))
            cv2.ellipse(canvas, centre, axes, holes.uniform(0, 180), 0, 360, 1, -1)
        tissue &= canvas == 0
    least = min(40_000 / MAP_UM**2, 0.05 * tissue.size)
    return _without_specks(tissue, least, least)


def _without_specks(mask: NDArray[np.bool_], piece_px: float, hole_px: float) -> NDArray[np.bool_]:
    """Without pieces and holes below these areas: nobody can say whether they count."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= piece_px
    large[0] = False
    mask = np.asarray(large)[np.asarray(labels)]
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < hole_px
    small[0] = False
    return np.asarray(mask | np.asarray(small)[np.asarray(labels)], np.bool_)


def _signed_distance_um(mask: NDArray[np.bool_]) -> Floats:
    import cv2

    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    if mask.all():
        return np.full(mask.shape, _CLIP_UM, np.float32)
    if not mask.any():
        return np.full(mask.shape, -_CLIP_UM, np.float32)
    # Distances count to the far pixel's centre: half a pixel less on both sides puts zero on the border.
    signed = (np.maximum(inside - 0.5, 0) - np.maximum(outside - 0.5, 0)) * MAP_UM
    return np.asarray(np.clip(cv2.GaussianBlur(signed, (0, 0), 1.0), -_CLIP_UM, _CLIP_UM), np.float32)


def _smoothstep(values: Floats, width: float) -> Floats:
    t = np.clip(values / (2 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _share(values: Floats, inside: NDArray[np.bool_], share: float) -> Floats:
    """0 to 1, with soft borders, so that about ``share`` of the inside is 1."""
    if share <= 0 or not inside.any():
        return np.zeros(values.shape, np.float32)
    return _smoothstep(values - np.quantile(values[inside], 1 - share), 0.12)


def _lesion(spec: SlideSpec, edge: Floats, fat: Floats, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Blobs that cover ``lesion_fraction`` of the tissue, away from its edge and from fat."""
    # Small pieces have no inside: then a lesion may reach the edge, since a label without a lesion would be a lie.
    choices = ((edge > 24) & (fat < 0.5), edge > 8, edge > 0)
    possible = next((choice for choice in choices if choice.sum() > 0.05 * (edge > 0).sum()), choices[-1])
    if not possible.any():
        return np.zeros(shape, bool)
    wavelength = float(np.clip(0.35 * min(spec.size_um), 200, 1500))
    values = field(shape, wavelength / MAP_UM, generator(spec.seed, "lesion"))
    wanted = min(spec.lesion_fraction * float((edge > 0).sum()) / float(possible.sum()), 1.0)
    lesion = possible & (values >= np.quantile(values[possible], 1 - wanted))
    kept = _without_specks(lesion, 20_000 / MAP_UM**2, 5_000 / MAP_UM**2)
    return kept if kept.any() else lesion


def _glands(spec: SlideSpec, edge: Floats, gland: Floats, fat: Floats) -> Glands:
    columns, rows = (np.arange(int(np.ceil(um / _GLAND_PITCH_UM)) + 1) for um in spec.size_um)
    c, r = (a.ravel() for a in np.meshgrid(columns, rows))
    u = [uniform(spec.seed, 101 + k, c, r) for k in range(12)]
    x = (c + 0.5 * (r % 2) + 0.28 * (u[0] - 0.5)) * _GLAND_PITCH_UM
    y = (r + 0.28 * (u[1] - 0.5)) * _GLAND_PITCH_UM
    radius = 36 + 24 * u[2]
    fits = (sample_map(edge, x, y) > 0.6 * radius) & (sample_map(fat, x, y) < 0.3)
    fits &= u[3] < sample_map(gland, x, y) * 1.1 - 0.05
    sizes = (np.stack(u[4:7], axis=1) - 0.5) * [0.34, 0.20, 0.12]
    phases = np.stack(u[7:10], axis=1) * 2 * np.pi
    lumen = 0.22 + 0.34 * u[10]
    key = r * 100_003 + c
    return Glands(x[fits], y[fits], radius[fits], lumen[fits], sizes[fits], phases[fits], key[fits].astype(np.int64))


def _stain(spec: SlideSpec) -> Stain:
    """Between the stain vectors of Ruifrok and Johnston (2001) and of Macenko et al. (2009), with other strengths."""
    rng = generator(spec.seed, "stain")
    much = spec.stain_variation
    a, b = 0.5 + 0.5 * much * rng.uniform(-1, 1, 2)
    haematoxylin = a * np.array([0.650, 0.704, 0.286]) + (1 - a) * np.array([0.563, 0.720, 0.406])
    eosin = b * np.array([0.072, 0.990, 0.250]) + (1 - b) * np.array([0.170, 0.850, 0.500])
    if spec.stain != "he":
        eosin = {"dab": np.array([0.268, 0.570, 0.776]), "pas": np.array([0.175, 0.972, 0.155])}[spec.stain]
    strengths = np.exp(much * np.clip(rng.standard_normal(2), -1.8, 1.8) * [0.13, 0.16])
    glass = 243 + much * rng.uniform(-5, 5) + much * rng.uniform(-1.5, 1.5, 3)
    return Stain(haematoxylin * strengths[0], eosin * strengths[1], glass)


_INKS = {
    "blue": (1.05, 0.62, 0.14),
    "green": (1.10, 0.42, 0.72),
    "black": (1.25, 1.24, 1.20),
    "red": (0.03, 0.95, 0.80),
}


def _pen(spec: SlideSpec) -> tuple[Mark, ...]:
    """One to three strokes of one or two colours, from 100 to 450 um wide, mostly near the borders."""
    rng = generator(spec.seed, "pen")
    width, height = spec.size_um
    side = min(width, height)
    marks = []
    for _ in range(int(rng.integers(1, 4))):
        drawn = list(_INKS)[int(rng.integers(len(_INKS)))]
        ink = spec.ink or drawn
        along, off = rng.uniform(0.1, 0.9), rng.uniform(0.03, 0.16)
        x, y = [(along, off), (along, 1 - off), (off, along), (1 - off, along)][int(rng.integers(4))]
        heading, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-1.6, 1.6)
        length, steps = side * rng.uniform(0.2, 0.5), 40
        angles = heading + bend * np.linspace(0, 1, steps)
        path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1) * length / steps, axis=0)
        path = path - path.mean(axis=0) + [x * width, y * height]
        marks.append(Mark(path, float(np.clip(side * rng.uniform(0.02, 0.05), 100, 450)), np.array(_INKS[ink])))
    return tuple(marks)


def _debris(spec: SlideSpec) -> tuple[Mark, ...]:
    """Dark irregular grains of 40 to 150 um, and thin grey hairs."""
    rng = generator(spec.seed, "debris")
    width, height = spec.size_um
    marks = []
    for _ in range(int(np.clip(2 + 1.5e-6 * width * height * rng.uniform(0.3, 1.0), 2, 40))):
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radius = rng.uniform(20, 75) * (1 + 0.3 * np.convolve(rng.standard_normal(28), np.ones(5) / 5, "valid"))
        centre = rng.uniform(0, 1, 2) * [width, height]
        shape = np.stack([np.cos(angles) * radius, np.sin(angles) * radius * rng.uniform(0.5, 1)], axis=1)
        tone = rng.uniform(0.7, 1.3)
        marks.append(Mark(centre + shape, 0.0, tone * np.array([1.0, rng.uniform(0.97, 1.02), rng.uniform(0.97, 1.1)])))
    for _ in range(int(rng.integers(1, 4))):
        angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-0.35, 0.35, 30))
        path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(8, 22), axis=0)
        marks.append(Mark(path + rng.uniform(0, 1, 2) * [width, height], 9.0, 0.45 * np.array([1.0, 0.98, 0.95])))
    return tuple(marks)


def _folds(spec: SlideSpec, edge: Floats) -> Floats:
    """Bands of 60 to 120 um across the tissue, where it lies twice."""
    import cv2

    rng = generator(spec.seed, "folds")
    canvas = np.zeros(edge.shape, np.uint8)
    inside = np.argwhere(edge > 30)
    side = min(edge.shape)
    for _ in range(int(rng.integers(2, 5)) if len(inside) else 0):
        row, column = inside[int(rng.uniform() * len(inside))]
        angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-0.12, 0.12, 30))
        steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * side * rng.uniform(0.25, 0.5) / 30
        path = np.cumsum(steps, axis=0)
        path += [column, row] - path.mean(axis=0)
        width = max(1, round(rng.uniform(60, 120) / MAP_UM))
        cv2.polylines(
            canvas, [np.rint(path * 16).astype(np.int32).reshape(1, -1, 2)], False, 255.0, width, cv2.LINE_AA, 4
        )
    return np.asarray(canvas / np.float32(255) * (edge > 0), np.float32)


def _bubbles(spec: SlideSpec) -> tuple[Mark, ...]:
    """Air under the cover glass: dark rings of 120 to 500 um."""
    rng = generator(spec.seed, "bubbles")
    marks = []
    around = np.linspace(0, 2 * np.pi, 73)
    for _ in range(int(rng.integers(2, 6))):
        centre = rng.uniform(0.15, 0.85, 2) * spec.size_um
        radius = rng.uniform(60, 250)
        ring = np.stack([np.cos(around), np.sin(around)], axis=1) * radius
        marks.append(Mark(centre + ring, rng.uniform(12, 20), rng.uniform(0.45, 0.8) * np.ones(3)))
    return tuple(marks)


def _blurred(spec: SlideSpec, shape: tuple[int, int]) -> Floats:
    if spec.blur_um == 0 or spec.blur_fraction == 0:
        return np.zeros(shape, np.float32)
    if spec.blur_fraction >= 1:
        return np.ones(shape, np.float32)
    values = field(shape, 1500 / MAP_UM, generator(spec.seed, "blur"))
    return _smoothstep(values - np.quantile(values, 1 - spec.blur_fraction), 0.05)


def draw_marks(
    marks: tuple[Mark, ...], x_um: float, y_um: float, um_per_px: tuple[float, float], size_px: tuple[int, int]
) -> Floats:
    """Optical density of pen or debris on a window, float32 (H, W, 3), antialiased; the densest wins."""
    import cv2

    width, height = size_px
    out = np.zeros((height, width, 3), np.float32)
    for mark in marks:
        points = (mark.points_um - [x_um, y_um]) / um_per_px
        reach = mark.width_um / min(um_per_px) + 2
        low, high = points.min(axis=0) - reach, points.max(axis=0) + reach
        if high[0] < 0 or high[1] < 0 or low[0] > width or low[1] > height:
            continue
        x0, y0 = (max(0, int(v)) for v in low)
        x1, y1 = (min(n, int(v) + 2) for n, v in zip(size_px, high, strict=True))
        canvas = np.zeros((y1 - y0, x1 - x0), np.uint8)
        # cv2 draws with pixel centres at whole numbers and, with shift 4, in sixteenths.
        path = np.rint((points - [x0 + 0.5, y0 + 0.5]) * 16).astype(np.int32).reshape(1, -1, 2)
        if mark.width_um > 0:
            thickness = max(1, round(mark.width_um / float(np.mean(um_per_px))))
            cv2.polylines(canvas, [path], False, 255.0, thickness, cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(canvas, [path], 255.0, cv2.LINE_AA, 4)
        part = out[y0:y1, x0:x1]
        np.maximum(part, (canvas.astype(np.float32) / 255)[..., None] * mark.od.astype(np.float32), out=part)
    return out
