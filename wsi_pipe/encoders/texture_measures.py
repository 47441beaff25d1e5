"""Texture measures of one tile, as plain functions on arrays: what ``texture.TextureEncoder`` is made of.

Per-tile work goes through OpenCV on arrays of tens of kilobytes, which stay in the processor's cache; it ends in small
histograms and sums (``RawMeasures``). What follows from those is computed by ``texture.py`` over the whole batch.

Sources
-------
stain    Ruifrok & Johnston 2001 (colour deconvolution), with the haematoxylin and eosin vectors of Macenko et al. 2009
colour   Stricker & Orengo 1995: mean, standard deviation and cube root of the third central moment of each channel
lbp      Ojala, Pietikäinen & Mäenpää 2002: rotation-invariant uniform patterns (riu2), 8 neighbours on a circle of 1 px
glcm     Haralick, Shanmugam & Dinstein 1973: statistics of the co-occurrence of grey levels at distance 1
band     Burt & Adelson 1983: energy in the bands of a Laplacian pyramid
blob     Lindeberg 1998: extrema of a difference of Gaussians, here of haematoxylin, at the sizes that nuclei have
edge     Bigün & Granlund 1987: gradients and the coherence of their orientation (structure tensor)

Kather et al. 2016 (Scientific Reports 6:27988) classed eight tissue types of colorectal cancer at 87 % with intensity
moments, local binary patterns, co-occurrence statistics, Gabor and perception-like features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOB_NAMES",
    "EDGE_NAMES",
    "GLCM_LEVELS",
    "OD_STEP",
    "OD_ZERO",
    "PLACES",
    "RIU2",
    "RIU2_BINS",
    "RawMeasures",
    "glcm_counts",
    "lbp_counts",
    "measure",
    "riu2_table",
    "stain_planes",
]

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Counts = NDArray[np.int64]

MACENKO_H = (0.5626, 0.7201, 0.4062)
MACENKO_E = (0.2159, 0.8012, 0.5581)
"""Unit vectors of optical density (red, green, blue), the reference stains of Macenko et al. 2009."""

OD_STEP = 1.6 / 255
"""Optical density (log10) per grey level of the 8-bit stain planes."""

OD_ZERO = (32.0, 32.0, 128.0)
"""Grey level of no stain in the planes of haematoxylin, eosin and residual: noise about zero is not cut off."""

PLACES = (("y", 1), ("y", 2), ("y", 4), ("h", 2), ("h", 4))
"""Where textures are measured: channel (luminance, haematoxylin) and scale.

Scale 1 is the tile after a Gaussian of 1 px, 2 and 4 are the tile halved and quartered. Stains start at the halved
tile: JPEG stores colour at half resolution, so below that haematoxylin is made of compression noise.
"""

LBP_TOLERANCE = (4.0, 3.0, 2.0, 3.0, 3.0)
"""Grey levels by which a neighbour must exceed the centre, by place: above the noise of JPEG recompression."""

GLCM_LEVELS = 16
"""Grey levels of the co-occurrence matrices: a pair fits one byte, so that a 256-bin histogram counts it."""

GLCM_OFFSETS = ((0, 1), (-1, 1), (-1, 0), (-1, -1))
"""(row, column) to the second pixel of a pair: 0, 45, 90 and 135 degrees at distance 1."""

BLOB_SIGMAS = (0.75, 1.5, 3.0, 6.0)
"""Gaussians, px of the halved tile: their differences answer to blobs about 4, 8 and 17 px wide in the tile."""

BLOB_THRESHOLD_OD = 0.03
"""Haematoxylin above its surroundings that counts as a nucleus-like blob."""

BLOB_NAMES = (
    *(f"blob_{kind}_{i}" for i in range(len(BLOB_SIGMAS) - 1) for kind in ("energy", "skew", "peaks")),
    "blob_area_fraction",
    "blob_count",
    "blob_log_area_mean",
    "blob_log_area_std",
    "blob_extent_mean",
    "blob_elongation_mean",
    "blob_haematoxylin_contrast",
    "blob_eosin_contrast",
)
EDGE_NAMES = tuple(
    f"edge_{kind}_{scale}" for scale in (2, 4) for kind in ("mean", "std", "global_coherence", "local_coherence")
)


def _unmixing() -> Float64:
    """Rows: haematoxylin, eosin and residual from optical density; the residual's vector is normal to the stains'."""
    haematoxylin, eosin = np.array(MACENKO_H), np.array(MACENKO_E)
    residual = np.cross(haematoxylin, eosin)
    stains = np.stack([haematoxylin, eosin, residual / np.linalg.norm(residual)])
    inverse: Float64 = np.linalg.inv(stains.T)
    return inverse


_OPTICAL_DENSITY = (-np.log10((np.arange(256) + 1.0) / 256.0)).astype(np.float32)
_UNMIX = _unmixing().astype(np.float32)
_TO_GREY = np.hstack([_UNMIX / OD_STEP, np.array(OD_ZERO)[:, None]]).astype(np.float32)


def riu2_table() -> UInt8:
    """The riu2 class of each 8-bit pattern, uint8 (256,): ones where at most 2 transitions, else 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    transitions = (bits != np.roll(bits, 1, axis=1)).sum(1)
    return np.where(transitions <= 2, bits.sum(1), 9).astype(np.uint8)


