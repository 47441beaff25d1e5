"""Pixels of a synthetic slide, block by block.

A picture is made of the amounts of haematoxylin and eosin at each pixel (uint8, 255 for 2 units of density), turned
to colour by Beer-Lambert's law, then lit, marked and given a sensor's noise. Everything is placed by coordinates of
the whole slide, so a pixel is the same whichever block or tile it is asked for in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.synthetic.chance import uniform
from wsi_pipe.synthetic.light import leave_unscanned, lit, tinted
from wsi_pipe.synthetic.nuclei import sprites, stamp
from wsi_pipe.synthetic.paint import (
    EDGE,
    EPITHELIUM,
    FAT_EOSIN,
    FAT_HAEMA,
    FIBRE_EOSIN,
    FIBRE_HAEMA,
    GLAND_EOSIN,
    GLAND_HAEMA,
    LUMEN,
    as_bytes,
    blend,
    grains,
    outline,
)
from wsi_pipe.synthetic.plan import MAP_UM, SlidePlan, draw_marks, sample_map
from wsi_pipe.synthetic.textures import Textures, textures, window

__all__ = ["BLOCK_PX", "block_size_px", "blurred_block", "finish_block", "optical_block", "render_block"]

BLOCK_PX = 1024
_COARSE_UM = 2.0
_LARGEST_NUCLEUS_UM = 12.0
_FINE_GREY = 26

# cv2 states no pixel type of what it returns; within this module the names say it.
Bytes = NDArray[Any]
Floats = NDArray[Any]


def _step_px(mpp: float) -> int:
    """Pixels to a step of the architecture's grid of about 2 um."""
    return max(1, round(_COARSE_UM / mpp))


def block_size_px(mpp: float) -> int:
    """Side of a block: about BLOCK_PX, a whole number of steps of both grids that pixels hang on."""
    unit = _step_px(mpp)
    return unit * max(1, round(BLOCK_PX / unit))


def render_block(plan: SlidePlan, column: int, row: int) -> Bytes:
    """Level-0 pixels of a block, uint8 (side, side, 3); the last ones reach over the slide's border."""
    block = _Block(plan, column, row)
    return block.sensed(block.optical())


def optical_block(plan: SlidePlan, column: int, row: int) -> Bytes:
    """A block in focus as light reaches the sensor: no noise yet, nothing left unscanned."""
    return _Block(plan, column, row).optical()


def blurred_block(plan: SlidePlan, column: int, row: int, around: Mapping[tuple[int, int], Bytes]) -> Bytes:
    """A block out of focus where the plan says so; around: ``optical_block`` of it and its neighbours by offset."""
    import cv2

    own = around[0, 0]
    side = own.shape[0]
    sigma = plan.spec.blur_um / plan.spec.mpp
    # The kernel stays within the neighbours, however coarse the question.
    margin = min(int(np.ceil(4 * sigma)) + 1, side)
    canvas = np.concatenate([np.concatenate([around[c, r] for c in (-1, 0, 1)], axis=1) for r in (-1, 0, 1)])
    cut = slice(side - margin, 2 * side + margin)
    soft = cv2.GaussianBlur(canvas[cut, cut], (2 * margin + 1, 2 * margin + 1), sigma)
    soft = soft[margin:-margin, margin:-margin]
    block = _Block(plan, column, row)
    weight = block.pixels(as_bytes(block.coarse(plan.blur) * 255))
    return blend(soft, own, cv2.merge([weight, weight, weight]))


def finish_block(plan: SlidePlan, column: int, row: int, rgb: Bytes) -> Bytes:
    """What the sensor and the scanner's software make of a block's light."""
    return _Block(plan, column, row).sensed(rgb)


