"""Several teachers: each has its own layers, projections and figures, and the student is one network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.checkpoint import ModelCard, save_model
from lrmil.cli import group as lrmil_group
from lrmil.config import ModelSettings
from lrmil.distill import DistillRequest, DistillSettings, run_distillation
from lrmil.distill import run as run_module
from lrmil.distill.feed import Feed, TargetBatch
from lrmil.distill.student import Head, Student
from lrmil.distill.targets import Lesson, target_stats
from lrmil.distill.train import _loss, losses_of, variances_of
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.model import build_model
from wsi_pipe.cli import group as wsi_pipe_group
from wsi_pipe.cli import run_group
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.loading import build_random
from wsi_pipe.encoders.lr_file import read_lr_header
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.seen import Seen

GREY = Preprocessing(None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QUICK = DistillSettings(
    epochs=2, batch_size=8, lr=1e-3, precision="float32", device="cpu", val_fraction=0.3, threads=1, patience=9
)


def network(name: str) -> PooledNetwork:
    return build_random(Recipe(name, 64 if name == "test_vit" else 96, GREY, "model", {}), name, input_px=64)


def student(name: str, more: tuple[Head, ...]) -> Student:
    torch.manual_seed(0)
    net = network(name)
    blocks = [0, 4] if net.depth else []
    torch.manual_seed(1)
    return Student(net, blocks=blocks, layer_dims=[64, 10], final_dim=7, k=4, side_px=64, more=more)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_each_teacher_has_maps_and_projections_of_its_own(name: str) -> None:
    vit = name == "test_vit"
    other = Head([2] if vit else [], [5], 9), Head([0, 1, 4] if vit else [], [64, 64, 3], 11)
    both, one = student(name, other).eval(), student(name, ()).eval()
    # What the first teacher's part begins with does not depend on the others.
    assert all(torch.equal(value, both.state_dict()[key]) for key, value in one.state_dict().items())
    assert not [key for key in one.state_dict() if key.startswith("more")]
    images = torch.randn(2, 3, 64, 64)
    output, alone = both(images), one(images)
    assert torch.allclose(output.feature, alone.feature, atol=1e-6)
    assert [tuple(p.shape) for p in output.of(1).patches] == [(2, 16, 5)]
    assert [tuple(p.shape) for p in output.of(2).patches] == [(2, 16, 64), (2, 16, 64), (2, 16, 3)]
    assert [tuple(output.of(n).final.shape) for n in range(3)] == [(2, 7), (2, 9), (2, 11)]
    for found, wanted in zip((*output.of(0).patches, output.of(0).final), (*alone.patches, alone.final), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    if vit:
        # Each from its own block: the teacher of block 2 alone sees what a student of that block alone gives.
        torch.manual_seed(0)
        plain = Student(network(name), blocks=[2], layer_dims=[64], final_dim=64, k=4, side_px=64).eval()
        seen = both.more_projections[0][0](plain(images).patches[0])
        assert torch.allclose(output.of(1).patches[0], seen, atol=1e-5)


def test_the_loss_is_the_mean_over_teachers() -> None:
    from tests.lrmil.test_distill_feed import CPU, Source, slide

    first = [slide(i, 4, 4 + i, (64, 10, 7), np.float16) for i in range(2)]
    second = [
        dataclasses.replace(one, layers=(np.asarray(one.final) * 2,), final=np.asarray(one.final) + 1) for one in first
    ]
    lesson = Lesson("b", second, target_stats(second, standardise=True))
    settings = DistillSettings(batch_size=4)
    feed = Feed(Source(first, settings), target_stats(first, standardise=False), CPU, more=[lesson], name="a")  # type: ignore[arg-type]
    alone = [Feed(Source(s, settings), own.stats, CPU) for s, own in zip((first, second), feed.lessons, strict=True)]  # type: ignore[arg-type]
    net = student("test_resnet", (Head([], [7], 7),))
    variances = variances_of(feed, settings)
    for batch, *each in zip(feed.shuffled([1]), *(one.shuffled([1]) for one in alone), strict=True):
        output = net(torch.randn(len(batch.pixels), 3, 64, 64))
        losses = []
        for n, own in enumerate(each):
            given: TargetBatch = batch.of(n).targets
            for found, wanted in zip(
                [*given.layers, given.final], [*own.targets.layers, own.targets.final], strict=True
            ):
                assert torch.equal(found, wanted)
            losses.append(losses_of(output.of(n), own.targets, variances[n], settings))
        assert _loss(output, batch, variances, settings).item() == pytest.approx(
            (losses[0] + losses[1]).item() / 2, rel=1e-6
        )
        # An only teacher's loss is what it always was, to the bit.
        assert torch.equal(_loss(output, each[0], variances[:1], settings), losses[0])


def request_of(cohort: Path, out: Path, **changes: Any) -> DistillRequest:
    base = DistillRequest(
        bags=cohort / "job" / "bags", teacher="texture", student="timm:test_resnet", lr="5x", hr="20x", out=out,
        settings=QUICK, random_student=True, random_teacher=True, more_teachers=("timm:test_vit",),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def two_encoders(distill_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with the features and layers of two encoders."""
    root = tmp_path_factory.mktemp("teachers")
    arguments = ["run", distill_cohort / "slides" / "slides.csv", "-o", root / "job", "-r", "20x", "-r", "5x"]
    arguments += ["--tile-px", "64", "-e", "timm:test_vit", "-e", "timm:test_vit2", "--random-weights", "--no-report"]
    arguments += ["--layers", "0,1,-2", "--precision", "float32", "--devices", "cpu"]
    assert run_group(wsi_pipe_group, "wsi-pipe", [str(part) for part in arguments]) == 0
    return root