RIU2_BINS = 10
RIU2: Counts = (riu2_table()[:, None] == np.arange(RIU2_BINS)).astype(np.int64)
"""(256, 10): sums pattern counts into riu2 classes."""


@dataclass(frozen=True, slots=True)
class RawMeasures:
    """What is kept of one tile.

    stain: int64 (3, 256), histograms of haematoxylin, eosin and residual in steps of OD_STEP from OD_ZERO.
    stain_product: mean product of haematoxylin and eosin in grey levels. colour: float64 (6, 3), mean, standard
    deviation and third central moment of R, G, B, L, a, b. lbp: int64 (5, 256), pattern counts by place (PLACES).
    glcm: int64 (5, 4, 256), pair counts by place and direction. band: float64 (5,), root mean square of the
    pyramid's band by place. blob, edge: float64, as BLOB_NAMES, EDGE_NAMES.
    """

    stain: Counts
    stain_product: float
    colour: Float64
    lbp: Counts
    glcm: Counts
    band: Float64
    blob: Float64
    edge: Float64


def stain_planes(rgb: UInt8) -> UInt8:
    """Haematoxylin, eosin and residual, uint8 (H, W, 3) in steps of OD_STEP, of RGB uint8 (H, W, 3).

    Optical density is -log10((I + 1) / 256); no stain is OD_ZERO, and the planes are clipped at 0 and 255.
    """
    density = cv2.LUT(rgb, _OPTICAL_DENSITY)
    planes = np.asarray(cv2.transform(density, _TO_GREY), np.float32)
    return np.clip(np.rint(planes, out=planes), 0, 255, out=planes).astype(np.uint8)


def histogram(grey: UInt8) -> Counts:
    """Counts of each value, int64 (256,), of a uint8 array."""
    return np.asarray(cv2.calcHist([grey], [0], None, [256], [0, 256]), np.float64).ravel().astype(np.int64)


def _mean(image: Float32) -> float:
    """The mean, summed by NumPy: cv2.mean's last bit depends on where the array lies in memory."""
    return float(image.mean(dtype=np.float64))


_DIAGONAL = float(np.sqrt(0.5))


def _diagonal_kernel(row: int, column: int) -> Float32:
    """Bilinear weights, 3 x 3, of the point on the unit circle towards (row, column), each -1 or 1."""
    kernel = np.zeros((3, 3))
    for r, wr in ((0, 1 - _DIAGONAL), (row, _DIAGONAL)):
        for c, wc in ((0, 1 - _DIAGONAL), (column, _DIAGONAL)):
            kernel[1 + r, 1 + c] += wr * wc
    return kernel.astype(np.float32)


