"""The formats that features are exported to, by the name on the command line."""

from __future__ import annotations

from wsi_pipe.interop.anndata_file import AnnDataExporter
from wsi_pipe.interop.clam import ClamExporter
from wsi_pipe.interop.slide2vec import Slide2vecExporter
from wsi_pipe.interop.stamp import StampExporter
from wsi_pipe.interop.trident import TridentExporter
from wsi_pipe.interop.values import Exporter
from wsi_pipe.interop.zarr_store import ZarrExporter

__all__ = ["EXPORTERS"]

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        ClamExporter(),
        TridentExporter(),
        StampExporter(),
        Slide2vecExporter(),
        AnnDataExporter(),
        ZarrExporter(),
    )
}