TWO: dict[str, Any] = {"teacher": "timm:test_vit2", "more_teachers": ("timm:test_vit",)}


@pytest.mark.slow
def test_a_student_learns_from_two_teachers(two_encoders: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, epochs=6, lr=5e-3, stain=0.0)
    request = request_of(two_encoders, tmp_path / "stored" / "lr.safetensors", settings=settings, **TWO)
    stored = run_distillation(request)
    last = stored.history.epochs[-1]
    names = {key.removesuffix("_cosine") for key in last if key.endswith("_cosine")}
    vits = ("timm-test_vit2-random", "timm-test_vit-random")
    assert names == {f"{vit}.{what}" for vit in vits for what in ("layer0", "layer1", "layer2", "final")}
    assert stored.baseline.keys() == stored.mean.keys() == names
    assert last["loss"] < 0.8 * stored.history.epochs[0]["loss"]
    training = read_lr_header(stored.path).training
    assert [one["teacher"] for one in training["teachers"]] == ["timm:test_vit2-random", "timm:test_vit-random"]
    assert [one["layers"][:2] for one in training["teachers"]] == [[0, 1], [0, 1]]
    assert training["teacher"] == "timm:test_vit2-random"
    licence = read_lr_header(stored.path).licence
    assert "distilled from timm:test_vit2-random" in licence
    assert "distilled from timm:test_vit-random" in licence
    # The file is the student's network alone, whatever the teachers are.
    from safetensors import safe_open

    with safe_open(stored.path, framework="pt") as file:
        assert set(file.keys()) == network("test_resnet").trunk.state_dict().keys()
    encoder = load_encoder(str(stored.path), precision="float32")
    assert encoder.encode(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, encoder.info.dim)
    # Computed now, the same is learnt; the bags hold half precision.
    out = tmp_path / "computed" / "lr.safetensors"
    computed = run_distillation(dataclasses.replace(request, out=out, compute=True))
    assert computed.history.epochs[-1]["loss"] == pytest.approx(last["loss"], rel=0.05)
    folder = tmp_path / "computed" / "lr.targets"
    assert len(list(folder.glob("*.h5"))) == len(list((folder / vits[1]).glob("*.h5"))) == 6


def test_grids_that_are_moved_are_the_same_for_all_teachers(
    distill_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = run_module.distill

    def spy(student: Any, preprocessing: Any, train: Any, *args: Any, **options: Any) -> Any:
        seen.update(train=train, more=options["more"])
        return original(student, preprocessing, train, *args, **options)

    monkeypatch.setattr(run_module, "distill", spy)
    dim = load_encoder("texture").info.dim
    settings = ModelSettings("gated-abmil", in_dim=dim, hidden=8, attention_dim=4)
    card = ModelCard(model=settings, classes=("a", "b"), encoder="texture", seen=Seen.of({"train": [("somebody", "")]}))
    save_model(tmp_path / "hr.safetensors", build_model(settings), card)
    quick = dataclasses.replace(QUICK, epochs=1, jitters=1)
    # The MIL teacher is of the second one's features; its attention weighs the children for both.
    request = request_of(
        distill_cohort, tmp_path / "lr.safetensors", settings=quick, compute=True, teacher="timm:test_vit",
        more_teachers=("texture",), mil_teacher=tmp_path / "hr.safetensors",
    )  # fmt: skip
    run_distillation(request)
    others = seen["more"][0][0].slides
    assert len(seen["train"]) == len(others) > 4
    for one, other in zip(seen["train"], others, strict=True):
        assert one.slide_id == other.slide_id
        assert one.lr.origin_l0 == other.lr.origin_l0
        assert np.array_equal(one.children.children, other.children.children)
        assert np.array_equal(one.weights, other.weights)
        assert other.final.shape[1] == dim != one.final.shape[1]
    spread = max(float(np.ptp(one.weights[one.weights > 0])) for one in others)
    assert spread > 1e-3
    with pytest.raises(BagMismatchError, match="encoder texture, not of timm:test_vit-random"):
        run_distillation(dataclasses.replace(request, more_teachers=()))
    with pytest.raises(SettingsError, match="teacher timm-test_vit-random is given twice"):
        run_distillation(dataclasses.replace(request, more_teachers=("timm:test_vit",)))


def test_the_command_takes_a_teacher_more_than_once(
    two_encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lr.safetensors"
    arguments = ["distill", "--bags", two_encoders / "job" / "bags", "--teacher", "timm:test_vit2"]
    arguments += ["--teacher", "timm:test_vit"]
    arguments += ["--random-teacher", "--student", "timm:test_vit", "--random-student", "--all", "--out", out]
    arguments += ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--val-fraction", "0.3"]
    assert run_group(lrmil_group, "lrmil", [str(part) for part in arguments]) == 0
    printed = capsys.readouterr().out
    assert "timm-test_vit2-random.layer0" in printed
    assert "timm-test_vit-random.final" in printed
    history = json.loads((tmp_path / "lr.history.json").read_text())
    assert "timm-test_vit-random.layer2_cosine" in history["best"]
    assert out.with_suffix(".png").stat().st_size > 1000
