"""An encoder of tiles and the classifier on top of it, trained together from slide labels and a teacher's word.

Stage 2 with the encoder not frozen: what the teacher says of a slide reaches the tiles' network, on slides without a
label too.
"""

from __future__ import annotations

from lrmil.finetuning.cohort import TileBags, cohort_notes, open_tiles, places_of, seen_by
from lrmil.finetuning.loop import fit_tiles, slide_logits
from lrmil.finetuning.network import TileClassifier
from lrmil.finetuning.run import FinetunedFold, FinetuneRequest, finetune_folds, load_start
from lrmil.finetuning.settings import FinetuneSettings, load_finetune_settings
from lrmil.finetuning.tiles import HeldTiles, SlideTiles, TileSlide

__all__ = [
    "FinetuneRequest",
    "FinetuneSettings",
    "FinetunedFold",
    "HeldTiles",
    "SlideTiles",
    "TileBags",
    "TileClassifier",
    "TileSlide",
    "cohort_notes",
    "finetune_folds",
    "fit_tiles",
    "load_finetune_settings",
    "load_start",
    "open_tiles",
    "places_of",
    "seen_by",
    "slide_logits",
]
