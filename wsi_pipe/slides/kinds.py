"""What the ending of a file's name says of it: a slide that is read, one that is not, a plain image, or something else.

Endings only sort files; what a file is, its reader finds out from its bytes.
"""

from __future__ import annotations

from pathlib import PurePath

__all__ = ["NOT_READ", "PLAIN_IMAGES", "SLIDE_EXTENSIONS", "companion_folder", "extension", "may_be_dicom"]

SLIDE_EXTENSIONS = frozenset(
    {
        ".svs", ".tif", ".tiff", ".ptif", ".ptiff", ".qptiff", ".btf", ".tf2", ".tf8", ".ndpi", ".mrxs", ".scn", ".bif",
        ".vms", ".vmu", ".svslide", ".dcm", ".dicom", ".czi", ".jp2", ".jpx",
    }
)  # fmt: skip
"""What a folder is searched for, beside folders that are OME-Zarr stores and DICOM files without an ending."""

PLAIN_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".pnm", ".ppm"})
"""Taken only when they are named: folders of slides often hold pictures of labels and thumbnails."""

NOT_READ = {
    ".isyntax": "Philips iSyntax",
    ".i2syntax": "Philips iSyntax 2",
    ".vsi": "Olympus or Evident cellSens",
    ".ets": "Olympus or Evident cellSens",
    ".oir": "Olympus or Evident",
    ".oib": "Olympus",
    ".oif": "Olympus",
    ".zvi": "Zeiss ZVI",
    ".lsm": "Zeiss LSM",
    ".lif": "Leica LIF",
    ".lof": "Leica LOF",
    ".xlef": "Leica XLEF",
    ".nd2": "Nikon ND2",
    ".ims": "Imaris",
    ".ndpis": "Hamamatsu fluorescence set",
    ".afi": "Aperio fluorescence set",
    ".mds": "Motic",
    ".mdsx": "Motic",
    ".kfb": "KFBIO",
    ".kfbf": "KFBIO fluorescence",
    ".tmap": "UNIC",
    ".tron": "InteliPath",
    ".sdpc": "SQRAY",
    ".dyqx": "SQRAY",
    ".dzi": "Deep Zoom",
    ".szi": "Smart Zoom",
    ".jxl": "JPEG XL",
    ".hdx": "Hamamatsu",
    ".iris": "Iris",
}
"""Ending -> whose format it is: slides that no reader here understands."""

_NO_PICTURES = frozenset(
    {
        ".txt", ".md", ".log", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".doc", ".docx", ".pdf", ".json", ".jsonl",
        ".geojson", ".xml", ".yml", ".yaml", ".toml", ".ini", ".cfg", ".html", ".htm", ".css", ".js", ".py", ".ipynb",
        ".r", ".m", ".sh", ".bat", ".h5", ".hdf5", ".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".parquet",
        ".db", ".sqlite", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".dat", ".part", ".partial",
        ".tmp", ".bak", ".lock", ".md5", ".sha256", ".crc", ".annotations", ".ndpa", ".qpdata", ".qpproj", ".lnk",
        ".exe", ".dll", ".so", ".mp4", ".avi", ".svg", ".opt", ".map",
    }
)  # fmt: skip
_NO_DICOM = (SLIDE_EXTENSIONS - {".dcm", ".dicom"}) | PLAIN_IMAGES | NOT_READ.keys() | _NO_PICTURES


def extension(name: str) -> str:
    """The last ending of a file's name in small letters, with its dot; nothing where there is none."""
    return PurePath(name).suffix.lower()


def may_be_dicom(name: str) -> bool:
    """Whether a file of this name may be DICOM: archives call its files by numbers, or without any ending.

    The first bytes of such files are looked at, so endings that say otherwise are told apart by name: a folder of
    100,000 slides on a network file system is not read for it.
    """
    return not name.startswith(".") and name.upper() != "DICOMDIR" and extension(name) not in _NO_DICOM


def companion_folder(name: str) -> str | None:
    """The folder beside a slide of this name that holds its pixels, and no slides of its own; None without one."""
    path = PurePath(name)
    ending = extension(name)
    return path.stem if ending == ".mrxs" else f"_{path.stem}_" if ending == ".vsi" else None
