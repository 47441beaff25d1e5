"""What a slide's file holds that names a person, a place or a date: to be known before files are handed on.

Keys follow the Basic Application Level Confidentiality Profile of DICOM (PS3.15, table E.1-1) as far as slides have
them, and what scanners' software writes into descriptions of TIFF files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.slides.base import Slide
from wsi_pipe.slides.parts import dicom_series, is_dicom, without_warnings
from wsi_pipe.slides.storage.source import open_source
from wsi_pipe.slides.tiff.ifd import Directory, read_directories

__all__ = ["PersonalItem", "personal_items"]

LONGEST_VALUE = 80


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TEXT_TAGS = {
    269: "DocumentName",
    285: "PageName",
    306: "DateTime",
    315: "Artist",
    316: "HostComputer",
    33432: "Copyright",
}
DESCRIPTION, XMP = 270, 700
NDPI_LENS, NDPI_MAP = 65421, 65449
NDPI_TEXTS = {65427: "hamamatsu.Reference", 65442: "hamamatsu.SerialNumber"}

PERSON = _words(
    "user username operator operators experimenter technician owner artist author patient subject surname "
    "firstname lastname birth birthdate sex age mrn physician physicians"
)
DATE = _words("date datetime created creation time scandate scantime")
NUMBER = _words(
    "case accession specimen sample barcode label title filename originalname computer host hostname serial "
    "serialnumber institution hospital department uuid guid identifier slidename slideid scanscopeid scannerid"
)
HARMLESS = _words(
    "exposure increment zone duration color colour size storage class processing focal timer interval rate "
    "width height depth offset count"
)
"""Words of a key, and what they tell of its value."""

_PAIR = re.compile(r"(?:^|[|;\n\r])\s*([A-Za-z][\w .:/-]{0,60}?)\s*[=:]\s*([^|;\n\r<>]{1,200})")
_XML_ATTRIBUTE = re.compile(r"([A-Za-z][\w.:-]{0,60})=\"([^\"<>]{1,200})\"")
_XML_NAMED = re.compile(r"Name=\"([\w. -]{1,80})\"[^<>]*>([^<>]{1,200})<")
_XML_IMAGE = re.compile(r"<(?:\w+:)?Image\s[^<>]*?\bName=\"([^\"<>]{1,200})\"")
_XML_ELEMENT = re.compile(r"<([A-Za-z][\w.:-]{0,60})(?:\s[^<>]*)?>([^<>]{1,200})</")

DICOM_KEYWORDS = _words(
    "PatientID OtherPatientIDs IssuerOfPatientID PatientSex PatientAge PatientAddress PatientComments "
    "PatientTelephoneNumbers EthnicGroup Occupation AccessionNumber StudyID StudyDescription InstitutionName "
    "InstitutionAddress InstitutionalDepartmentName StationName DeviceSerialNumber ContainerIdentifier "
    "SpecimenIdentifier SpecimenUID BarcodeValue LabelText ImageComments RequestedProcedureID "
    "PerformedProcedureStepID ClinicalTrialSubjectID"
)
DICOM_PARTS, DICOM_TIMES = ("PN",), ("DA", "DT", "TM")


@dataclass(frozen=True)
class PersonalItem:
    """One such thing. kind: "person", "date", "id" or "picture". name: as the file calls it. value: shortened."""

    kind: str
    name: str
    value: str = ""


def personal_items(slide: Slide) -> list[PersonalItem]:
    """What the file of an open slide holds that names a person, a device or a date, and its label and macro pictures.

    Every directory of a TIFF is looked at and every instance of a DICOM series, not only what is read as the slide.
    That nothing is found does not prove that there is nothing: makers keep data in places of their own.
    """
    path = slide.info.path
    items = [*_of_properties(slide.info.properties)]
    file = "://" in path or Path(path).is_file()
    for look in (_of_dicom, _of_tiff) if file else ():
        try:
            items += look(path)
        except UnsupportedSlideError:
            continue
        except Exception as error:
            # Whatever is damaged there: to say nothing would read as "nothing is there".
            items.append(PersonalItem("id", "metadata that cannot be read", type(error).__name__))
    found: dict[tuple[str, str], PersonalItem] = {}
    for item in items:
        # The same thing may be known under several readers' names of it.
        found.setdefault((item.name.rpartition(".")[2].casefold(), item.value), item)
    return sorted(found.values(), key=lambda item: ("person", "id", "date", "picture").index(item.kind))


def _item(name: str, value: str) -> PersonalItem | None:
    """The pair as an item where its name says so."""
    value = " ".join(value.split()).strip("\0 ")[:LONGEST_VALUE]
    words = [word.casefold() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    told = {*words, "".join(words), *map("".join, itertools.pairwise(words))}
    if not value or value == "None" or told & HARMLESS:
        return None
    for kind, known in (("date", DATE), ("person", PERSON), ("id", NUMBER)):
        if told & known:
            return PersonalItem(kind, name.strip(), value)
    return None


def _of_properties(properties: Mapping[str, str]) -> Iterator[PersonalItem]:
    for name, value in properties.items():
        picture = re.fullmatch(r"openslide\.associated\.(.*(?:label|macro|overview).*)\.width", name)
        if picture:
            yield PersonalItem("picture", picture[1])
        if name.startswith(("openslide.", "tiff.ImageDescription", "tiff.XResolution")):
            continue
        item = _item(name.rpartition(".")[2], value)
        if item:
            yield PersonalItem(item.kind, name, item.value)


def _of_tiff(path: str) -> Iterator[PersonalItem]:
    source = open_source(path)
    try:
        for number, directory in enumerate(read_directories(source)):
            yield from _of_directory(directory, number)
    finally:
        source.close()


def _of_directory(directory: Directory, number: int) -> Iterator[PersonalItem]:
    names = TEXT_TAGS | (NDPI_TEXTS if directory.is_ndpi else {})
    for tag, name in names.items():
        text = directory.text(tag).strip() if tag in directory else ""
        if text:
            kind = "date" if name == "DateTime" else "id" if "." in name else "person"
            yield PersonalItem(kind, name, text[:LONGEST_VALUE])
    text = directory.text(DESCRIPTION) if DESCRIPTION in directory else ""
    if XMP in directory:
        text += "\n" + directory.raw(XMP)[: 1 << 20].decode("utf-8", "replace")
    if directory.is_ndpi and NDPI_MAP in directory:
        text += "\n" + directory.text(NDPI_MAP)
    yield from _of_text(text)
    if directory.is_ndpi and NDPI_LENS in directory:
        # Hamamatsu's mark of the macro picture and of its map: a magnification below zero.
        if float(directory.array(NDPI_LENS)[0]) < 0:
            yield PersonalItem("picture", "macro")
    elif number and (found := re.search(r"\b(label|macro|overview)\b", text[:4096], re.IGNORECASE)):
        yield PersonalItem("picture", found[1].lower())
    if found := re.search(r"PIM_DP_IMAGE_TYPE\"[^<>]*>(LABEL|MACRO)IMAGE", text):
        yield PersonalItem("picture", found[1].lower())


def _of_text(text: str) -> Iterator[PersonalItem]:
    """Pairs of a description: ``key = value`` between bars, or XML."""
    text = text[: 1 << 20]
    yield from (PersonalItem("id", "Image Name", name[:LONGEST_VALUE]) for name in _XML_IMAGE.findall(text))
    patterns = (_XML_ATTRIBUTE, _XML_NAMED, _XML_ELEMENT) if "<" in text and "/" in text else (_PAIR,)
    for pattern in patterns:
        for name, value in pattern.findall(text):
            item = _item(name.rpartition(":")[2], value)
            if item:
                yield item


def _of_dicom(path: str) -> Iterator[PersonalItem]:
    import pydicom

    if "://" in path or not is_dicom(Path(path)):
        return
    for part in dicom_series(Path(path)):
        with without_warnings():
            dataset = pydicom.dcmread(part, stop_before_pixels=True)
            yield from _of_elements(dataset)
            kinds = {str(kind) for kind in dataset.get("ImageType", ())}
        for kind in ("LABEL", "OVERVIEW"):
            if kind in kinds:
                yield PersonalItem("picture", kind.lower())


def _of_elements(dataset: Iterable[object]) -> Iterator[PersonalItem]:
    import pydicom

    assert isinstance(dataset, pydicom.Dataset)
    for element in dataset.iterall():
        value = str(element.value or "").strip()[:LONGEST_VALUE]
        name = element.keyword or str(element.tag)
        if not value or element.VR == "SQ":
            continue
        if element.VR in DICOM_PARTS:
            yield PersonalItem("person", name, value)
        elif element.VR in DICOM_TIMES:
            yield PersonalItem("date", name, value)
        elif element.keyword in DICOM_KEYWORDS:
            yield PersonalItem("id", name, value)