# Round the circle, as the transitions of a pattern ask for.
_CIRCLE: tuple[tuple[int, int], ...] = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
_KERNELS = {(r, c): _diagonal_kernel(r, c) for r, c in _CIRCLE if r and c}


def lbp_counts(image: Float32, tolerance: float) -> Counts:
    """Counts of 8-neighbour binary patterns at radius 1, int64 (256,), over a float32 image less its border of 1 px.

    A bit is set where the neighbour, bilinear on the circle, is at least ``tolerance`` above the centre: with 0 the
    operator of Ojala et al. 2002, with more a flat patch stays one pattern under noise.
    """
    height, width = image.shape
    threshold = image[1:-1, 1:-1] + np.float32(tolerance)
    code = np.zeros((height - 2, width - 2), np.uint8)
    for row, column in _CIRCLE:
        if row and column:
            at = cv2.filter2D(image, cv2.CV_32F, _KERNELS[row, column])[1:-1, 1:-1]
        else:
            at = image[1 + row : height - 1 + row, 1 + column : width - 1 + column]
        np.add(code, code, out=code)
        np.add(code, (at >= threshold).view(np.uint8), out=code)
    return histogram(code)


def glcm_counts(quantised: UInt8) -> Counts:
    """Counts of pairs of grey levels, int64 (4, 256): first * 16 + second, at 0, 45, 90 and 135 degrees.

    quantised: uint8 (H, W), values below GLCM_LEVELS.
    """
    height, width = quantised.shape
    first = quantised << 4
    counts = []
    for row, column in GLCM_OFFSETS:
        left, right = max(-column, 0), width - max(column, 0)
        here = first[-row:, left:right]
        there = quantised[: height + row, left + column : right + column]
        counts.append(histogram(np.ascontiguousarray(here | there)))
    return np.stack(counts)


def _colour_moments(rgb: UInt8) -> Float64:
    """(6, 3): mean, standard deviation and third central moment of R, G, B, L, a, b in units of 255."""
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
    levels = np.arange(256) / 255.0
    rows = []
    for image in (rgb, lab):
        for channel in range(3):
            counts = np.asarray(cv2.calcHist([image], [channel], None, [256], [0, 256]), np.float64).ravel()
            share = counts / counts.sum()
            mean = float((share * levels).sum())
            centred = levels - mean
            squares = share * centred * centred
            rows.append((mean, float(np.sqrt(squares.sum())), float((squares * centred).sum())))
    return np.array(rows)


def _blobs(haematoxylin: Float32, eosin: Float32) -> Float64:
    """BLOB_NAMES of stain planes in grey levels, float32 (H, W), at half the tile's size."""
    smooth = [cv2.GaussianBlur(haematoxylin, (0, 0), sigma) for sigma in BLOB_SIGMAS]
    threshold = BLOB_THRESHOLD_OD / OD_STEP
    area = haematoxylin.size
    values: list[float] = []
    for fine, coarse in itertools.pairwise(smooth):
        band = fine - coarse
        centred = band - np.float32(_mean(band))
        squares = centred * centred
        deviation = float(np.sqrt(_mean(squares)))
        third = _mean(squares * centred)
        peaks = np.count_nonzero((band >= threshold) & (band >= cv2.dilate(band, np.ones((3, 3), np.uint8))))
        values += [
            float(np.log1p(deviation)) / 2,
            float(np.cbrt(third)) / (deviation + 1.0),
            float(np.log1p(1000.0 * peaks / area)) / 2,
        ]
    within = (smooth[1] - smooth[3]) >= threshold
    _, _, stats, _ = cv2.connectedComponentsWithStats(within.view(np.uint8), connectivity=4)
    stats = stats[1:][stats[1:, cv2.CC_STAT_AREA] >= 4]
    inside = float(np.count_nonzero(within)) / area
    values += [inside, float(np.log1p(1000.0 * len(stats) / area)) / 2]
    if len(stats):
        size = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
        width, height = stats[:, cv2.CC_STAT_WIDTH].astype(np.float64), stats[:, cv2.CC_STAT_HEIGHT].astype(np.float64)
        logs = np.log(size)
        values += [float(logs.mean()) / 4, float(logs.std()), float((size / (width * height)).mean())]
        values += [float(np.log(np.maximum(width, height) / np.minimum(width, height)).mean())]
    else:
        values += [0.0, 0.0, 0.0, 0.0]
    for plane in (haematoxylin, eosin):
        if 0.0 < inside < 1.0:
            difference = float(plane[within].mean(dtype=np.float64) - plane[~within].mean(dtype=np.float64))
        else:
            difference = 0.0
        values.append(difference * OD_STEP)
    return np.array(values)


