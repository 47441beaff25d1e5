"""What a job writes names no person, file or date where it is anonymised, and no secret of a URL anywhere."""

from __future__ import annotations

import csv
import json
import re
import shutil
import stat
import threading
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_pipe.bag import read_attrs
from wsi_pipe.cli import group, run_group
from wsi_pipe.job.private import anonymised, revealed, told
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.masking import mask_secrets, same_address

PLANTED = ("Garcia", "Mendez", "MRN-0815", "1961-02-03", "03/02/61", "pathologist7", "S-77-LABEL", "unit4")
"""Of a person: in file names, folders, metadata, cases."""


def run(*words: object) -> int:
    return run_group(group, "wsi-pipe", [str(word) for word in words])


def spellings(text: str) -> list[bytes]:
    forms = {text, text.lower(), text.upper(), unicodedata.normalize("NFD", text), json.dumps(text)[1:-1]}
    return [form.encode(encoding) for form in forms for encoding in ("utf-8", "utf-16-le")]


def told_by(folder: Path, planted: tuple[str, ...]) -> list[str]:
    """Which planted strings stand in the names and the bytes of files, the private ones left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.name == "identities.csv":
            continue
        raw = inside.encode() + (path.read_bytes() if path.is_file() else b"")
        found += [f"{text} in {inside}" for text in planted if any(form in raw for form in spellings(text))]
    return found


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, tissue_picture: Callable[..., NDArray[np.uint8]]) -> Path:
    """An SVS of a patient, with label and macro, a damaged one and one without resolution."""
    folder = tmp_path_factory.mktemp("in") / "Garcia Mendez" / "unit4"
    (folder / "Mendez").mkdir(parents=True)
    picture = tissue_picture(768, 640)
    write_dicom(folder / "Mendez" / "1.dcm", np.ascontiguousarray(picture[:512, :512]))
    label = np.full((64, 64, 3), 255, np.uint8)
    text = (
        "Aperio Image Library v12\n768x640 [0,0 768x640] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5|"
        "User = pathologist7|Date = 03/02/61|Filename = MRN-0815|Patient = Garcia"
    )
    with tifffile.TiffWriter(folder / "MRN-0815 Garcia.svs") as svs:
        svs.write(picture, tile=(256, 256), photometric="rgb", compression="jpeg", description=text, metadata=None)
        svs.write(picture[::4, ::4], photometric="rgb", metadata=None)
        svs.write(label, photometric="rgb", description="Aperio\nlabel S-77-LABEL", metadata=None, subfiletype=1)
        svs.write(label, photometric="rgb", description="Aperio\nmacro 64x64", metadata=None, subfiletype=9)
    (folder / "Mendez MRN-0815 x.svs").write_bytes(b"II*\0 Garcia 1961-02-03" + bytes(100))
    tifffile.imwrite(
        folder / "Garcia 1961-02-03.tif", picture, tile=(256, 256), photometric="rgb", metadata=None,
        datetime="1961:02:03 10:11:12", description="Garcia 1961-02-03",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def job(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    slides = scans / "list.csv"
    slides.write_text(
        "slide,patient,mask\nMRN-0815 Garcia.svs,Garcia,\nMendez MRN-0815 x.svs,Garcia,\n"
        "Garcia 1961-02-03.tif,Mendez,Garcia-mask.geojson\nMendez/1.dcm,Mendez,\n"
    )
    code = run(
        "run", "--slides", slides, "-o", folder / "job", "--anonymise", "-e", "texture", "-r", "5x", "-r", "20x",
        "--log-json", folder / "job" / "log.jsonl", "--keep-features",
    )  # fmt: skip
    assert code == 1
    return folder / "job"


def identities(job: Path) -> dict[str, dict[str, str]]:
    with open(job / "private" / "identities.csv", encoding="utf-8", newline="") as file:
        return {row["original_id"]: row for row in csv.DictReader(file)}


def test_no_byte_of_an_anonymised_job_names_the_patient_the_file_or_the_date(job: Path, scans: Path) -> None:
    outcomes = [json.loads(line) for line in (job / "outcomes.jsonl").read_text().splitlines()]
    assert sorted(outcome["status"] for outcome in outcomes) == ["done", "done", "failed", "failed"]
    assert all(outcome["reason"] for outcome in outcomes if outcome["status"] == "failed")
    written = [path for path in job.rglob("*") if path.is_file()]
    kinds = {".h5", ".geojson", ".jpg", ".jsonl", ".csv", ".html", ".json", ".toml"}
    assert kinds <= {path.suffix for path in written}
    assert told_by(job, (*PLANTED, str(scans), scans.name)) == []


def test_who_made_the_job_can_tell_the_slides_and_nobody_else(job: Path, scans: Path) -> None:
    known = identities(job)
    assert set(known) == {"MRN-0815 Garcia", "Mendez MRN-0815 x", "Garcia 1961-02-03", "Mendez"}
    assert known["MRN-0815 Garcia"]["slide"] == str(scans / "MRN-0815 Garcia.svs")
    assert known["MRN-0815 Garcia"]["case_id"] == known["Mendez MRN-0815 x"]["case_id"]
    assert known["MRN-0815 Garcia"]["case_id"] != known["Garcia 1961-02-03"]["case_id"]
    for private in (job / "private" / "identities.csv", job / "private" / "salt"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE((job / "private").stat().st_mode) == 0o700
    slide = known["MRN-0815 Garcia"]["slide_id"]
    attrs = read_attrs(job / "bags" / f"{slide}.h5")
    assert (attrs.slide_id, attrs.case_id, attrs.slide_path) == (slide, known["MRN-0815 Garcia"]["case_id"], "")


def test_an_anonymised_job_goes_on_by_the_names_of_the_files(
    job: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (job / "bags").iterdir()}
    assert run("run", "--slides", scans / "list.csv", "-o", job, "--only", "MRN-0815 Garcia", "--json") == 0
    (outcome,) = json.loads(capsys.readouterr().out)["outcomes"]
    assert outcome["slide_id"] == identities(job)["MRN-0815 Garcia"]["slide_id"]
    assert "assemble" in outcome["cached"]
    assert {path: path.stat().st_mtime_ns for path in (job / "bags").iterdir()} == before
    assert run("run", "-o", job, "--only", "MRN-0815 Garcia", "--json") == 0
    assert run("verify", job) == 0
    assert run("status", job) == 1
    assert run("report", job) == 0
    said = capsys.readouterr()
    assert not any(name in said.out + said.err for name in PLANTED)
    assert told_by(job, PLANTED) == []


def test_a_replaced_slide_of_an_anonymised_job_is_told_by_its_id_alone(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, job = tmp_path / "in", tmp_path / "job"
    folder.mkdir()
    slide = folder / "MRN-0815 Garcia.svs"
    shutil.copyfile(scans / slide.name, slide)
    assert run("run", folder, "-o", job, "--anonymise", "-e", "texture", "-r", "5x", "--no-report") == 0
    (own,) = identities(job).values()
    slide.write_bytes(slide.read_bytes() + bytes(8))
    capsys.readouterr()
    for command in (["run", folder, "-o", job], ["run", "-o", job]):
        assert run(*command) == 2
        said = capsys.readouterr().err
        assert f"another file in the place of {own['slide_id']} would make" in said
        assert run("plan", *command[1:], "--calibrate", 0) == 1
        assert said.partition("error: ")[2].strip() in capsys.readouterr().err
    assert run("verify", job) == 1
    assert run("status", job) == 0
    said = capsys.readouterr().out
    assert said.count("its slide was replaced or changed since") == 2
    assert not any(name in said for name in PLANTED)


def test_anonymising_is_for_the_whole_job(
    job: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = scans / "MRN-0815 Garcia.svs"
    assert run("run", slide, "-o", job, "--no-anonymise") == 2
    assert "was made with --anonymise" in capsys.readouterr().err
    assert run("segment", slide, "-o", tmp_path / "plain") == 0
    assert run("run", slide, "-o", tmp_path / "plain", "--anonymise") == 2
    assert "was made without --anonymise: what it holds already names its slides; make a new job" in (
        capsys.readouterr().err
    )


def test_one_salt_gives_a_patient_one_id_in_two_jobs_and_another_salt_another(
    scans: Path, tmp_path: Path, job: Path
) -> None:
    slide = scans / "MRN-0815 Garcia.svs"
    for name in ("a", "b"):
        assert run("segment", slide, "-o", tmp_path / name, "--anonymise", "--salt", tmp_path / "salt") == 0
    ids = [[p.stem for p in (tmp_path / name / "tissue").iterdir()] for name in ("a", "b")]
    assert ids[0] == ids[1]
    assert ids[0] != [identities(job)["MRN-0815 Garcia"]["slide_id"]]
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    (tmp_path / "other").write_text("0123456789abcdef" * 2)
    assert run("segment", slide, "-o", tmp_path / "a", "--salt", tmp_path / "other") == 2


def test_a_copy_without_its_private_folder_is_looked_at_and_not_gone_on_with(
    job: Path, tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(job, copy, ignore=shutil.ignore_patterns("private"))
    assert run("verify", copy) == 0
    assert run("status", copy) == 1
    assert run("report", copy) == 0
    capsys.readouterr()
    assert run("run", scans / "MRN-0815 Garcia.svs", "-o", copy) == 2
    assert "without its folder private" in capsys.readouterr().err
    assert told_by(copy, PLANTED) == []


@pytest.mark.slow
def test_what_lrmil_writes_of_an_anonymised_job_names_nobody_either(
    tmp_path: Path, tissue_picture: Callable[..., NDArray[np.uint8]], make_slide: Callable[..., Path]
) -> None:
    from lrmil.cli import group as lrmil

    job, folder = tmp_path / "job", tmp_path / "Garcia"
    for i in range(8):
        make_slide(folder / f"Garcia MRN-0815 {i}.svs", picture=tissue_picture(512, 512, seed=i))
    assert run("run", folder, "-o", job, "--anonymise", "-r", "20x", "--no-report") == 0
    known = identities(job)
    labels = tmp_path / "labels.csv"
    rows = [f"{row['slide_id']},{int(name[-1]) % 2}" for name, row in known.items()]
    labels.write_text("\n".join(["slide_id,label", *rows]))
    out = tmp_path / "out"
    train = ["train", "--bags", job / "bags", "--labels", labels, "-r", "20x", "-e", "texture", "--epochs", "1"]
    # An attention model, so that all kinds of files are written.
    train += ["--model", "gated-abmil"]
    assert run_group(lrmil, "lrmil", [*map(str, train), "--folds", "2", "-o", str(out)]) == 0
    model = next(out.glob("fold_1/model.safetensors"))
    predict = [
        "predict",
        "--model",
        model,
        "--bags",
        job / "bags",
        "-o",
        tmp_path / "predicted",
        "--geojson",
        "--heatmaps",
    ]
    assert run_group(lrmil, "lrmil", [*map(str, predict)]) == 0
    made = {path.suffix for folder in (out, tmp_path / "predicted") for path in folder.rglob("*")}
    assert {".csv", ".json", ".safetensors"} <= made
    straight = ["predict", "--model", model, folder / "Garcia MRN-0815 1.svs", "-o", tmp_path / "p2", "--job", job]
    assert run_group(lrmil, "lrmil", [*map(str, straight)]) == 2, "names do not get into an anonymised job"
    for written in (job, out, tmp_path / "predicted"):
        assert told_by(written, ("Garcia", "MRN-0815")) == []


def test_hashing_is_undone_by_what_is_kept_and_is_the_same_for_all_forms_of_a_name() -> None:
    entries = [SlideEntry(f"s{i}", f"/in/s{i}.svs", unicodedata.normalize(form, "Müller")) for i, form in
               enumerate(("NFC", "NFD"))]  # fmt: skip
    salt = b"0123456789abcdef"
    hidden = anonymised(entries, salt)
    assert len({entry.case_id for entry in hidden}) == 1
    assert len({entry.slide_id for entry in hidden}) == 2
    assert all(re.fullmatch("x[0-9a-f]{16}", entry.slide_id) for entry in hidden)
    assert revealed(hidden) == entries
    (alone, other) = anonymised([SlideEntry("p1", "/in/p1.svs", "p1"), SlideEntry("p1b", "/in/p1b.svs", "p1")], salt)
    assert alone.slide_id == alone.case_id == other.case_id != other.slide_id
    assert anonymised(hidden, salt) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "/in/Garcia Mendez/x Garcia.svs: cannot be read",
        "x Garcia.svs: no such file", "X GARCIA is damaged", "see /home/unit4/y.dcm and /in/other/z.svs",
        "the description 'Garcia|1961' is not understood", "patient 19610203 of \"Mendez\"",
    ],
)  # fmt: skip
def test_messages_are_told_without_names(text: str) -> None:
    (entry,) = anonymised([SlideEntry("x Garcia", "/in/Garcia Mendez/x Garcia.svs", "p")], b"0123456789abcdef")
    said = told(entry, text)
    assert not re.search("garcia|mendez|unit4|1961|other", said, re.IGNORECASE), said
    assert told(SlideEntry("a", "/x/a.svs", "a"), text) == text


def test_an_anonymised_job_tells_neither_where_slides_were_nor_when_they_were_scanned(
    tmp_path: Path, tissue_picture: Callable[..., NDArray[np.uint8]], make_slide: Callable[..., Path]
) -> None:
    import os

    job, old, new = tmp_path / "job", tmp_path / "Old Garcia" / "of Mendez", tmp_path / "unit4 new"
    slide = make_slide(old / "scan.tif", picture=tissue_picture(512, 512))
    scanned_ns = 1_100_000_000_123_456_789
    os.utime(slide, ns=(scanned_ns, scanned_ns))
    area = [[50, 50], [400, 50], [400, 400], [50, 400], [50, 50]]
    mask = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [area]}}
    (tmp_path / "Old Garcia" / "by pathologist7.geojson").write_text(json.dumps(mask))
    rows = "slide,mask\nOld Garcia/of Mendez/scan.tif,Old Garcia/by pathologist7.geojson\n"
    (tmp_path / "list.csv").write_text(rows)
    assert run("run", "--slides", tmp_path / "list.csv", "-o", job, "--anonymise", "-r", "20x") == 0
    assert run("run", "-o", job) == 0
    new.mkdir()
    old.rename(new / "of Mendez")
    assert run("run", new, "-o", job) == 0
    (tmp_path / "list.csv").write_text("slide,mask\nunit4 new/of Mendez/scan.tif,-\n")
    assert run("run", "--slides", tmp_path / "list.csv", "-o", job, "--redo") == 0
    changes = [json.loads(line) for line in (job / "changes.jsonl").read_text().splitlines()]
    assert [(c["what"], c["old"], c["new"]) for c in changes] == [
        ("path", "(left out)", "(left out)"), ("mask", "(left out)", "none"),
    ]  # fmt: skip
    (mark, *_) = (json.loads(line) for line in (job / ".index.jsonl").read_text().splitlines())
    assert mark["files"][0][1] == (new / "of Mendez" / "scan.tif").stat().st_size
    assert told_by(job, ("Garcia", "Mendez", "pathologist7", "unit4", str(scanned_ns // 10**9))) == []


def test_names_of_the_files_of_a_series_are_not_told_either(
    tmp_path: Path, tissue_picture: Callable[..., NDArray[np.uint8]]
) -> None:
    import pydicom

    series = tmp_path / "in" / "series"
    series.mkdir(parents=True)
    write_dicom(series / "MRN-0815 Garcia.dcm", np.ascontiguousarray(tissue_picture(768, 640)[:512, :512]))
    left_out = pydicom.dcmread(series / "MRN-0815 Garcia.dcm")
    left_out.ImageType = ["ORIGINAL", "PRIMARY", "OTHER", "NONE"]
    left_out.SOPInstanceUID = left_out.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    left_out.save_as(series / "Mendez 2.dcm")
    assert run("run", tmp_path / "in", "-o", tmp_path / "job", "--anonymise", "-r", "20x") == 0
    (outcome,) = (json.loads(line) for line in (tmp_path / "job/outcomes.jsonl").read_text().splitlines())
    assert any("is left out" in note for note in outcome["notes"])
    assert told_by(tmp_path / "job", ("Garcia", "Mendez", "MRN-0815")) == []


def test_a_mask_without_area_is_not_called_by_its_name(
    tmp_path: Path, tissue_picture: Callable[..., NDArray[np.uint8]], make_slide: Callable[..., Path]
) -> None:
    slide = make_slide(tmp_path / "unit4 a.tif", picture=tissue_picture(512, 512))
    mask = tmp_path / "of Garcia.geojson"
    mask.write_text('{"type": "FeatureCollection", "features": []}')
    assert run("run", slide, "--mask", mask, "-o", tmp_path / "job", "--anonymise", "-r", "20x") == 0
    (outcome,) = (json.loads(line) for line in (tmp_path / "job/outcomes.jsonl").read_text().splitlines())
    assert "holds no area" in outcome["reason"]
    assert told_by(tmp_path / "job", ("Garcia", "unit4")) == []


def described(capsys: pytest.CaptureFixture[str], *slides: Path) -> list[set[tuple[str, str]]]:
    assert run("info", *slides, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    return [{(item["kind"], item["value"] or item["name"]) for item in slide["personal"]} for slide in found]


def test_info_says_what_an_svs_holds_of_a_person(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = scans / "MRN-0815 Garcia.svs"
    (found,) = described(capsys, slide)
    assert found == {
        ("person", "pathologist7"), ("date", "03/02/61"), ("id", "MRN-0815"), ("person", "Garcia"),
        ("picture", "label"), ("picture", "macro"),
    }  # fmt: skip
    assert run("info", slide) == 0
    assert "personal: aperio.User pathologist7; aperio.Patient Garcia; aperio.Filename MRN-0815; aperio.Date" in (
        capsys.readouterr().out
    )


def test_info_says_what_other_files_hold_and_nothing_where_there_is_nothing(
    tmp_path: Path, make_slide: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import pydicom

    picture = np.full((300, 300, 3), 200, np.uint8)
    ome = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Experimenter ID="E" UserName="pathologist7"/>'
        '<Image ID="Image:0" Name="Garcia 77"><AcquisitionDate>1961-02-03T00:00:00</AcquisitionDate><Pixels ID="P:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="300" SizeY="300" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5" '
        'PhysicalSizeY="0.5" TimeIncrement="3"><Channel ID="C:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image>'
        "</OME>"
    )
    for name, options in {
        "x.ome.tif": {"description": ome},
        "tags.tif": {"datetime": "1961:02:03 10:11:12", "extratags": [(315, 2, 0, "Mendez", True)]},
    }.items():
        tifffile.imwrite(
            tmp_path / name, picture, tile=(256, 256), photometric="rgb", metadata=None, software=False, **options
        )
    plain = make_slide(tmp_path / "plain.tif")
    ome_found, tags, nothing = described(capsys, tmp_path / "x.ome.tif", tmp_path / "tags.tif", plain)
    assert ome_found == {("person", "pathologist7"), ("id", "Garcia 77"), ("date", "1961-02-03T00:00:00")}
    assert tags == {("date", "1961:02:03 10:11:12"), ("person", "Mendez")}
    assert nothing == set()
    dicom = tmp_path / "dicom" / "a.dcm"
    dicom.parent.mkdir()
    write_dicom(dicom, picture[:256, :256])
    (found,) = described(capsys, dicom)
    assert found == {
        ("person", "Garcia^Mendez"), ("date", "19610203"), ("id", "MRN-0815"), ("person", "Unit4^X"),
        ("id", "S-77-LABEL"),
    }  # fmt: skip
    assert pydicom.dcmread(dicom).PatientID == "MRN-0815"


def write_dicom(path: Path, picture: NDArray[np.uint8]) -> None:
    """A slide of one uncompressed frame, with a patient and, deep inside, a specimen's preparer and number."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["one"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID = generate_uid(entropy_srcs=["s"]), generate_uid(entropy_srcs=["t"])
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Garcia^Mendez", "MRN-0815", "19610203"
    specimen = Dataset()
    specimen.SpecimenIdentifier, specimen.OperatorsName = "S-77-LABEL", "Unit4^X"
    ds.SpecimenDescriptionSequence = [specimen]
    ds.Modality, ds.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.Rows, ds.Columns = picture.shape[:2]
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = picture.shape[1], picture.shape[0]
    ds.NumberOfFrames, ds.SamplesPerPixel, ds.PlanarConfiguration = 1, 3, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PhotometricInterpretation = "RGB"
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [0.0005, 0.0005]
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.PixelData = picture.tobytes()
    ds.save_as(path, enforce_file_format=True)


