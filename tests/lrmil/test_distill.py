"""Distillation from bags and slides to an LR encoder that wsi-pipe runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.checkpoint import ModelCard, load_model, save_model
from lrmil.cli import group
from lrmil.config import ModelSettings
from lrmil.data import read_cases
from lrmil.distill import DistillRequest, DistillSettings, attention, run_distillation
from lrmil.distill import run as run_module
from lrmil.distill import train as train_module
from lrmil.errors import BagMismatchError, LeakageError, ResumeError, SettingsError, SplitError
from lrmil.model import build_model
from lrmil.splits import SplitTable
from lrmil.store import inspect_bag
from wsi_pipe.bag import read_attrs, read_grids, read_level
from wsi_pipe.cli import group as wsi_group
from wsi_pipe.cli import run_group
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.lr_file import read_lr_header
from wsi_pipe.errors import BagError
from wsi_pipe.execute import Where
from wsi_pipe.job import open_job
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.manifest import read_manifest
from wsi_pipe.seen import Seen
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import read_tiles, stream_tiles

QUICK = DistillSettings(
    epochs=2, batch_size=8, lr=1e-3, precision="float32", device="cpu", val_fraction=0.3, threads=1, patience=9
)


@pytest.fixture(scope="session")
def cohort(distill_cohort: Path) -> Path:
    return distill_cohort


def splits_of(cohort: Path, held: int = 2) -> SplitTable:
    cases = tuple(read_attrs(bag).case_id for bag in sorted((cohort / "job" / "bags").glob("*.h5")))
    first = tuple("test" if i < held else "train" for i in range(len(cases)))
    second = tuple("test" if i >= len(cases) - held else "train" for i in range(len(cases)))
    return SplitTable("case", cases, {"fold_1": first, "fold_2": second})  # type: ignore[dict-item]


def request_of(cohort: Path, out: Path, **changes: Any) -> DistillRequest:
    base = DistillRequest(
        bags=cohort / "job" / "bags",
        teacher="texture",
        student="timm:test_vit",
        lr="5x",
        hr="20x",
        splits=splits_of(cohort),
        fold="1",
        out=out,
        settings=QUICK,
        random_student=True,
    )
    return dataclasses.replace(base, **changes)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


LAYERED: dict[str, Any] = {"teacher": "timm:test_vit", "random_teacher": True, "compute": True}


@pytest.mark.parametrize(
    "options",
    [
        {"student": "timm:test_vit"},
        {"student": "timm:test_resnet"},
        {**LAYERED, "student": "copy"},
        {**LAYERED, "student": "timm:test_resnet"},
    ],
    ids=["vit", "convnet", "copy", "convnet of layers"],
)
def test_the_exported_encoder_gives_the_features_of_training(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    trained: list[Any] = []
    original = run_module.distill

    def spy(student: Any, preprocessing: Any, *args: Any, **kwargs: Any) -> Any:
        history = original(student, preprocessing, *args, **kwargs)
        trained.extend([student, preprocessing])
        return history

    monkeypatch.setattr(run_module, "distill", spy)
    out = tmp_path / "lr-fold1.safetensors"
    result = run_distillation(request_of(cohort, out, **options))
    assert len(result.history.epochs) == 2
    entries = read_manifest(cohort / "slides" / "slides.csv")[:2]
    settings = JobSettings(
        tile=TileSettings(resolutions=(2.0,), tile_px=64),
        extract=ExtractSettings(encoders={"5x": (str(out),)}, precision="float32", dtype="float32"),
    )
    paths = open_job(tmp_path / "job", settings, entries)
    assert [o.status for o in dispatch(entries, settings, paths, Where())] == ["done", "done"]
    student, preprocessing = trained
    student.eval()
    for entry in entries:
        bag = paths.bag(entry.slide_id)
        slide = open_slide(entry.path)
        pixels = np.concatenate([b.pixels for b in stream_tiles(slide, read_grids(bag)[0])])
        slide.close()
        with torch.inference_mode():
            run = train_module.Runner(student, preprocessing, torch.device("cpu"), torch.float32)
            expected = run(torch.from_numpy(pixels)).feature
        found = read_level(bag, "5x", "lr-fold1").features
        assert len(found) > 0
        assert np.abs(found - expected.numpy()).max() <= 1e-4
        assert expected.std() > 1e-3


def test_a_convnet_learns_the_layers_of_a_vit(cohort: Path, tmp_path: Path) -> None:
    # Standardised, so that it is not enough to find the mean.
    settings = dataclasses.replace(QUICK, epochs=10, lr=5e-3, final=0.0, standardise="yes", stain=0.0)
    request = request_of(cohort, tmp_path / "lr.safetensors", student="timm:test_resnet", settings=settings, **LAYERED)
    result = run_distillation(request)
    first, last = result.history.epochs[0], result.history.epochs[-1]
    assert last["loss"] < 0.5 * first["loss"]
    # On cases that it did not train on, too.
    assert min(last[f"layer{n}_explained_variance"] for n in range(3)) > 0.4
    # What is exported is the network alone.
    network = load_encoder("timm:test_resnet", random_weights=True).network.trunk
    assert weights_of(result.path).keys() == network.state_dict().keys()


def test_the_file_says_which_slides_were_seen_and_none_of_them_is_held_out(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr-fold1.safetensors"
    result = run_distillation(request_of(cohort, out))
    training = read_lr_header(out).training
    seen = set(training["train_slides"]) | set(training["val_slides"])
    everything = [read_attrs(bag) for bag in sorted((cohort / "job" / "bags").glob("*.h5"))]
    assert seen == {a.slide_id for a in everything[2:]}
    assert training["val_slides"]
    assert not set(training["train_slides"]) & set(training["val_slides"])
    assert set(result.train_slides) == set(training["train_slides"])


def test_more_grids_of_the_training_slides_have_targets_of_their_own(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = run_module.distill

    def spy(student: Any, preprocessing: Any, train: Any, val: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(train=train, val=val)
        return original(student, preprocessing, train, val, *args, **kwargs)

    monkeypatch.setattr(run_module, "distill", spy)
    folder = tmp_path / "targets"
    settings = dataclasses.replace(QUICK, epochs=1, jitters=2)
    request = request_of(cohort, tmp_path / "lr.safetensors", settings=settings, targets_dir=folder)
    result = run_distillation(request)
    plain = [slide for slide in seen["train"] if slide.slide_id in result.train_slides]
    assert len(plain) == len(seen["train"]) == 3 * len(result.train_slides)
    assert len(seen["val"]) == len(result.val_slides)
    texture = load_encoder("texture")
    # The last of them, worked out anew: the teacher on tiles read at the moved place.
    one = seen["train"][-1]
    tile = int(np.flatnonzero((one.children.children >= 0).any(1))[0])
    place = int(np.flatnonzero(one.children.children[tile] >= 0)[0])
    corner = one.lr.corners_l0[tile] + np.array([place % 4, place // 4]) * 64
    slide = open_slide(one.path)
    pixels = read_tiles(slide, corner[None], 64.0, 64)
    low = read_tiles(slide, one.lr.corners_l0[tile][None], 256.0, 64)
    slide.close()
    expected = texture.encode(pixels)[0]
    assert np.allclose(one.final[one.children.children[tile, place]], expected, rtol=2e-3, atol=2e-3)
    assert np.allclose(one.baseline[tile], texture.encode(low)[0], rtol=2e-3, atol=2e-3)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    assert len(files) == 2 * 2 * len(result.train_slides)
    # Another student takes them as they are.
    run_distillation(dataclasses.replace(request, out=tmp_path / "again.safetensors"))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")} == files


def test_slides_that_are_held_out_are_never_opened(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrmil.distill import pixels

    opened: set[str] = set()

    def watched(path: str, **options: Any) -> Any:
        opened.add(Path(path).stem)
        return open_slide(path, **options)

    monkeypatch.setattr(pixels, "open_slide", watched)
    run_distillation(request_of(cohort, tmp_path / "lr.safetensors"))
    held = {read_attrs(bag).slide_id for bag in sorted((cohort / "job" / "bags").glob("*.h5"))[:2]}
    assert len(opened) == 4
    assert not opened & held


def test_cached_and_streamed_tiles_train_the_same_encoder(cohort: Path, tmp_path: Path) -> None:
    results = []
    for name, cache in (("cached", 512), ("streamed", 0)):
        # Groups of one MiB, so that slides are mixed in several groups either way.
        settings = dataclasses.replace(QUICK, cache_mib=cache, mix_mib=1, threads=1 + (cache == 0))
        results.append(run_distillation(request_of(cohort, tmp_path / name / "lr.safetensors", settings=settings)))
    assert results[0].history.epochs == results[1].history.epochs
    one, other = (weights_of(result.path) for result in results)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["texture", "timm:test_vit"])
def test_targets_in_memory_and_in_files_train_the_same_encoder(cohort: Path, tmp_path: Path, teacher: str) -> None:
    results, lines = [], []
    options: dict[str, Any] = {"targets_dir": tmp_path / "targets", "teacher": teacher}
    if teacher == "texture":
        options["mil_teacher"] = mil_teacher(tmp_path / "hr.safetensors", "fold_1", load_encoder("texture").info.dim)
    else:
        options |= {"compute": True, "random_teacher": True, "student": "copy"}
    for name, limit in (("memory", 4096), ("files", 0)):
        settings = dataclasses.replace(QUICK, jitters=1, targets_mib=limit)
        request = request_of(cohort, tmp_path / name / "lr.safetensors", settings=settings, **options)
        said: list[str] = []
        results.append(run_distillation(request, said.append))
        lines.append([line for line in said if "scratch files" in line])
    assert [len(found) for found in lines] == [0, 1]
    assert results[0].history.epochs == results[1].history.epochs
    assert results[0].baseline == results[1].baseline
    assert results[0].mean == results[1].mean
    assert results[0].path.read_bytes() == results[1].path.read_bytes()
    assert not list((tmp_path / "files").glob("targets-*"))
    # A limit on memory is no other run: what one began the other would go on with.
    again = dataclasses.replace(request, settings=dataclasses.replace(settings, targets_mib=7))
    assert run_distillation(again).history.epochs == results[0].history.epochs
    assert "targets_mib" not in read_lr_header(results[0].path).training["settings"]


@pytest.mark.slow
def test_a_run_that_was_interrupted_gives_the_same_to_the_bit(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(QUICK, epochs=3)
    whole = run_distillation(request_of(cohort, tmp_path / "whole" / "lr.safetensors", settings=settings))

    class PulledPlugError(Exception):
        pass

    def stop(text: str) -> None:
        if text.startswith("epoch 2/"):
            raise PulledPlugError

    request = request_of(cohort, tmp_path / "cut" / "lr.safetensors", settings=settings)
    with pytest.raises(PulledPlugError):
        run_distillation(request, stop)
    assert not request.out.exists()
    lines: list[str] = []
    resumed = run_distillation(request, lines.append)
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 3/3"]
    assert resumed.history.epochs == whole.history.epochs
    one, other = weights_of(whole.path), weights_of(resumed.path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ResumeError, match="other settings"):
        run_distillation(dataclasses.replace(request, settings=dataclasses.replace(settings, lr=5e-4)))


@pytest.mark.slow
def test_layers_of_a_vit_are_computed_where_bags_lack_them(cohort: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"teacher": "timm:test_vit", "random_teacher": True, "student": "copy"}
    with pytest.raises(BagError, match=r"no features of timm:test_vit") as caught:
        run_distillation(request_of(cohort, tmp_path / "lr.safetensors", **common))
    assert "choose an encoder it has" in str(caught.value.remedy)
    request = request_of(cohort, tmp_path / "lr.safetensors", compute=True, targets_dir=tmp_path / "t", **common)
    result = run_distillation(request)
    names = {key.split("_")[0] for key in result.figures if key.endswith("cosine")}
    assert names == {"layer0", "layer1", "layer2", "final"}
    assert read_lr_header(result.path).training["layers"] == [0, 1, 4]
    files = sorted((tmp_path / "t").glob("*.h5"))
    assert len(files) == 4
    stamps = [file.stat().st_mtime_ns for file in files]
    # Another fold shares what is there already: only its two further slides are computed.
    run_distillation(dataclasses.replace(request, fold="2", out=tmp_path / "lr2.safetensors"))
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert len(list((tmp_path / "t").glob("*.h5"))) == 6


def test_bags_with_features_but_without_layers_say_how_to_get_them(cohort: Path, tmp_path: Path) -> None:
    entries = read_manifest(cohort / "slides" / "slides.csv")[2:4]
    settings = JobSettings(
        tile=TileSettings(resolutions=(0.5, 2.0), tile_px=64),
        extract=ExtractSettings(encoders={"*": ("timm:test_vit",)}, random_weights=True),
    )
    paths = open_job(tmp_path / "job", settings, entries)
    assert [o.status for o in dispatch(entries, settings, paths, Where())] == ["done", "done"]
    request = request_of(cohort, tmp_path / "lr.safetensors", bags=paths.bags, teacher="timm:test_vit")
    with pytest.raises(BagMismatchError, match="holds no layers 0, 1, 4") as caught:
        run_distillation(dataclasses.replace(request, random_teacher=True))
    assert "--layers 0,1,4" in str(caught.value.remedy)
    assert "--targets compute" in str(caught.value.remedy)


def mil_teacher(path: Path, fold: str, dim: int, seen: tuple[str, ...] = ("somebody",)) -> Path:
    settings = ModelSettings("gated-abmil", in_dim=dim, hidden=8, attention_dim=4)
    torch.manual_seed(0)
    card = ModelCard(
        model=settings,
        classes=("negative", "positive"),
        encoder="texture",
        level="20x",
        tile_px=64,
        fold=fold,
        seen=Seen.of({"train": [(case, "") for case in seen]}),
    )
    save_model(path, build_model(settings), card)
    return path


def test_children_weigh_as_the_teacher_of_the_same_fold_attends(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dim = load_encoder("texture").info.dim
    ours = mil_teacher(tmp_path / "ours.safetensors", "fold_1", dim)
    seen: list[Any] = []
    original = run_module.distill

    def spy(student: Any, preprocessing: Any, train: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(train)
        return original(student, preprocessing, train, *args, **kwargs)

    monkeypatch.setattr(run_module, "distill", spy)
    run_distillation(request_of(cohort, tmp_path / "b.safetensors", mil_teacher=ours))
    model, _ = load_model(ours)
    for slide in seen:
        with torch.inference_mode():
            logits = model(torch.from_numpy(slide.final).float(), torch.tensor([0, len(slide.final)])).attention_logits
        assert logits is not None
        for children, weights in zip(slide.children.children, slide.weights, strict=True):
            present = children >= 0
            # Softmax over the slide, renormalised over the children, is softmax over the children.
            expected = logits[torch.from_numpy(children[present])].softmax(0).numpy()
            assert np.allclose(weights[present], expected, atol=1e-5)
            assert not weights[~present].any()


def test_the_teacher_of_another_fold_is_refused(cohort: Path, tmp_path: Path) -> None:
    dim = load_encoder("texture").info.dim
    other = mil_teacher(tmp_path / "other.safetensors", "fold_2", dim)
    with pytest.raises(BagMismatchError, match="fold_2, not of fold_1"):
        run_distillation(request_of(cohort, tmp_path / "lr.safetensors", mil_teacher=other))


def test_a_case_in_two_parts_is_refused(cohort: Path, tmp_path: Path) -> None:
    whole = splits_of(cohort)
    parts = (*whole.folds["fold_1"], "train")
    torn = SplitTable("case", (*whole.ids, whole.ids[0]), {"fold_1": parts})  # type: ignore[dict-item]
    with pytest.raises(LeakageError, match="two parts"):
        run_distillation(request_of(cohort, tmp_path / "lr.safetensors", splits=torn))


def test_a_teacher_that_is_no_network_cannot_be_copied(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no network that could be copied"):
        run_distillation(request_of(cohort, tmp_path / "lr.safetensors", student="copy"))


def test_the_command_distils_and_draws(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits_of(cohort).write(tmp_path / "splits.csv")
    out = tmp_path / "lr-fold1.safetensors"
    arguments = ["distill", "--bags", str(cohort / "job" / "bags"), "--teacher", "texture"]
    arguments += ["--student", "timm:test_vit", "--random-student", "--splits", str(tmp_path / "splits.csv")]
    arguments += ["--fold", "1", "--out", str(out), "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    assert run_group(group, "lrmil", arguments) == 0
    printed = capsys.readouterr().out
    assert "layer0" in printed
    assert "linear" in printed
    assert out.is_file()
    assert out.with_suffix(".png").stat().st_size > 1000
    history = json.loads((tmp_path / "lr-fold1.history.json").read_text())
    assert history["best_epoch"] == 1
    assert set(history["linear_baseline"]) == {"layer0", "final"}
    assert run_group(group, "lrmil", [*arguments, "-r", "20x"]) == 2
    assert "give HR and LR" in capsys.readouterr().err


def test_a_mil_teacher_that_may_have_seen_held_out_cases_is_refused(cohort: Path, tmp_path: Path) -> None:
    dim = load_encoder("texture").info.dim
    # An early model, whose file says nothing, away from its splits, is not believed, whatever fold it names.
    unknown = mil_teacher(tmp_path / "unknown.safetensors", "fold_1", dim, seen=())
    with pytest.raises(LeakageError, match="does not say whom it was trained on"):
        run_distillation(request_of(cohort, tmp_path / "a.safetensors", mil_teacher=unknown))
    # Its fold has the same name, and other cases.
    (tmp_path / "run" / "fold_1").mkdir(parents=True)
    other = mil_teacher(tmp_path / "run" / "fold_1" / "model.safetensors", "fold_1", dim, seen=())
    table = splits_of(cohort)
    swapped = SplitTable("case", table.ids, {"fold_1": table.folds["fold_2"], "fold_2": table.folds["fold_1"]})
    swapped.write(tmp_path / "run" / "splits.csv")
    with pytest.raises(LeakageError, match="trained on 2 of them"):
        run_distillation(request_of(cohort, tmp_path / "b.safetensors", mil_teacher=other))
    table.write(tmp_path / "run" / "splits.csv")
    run_distillation(request_of(cohort, tmp_path / "c.safetensors", mil_teacher=other))
    # A record in the file goes before what lies beside it.
    held = table.ids[0]
    mil_teacher(tmp_path / "run" / "fold_1" / "model.safetensors", "fold_1", dim, seen=(held.upper(),))
    with pytest.raises(LeakageError, match="trained on 1 of them"):
        run_distillation(request_of(cohort, tmp_path / "d.safetensors", mil_teacher=other))


def test_without_splits_all_slides_are_seen_and_the_file_says_whom(cohort: Path, tmp_path: Path) -> None:
    attrs = [read_attrs(bag) for bag in sorted((cohort / "job" / "bags").glob("*.h5"))]
    settings = dataclasses.replace(QUICK, epochs=1)
    everyone = request_of(cohort, tmp_path / "lr.safetensors", splits=None, fold="", settings=settings)
    result = run_distillation(everyone)
    assert {*result.train_slides, *result.val_slides} == {a.slide_id for a in attrs}
    assert result.val_slides
    seen = Seen.from_json(read_lr_header(result.path).training["seen"])
    # Without labels; by its case, and by its pixels whatever the case is called now.
    assert seen.part_of(attrs[0].case_id, "") == "unlabelled"
    assert seen.part_of("another name", attrs[0].slide_fingerprint) == "unlabelled"
    assert seen.part_of("another name", "another slide") == ""
    two = tuple(a.case_id for a in attrs[:3])
    some = run_distillation(dataclasses.replace(everyone, out=tmp_path / "some.safetensors", only_cases=two))
    assert {*some.train_slides, *some.val_slides} == {a.slide_id for a in attrs[:3]}
    with pytest.raises(SplitError, match="no bag is of the case nobody"):
        run_distillation(dataclasses.replace(everyone, only_cases=("nobody",)))


def test_bags_say_which_slides_their_encoder_has_seen(cohort: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, epochs=1)
    encoder = run_distillation(request_of(cohort, tmp_path / "lr-fold1.safetensors", settings=settings)).path
    held = set(splits_of(cohort).ids[:2])
    arguments = ["run", str(cohort / "slides" / "slides.csv"), "-o", str(tmp_path / "job"), "-r", "20x", "-r", "5x"]
    arguments += ["--tile-px", "64", "-e", "20x=texture", "-e", f"5x={encoder}", "--devices", "cpu"]
    assert run_group(wsi_group, "wsi-pipe", arguments) == 0
    bags = sorted((tmp_path / "job" / "bags").glob("*.h5"))
    saw = {read_attrs(bag).case_id: inspect_bag(bag, "5x", None).encoder_saw for bag in bags}
    assert len(saw) == 6
    assert {case for case, part in saw.items() if part == ""} == held
    assert set(saw.values()) == {"", "unlabelled"}
    assert all(inspect_bag(bag, "20x", None).encoder_saw == "" for bag in bags)


def test_the_command_says_what_it_needs_to_know(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "distill",
        "--bags",
        str(cohort / "job" / "bags"),
        "--teacher",
        "texture",
        "--out",
        str(tmp_path / "a.safetensors"),
    ]
    (tmp_path / "empty.txt").write_text("\n")
    for wrong in ([], ["--all", "--fold", "1"], ["--fold", "1"]):
        assert run_group(group, "lrmil", [*base, *wrong]) == 2
        assert "--all, or --cases FILE" in capsys.readouterr().err
    assert run_group(group, "lrmil", [*base, "--cases", str(tmp_path / "empty.txt")]) == 2
    assert "names no case" in capsys.readouterr().err


def test_cases_may_come_from_the_labels_alone(cohort: Path, tmp_path: Path) -> None:
    everything = [read_attrs(bag) for bag in sorted((cohort / "job" / "bags").glob("*.h5"))]
    rows = [f"{a.slide_id},patient{i // 2},{i % 2}" for i, a in enumerate(everything)]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["slide_id,case_id,label", *rows]) + "\n")
    parts = ("test", "train", "train")
    splits = SplitTable("case", ("patient0", "patient1", "patient2"), {"fold_1": parts})  # type: ignore[dict-item]
    request = request_of(cohort, tmp_path / "lr.safetensors", splits=splits)
    with pytest.raises(SplitError, match="no training bag"):
        run_distillation(request)
    result = run_distillation(dataclasses.replace(request, cases=read_cases(labels)))
    assert {*result.train_slides, *result.val_slides} == {a.slide_id for a in everything[2:]}
    # Slides of one patient stop together or train together.
    patient = {a.slide_id: i // 2 for i, a in enumerate(everything)}
    assert not {patient[s] for s in result.train_slides} & {patient[s] for s in result.val_slides}


@pytest.mark.slow
def test_a_run_goes_on_where_attention_differs_in_the_last_digit(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on another processor; another teacher's is another run."""
    teacher = mil_teacher(tmp_path / "hr.safetensors", "fold_1", load_encoder("texture").info.dim)
    request = request_of(cohort, tmp_path / "lr.safetensors", mil_teacher=teacher)
    first = run_distillation(request)
    original = attention.attention_weights
    monkeypatch.setattr(attention, "attention_weights", lambda *args: original(*args) * np.float32(1 + 1e-6))
    assert run_distillation(request).history.epochs == first.history.epochs
    other = mil_teacher(tmp_path / "other.safetensors", "fold_1", load_encoder("texture").info.dim)
    model, card = load_model(other)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    save_model(other, model, card)
    with pytest.raises(ResumeError, match="other settings"):
        run_distillation(dataclasses.replace(request, mil_teacher=other))


@pytest.mark.slow
def test_another_student_does_not_go_on_where_the_first_one_was(cohort: Path, tmp_path: Path) -> None:
    request = request_of(cohort, tmp_path / "lr.safetensors", settings=dataclasses.replace(QUICK, epochs=1))
    run_distillation(request)
    with pytest.raises(ResumeError, match="other settings"):
        run_distillation(dataclasses.replace(request, student="timm:test_vit2"))
    with pytest.raises(ResumeError, match="other settings"):
        run_distillation(dataclasses.replace(request, student_px=96))
