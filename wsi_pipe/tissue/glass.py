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
from wsi_pipe.tissue.shapes import components, extremes

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


def white_reference(rgb: Picture, white_min: float = 200.0) -> Floats:
    """RGB of the empty glass, float32 (3,), where it is all but grey.

    The most frequent value of each channel among pixels that are bright (``white_min`` or more) and nearly grey; pure
    white counts only where there is no other glass, since scanners fill with it what they did not scan. Where less
    than 0.5 % of the slide qualifies, there is no glass in view and the reference is what scanners calibrate to.
    """
    bright = rgb[extremes(rgb)[0] >= white_min]
    enough = NEAR_WHITE_SHARE * rgb.shape[0] * rgb.shape[1]
    log = _LOG_LEVELS[bright]
    least, most = extremes(log)
    # A tint towards pink or violet must be slight: beyond that it is pale tissue that fills the slide.
    pink = np.maximum(log[:, 0], log[:, 2]) - log[:, 1]
    glass = bright[(most - least <= _MAX_WHITE_CHROMA) & (pink <= _MAX_WHITE_STAIN)]
    scanned = glass[extremes(glass)[0] < _UNSCANNED]
    chosen = scanned if len(scanned) >= enough else glass
    if len(chosen) < enough or len(chosen) == 0:
        return np.full(3, DEFAULT_WHITE, np.float32)
    # A mode and not a mean: the pale parts of tissue and uneven light are among these pixels.
    return np.array([_mode(chosen[:, channel]) for channel in range(3)], np.float32)


def _mode(values: NDArray[np.uint8]) -> float:
    counts = np.bincount(values, minlength=256).astype(np.float64)
    return float(np.argmax(np.convolve(counts, np.ones(5), mode="same")))


def optical_density(rgb: Picture, white: Floats) -> Floats:
    """``log10((white + 1) / (value + 1))`` by channel, float32 (H, W, 3), not below zero.

    white: float32 (3,), or (H, W, 3) where it differs from place to place.
    """
    import cv2

    if white.ndim == 3:
        od = cv2.log(white + np.float32(1)) / np.float32(np.log(10)) - np.log10(np.float32(256))
        return np.asarray(np.maximum(od - _LOG_LEVELS[rgb], 0), np.float32)
    levels = np.arange(256, dtype=np.float64)[:, None]
    table = np.maximum(np.log10((white[None].astype(np.float64) + 1) / (levels + 1)), 0).astype(np.float32)
    return np.asarray(cv2.LUT(np.ascontiguousarray(rgb), table[None]), np.float32)


def white_map(rgb: Picture, um_per_px: FloatPair, white_min: float = 200.0) -> Floats:
    """RGB of the glass, float32 (3,), or (H, W, 3) where one colour does not do for the whole slide.

    The single colour of ``white_reference`` stands where all glass is within 0.007 OD of it. Else each place has the
    colour of the glass it is on, smoothed over 0.25 mm within the piece, and tissue that of the nearest glass.
    """
    common = white_reference(rgb, white_min)
    dimmest, brightest = extremes(rgb)
    log = _LOG_LEVELS[rgb]
    least, most = extremes(log)
    # What was not scanned says nothing of the lamp.
    pale = (dimmest >= white_min) & (most - least <= _MAX_TINT) & (dimmest < _UNSCANNED)
    variance = _variance(rgb, um_per_px)
    labels, pieces = _pieces(pale & (variance <= _FLAT_SD**2), log, um_per_px)
    if _share(pieces, rgb) < NEAR_WHITE_SHARE:
        # A noisy picture. One that is alike all over may as well be pale tissue.
        labels, pieces = _pieces(pale & (variance <= (2 * _FLAT_SD) ** 2), log, um_per_px)
        if _share(pieces, rgb) > _MOST_NOISY_SHARE:
            return common
    if not pieces:
        return common
    off_scan = (dimmest >= _UNSCANNED) | (brightest <= 12)
    glass = _glass_pieces(labels, pieces, off_scan, um_per_px, rgb.shape[0] * rgb.shape[1])
    if not glass:
        return common
    drifted = {piece.label: _drift(labels, piece, log, um_per_px) for piece in glass}
    reference = np.log10((common.astype(np.float64) + 1) / 256)
    if all(_stain(reference - colours).max() <= _TINT_THAT_MATTERS for colours in _sampled(glass, drifted, labels)):
        return common
    return _spread(labels, glass, drifted, um_per_px)