class Guarded(SimpleHTTPRequestHandler):
    """Files for who brings the token."""

    def do_GET(self) -> None:
        if "token=Hush-4711" not in self.path:
            self.send_error(403, f"wrong token in {self.path}")
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        if "token=Hush-4711" not in self.path:
            self.send_error(403)
            return
        super().do_HEAD()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def guarded(tmp_path: Path, make_slide: Callable[..., Path]) -> Iterator[str]:
    make_slide(tmp_path / "served" / "a.tif")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


SECRETS = ("Hush-4711", "Hush-4712", "pa55word")


def test_secrets_of_urls_stay_out_of_what_is_stored_and_said_and_the_job_goes_on(
    tmp_path: Path, guarded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    good, bad = f"{guarded}/a.tif?token=Hush-4711", f"{guarded}/b.tif?token=Hush-4712"
    named = f"{guarded.replace('http://', 'http://me:pa55word@')}/c.tif?X-Amz-Signature=Hush-4711"
    options = ["-o", job, "--cache", tmp_path / "cache", "--log-json", job.with_suffix(".log")]
    assert run("run", good, bad, named, *options, "-r", "5x") == 1
    said = capsys.readouterr()
    assert "3 URLs hold a password or a token: they are kept in" in said.err
    assert not any(secret in said.out + said.err + job.with_suffix(".log").read_text() for secret in SECRETS)
    assert told_by(job, SECRETS) == []
    assert told_by(tmp_path / "cache", SECRETS) == []
    attrs = read_attrs(job / "bags" / "a.h5")
    assert attrs.slide_path == f"{guarded}/a.tif?token=***"
    assert "Hush-4711" in (job / "private" / "identities.csv").read_text()
    assert stat.S_IMODE((job / "private" / "identities.csv").stat().st_mode) == 0o600
    # By the job's own list, and signed anew, it is the same slide.
    assert run("run", *options, "--only", "a", "--json") == 0
    assert "assemble" in json.loads(capsys.readouterr().out)["outcomes"][0]["cached"]
    assert run("run", good + "&Expires=77", *options, "--json") == 0
    (outcome,) = json.loads(capsys.readouterr().out)["outcomes"]
    assert outcome["slide_id"] == "a"
    assert run("info", bad) == 1
    assert run("status", job) == 1
    said = capsys.readouterr()
    assert not any(secret in said.out + said.err for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pw@h/a.svs", "https://***@h/a.svs"),
        ("https://tok@h/a@b.svs", "https://***@h/a@b.svs"),
        ("s3://AKIA:se/cr+et@bucket/x.svs", "s3://***@bucket/x.svs"),
        ("https://h:8080/a@b.svs", "https://h:8080/a@b.svs"),
        ("https://h/a?X-Amz-Credential=x&X-Amz-Signature=abc&versionId=3",
         "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***&versionId=3"),
        ("https://b/x.svs?sv=2020&sig=aa%2Bb%3D", "https://b/x.svs?sv=2020&sig=***"),
        ("403, url=URL('https://h/a?token=xyz'), retry", "403, url=URL('https://h/a?token=***'), retry"),
        ("https://h/a.svs#access_token=abc", "https://h/a.svs#access_token=***"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("level=2; write --min-tissue=0.5, key=3", "level=2; write --min-tissue=0.5, key=3"),
        ("mail a@b.c about /in/x=1/a.svs", "mail a@b.c about /in/x=1/a.svs"),
    ],
)  # fmt: skip
def test_masking(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


def test_an_address_is_the_same_whoever_signed_it_and_another_file_is_another() -> None:
    one = same_address("https://h/a.svs?X-Amz-Date=1&X-Amz-Signature=a&versionId=3")
    assert one == same_address("https://u:p@h/a.svs?versionId=3&X-Amz-Signature=b")
    assert one != same_address("https://h/a.svs?versionId=4")
    assert same_address("https://h/get?case=1") != same_address("https://h/get?case=2")
    assert same_address("/in/a@b?x=1") == "/in/a@b?x=1"