class _Block:
    def __init__(self, plan: SlidePlan, column: int, row: int) -> None:
        self.plan, self.spec = plan, plan.spec
        self.mpp = plan.spec.mpp
        self.side = block_size_px(self.mpp)
        self.x, self.y = column * self.side, row * self.side
        self.step = _step_px(self.mpp)
        self.textures: Textures = textures(self.mpp)
        self.haema: Bytes | None = None  # where tissue was drawn: what the fine signal goes by

    # -- grids ------------------------------------------------------------------------------------------------------

    def coarse(self, values: Floats, *, cubic: bool = False) -> Floats:
        """A map of the slide on the block's architecture grid, with a margin of 2 steps on all sides."""
        import cv2

        pitch = self.step * self.mpp / MAP_UM
        n = self.side // self.step + 4
        # cv2 counts from pixel centres: coarse pixel i is centred at (i - 2 + 0.5) steps from the block's corner.
        x0 = (self.x * self.mpp / MAP_UM) - 1.5 * pitch - 0.5
        y0 = (self.y * self.mpp / MAP_UM) - 1.5 * pitch - 0.5
        way = (cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
        matrix = np.array([[pitch, 0, x0], [0, pitch, y0]], np.float64)
        return np.asarray(cv2.warpAffine(values, matrix, (n, n), flags=way, borderMode=cv2.BORDER_REPLICATE))

    def pixels(self, coarse: Bytes) -> Bytes:
        """Values of the architecture grid, uint8, at the block's pixels."""
        import cv2

        if self.step == 1:
            return np.ascontiguousarray(coarse[2:-2, 2:-2])
        n = coarse.shape[0] * self.step
        large = cv2.resize(coarse, (n, n), interpolation=cv2.INTER_LINEAR)
        m = 2 * self.step
        return np.ascontiguousarray(large[m:-m, m:-m])

    def texture(self, values: NDArray[Any], key: int) -> Bytes:
        """A window of a seamless texture, shifted as this slide has it."""
        shift = (uniform(self.spec.seed, 301, key, np.arange(2)) * values.shape[0]).astype(int)
        return np.ascontiguousarray(
            window(values, self.x + int(shift[0]), self.y + int(shift[1]), self.side, self.side)
        )

    # -- layers -----------------------------------------------------------------------------------------------------

    def optical(self) -> Bytes:
        edge = self.coarse(self.plan.edge_um, cubic=True)
        if edge.max() > -12:
            rgb = self._tissue(edge)
        else:
            glass = np.clip(np.rint(self.plan.stain.glass), 0, 255).astype(np.uint8)
            rgb = np.empty((self.side, self.side, 3), np.uint8)
            rgb[:] = glass
        rgb = tinted(self.spec, lit(self.spec, rgb, self.x, self.y), self.x, self.y)
        if self.plan.debris or self.plan.bubbles or self.plan.pen:
            od = self._marks_od()
            where = np.maximum(np.maximum(od[..., 0], od[..., 1]), od[..., 2]) > 0
            if where.any():
                streaks = 0.85 + 0.15 * self.texture(self.textures.grain, 9)[where].astype(np.float32)[:, None] / 128
                rgb[where] = np.rint(rgb[where] * np.power(10.0, -od[where] * streaks)).astype(np.uint8)
        return np.asarray(rgb, np.uint8)

    def sensed(self, rgb: Bytes) -> Bytes:
        """The block's light with the sensor's noise, and the scanner's own white or black."""
        import cv2

        noise = self.texture(self.textures.noise, 8)
        noisy = cv2.add(rgb, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U)
        if self.spec.stitching:
            leave_unscanned(self.plan, noisy, self.x, self.y)
        if self.haema is not None and self.spec.signal == "fine" and self.spec.label == 1:
            self._add_fine(noisy, self.haema)
        return np.asarray(noisy, np.uint8)

    def _tissue(self, edge: Floats) -> Bytes:
        import cv2

        plan, t = self.plan, self.textures
        lesion = np.clip(self.coarse(plan.lesion_um) / 12 + 0.5, 0, 1)
        # Sheets of tumour are parted into nests by strands of stroma.
        coarse = self.spec.strength if self.spec.signal == "coarse" else 0.0
        tumour = lesion * self.coarse(plan.nest) * coarse
        fat = self.coarse(plan.fat)
        mix = self.pixels(as_bytes(self.coarse(plan.mix) * 255))
        rho = self._gland_radius(tumour, fat)

        # Stroma: two directions of fibres, one fading into the other.
        fibres = blend(self.texture(t.fibres[0], 1), self.texture(t.fibres[1], 2), mix)
        grain = self.texture(t.grain, 3)
        eosin = cv2.LUT(fibres, FIBRE_EOSIN)
        haema = cv2.LUT(fibres, FIBRE_HAEMA)
        # Epithelium around lumens.
        radius = self.pixels(rho)
        weight = cv2.LUT(radius, EPITHELIUM)
        eosin = blend(cv2.multiply(cv2.LUT(radius, GLAND_EOSIN), grain, scale=1 / 128), eosin, weight)
        haema = blend(cv2.multiply(cv2.LUT(radius, GLAND_HAEMA), grain, scale=1 / 128), haema, weight)
        lumen = cv2.LUT(radius, LUMEN)
        if tumour.any():
            much = self.pixels(as_bytes(tumour * 255))
            eosin = blend(cv2.multiply(np.full_like(eosin, 44), grain, scale=1 / 128), eosin, much)
            haema = blend(cv2.multiply(np.full_like(haema, 27), grain, scale=1 / 128), haema, much)
        nuclei = self._nuclei(edge, lesion, tumour, fat, rho)
        haema = np.maximum(haema, nuclei)
        if fat.max() > 0.02:
            cells = self.texture(t.fat, 5)
            much = self.pixels(as_bytes(fat * 255))
            eosin = blend(cv2.LUT(cells, FAT_EOSIN), eosin, much)
            haema = blend(np.maximum(cv2.LUT(cells, FAT_HAEMA), nuclei), haema, much)
        # The section: its thickness, lumens, and an edge that frays along the fibres.
        edge8 = self.pixels(as_bytes(edge * 4 + 128))
        frayed = cv2.addWeighted(edge8, 1.0, fibres, 0.07, -0.07 * 128)
        cover = cv2.multiply(cv2.LUT(frayed, EDGE), lumen, scale=1 / 255)
        thick = self.pixels(as_bytes(self.coarse(plan.thick) * 128))
        cover = cv2.multiply(cover, thick, scale=1 / 128)
        eosin = cv2.multiply(eosin, cover, scale=1 / 255)
        haema = cv2.multiply(haema, cover, scale=1 / 255)
        if plan.fold.any():
            twice = self.pixels(as_bytes(128 + 127 * self.coarse(plan.fold)))
            eosin, haema = (cv2.multiply(a, twice, scale=1 / 128) for a in (eosin, haema))
        if self.mpp < 0.8:
            # The optics: nothing is sharper than 0.35 um.
            eosin, haema = (cv2.GaussianBlur(a, (0, 0), 0.28 / self.mpp) for a in (eosin, haema))
        self.haema = haema
        levels = np.arange(256)[:, None] / 255 * 2.0
        glass = self.plan.stain.glass
        by_haema = np.power(10.0, -levels * plan.stain.haematoxylin) * 255
        by_eosin = np.power(10.0, -levels * plan.stain.eosin) * glass
        first = cv2.LUT(cv2.merge([haema, haema, haema]), as_bytes(by_haema)[None])
        second = cv2.LUT(cv2.merge([eosin, eosin, eosin]), as_bytes(by_eosin)[None])
        return np.asarray(cv2.multiply(first, second, scale=1 / 255))

    def _gland_radius(self, tumour: Floats, fat: Floats) -> Bytes:
        """Position in the nearest gland on the architecture grid: 0 its centre, 128 its border, 255 outside."""
        g = self.plan.glands
        pitch = self.step * self.mpp
        n = tumour.shape[0]
        out = np.full((n, n), 255, np.uint8)
        x0, y0 = (self.x - 2 * self.step) * self.mpp, (self.y - 2 * self.step) * self.mpp
        reach = g.radius * 1.6
        extent = n * pitch
        near = (g.x + reach > x0) & (g.y + reach > y0) & (g.x - reach < x0 + extent) & (g.y - reach < y0 + extent)
        for i in np.flatnonzero(near):
            c0, r0 = (max(0, int((p - reach[i] - o) / pitch)) for p, o in ((g.x[i], x0), (g.y[i], y0)))
            c1, r1 = (min(n, int((p + reach[i] - o) / pitch) + 2) for p, o in ((g.x[i], x0), (g.y[i], y0)))
            dx = x0 + (np.arange(c0, c1, dtype=np.float32)[None] + 0.5) * pitch - np.float32(g.x[i])
            dy = y0 + (np.arange(r0, r1, dtype=np.float32)[:, None] + 0.5) * pitch - np.float32(g.y[i])
            rho = np.hypot(dx, dy) / outline(np.arctan2(dy, dx), g.radius[i], g.sizes[i], g.phases[i])
            # Each gland has its own lumen: stretch so that the lumen's border is at 64 and the outer one at 128.
            low = g.lumen[i]
            level = np.where(rho < low, rho / low * 64, 64 + (rho - low) / (1 - low) * 64)
            part = out[r0:r1, c0:c1]
            np.minimum(part, np.clip(level, 0, 255).astype(np.uint8), out=part)
        out[(tumour > 0.5) | (fat > 0.6)] = 255
        return out

    # -- nuclei -----------------------------------------------------------------------------------------------------

    def _nuclei(self, edge: Floats, lesion: Floats, tumour: Floats, fat: Floats, rho: Bytes) -> Bytes:
        canvas = np.zeros((self.side, self.side), np.uint8)

        def at(values: NDArray[Any], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[Any]:
            rows = np.clip((y - self.y) / self.step + 2, 0, values.shape[0] - 1).astype(np.int64)
            columns = np.clip((x - self.x) / self.step + 2, 0, values.shape[1] - 1).astype(np.int64)
            return values[rows, columns]

        # Fibroblasts, along the fibres.
        x, y, u = self._lattice(19.0, 401)
        depth = at(edge, x, y)
        keep = (
            (depth > 3) & (at(rho, x, y) > 136) & (at(tumour, x, y) < 0.5) & (u[2] < 0.62 * (1 - 1.4 * at(fat, x, y)))
        )
        x, y, u = x[keep], y[keep], u[:, keep]
        angle = self._fibre_angle(x, y) + 0.5 * (u[3] - 0.5)
        self._stamp(canvas, "fibroblast", x, y, angle, u[4])
        # Lymphocytes, scattered and in crowds.
        x, y, u = self._lattice(8.5, 402)
        crowd = sample_map(self.plan.crowd, x * self.mpp, y * self.mpp)
        keep = (at(edge, x, y) > 3) & (u[2] < 0.015 + 0.8 * crowd) & (at(rho, x, y) > 132) & (at(fat, x, y) < 0.4)
        self._stamp(canvas, "lymphocyte", x[keep], y[keep], np.pi * u[3, keep], u[4, keep])
        # Sheets of tumour.
        if tumour.any():
            x, y, u = self._lattice(10.4, 403)
            keep = (at(edge, x, y) > 3) & (u[2] < 0.93 * at(tumour, x, y))
            self._stamp(canvas, "tumour", x[keep], y[keep], np.pi * u[3, keep], u[4, keep])
        # Epithelium, in one or two rows at the base of each gland.
        x, y, angle, u = self._gland_nuclei()
        keep = (at(edge, x, y) > 2) & (at(tumour, x, y) < 0.5) & (at(fat, x, y) < 0.6)
        if self.spec.signal == "middle" and self.spec.label:
            changed = keep & (u[0] < at(lesion, x, y) * self.spec.strength)
            self._stamp(canvas, "vesicular", x[changed], y[changed], angle[changed], u[1, changed])
            keep &= ~changed
        self._stamp(canvas, "epithelial", x[keep], y[keep], angle[keep], u[1, keep])
        return canvas

    def _stamp(
        self,
        canvas: Bytes,
        kind: str,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        angle: NDArray[np.float64],
        variant: NDArray[np.float64],
    ) -> None:
        stamp(canvas, sprites(kind, self.mpp), x - self.x, y - self.y, angle, variant)

    def _lattice(
        self, pitch_um: float, key: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Jittered points of the slide near the block: x, y in level-0 pixels, and five numbers in [0, 1) each."""
        pitch = pitch_um / self.mpp
        margin = _LARGEST_NUCLEUS_UM / self.mpp
        first = [int(np.floor((o - margin) / pitch)) for o in (self.x, self.y)]
        last = [int(np.ceil((o + self.side + margin) / pitch)) for o in (self.x, self.y)]
        c, r = (a.ravel() for a in np.meshgrid(np.arange(first[0], last[0]), np.arange(first[1], last[1])))
        u = np.stack([uniform(self.spec.seed, key, k, c, r) for k in range(5)])
        return (c + 0.15 + 0.7 * u[0] + 0.5 * (r % 2)) * pitch, (r + 0.15 + 0.7 * u[1]) * pitch, u

    def _fibre_angle(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Direction of the fibres of whichever texture is the stronger at the points."""
        size = self.textures.fibres[0].shape[0]
        first_wins = sample_map(self.plan.mix, x * self.mpp, y * self.mpp) > 0.5
        both = []
        for key, angles in zip((1, 2), self.textures.angles, strict=True):
            shift = (uniform(self.spec.seed, 301, key, np.arange(2)) * size).astype(int)
            n = angles.shape[0]
            columns = ((x + shift[0]) % size / size * n).astype(np.int64) % n
            rows = ((y + shift[1]) % size / size * n).astype(np.int64) % n
            both.append(angles[rows, columns])
        return np.asarray(np.where(first_wins, both[0], both[1]) % np.pi, np.float64)

    def _gland_nuclei(
        self,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Centres in level-0 pixels, directions and two numbers in [0, 1) each, for the glands near the block."""
        g = self.plan.glands
        reach = g.radius * 1.6
        x0, y0, extent = self.x * self.mpp, self.y * self.mpp, self.side * self.mpp
        near = (g.x + reach > x0) & (g.y + reach > y0) & (g.x - reach < x0 + extent) & (g.y - reach < y0 + extent)
        chosen = np.flatnonzero(near)
        parts = []
        for layer, (depth, spacing) in enumerate(((0.80, 6.6), (0.52, 9.5))):
            count = np.maximum(6, (2 * np.pi * g.radius[chosen] * depth / spacing).astype(np.int64))
            gland = np.repeat(chosen, count)
            index = np.arange(len(gland)) - np.repeat(np.cumsum(count) - count, count)
            u = np.stack([uniform(self.spec.seed, 500 + 10 * layer + k, g.key[gland], index) for k in range(6)])
            theta = 2 * np.pi * (index + 0.7 * u[2]) / np.repeat(count, count)
            # Depth is the share of the way from the lumen's border to the gland's.
            low = g.lumen[gland]
            rho = low + (1 - low) * (depth + 0.14 * (u[3] - 0.5))
            radius = rho * outline(theta, g.radius[gland], g.sizes[gland], g.phases[gland])
            keep = u[4] < (1.0, 0.55)[layer]
            x = (g.x[gland] + radius * np.cos(theta)) / self.mpp
            y = (g.y[gland] + radius * np.sin(theta)) / self.mpp
            angle = theta + 0.5 * (u[5] - 0.5)
            parts.append((x[keep], y[keep], angle[keep] % np.pi, u[:2, keep]))
        x, y, angle = (np.concatenate([p[i] for p in parts]) for i in range(3))
        return x, y, angle, np.concatenate([p[3] for p in parts], axis=1)

    # -- light and signal -------------------------------------------------------------------------------------------

    def _marks_od(self) -> Floats:
        """Density of marks on the block; where ink bleeds, drawn with a margin and softened."""
        import cv2

        x_um, y_um, um = self.x * self.mpp, self.y * self.mpp, (self.mpp, self.mpp)
        bleed = self.spec.ink_bleed_um
        if not (bleed and self.plan.pen):
            marks = (*self.plan.debris, *self.plan.bubbles, *self.plan.pen)
            return draw_marks(marks, x_um, y_um, um, (self.side, self.side))
        od = draw_marks((*self.plan.debris, *self.plan.bubbles), x_um, y_um, um, (self.side, self.side))
        m = int(np.ceil(3 * bleed / self.mpp))
        n = self.side + 2 * m
        ink = draw_marks(self.plan.pen, x_um - m * self.mpp, y_um - m * self.mpp, um, (n, n))
        soft = cv2.GaussianBlur(ink, (2 * m + 1, 2 * m + 1), bleed / self.mpp)[m:-m, m:-m]
        return np.asarray(np.maximum(od, soft), np.float32)

    def _add_fine(self, rgb: Bytes, haema: Bytes) -> None:
        """Grains of chromatin in the nuclei of lesions that sum to exactly nothing over cells of about 2 um."""
        cell = self.step
        grain = max(1, round(0.5 / self.mpp))
        if cell < 2 * grain:
            return
        inside = self.pixels(as_bytes(np.clip(self.coarse(self.plan.lesion_um) / 4 + 0.5, 0, 1) * 255)) > 127
        n = self.side // cell
        amount = round(_FINE_GREY * self.spec.strength)
        # Only cells that are nucleus throughout, and have room for the change on both sides.
        fit = (haema > 62) & inside
        for channel in range(3):
            fit &= (rgb[..., channel] >= amount) & (rgb[..., channel] <= 255 - amount)
        whole = np.logical_and.reduce(fit.reshape(n, cell, self.side), axis=1).reshape(n, n, cell).all(axis=2)
        columns, rows = np.arange(n) + self.x // cell, np.arange(n) + self.y // cell
        bank = grains(cell, grain)
        which = (uniform(self.spec.seed, 701, columns[None], rows[:, None]) * len(bank)).astype(np.int64)
        change = bank[which] * (whole * amount).astype(np.int16)[..., None, None]
        change = change.swapaxes(1, 2).reshape(self.side, self.side, 1)
        rgb[:] = (rgb.astype(np.int16) + change).astype(np.uint8)