def _edges(images: Sequence[Float32]) -> Float64:
    """EDGE_NAMES of luminance at half and quarter size, float32 (H, W) each."""
    values: list[float] = []
    for image in images:
        gx = cv2.Sobel(image, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
        gy = cv2.Sobel(image, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
        xx, yy, xy = gx * gx, gy * gy, gx * gy
        jxx, jyy, jxy = (_mean(a) for a in (xx, yy, xy))
        mean = _mean(np.sqrt(xx + yy))
        deviation = float(np.sqrt(max(jxx + jyy - mean * mean, 0.0)))
        # A squared grey level in the denominator lets coherence go to 0, not to noise, where the tile is flat.
        whole = float(np.hypot(jxx - jyy, 2 * jxy)) / (jxx + jyy + 1.0)
        xx, yy, xy = (np.asarray(cv2.blur(a, (7, 7)), np.float32) for a in (xx, yy, xy))
        local = _mean(np.sqrt((xx - yy) ** 2 + 4 * xy * xy) / (xx + yy + np.float32(1.0)))
        values += [float(np.log1p(mean)) / 2, float(np.log1p(deviation)) / 2, whole, local]
    return np.array(values)


def _halved(image: Float32) -> Float32:
    height, width = image.shape[:2]
    return np.asarray(cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA), np.float32)


def measure(rgb: UInt8) -> RawMeasures:
    """All measures of one tile, RGB uint8 (H, W, 3), contiguous, at least 32 px in each direction."""
    luminance = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.float32)
    half_rgb = cv2.resize(rgb, (rgb.shape[1] // 2, rgb.shape[0] // 2), interpolation=cv2.INTER_AREA)
    soft_rgb = np.asarray(cv2.GaussianBlur(half_rgb, (5, 5), 1.0), np.uint8)
    haematoxylin, eosin, residual = (np.asarray(p, np.uint8) for p in cv2.split(stain_planes(soft_rgb)))
    half_h = haematoxylin.astype(np.float32)
    half_y = _halved(luminance)
    quarter_y = _halved(half_y)
    smooth_y = np.asarray(cv2.GaussianBlur(luminance, (5, 5), 1.0), np.float32)
    images = (smooth_y, half_y, quarter_y, half_h, _halved(half_h))
    shift = np.float32(GLCM_LEVELS / 256)
    band = [_mean((s - cv2.GaussianBlur(s, (5, 5), 1.25)) ** 2) ** 0.5 for s in images]
    product = haematoxylin.ravel().astype(np.int64) @ eosin.ravel().astype(np.int64)
    return RawMeasures(
        stain=np.stack([histogram(p) for p in (haematoxylin, eosin, residual)]),
        stain_product=float(product) / haematoxylin.size,
        colour=_colour_moments(soft_rgb),
        lbp=np.stack([lbp_counts(s, tolerance) for s, tolerance in zip(images, LBP_TOLERANCE, strict=True)]),
        glcm=np.stack([glcm_counts((s * shift).astype(np.uint8)) for s in images]),
        band=np.array(band),
        blob=_blobs(half_h, eosin.astype(np.float32)),
        edge=_edges((half_y, quarter_y)),
    )
