"""What a synthetic slide is made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import IntPair

__all__ = ["INKS", "SIGNALS", "STAINS", "Signal", "SlideSpec", "Stains"]

Signal = Literal["coarse", "middle", "fine"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
Stains = Literal["he", "dab", "pas"]
STAINS: tuple[Stains, ...] = get_args(Stains)
INKS = ("blue", "green", "black", "red")


@dataclass(frozen=True)
class SlideSpec:
    """A synthetic slide, wholly determined by these values.

    size_px: (width, height) of level 0. mpp: micrometres per level-0 pixel. label: 1 has lesions, 0 has none; all else
    is the same. signal: what tells a lesion: "coarse" is sheets of crowded, dark, large nuclei, seen at 5x; "middle"
    is larger, paler nuclei with a rim and a nucleolus at the same amount of stain, of which 5x keeps a weak trace;
    "fine" is grains of chromatin that average to exactly nothing over 2 um (if that is a whole number of pixels), so
    that 20x shows them and 5x cannot. strength: of the signal, 0 to 1. lesion_fraction: of the tissue.
    tissue_fraction: of the slide. stain_variation: 0 for one stain on all slides, 1 for what laboratories differ by.
    pen, debris, pale, holes, fat, stitching: what else is on the slide.

    stain: haematoxylin with eosin, with DAB in eosin's place, or periodic acid-Schiff. tint: share of red, green and
    blue light that the empty glass lets through. field_tint: share of green light (and a quarter as much red) that
    about half of the fields of view lose, so that lilac fields lie beside untinted ones. lamp_drift: share of green
    light lost from the left edge to the right one. unscanned: "white" or "black", with stitching. ink: the pen's colour
    ("" for any), ink_bleed_um: standard deviation of its soft rim. blur_um: standard deviation of the Gaussian by which
    blur_fraction of the slide is out of focus. folds, bubbles: bands of tissue that lie twice, and rings of air.
    """

    seed: int
    size_px: IntPair = (2048, 2048)
    mpp: float = 0.5
    label: int = 0
    signal: Signal = "coarse"
    strength: float = 1.0
    lesion_fraction: float = 0.3
    tissue_fraction: float = 0.55
    stain_variation: float = 1.0
    pen: bool = False
    debris: bool = False
    pale: bool = False
    holes: bool = True
    fat: bool = True
    stitching: bool = True
    stain: Stains = "he"
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    field_tint: float = 0.0
    lamp_drift: float = 0.0
    unscanned: Literal["white", "black"] = "white"
    ink: str = ""
    ink_bleed_um: float = 0.0
    blur_um: float = 0.0
    blur_fraction: float = 1.0
    folds: bool = False
    bubbles: bool = False

    def __post_init__(self) -> None:
        if min(self.size_px) < 1:
            raise ConfigError(f"a synthetic slide of {self.size_px[0]} x {self.size_px[1]} px is empty")
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ConfigError(f"mpp {self.mpp} um/px must be above zero")
        if self.signal not in SIGNALS:
            raise ConfigError(f"lesion signal {self.signal!r} must be one of {', '.join(SIGNALS)}")
        if self.label not in (0, 1):
            raise ConfigError(f"label {self.label!r} must be 0 or 1")
        for name, choices in (("stain", STAINS), ("unscanned", ("white", "black")), ("ink", ("", *INKS))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r} must be one of {', '.join(filter(None, choices))}")
        if len(self.tint) != 3 or not all(0 < share <= 1 for share in self.tint):
            raise ConfigError(f"tint {self.tint} must be three shares of light above 0 and up to 1")
        for name in ("blur_um", "ink_bleed_um"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} {getattr(self, name)} must be a finite number, zero or above")
        if self.blur_um and self.signal == "fine" and self.label == 1:
            raise ConfigError("a fine signal cannot be out of focus", remedy="give another signal, or blur_um 0")
        fractions = ("strength", "lesion_fraction", "tissue_fraction", "stain_variation")
        for name in (*fractions, "field_tint", "lamp_drift", "blur_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} must lie between 0 and 1")

        if self.label == 1 and not (self.tissue_fraction > 0 and self.lesion_fraction > 0):
            raise ConfigError(
                "a slide of label 1 has a lesion, which needs tissue",
                remedy="give tissue_fraction and lesion_fraction above 0",
            )

    @property
    def size_um(self) -> tuple[float, float]:
        """(width, height) in micrometres."""
        return (self.size_px[0] * self.mpp, self.size_px[1] * self.mpp)
