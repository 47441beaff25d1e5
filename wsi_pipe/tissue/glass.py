"""The colour of empty glass, one for the slide or one for each place, measured and not assumed.

A lamp that is not quite white, a filter or an odd white balance tints the glass, and a stitching scanner may tint one
field of view and not the next. Such glass absorbs green as pale eosin does, so its colour alone tells nothing. Its
smoothness does: at the overview's 8 um/px the grey levels of glass vary by less than 1 nearby (0.3 to 0.8 on scanned
slides), those of tissue by 10 and more. So what is bright, nearly grey and smooth is looked at in connected pieces:
pieces of the slide's main glass, fields of another tint (their borders with other glass run straight along rows and
columns, or they reach the end of the scan), or something smooth that is neither and stays for the thresholds to judge.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair
from wsi_pipe.tissue.shapes import Planes, components, planes_of

__all__ = ["DEFAULT_WHITE", "optical_density", "white_map", "white_reference"]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Picture = NDArray[np.uint8]

DEFAULT_WHITE = 245.0
"""Grey level of glass where no glass is in view: what scanners calibrate to lies between 235 and 255."""

NEAR_WHITE_SHARE = 0.005
"""Less of the slide than this is no measure of its glass."""

_LOG_LEVELS = np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
_MAX_WHITE_CHROMA = 0.05
_MAX_WHITE_STAIN = 0.018
_MAX_TINT = 0.058
"""OD between the least and the most absorbed channel of tinted glass: 12 % of the light."""
_FLAT_SD = 1.4
"""Grey levels; three times the noise of scanned glass at 8 um/px, two thirds of the faintest texture of tissue."""
_FLAT_WINDOW_UM = 40.0
_NOISE_UM = 8.0
_MOST_NOISY_SHARE = 0.9
_PIECE_UM2 = 5_000.0
_UNSCANNED = 254
_SAME_TINT = 0.006
_TINT_THAT_MATTERS = 0.007
"""OD; little more than half of what makes a pixel pale tissue."""
_DRIFT_UM = 250.0
_BORDER_UM = 56.0
_STRAIGHT_SHARE = 0.4
_LEAST_RIM_PX = 6
_TOUCHING_SHARE = 0.08
_BAND_ROWS = 128
_MOST_LEVELS = 96
_COUNTED_AT_ONCE = 1 << 23
"""Pixels, fewer than float32 counts one by one."""


class _Piece(NamedTuple):
    """A connected piece of smooth, bright, nearly grey pixels.

    label: in the label map. area_px, box (x, y, w, h). tint: OD of green over the less absorbed of red and blue.
    log: mean log10 level by channel.
    """

    label: int
    area_px: int
    box: tuple[int, int, int, int]
    tint: float
    log: NDArray[np.float64]


def white_reference(rgb: Picture, planes: Planes, white_min: float = 200.0) -> Floats:
    """RGB of the empty glass, float32 (3,), where it is all but grey.

    The most frequent value of each channel among pixels that are bright (``white_min`` or more) and nearly grey; pure
    white counts only where there is no other glass, since scanners fill with it what they did not scan. Where less
    than 0.5 % of the slide qualifies, there is no glass in view and the reference is what scanners calibrate to.
    """
    enough = NEAR_WHITE_SHARE * rgb.shape[0] * rgb.shape[1]
    # There are few bright colours: each is judged once, and counts as often as it is there.
    colours, counts = _bright_colours(rgb, planes, white_min)
    log = _LOG_LEVELS[colours]
    least, most = log.min(axis=1), log.max(axis=1)
    # A tint towards pink or violet must be slight: beyond that it is pale tissue that fills the slide.
    pink = np.maximum(log[:, 0], log[:, 2]) - log[:, 1]
    glass = (most - least <= _MAX_WHITE_CHROMA) & (pink <= _MAX_WHITE_STAIN)
    scanned = glass & (colours.min(axis=1) < _UNSCANNED)
    chosen = scanned if counts[scanned].sum() >= enough else glass
    if counts[chosen].sum() < enough or not chosen.any():
        return np.full(3, DEFAULT_WHITE, np.float32)
    # A mode and not a mean: the pale parts of tissue and uneven light are among these pixels.
    return np.array([_mode(colours[chosen, channel], counts[chosen]) for channel in range(3)], np.float32)


def _bright_colours(rgb: Picture, planes: Planes, white_min: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The colours, int64 (n, 3), whose channels are all ``white_min`` or more, and how many pixels have each."""
    import cv2

    lowest = int(np.clip(np.ceil(white_min), 0, 256))
    side = 256 - lowest
    if side == 0:
        return np.zeros((0, 3), np.int64), np.zeros(0)
    if side > _MOST_LEVELS:
        found, counts = np.unique(rgb[planes.least >= lowest], axis=0, return_counts=True)
        return found.astype(np.int64), counts.astype(np.float64)
    table = np.zeros((side, side, side))
    rows = max(_COUNTED_AT_ONCE // rgb.shape[1], 1)
    for start in range(0, rgb.shape[0], rows):
        part = np.ascontiguousarray(rgb[start : start + rows])
        table += cv2.calcHist([part], [0, 1, 2], None, [side] * 3, [float(lowest), 256.0] * 3)
    colours = np.argwhere(table > 0)
    return colours + lowest, table[tuple(colours.T)]


def _mode(values: NDArray[np.int64], counts: NDArray[np.float64]) -> float:
    levels = np.bincount(values, counts, minlength=256)
    return float(np.argmax(np.convolve(levels, np.ones(5), mode="same")))


def optical_density(rgb: Picture, planes: Planes, white: Floats) -> Planes:
    """``log10((white + 1) / (value + 1))`` by channel, planes of float32 (H, W), not below zero.

    white: float32 (3,), or (H, W, 3) where it differs from place to place.
    """
    import cv2

    channels = (planes.r, planes.g, planes.b)
    if white.ndim == 3:
        found = []
        for channel, plane in enumerate(channels):
            own = cv2.log(np.ascontiguousarray(white[..., channel]) + np.float32(1))
            od = own / np.float32(np.log(10)) - np.log10(np.float32(256))
            found.append(np.asarray(np.maximum(od - _LOG_LEVELS[plane], 0), np.float32))
        return Planes.of(*found)
    levels = np.arange(256, dtype=np.float64)[:, None]
    table = np.maximum(np.log10((white[None].astype(np.float64) + 1) / (levels + 1)), 0).astype(np.float32)
    return Planes.of(*(np.asarray(cv2.LUT(p, np.ascontiguousarray(table[:, c]))) for c, p in enumerate(channels)))


def white_map(rgb: Picture, um_per_px: FloatPair, white_min: float = 200.0, planes: Planes | None = None) -> Floats:
    """RGB of the glass, float32 (3,), or (H, W, 3) where one colour does not do for the whole slide.

    The single colour of ``white_reference`` stands where all glass is within 0.007 OD of it. Else each place has the
    colour of the glass it is on, smoothed over 0.25 mm within the piece, and tissue that of the nearest glass.
    planes: of rgb, where they are there already.
    """
    planes = planes or planes_of(rgb)
    common = white_reference(rgb, planes, white_min)
    # What was not scanned says nothing of the lamp.
    pale = (planes.most <= _palest(white_min)[planes.least]) & (planes.least >= white_min)
    variance = _variance(rgb, um_per_px)
    labels, pieces = _pieces(pale & (variance <= _FLAT_SD**2), rgb, um_per_px)
    if _share(pieces, rgb) < NEAR_WHITE_SHARE:
        # A noisy picture. One that is alike all over may as well be pale tissue.
        labels, pieces = _pieces(pale & (variance <= (2 * _FLAT_SD) ** 2), rgb, um_per_px)
        if _share(pieces, rgb) > _MOST_NOISY_SHARE:
            return common
    if not pieces:
        return common
    glass = _glass_pieces(labels, pieces, planes, um_per_px)
    if not glass:
        return common
    reference = np.log10((common.astype(np.float64) + 1) / 256)
    coarse = {piece.label: _coarse_drift(labels, piece, rgb, um_per_px) for piece in glass}
    # What lies between the coarse map's points is stained no more than the most stained of them.
    if all(_stain(reference - colours).max() <= _TINT_THAT_MATTERS - 1e-5 for colours in coarse.values()):
        return common
    drifted = {piece.label: _drift(piece, coarse[piece.label]) for piece in glass}
    if all(_stain(reference - colours).max() <= _TINT_THAT_MATTERS for colours in _sampled(glass, drifted, labels)):
        return common
    return _spread(labels, glass, drifted, um_per_px)


def _palest(white_min: float) -> NDArray[np.uint8]:
    """By the least of a pixel's channels, uint8 (256,): how much the most may be in nearly grey glass."""
    levels = np.arange(256)
    near = _LOG_LEVELS[None, :] - _LOG_LEVELS[:, None] <= _MAX_TINT
    highest = np.where(near & (levels[None, :] >= levels[:, None]), levels[None, :], 0).max(axis=1)
    highest[_UNSCANNED:] = 0
    return np.asarray(highest, np.uint8)


def _stain(od: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(od[..., 1] - np.minimum(od[..., 0], od[..., 2]))


def _odd(length_um: float, um_per_px: FloatPair) -> tuple[int, int]:
    """An odd number of pixels, (x, y), at least 3, that come nearest to a length."""
    x, y = (max(2 * round((length_um / um - 1) / 2) + 1, 3) for um in um_per_px)
    return (x, y)


def _variance(rgb: Picture, um_per_px: FloatPair) -> Floats:
    """The largest variance of any channel over a window of 40 um, of values averaged over about 8 um."""
    import cv2

    fine = tuple(max(round(_NOISE_UM / um), 1) for um in um_per_px)
    window = _odd(_FLAT_WINDOW_UM, um_per_px)
    # A band of rows at a time, with what its windows see beyond it, stays in the processor's cache.
    margin = window[1] // 2 + (fine[1] if max(fine) > 1 else 0) + 1
    out = np.empty(rgb.shape[:2], np.float32)
    for start in range(0, rgb.shape[0], _BAND_ROWS):
        end = min(start + _BAND_ROWS, rgb.shape[0])
        first, last = max(start - margin, 0), min(end + margin, rgb.shape[0])
        values = rgb[first:last].astype(np.float32)
        if max(fine) > 1:
            values = np.asarray(cv2.blur(values, fine), np.float32)
        mean = cv2.blur(values, window)
        variance = cv2.subtract(cv2.blur(cv2.multiply(values, values), window), cv2.multiply(mean, mean))
        r, g, b = cv2.split(variance)
        out[start:end] = cv2.max(cv2.max(r, g), b)[start - first : end - first]
    return out


def _share(pieces: list[_Piece], rgb: Picture) -> float:
    return float(sum(piece.area_px for piece in pieces)) / float(rgb.shape[0] * rgb.shape[1])


def _pieces(smooth: Bools, rgb: Picture, um_per_px: FloatPair) -> tuple[NDArray[np.int32], list[_Piece]]:
    import cv2

    labels, stats = components(smooth)
    areas = stats[:, cv2.CC_STAT_AREA]
    large = np.flatnonzero(areas * um_per_px[0] * um_per_px[1] >= _PIECE_UM2)
    kept = np.zeros(len(stats), bool)
    kept[large] = True
    kept[0] = False
    own = np.flatnonzero(kept[labels])
    of, colours = labels.ravel()[own], rgb.reshape(-1, 3)[own]
    sums = np.stack([np.bincount(of, _LOG_LEVELS[colours[:, c]], len(stats)) for c in range(3)], axis=1)
    pieces = []
    for label in large[large > 0]:
        mean = sums[label] / areas[label]
        x, y, w, h = (int(v) for v in stats[label, :4])
        pieces.append(_Piece(int(label), int(areas[label]), (x, y, w, h), float(_stain(-mean)), mean))
    return labels, pieces


def _glass_pieces(
    labels: NDArray[np.int32], pieces: list[_Piece], planes: Planes, um_per_px: FloatPair
) -> list[_Piece]:
    """Those pieces that are glass; none where there is too little of it to tell."""
    slide_px = labels.size
    smooth_px = sum(piece.area_px for piece in pieces)
    enough = max(NEAR_WHITE_SHARE * slide_px, 0.05 * smooth_px)
    total = 0
    main: _Piece | None = None
    for piece in sorted(pieces, key=lambda piece: piece.tint):
        total += piece.area_px
        if total >= enough:
            main = piece
            break
    if main is None:
        return []
    glass = [piece for piece in pieces if piece.tint - main.tint <= _SAME_TINT]
    tinted = [piece for piece in pieces if piece.tint - main.tint > _SAME_TINT]
    if not tinted:
        return glass
    kept = np.zeros(int(labels.max()) + 1, bool)
    kept[[piece.label for piece in pieces]] = True
    off_scan = (planes.least >= _UNSCANNED) | (planes.most <= 12)
    others = kept[labels] | off_scan
    fields = {piece.label for piece in tinted if _is_field(labels, piece, others, um_per_px)}
    main_or_field = {piece.label for piece in glass} | fields
    glass = [piece for piece in pieces if piece.label in main_or_field]
    doubtful = [piece for piece in tinted if piece.label not in fields]
    # Between tissue on all sides, or a sliver: glass where it has the colour of other glass.
    known = np.array([piece.log for piece in glass])
    glass += [p for p in doubtful if np.abs(known - p.log).max(axis=1).min() <= _SAME_TINT]
    return glass


def _is_field(labels: NDArray[np.int32], piece: _Piece, others: Bools, um_per_px: FloatPair) -> bool:
    """Whether a tinted piece is a field of glass by its borders; others: other smooth pieces, and what is off the scan.

    Its borders with them run along rows and columns, or it has none with them and reaches the edge of the picture.
    """
    import cv2

    height, width = labels.shape
    reach_x, reach_y = (int(np.ceil(_BORDER_UM / um)) for um in um_per_px)
    x, y, w, h = piece.box
    x0, y0, x1, y1 = max(x - 2 * reach_x, 0), max(y - 2 * reach_y, 0), x + w + 2 * reach_x, y + h + 2 * reach_y
    own = labels[y0:y1, x0:x1] == piece.label
    mask = own.astype(np.uint8)
    # Beyond the picture nothing is known: its edge is no border of the piece, but it ends there.
    rim = own & (cv2.erode(mask, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE) == 0)
    at_end = np.zeros_like(own)
    if y0 == 0:
        at_end[0] = own[0]
    if x0 == 0:
        at_end[:, 0] |= own[:, 0]
    if y1 >= height:
        at_end[-1] |= own[-1]
    if x1 >= width:
        at_end[:, -1] |= own[:, -1]
    perimeter = int(np.count_nonzero(rim | at_end))
    around = others[y0:y1, x0:x1] & ~own
    near = cv2.dilate(around.astype(np.uint8), np.ones((2 * reach_y + 1, 2 * reach_x + 1), np.uint8))
    touching = rim & (near > 0)
    if np.count_nonzero(touching) >= _TOUCHING_SHARE * perimeter:
        # Where tissue begins the border with other glass ends: there the rim turns, and says nothing.
        gap = np.ones((2 * (reach_y // 2) + 1, 2 * (reach_x // 2) + 1), np.uint8)
        tissue = cv2.dilate((own | around).astype(np.uint8), gap) == 0
        margin = np.ones((3 * reach_y | 1, 3 * reach_x | 1), np.uint8)
        clear = touching & (cv2.dilate(tissue.astype(np.uint8), margin) == 0)
        judged = clear if np.count_nonzero(clear) >= _LEAST_RIM_PX else touching
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2.0, borderType=cv2.BORDER_REPLICATE)
        dx, dy = np.abs(cv2.Sobel(soft, cv2.CV_32F, 1, 0)), np.abs(cv2.Sobel(soft, cv2.CV_32F, 0, 1))
        along = np.minimum(dx, dy) <= np.tan(np.radians(10.0)) * np.maximum(dx, dy)
        return bool(np.mean(along[judged]) >= _STRAIGHT_SHARE)
    return bool(np.count_nonzero(at_end) >= _TOUCHING_SHARE * perimeter)


def _coarse_drift(labels: NDArray[np.int32], piece: _Piece, rgb: Picture, um_per_px: FloatPair) -> Floats:
    """Colours of a piece, log10 levels float32 (h, w, 3) of a few points over its box, smoothed within the piece."""
    import cv2

    x, y, w, h = piece.box
    own = (labels[y : y + h, x : x + w] == piece.label).astype(np.float32)
    sx, sy = (_DRIFT_UM / um for um in um_per_px)
    # What is smooth over so far needs few pixels.
    size = (max(round(4 * w / sx), 1), max(round(4 * h / sy), 1))
    size = (min(size[0], w), min(size[1], h))
    sigma = (max(sx * size[0] / w, 0.3), max(sy * size[1] / h, 0.3))
    edge = cv2.BORDER_CONSTANT
    weight = cv2.resize(own, size, interpolation=cv2.INTER_AREA)
    log = np.asarray(cv2.LUT(np.ascontiguousarray(rgb[y : y + h, x : x + w]), _LOG_LEVELS))
    values = cv2.resize(log * own[..., None], size, interpolation=cv2.INTER_AREA)
    weight = cv2.GaussianBlur(weight, (0, 0), sigmaX=sigma[0], sigmaY=sigma[1], borderType=edge)
    values = cv2.GaussianBlur(values, (0, 0), sigmaX=sigma[0], sigmaY=sigma[1], borderType=edge)
    return np.asarray(np.asarray(values).reshape(size[1], size[0], 3) / np.maximum(weight, 1e-6)[..., None], np.float32)


def _drift(piece: _Piece, coarse: Floats) -> Floats:
    """``_coarse_drift`` at every pixel of the piece's box."""
    import cv2

    return np.asarray(cv2.resize(coarse, piece.box[2:], interpolation=cv2.INTER_LINEAR), np.float32)


def _sampled(glass: list[_Piece], drifted: dict[int, Floats], labels: NDArray[np.int32]) -> list[Floats]:
    found = []
    for piece in glass:
        x, y, w, h = piece.box
        found.append(drifted[piece.label][labels[y : y + h, x : x + w] == piece.label])
    return found


def _spread(labels: NDArray[np.int32], glass: list[_Piece], drifted: dict[int, Floats], um_per_px: FloatPair) -> Floats:
    """The glass's colour at every pixel, grey levels float32 (H, W, 3)."""
    import cv2

    white = np.zeros((*labels.shape, 3), np.float32)
    known = np.zeros(labels.shape, bool)
    for piece in glass:
        x, y, w, h = piece.box
        own = labels[y : y + h, x : x + w] == piece.label
        white[y : y + h, x : x + w][own] = drifted[piece.label][own]
        known[y : y + h, x : x + w] |= own
    # Labels of cv2's transform number the glass's pixels in their order.
    _, nearest = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    source = np.zeros(int(nearest.max()) + 1, np.int64)
    rows, columns = np.nonzero(known)
    source[nearest[rows, columns]] = rows * labels.shape[1] + columns
    spread = white.reshape(-1, 3)[source[nearest]]
    # The border between two fields is in neither: there the more tinted of the two is the glass.
    reach_x, reach_y = (int(np.ceil(_BORDER_UM / um)) for um in um_per_px)
    element = np.ones((2 * reach_y + 1, 2 * reach_x + 1), np.uint8)
    for piece in sorted(glass, key=lambda piece: piece.tint):
        x, y, w, h = piece.box
        x0, y0 = max(x - reach_x, 0), max(y - reach_y, 0)
        part = (slice(y0, y + h + reach_y), slice(x0, x + w + reach_x))
        around = cv2.dilate((labels[part] == piece.label).astype(np.uint8), element) > 0
        spread[part][around & ~known[part]] = piece.log
    return np.asarray(np.power(np.float32(10), spread) * 256 - 1, np.float32)
