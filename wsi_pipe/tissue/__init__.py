"""Where tissue is on a slide: found on an overview, and in and out of GeoJSON. Pure functions on arrays."""

from wsi_pipe.tissue.detect import find_tissue
from wsi_pipe.tissue.geojson import (
    TISSUE_RGB,
    StoredMask,
    geojson_notices,
    mask_from_geojson,
    mask_to_geojson,
    stored_mask,
)
from wsi_pipe.tissue.outline import fill_polygons, trace_mask

__all__ = [
    "TISSUE_RGB",
    "StoredMask",
    "fill_polygons",
    "find_tissue",
    "geojson_notices",
    "mask_from_geojson",
    "mask_to_geojson",
    "stored_mask",
    "trace_mask",
]
