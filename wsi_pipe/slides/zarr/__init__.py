"""OME-Zarr: slides as folders, or URLs, of chunks."""
