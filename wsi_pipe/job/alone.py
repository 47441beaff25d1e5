"""The stages of one slide as values, without a job: what a run would make of it, fingerprints and all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wsi_pipe.bag import Bag, BagLevel, Features, TileValues
from wsi_pipe.config import ExtractSettings, SegmentSettings, TileSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.extract import SlideFeatures
from wsi_pipe.geometry import TissueMask
from wsi_pipe.job.annotate import annotate, read_annotations, stored_annotation
from wsi_pipe.job.features import Wanted, attrs_of_bag, computed_features, computed_quality, wanted_features
from wsi_pipe.job.fits import Identity, segment_fingerprint
from wsi_pipe.job.focus import drop_blurred, left_out_notes
from wsi_pipe.job.given import placed_mask, read_given
from wsi_pipe.job.grids import laid_attrs
from wsi_pipe.job.masks import how_found
from wsi_pipe.job.opening import missing_mpp
from wsi_pipe.job.prepared import Prepared
from wsi_pipe.job.record import utc_now
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.overview import read_overview
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue, share_notes

__all__ = ["FoundTissue", "LevelFeatures", "bag_of", "find_mask", "lay_grids", "level_features"]


@dataclass(frozen=True)
class FoundTissue:
    """A slide's mask, what made it, and what is to be said of it. fingerprint: of the stage, as in a bag."""

    mask: TissueMask
    settings: SegmentSettings
    fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LevelFeatures:
    """One encoder's features of one grid, and the quality of its tiles that was measured on the way."""

    wanted: Wanted
    features: Features
    quality: Mapping[str, TileValues]


def find_mask(entry: SlideEntry, slide: Slide, settings: SegmentSettings, reader: str) -> FoundTissue:
    """The mask of a slide: the one given for it, else the tissue that is found.

    Raises MissingMppError, MaskError for a given mask that cannot be used, SlideReadError.
    """
    mpp = slide.pyramid.isotropic_mpp
    if mpp is None:
        raise missing_mpp(entry)
    given = read_given(entry)
    how = how_found(entry, slide, settings, given[1] if given else None)
    stage = segment_fingerprint(slide.info.fingerprint, mpp, reader, how)
    notes: tuple[str, ...] = ()
    if given is None:
        overview = read_overview(slide, settings.mpp)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, settings)
    else:
        placed = placed_mask(entry, slide, settings, given[0])
        mask, notes = placed.mask, placed.notes
    return FoundTissue(mask, settings, stage, (*notes, *share_notes(mask, slide.pyramid.size_l0)))


def lay_grids(entry: SlideEntry, slide: Slide, tissue: FoundTissue, settings: TileSettings) -> Prepared:
    """The grids on a mask, with the root attributes of the bag that they belong into and the slide's annotations.

    Raises ResolutionError, MissingMppError, MaskError for annotations that cannot be used, and with
    ``settings.min_sharpness``, which reads every tile, SlideReadError.
    """
    grids = plan_grids(slide.pyramid, tissue.mask, settings)
    left_out = ""
    if settings.min_sharpness:
        grids, left_out = drop_blurred(slide, grids, settings.min_sharpness)
    identity = Identity(slide, entry.path)
    attrs = laid_attrs(entry, slide, identity, grids, tissue.mask, tissue.fingerprint, settings, left_out)
    notes = (*tissue.notes, *left_out_notes(left_out))
    values: dict[str, dict[str, TileValues]] = {}
    annotations = read_annotations(entry, slide, attrs.fingerprint_tile)
    if annotations is not None:
        values, _, text = annotate(annotations, entry.frame, slide, grids)
        attrs = dataclasses.replace(attrs, annotation=text)
        notes = (*notes, *map(str, stored_annotation(text)["notes"]))
    return Prepared(entry, attrs, grids, tuple(grid.label for grid in grids), notes=notes, annotation=values)


def level_features(
    prepared: Prepared, label: str, computed: SlideFeatures, encoder: Encoder, settings: ExtractSettings, reader: str
) -> LevelFeatures:
    """What the engine computed of one grid with one encoder, as a bag keeps it.

    settings: those of the computation, whose one encoder stands under the name that ``encoder`` has.
    """
    (wanted,) = wanted_features(
        dataclasses.replace(prepared, asked=(label,)), settings, {encoder.info.name: encoder.info}, reader
    )
    (_, features) = computed_features(computed, [wanted])[wanted.fingerprint]
    if not len(features.values):
        # As a job has it: nothing was run that could have had layers.
        features = dataclasses.replace(features, layers={})
    return LevelFeatures(wanted, features, computed_quality(computed, label))


def bag_of(prepared: Prepared, levels: Sequence[LevelFeatures]) -> Bag:
    """The bag of all grids of a slide and these features of them; of the coarsest, the first are the primary ones."""
    attrs, bag_levels = prepared.attrs, []
    for grid in prepared.grids:
        own: dict[str, Features] = {}
        quality: Mapping[str, TileValues] = {}
        for item in (item for item in levels if item.wanted.label == grid.label):
            info = item.wanted.info
            saw = info.seen.part_of(attrs.case_id, attrs.slide_fingerprint)
            own[info.slug] = dataclasses.replace(item.features, encoder_saw=saw)
            quality = item.quality or quality
        labels = prepared.annotation.get(grid.label, {}) if prepared.annotation else {}
        bag_levels.append(BagLevel(grid, own, {}, labels, quality))
    wanted = [item.wanted for item in levels]
    attrs = dataclasses.replace(attrs_of_bag(prepared, wanted, None, bag_levels), created_utc=utc_now())
    return Bag(attrs, tuple(bag_levels))
