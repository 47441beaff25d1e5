"""The headings of ``wsi-pipe``'s options, those that the long help alone shows, and their units."""

from __future__ import annotations

from wsi_pipe.cli.layout import Layout

__all__ = ["ARGUMENTS", "MESSAGES", "UNITS", "WSI_PIPE"]

ARGUMENTS = {"SLIDES": "Files, folders (searched through), URLs, or a CSV with a column slide."}

MESSAGES = {
    "Output": ("--each", "--json", "--log-json", "--title"),
    "Help": ("--quiet", "--verbose", "--help", "--help-all"),
}
"""The last headings of every command, of both programs."""

UNITS = {
    "--workers": "N",
    "--timeout": "SECONDS",
    "--wait-workers": "SECONDS",
    "--seed": "SEED",
    "--batch-size": "TILES",
    "--read-threads": "THREADS",
    "--threads": "THREADS",
    "--memory": "MIB",
    "--cache-size": "GIB",
    "--tile-px": "PX",
    "--limit": "SLIDES",
}

WSI_PIPE = Layout(
    "wsi-pipe",
    {
        "Job": (
            "--out", "--config", "--set", "--redo", "--report", "--keep-features", "--anonymise", "--salt",
        ),
        "Slides": (
            "--slides", "--slide-mpp", "--override-mpp", "--reader", "--scene", "--z", "--only", "--limit",
            "--retry-failed",
        ),
        "Drawn by hand": ("--mask", "--annotations", "--tissue-class", "--frame"),
        "Tissue": (
            "--method", "--mask-mpp", "--stain-min", "--stain-seed", "--edge-share", "--noise-factor", "--white-min",
            "--smooth-um", "--close-um", "--min-area-um2", "--max-hole-um2", "--drop-pen", "--drop-dark", "--pen-od",
            "--dark-od", "--mark-area-um2", "--mark-margin-um", "--edge-width-um", "--dark-background",
        ),
        "Grids": (
            "--resolution", "--tile-px", "--overlap", "--min-tissue", "--judge-um", "--min-sharpness",
            "--mpp-tolerance", "--allow-upsampling",
        ),
        "Features": (
            "--encoder", "--encoder-lr", "--normalise", "--layers", "--dtype", "--precision", "--random-weights",
            "--primary",
        ),
        "Tiles as images": ("--save-tiles", "--save-most"),
        "Machine": (
            "--workers", "--devices", "--batch-size", "--read-threads", "--memory", "--compile", "--timeout", "--cache",
            "--cache-size", "--scheduler", "--resources", "--wait-workers",
        ),
        "Projection to an archive": (
            "--slides-per-year", "--price-per-hour", "--price-per-kwh", "--currency", "--watts-per-core",
        ),
        "Measurement": ("--repeats", "--compare", "benchmark --cache", "--from", "--sample", "--calibrate"),
        **MESSAGES,
    },
    rare=frozenset({
        "--anonymise", "--salt", "--override-mpp", "--reader", "--scene", "--z", "--only", "--limit", "--report",
        "--keep-features", "--mask", "--annotations", "--tissue-class", "--frame", "--method", "--mask-mpp",
        "--stain-min", "--stain-seed", "--edge-share", "--noise-factor", "--white-min", "--smooth-um", "--close-um",
        "--min-area-um2", "--max-hole-um2", "--drop-pen", "--drop-dark", "--pen-od", "--dark-od", "--mark-area-um2",
        "--mark-margin-um", "--edge-width-um", "--dark-background", "--overlap", "--min-tissue", "--judge-um",
        "--min-sharpness", "--mpp-tolerance", "--allow-upsampling", "--layers", "--dtype", "--precision",
        "--random-weights", "--batch-size", "--read-threads", "--memory", "--compile", "--timeout", "--cache",
        "--cache-size", "--scheduler", "--resources", "--wait-workers", "--log-json", "--price-per-hour",
        "--price-per-kwh", "--currency", "--watts-per-core", "--metadata", "--each", "--primary", "--tile-px",
    }),
    units=UNITS | {
        "--scene": "SCAN",
        "--z": "PLANE",
        "--overlap": "PX",
        "--min-tissue": "SHARE",
        "--judge-um": "UM",
        "--mpp-tolerance": "SHARE",
        "--min-sharpness": "SHARPNESS",
        "--sample": "SLIDES",
        "--calibrate": "SLIDES",
        "--save-most": "TILES",
        "--repeats": "PASSES",
        "--slides-per-year": "SLIDES",
        "--price-per-hour": "PRICE",
        "--price-per-kwh": "PRICE",
        "--watts-per-core": "WATTS",
        "demo --slides": "SLIDES",
    },
    arguments=ARGUMENTS,
)  # fmt: skip
