"""Tissue on an RGB overview, without weights.

The default method rests on one fact: haematoxylin, eosin, DAB and most bright-field dyes absorb green more than they
absorb red or blue (whichever of the two they absorb least), while uneven light, stitching seams, dust, glass edges and
black ink are grey. So ``stain = OD_green - min(OD_red, OD_blue)`` in optical density (Beer-Lambert; Ruifrok and
Johnston 2001) is zero on all of these whatever their brightness, and above zero on the palest eosin. It needs no
histogram with two peaks, so a slide that is all tissue, or none, is no special case. It does need the colour of the
glass, which ``wsi_pipe.tissue.glass`` measures, place by place where fields of view differ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.config import SegmentSettings
from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import FloatPair, TissueMask
from wsi_pipe.tissue.glass import NEAR_WHITE_SHARE, optical_density, white_map
from wsi_pipe.tissue.marks import find_marks
from wsi_pipe.tissue.shapes import Planes, close_gaps, components, drop_lines, grow_values, planes_of

__all__ = ["find_tissue", "share_notes"]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_DARK_SHARE = 0.25
_GREY_SPREAD = 3
_LEAST_CONTRAST = 0.03
_EDGE_REACH_UM = 20.0
_MOST_TISSUE = 0.95
_LEAST_TISSUE = 0.001


class _Candidates(NamedTuple):
    """pale: what may be tissue; sure: what each piece must hold some of."""

    pale: Bools
    sure: Bools


def find_tissue(
    rgb: NDArray[np.uint8], um_per_px: FloatPair, scale_l0: FloatPair, settings: SegmentSettings | None = None
) -> TissueMask:
    """Tissue on an overview of a whole slide.

    rgb: uint8 (H, W, 3), any resolution, best near 8 um/px. um_per_px: micrometres per overview pixel, (x, y).
    scale_l0: level-0 pixels per overview pixel, (x, y). The mask is bool (H, W); where nothing is tissue (blank glass,
    fluorescence, pen and debris only) it is empty and ``empty_reason`` says why.

    Raises MaskError when rgb is not uint8 (H, W, 3) or um_per_px is not above zero.
    """
    settings = settings or SegmentSettings()
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise MaskError(f"an overview must be uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}")
    if not all(math.isfinite(um) and um > 0 for um in um_per_px):
        raise MaskError(f"the overview's resolution {um_per_px} um/px must be above zero")
    blank = np.zeros(rgb.shape[:2], bool)
    planes = planes_of(rgb)
    reason = _dark_reason(planes, settings)
    if reason is not None:
        return TissueMask(blank, scale_l0, reason)
    od = optical_density(rgb, planes, white_map(rgb, um_per_px, settings.white_min, planes))
    marks = find_marks(od, um_per_px, settings)
    candidates = _candidates(rgb, planes, od, marks.core | marks.halo, um_per_px, settings)
    mask = _cleaned(candidates, marks.core, marks.halo, um_per_px, settings)
    if mask.any():
        return TissueMask(mask, scale_l0)
    marked = float(marks.core.mean())
    if marked > 0:
        reason = f"no tissue: only pen or debris, on {marked:.1%} of the slide"
    else:
        reason = f"no tissue: no stained area of {settings.min_area_um2:g} um2 or more"
    reason += f"; {_remedies(settings)}"
    return TissueMask(blank, scale_l0, reason)


def _remedies(settings: SegmentSettings) -> str:
    """Options that may find what was not found."""
    other = "--method od finds stains that are not pink, violet or brown"
    if settings.method != "stain":
        other = "--method stain goes by colour"
    lower = f"--stain-seed (now {settings.stain_seed:g}) and --min-area-um2 lower find paler and smaller tissue"
    ink = (
        ", --no-drop-pen and --no-drop-dark keep what looks like ink" if settings.drop_pen or settings.drop_dark else ""
    )
    return f"{other}, {lower}{ink}"


def share_notes(mask: TissueMask, size_l0: tuple[int, int]) -> list[str]:
    """What a user should know of a mask that covers more of the slide than tissue does, or hardly any of it.

    size_l0: (width, height) of the slide in level-0 pixels, of which the mask's last pixels may hang over.
    """
    if mask.is_empty:
        return []
    covered = float(mask.mask.sum()) * mask.scale_l0[0] * mask.scale_l0[1] / (size_l0[0] * size_l0[1])
    if covered > _MOST_TISSUE:
        remedy = "if there is glass, look at the picture and raise --stain-min, or try --method od"
        return [f"tissue: {min(covered, 1):.1%} of the slide is taken for tissue; {remedy}"]
    if covered < _LEAST_TISSUE:
        remedy = "if there is more, lower --stain-seed or --min-area-um2, or try --method od"
        return [f"tissue: only {covered:.3%} of the slide is taken for tissue; {remedy}"]
    return []


def _dark_reason(planes: Planes, settings: SegmentSettings) -> str | None:
    """Why a slide is not bright-field, or None; black that was not scanned does not make it dark."""
    dimmest, brightest = planes.least, planes.most
    if float(np.mean(dimmest >= settings.white_min)) >= NEAR_WHITE_SHARE:
        return None
    seen = brightest > 12  # black that was never scanned says nothing
    if not seen.any():
        return "dark background: the slide is black"
    if float(np.mean(brightest[seen] < settings.dark_background)) >= _DARK_SHARE:
        return (
            f"dark background: {np.mean(brightest < settings.dark_background):.0%} of the slide is below grey level "
            f"{settings.dark_background:g} and next to nothing is white, as in fluorescence"
        )
    return None


def _candidates(
    rgb: NDArray[np.uint8], planes: Planes, od: Planes, marked: Bools, um_per_px: FloatPair, settings: SegmentSettings
) -> _Candidates:
    if settings.method == "otsu-saturation":
        import cv2

        saturation = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1].astype(np.float32)
        smooth = _smooth(saturation, um_per_px, settings.smooth_um)
        return _above(smooth, _otsu(smooth[~marked], 256.0))
    is_grey = float(np.mean(planes.most - planes.least <= _GREY_SPREAD)) > 0.999
    if settings.method == "od" or is_grey:
        density = _smooth(np.stack(od[:3], axis=2).mean(axis=2), um_per_px, settings.smooth_um)
        if is_grey and float(np.ptp(np.percentile(density, (1, 99)))) < _LEAST_CONTRAST:
            return _above(density, np.inf)  # one grey all over is glass under a dim lamp
        # Otsu splits any histogram: the limits keep it from splitting glass from glass or tissue from tissue.
        return _above(density, min(max(_otsu(density[~marked], 2.0), 0.05), 0.20))
    stain = _smooth(od.g - np.minimum(od.r, od.b), um_per_px, settings.smooth_um)
    low = _pale_from(stain[(od.most < 0.05) & ~marked], settings)
    pale = stain > low
    if settings.edge_share > 0:
        # At the edge of dark tissue the blur of optics and overview reaches outwards: the edge is where the density has
        # a share of what it has a little further in.
        pale &= stain > settings.edge_share * grow_values(stain, _EDGE_REACH_UM, um_per_px)
    return _Candidates(pale, pale & (stain > settings.stain_seed))


def _pale_from(glass: Floats, settings: SegmentSettings) -> float:
    """The stain density from which a pixel may be pale tissue, by that of the glass, which is noise."""
    # The noise's own measure takes two medians. Where more than half of the glass lies within half of what would
    # matter, they lie within all of it.
    within = settings.stain_min / max(settings.noise_factor, 1e-9) / 1.4826 / 2 * (1 - 1e-5)
    if 2 * np.count_nonzero(np.abs(glass) <= within) > len(glass) or not len(glass):
        return settings.stain_min
    noise = float(1.4826 * np.median(np.abs(glass - np.median(glass))))
    # Half of the seed's density is the most that noise can ask for: beyond it the slide is all pale tissue.
    return max(settings.stain_min, min(settings.noise_factor * noise, (settings.stain_min + settings.stain_seed) / 2))


def _above(values: Floats, threshold: float) -> _Candidates:
    above = values > threshold
    return _Candidates(above, above)


def _otsu(values: Floats, top: float) -> float:
    """Otsu's threshold (1979) over 256 bins from 0 to ``top``."""
    counts = np.histogram(values, bins=256, range=(0.0, top))[0].astype(np.float64)
    centres = (np.arange(256) + 0.5) * top / 256
    below = np.cumsum(counts)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[int(np.argmax(np.nan_to_num(between)))])


