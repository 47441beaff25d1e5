"""The bag: one HDF5 file a slide with the coordinates and features of all its grids.

``values`` holds what a bag contains, ``write`` puts it on disk, ``read`` gets it back, ``check`` says what is wrong
with a file, ``skim`` goes through one that may hang its reader. The schema is documented in ``docs/bag.md``.
"""

from __future__ import annotations

from wsi_pipe.bag.check import check_bag, check_feature_file
from wsi_pipe.bag.read import (
    BagHeader,
    BagLevelView,
    FeatureFileHeader,
    FeatureHeader,
    read_attention,
    read_attrs,
    read_bag,
    read_feature_file,
    read_feature_header,
    read_grids,
    read_header,
    read_level,
    read_quality,
    read_slide_vectors,
)
from wsi_pipe.bag.safety import refuse_unsafe, unreachable
from wsi_pipe.bag.skim import skim_file
from wsi_pipe.bag.values import (
    SCHEMA,
    SCHEMA_VERSION,
    Bag,
    BagAttrs,
    BagLevel,
    Features,
    SlideVector,
    TileValues,
    content_digest,
)
from wsi_pipe.bag.write import write_attention, write_bag, write_feature_file, write_slide_vector

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "Bag",
    "BagAttrs",
    "BagHeader",
    "BagLevel",
    "BagLevelView",
    "FeatureFileHeader",
    "FeatureHeader",
    "Features",
    "SlideVector",
    "TileValues",
    "check_bag",
    "check_feature_file",
    "content_digest",
    "read_attention",
    "read_attrs",
    "read_bag",
    "read_feature_file",
    "read_feature_header",
    "read_grids",
    "read_header",
    "read_level",
    "read_quality",
    "read_slide_vectors",
    "refuse_unsafe",
    "skim_file",
    "unreachable",
    "write_attention",
    "write_bag",
    "write_feature_file",
    "write_slide_vector",
]