def _stain(od: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(od[..., 1] - np.minimum(od[..., 0], od[..., 2]))


def _odd(length_um: float, um_per_px: FloatPair) -> tuple[int, int]:
    """An odd number of pixels, (x, y), at least 3, that come nearest to a length."""
    x, y = (max(2 * round((length_um / um - 1) / 2) + 1, 3) for um in um_per_px)
    return (x, y)


def _variance(rgb: Picture, um_per_px: FloatPair) -> Floats:
    """The largest variance of any channel over a window of 40 um, of values averaged over about 8 um."""
    import cv2

    values = rgb.astype(np.float32)
    fine = tuple(max(round(_NOISE_UM / um), 1) for um in um_per_px)
    if max(fine) > 1:
        values = np.asarray(cv2.blur(values, fine), np.float32)
    window = _odd(_FLAT_WINDOW_UM, um_per_px)
    mean = cv2.blur(values, window)
    variance = cv2.blur(cv2.multiply(values, values), window) - cv2.multiply(mean, mean)
    return np.asarray(extremes(variance)[1], np.float32)


def _share(pieces: list[_Piece], rgb: Picture) -> float:
    return float(sum(piece.area_px for piece in pieces)) / float(rgb.shape[0] * rgb.shape[1])


def _pieces(smooth: Bools, log: Floats, um_per_px: FloatPair) -> tuple[NDArray[np.int32], list[_Piece]]:
    import cv2

    labels, stats = components(smooth)
    areas = stats[:, cv2.CC_STAT_AREA]
    large = np.flatnonzero(areas * um_per_px[0] * um_per_px[1] >= _PIECE_UM2)
    flat_labels = labels.ravel()
    sums = np.stack([np.bincount(flat_labels, log[..., c].ravel(), len(stats)) for c in range(3)], axis=1)
    pieces = []
    for label in large[large > 0]:
        mean = sums[label] / areas[label]
        x, y, w, h = (int(v) for v in stats[label, :4])
        pieces.append(_Piece(int(label), int(areas[label]), (x, y, w, h), float(_stain(-mean)), mean))
    return labels, pieces


def _glass_pieces(
    labels: NDArray[np.int32], pieces: list[_Piece], off_scan: Bools, um_per_px: FloatPair, slide_px: int
) -> list[_Piece]:
    """Those pieces that are glass; none where there is too little of it to tell."""
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
    kept = np.zeros(int(labels.max()) + 1, bool)
    kept[[piece.label for piece in pieces]] = True
    others = kept[labels] | off_scan
    glass: list[_Piece] = []
    doubtful: list[_Piece] = []
    for piece in pieces:
        is_main = piece.tint - main.tint <= _SAME_TINT
        (glass if is_main or _is_field(labels, piece, others, um_per_px) else doubtful).append(piece)
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


def _drift(labels: NDArray[np.int32], piece: _Piece, log: Floats, um_per_px: FloatPair) -> Floats:
    """Colours of a piece, log10 levels float32 (h, w, 3) over its box, smoothed within the piece."""
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
    values = cv2.resize(log[y : y + h, x : x + w] * own[..., None], size, interpolation=cv2.INTER_AREA)
    weight = cv2.GaussianBlur(weight, (0, 0), sigmaX=sigma[0], sigmaY=sigma[1], borderType=edge)
    values = cv2.GaussianBlur(values, (0, 0), sigmaX=sigma[0], sigmaY=sigma[1], borderType=edge)
    smooth = np.asarray(values).reshape(size[1], size[0], 3) / np.maximum(weight, 1e-6)[..., None]
    return np.asarray(cv2.resize(smooth, (w, h), interpolation=cv2.INTER_LINEAR), np.float32)


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
