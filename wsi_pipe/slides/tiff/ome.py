"""What OME-XML says of a TIFF: which pictures it holds, which directories they are made of, and of what light.

References: the OME data model 2016-06; OME-TIFF specification, "TiffData" (a plane's directory follows from the
order of dimensions where it is not stated).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from wsi_pipe.errors import NotAPictureError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.tiff.layout import positive

__all__ = ["NO_NAME", "OME_NAMESPACE", "TRANSMITTED", "OmeImage", "ome_images"]

OME_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/"
UM_PER_UNIT = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6,
    "Å": 1e-4, "in": 25400.0,
}  # fmt: skip

TRANSMITTED = re.compile(r"transmi|bright[ _-]?field", re.IGNORECASE)
"""Says of a channel that its light is let through. Zeiss states a wavelength and a "fluor" of such channels too."""

_LIGHT = re.compile(r"fluoresc", re.IGNORECASE)
_DYES = re.compile(
    r"\b(?:DAPI|Hoechst\w*|FITC|TRITC|[EGYRC]+FP|mCherry|Cy ?-?[2357](?:\.5)?|Alexa\w*|AF\d{3}|Opal ?\d+|Rhodamine\w*|"
    r"Texas ?Red)\b",
    re.IGNORECASE,
)
NO_NAME = re.compile(r"(?:channel|ch|c)?[\s:_#-]*\d*(?:[:_]\d+)*", re.IGNORECASE)
_COLOUR_WORDS = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
_COLOUR_VALUES = (0xFF0000, 0x00FF00, 0x0000FF)


@dataclass(frozen=True)
class _Channel:
    """name: as stated, "" where none or a mere number. samples: a pixel. colour: RGB, or None. fluorescent: says so."""

    name: str
    samples: int
    colour: int | None
    fluorescent: bool


@dataclass(frozen=True)
class OmeImage:
    """One Image element.

    name: as stated. size_px: (width, height). type: of samples, such as "uint8". sizes: planes in (z, c, t), c counting
    channels, not samples. planes: directory in the main chain of each plane (z, c, t), None where it lies elsewhere.
    mpp: (x, y) um/px as stated, or None. objective: nominal magnification, or None.
    """

    name: str
    size_px: IntPair
    type: str
    channels: tuple[_Channel, ...]
    sizes: tuple[int, int, int]
    planes: dict[tuple[int, int, int], int | None]
    mpp: FloatPair | None
    objective: float | None

    @property
    def is_coloured(self) -> bool:
        """Whether one plane holds the colours."""
        return len(self.channels) == 1 and self.channels[0].samples in (3, 4)

    @property
    def states_colours(self) -> bool:
        """Whether three channels of one sample are named, or where they have no names coloured, red, green and blue."""
        if len(self.channels) != 3 or any(c.samples != 1 or c.fluorescent for c in self.channels):
            return False
        names = [c.name.strip().lower() for c in self.channels]
        if all(name in words for name, words in zip(names, _COLOUR_WORDS, strict=True)):
            return True
        return not any(names) and [c.colour for c in self.channels] == list(_COLOUR_VALUES)

    @property
    def may_be_colours(self) -> bool:
        """Whether three channels of one sample say nothing of themselves, so that the picture must tell."""
        if len(self.channels) != 3 or any(c.samples != 1 or c.fluorescent or c.name for c in self.channels):
            return False
        return all(c.colour in (None, 0xFFFFFF) for c in self.channels)

    @property
    def is_fluorescent(self) -> bool:
        """Whether a channel states that its light is fluorescence."""
        return any(c.fluorescent for c in self.channels)

    def described(self) -> str:
        """What its planes are, in words."""
        z, c, t = self.sizes
        names = ", ".join(channel.name for channel in self.channels if channel.name)
        parts = [f"{c} channels{f' ({names})' if names else ''}"] if c > 1 else []
        parts += [f"{z} focal planes"] if z > 1 else []
        return " and ".join(parts + ([f"{t} time points"] if t > 1 else [])) or "one picture"


def ome_images(name: str, root: Element) -> list[OmeImage]:
    """All images, in order. Raises NotAPictureError where the file does not hold all that it describes."""
    objectives = {
        e.get("ID", ""): positive(e.get("NominalMagnification")) for e in root.iter() if _local(e) == "Objective"
    }
    images: list[OmeImage] = []
    at = 0
    for element in (e for e in root if _local(e) == "Image"):
        pixels = next((e for e in element if _local(e) == "Pixels"), None)
        if pixels is None:
            continue
        image, at = _image(name, element, pixels, objectives, at)
        images.append(image)
    return images


def _image(
    name: str, element: Element, pixels: Element, objectives: dict[str, float | None], at: int
) -> tuple[OmeImage, int]:
    size_c, size_z, size_t = (_whole(pixels, key) for key in ("SizeC", "SizeZ", "SizeT"))
    stated = [e for e in pixels if _local(e) == "Channel"]
    samples = [_whole(e, "SamplesPerPixel") for e in stated]
    if sum(samples) != size_c:
        # Old writers give no channels, or do not say how many samples they have: three are then one RGB picture.
        per = 3 if size_c == 3 and len(stated) <= 1 else max(size_c // max(len(stated), 1), 1)
        samples = [per] * (size_c // per)
    channels = tuple(_channel(stated[i] if i < len(stated) else None, count, pixels) for i, count in enumerate(samples))
    sizes = (size_z, len(channels), size_t)
    planes, at = _planes(name, pixels, sizes, at)
    reference = next((e.get("ID", "") for e in element if _local(e) in ("ObjectiveSettings", "ObjectiveRef")), "")
    power = objectives.get(reference)
    if power is None:
        power = next((value for value in objectives.values() if value is not None), None)
    x, y = _length(pixels, "PhysicalSizeX"), _length(pixels, "PhysicalSizeY")
    image = OmeImage(
        name=element.get("Name", "") or "",
        size_px=(_whole(pixels, "SizeX"), _whole(pixels, "SizeY")),
        type=pixels.get("Type", pixels.get("PixelType", "uint8")),
        channels=channels,
        sizes=sizes,
        planes=planes,
        mpp=None if x is None or y is None else (x, y),
        objective=power,
    )
    return image, at


def _channel(element: Element | None, samples: int, pixels: Element) -> _Channel:
    if element is None:
        return _Channel("", samples, None, False)
    name = element.get("Name") or ""
    try:
        # Signed, with the opacity in the last byte.
        colour = None if element.get("Color") is None else (int(element.get("Color", "")) & 0xFFFFFFFF) >> 8
    except ValueError:
        colour = None
    words = " ".join(element.get(key) or "" for key in ("ContrastMethod", "IlluminationType", "AcquisitionMode"))
    said = f"{words} {name} {element.get('Fluor') or ''}"
    glows = bool(_LIGHT.search(words) or _DYES.search(name)) or (
        not TRANSMITTED.search(said) and any(element.get(k) for k in ("EmissionWavelength", "Fluor"))
    )
    return _Channel("" if NO_NAME.fullmatch(name.strip()) else name, samples, colour, glows)


_MAX_PLANES = 1 << 16


def _planes(
    name: str, pixels: Element, sizes: tuple[int, int, int], at: int
) -> tuple[dict[tuple[int, int, int], int | None], int]:
    """The directory of each plane, and the first directory after this image's."""
    size_z, size_c, size_t = sizes
    total = size_z * size_c * size_t
    if not 0 < total <= _MAX_PLANES:
        raise NotAPictureError(f"{name}: the OME description states {total} planes", remedy="export the slide as RGB")
    order = pixels.get("DimensionOrder", "XYCZT")[2:].lower()
    axes = {"z": size_z, "c": size_c, "t": size_t}
    if sorted(order) != ["c", "t", "z"]:
        order = "czt"
    positions = list(_positions(order, axes))
    number = {position: i for i, position in enumerate(positions)}
    blocks = [e for e in pixels if _local(e) == "TiffData"]
    found: dict[tuple[int, int, int], int | None] = {}
    own = {u.get("FileName") for b in blocks for u in b if _local(u) == "UUID"}
    for block in blocks:
        start = (_whole(block, "FirstZ", 0), _channel_at(block, pixels, size_c), _whole(block, "FirstT", 0))
        ifd = block.get("IFD")
        count = _whole(block, "PlaneCount", 1 if ifd is not None else total)
        elsewhere = len(own) > 1 and any(_local(u) == "UUID" and u.get("FileName") != _file_name(name) for u in block)
        first = number.get(start)
        if first is None:
            continue
        for i in range(min(count, total - first)):
            found[positions[first + i]] = None if elsewhere else _whole(block, "IFD", 0) + i
    if not blocks:
        found = {position: at + i for i, position in enumerate(positions)}
    last = max((ifd for ifd in found.values() if ifd is not None), default=at - 1)
    return found, max(at, last + 1)


def _channel_at(block: Element, pixels: Element, size_c: int) -> int:
    """FirstC counts samples in some files and channels in others; one channel of colours is always the first."""
    first = _whole(block, "FirstC", 0)
    return 0 if size_c == 1 else first


def _file_name(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


def _positions(order: str, axes: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    fast, middle, slow = tuple(order)
    for c in range(axes[slow]):
        for b in range(axes[middle]):
            for a in range(axes[fast]):
                at = {fast: a, middle: b, slow: c}
                yield (at["z"], at["c"], at["t"])


def _whole(element: Element, key: str, default: int = 1) -> int:
    text = (element.get(key) or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default


def _length(pixels: Element, name: str) -> float | None:
    value, unit = positive(pixels.get(name)), UM_PER_UNIT.get(pixels.get(f"{name}Unit", "µm"))
    return None if value is None or unit is None else value * unit


def _local(element: Element) -> str:
    return re.sub(r"^\{.*\}", "", element.tag)
