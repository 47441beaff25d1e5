"""Where tissue and annotated regions are on a slide: found on an overview, and in and out of GeoJSON.

Pure functions on arrays and parsed JSON.
"""

from wsi_pipe.tissue.classes import Region, region_coverage, regions_of
from wsi_pipe.tissue.detect import find_tissue, share_notes
from wsi_pipe.tissue.frame import FRAMES, Bounds, Placed, frame_statement, place_areas, qupath_origin
from wsi_pipe.tissue.geojson import (
    TISSUE_RGB,
    GivenMask,
    StoredMask,
    mask_from_geojson,
    mask_to_geojson,
    read_mask,
    stored_mask,
)
from wsi_pipe.tissue.outline import fill_polygons, trace_mask

__all__ = [
    "FRAMES",
    "TISSUE_RGB",
    "Bounds",
    "GivenMask",
    "Placed",
    "Region",
    "StoredMask",
    "fill_polygons",
    "find_tissue",
    "frame_statement",
    "mask_from_geojson",
    "mask_to_geojson",
    "place_areas",
    "qupath_origin",
    "read_mask",
    "region_coverage",
    "regions_of",
    "share_notes",
    "stored_mask",
    "trace_mask",
]