def _smooth(values: Floats, um_per_px: FloatPair, sigma_um: float) -> Floats:
    import cv2

    sx, sy = sigma_um / um_per_px[0], sigma_um / um_per_px[1]
    if max(sx, sy) < 0.3:  # a Gaussian that narrow changes nothing
        return values
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigmaX=max(sx, 0.01), sigmaY=max(sy, 0.01)), np.float32)


def _cleaned(
    candidates: _Candidates, core: Bools, halo: Bools, um_per_px: FloatPair, settings: SegmentSettings
) -> Bools:
    """Gaps closed, holes filled, specks, edges of glass and unsure pieces dropped, marks cut out."""
    import cv2

    pixel_um2 = um_per_px[0] * um_per_px[1]
    marked = core | halo
    pale = close_gaps(candidates.pale & ~marked, um_per_px, settings.close_um) & ~marked
    labels, stats = components(pale)
    keep = stats[:, cv2.CC_STAT_AREA] * pixel_um2 >= settings.min_area_um2
    has_seed = np.zeros(len(stats), bool)
    has_seed[labels[candidates.sure & ~marked]] = True
    keep &= has_seed
    keep[0] = False
    keep = drop_lines(labels, stats, keep, um_per_px, settings.edge_width_um)
    mask: Bools = keep[labels]
    # Small holes are filled, but not where pen or debris lies.
    holes, hole_stats = components(~mask)
    small = hole_stats[:, cv2.CC_STAT_AREA] * pixel_um2 < settings.max_hole_um2
    small[0] = False
    return mask | (small[holes] & ~core)
