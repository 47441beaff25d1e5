"""One exported file: what it holds, whom it refuses, and that it predicts as the model does without torch."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lrmil.checkpoint import ModelCard, load_model, save_model
from lrmil.cli import group
from lrmil.config import ModelSettings
from lrmil.deploy.export import joined, write_classifier
from lrmil.deploy.graph import OPSET, Graph
from lrmil.deploy.header import ClassifierHeader, digest_entry, read_header
from lrmil.deploy.runtime import OnnxClassifier
from lrmil.errors import ModelFileError
from lrmil.model import build_model
from wsi_pipe.bag import read_attrs
from wsi_pipe.config import TileSettings
from wsi_pipe.encoders.architectures import build, timm_recipe
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.encoders.weights import file_sha256
from wsi_pipe.errors import ConfigError, WsiPipeError
from wsi_pipe.geometry import TileSpec
from wsi_pipe.seen import Seen
from wsi_pipe.synthetic import make_cohort

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Said(NamedTuple):
    """A command's end: what ``wsi_pipe.cli.run_main`` would make of it."""

    exit_code: int
    output: str


class Trained:
    """A cohort's folder with an encoder and a model that is said to have seen some of its slides."""

    def __init__(self, root: Path, cohort: Path) -> None:
        self.root, self.cohort = root, cohort
        self.encoder = root / "lr.safetensors"
        recipe, _ = timm_recipe("test_vit")
        # Tiles of 64 px, which the network takes at its own 160: resizing is part of what is exported.
        torch.manual_seed(1)
        network = build(recipe, name="test_vit")
        write_lr_encoder(self.encoder, network, recipe=recipe, tile=TileSpec(2.0, 64), licence="MIT")
        self.attrs = [read_attrs(path) for path in sorted((cohort / "job" / "bags").glob("*.h5"))]
        pairs = [(a.case_id or a.slide_id, a.slide_fingerprint) for a in self.attrs]
        torch.manual_seed(0)
        model = build_model(ModelSettings("gated-abmil", in_dim=recipe.dim, hidden=16, attention_dim=8))
        card = ModelCard(
            model.settings, ("benign", "tumour"), str(self.encoder), file_sha256(self.encoder), "5x", 2.0, 64,
            temperature=1.4, bias=(0.1, -0.1), seen=Seen.of({"train": pairs[:3], "val": pairs[3:5]}),
        )  # fmt: skip
        self.model = root / "model.safetensors"
        save_model(self.model, model, card)
        self.slides = sorted((cohort / "slides").glob("*.svs")) or sorted((cohort / "slides").glob("*.tif*"))

    def run(self, *arguments: object) -> Said:
        done = CliRunner().invoke(group, list(map(str, arguments)), standalone_mode=False)
        if isinstance(done.exception, WsiPipeError):
            return Said(2, str(done.exception))
        return Said(
            done.exit_code or done.return_value or 0, done.output + (repr(done.exception) if done.exception else "")
        )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, distill_cohort: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("export"), distill_cohort)


@pytest.fixture(scope="session")
def exported(trained: Trained) -> Path:
    """The trained model, exported. It takes long, so what does not need torch's exporter takes ``classifier``."""
    out = trained.root / "exported.onnx"
    result = trained.run("export", "--model", trained.model, "--bags", trained.cohort / "job", "-o", out)
    assert result.exit_code == 0, result.output
    return out


def plain_encoder(dim: int) -> Any:
    """A graph of a linear encoder of the mean colour of uint8 tiles of 64 px."""
    graph = Graph("encoder")
    pixels = graph.op("Cast", "tiles", to=onnx.TensorProto.FLOAT)
    weight = np.random.default_rng(0).normal(size=(dim, 3)) / 99
    graph.named(
        graph.linear(graph.op("ReduceMean", pixels, graph.ints(1, 2), keepdims=0), weight, np.ones(dim)), "features"
    )
    values = [("tiles", onnx.TensorProto.UINT8, [64, 64, 3]), ("features", onnx.TensorProto.FLOAT, [dim])]
    put_in, out = [onnx.helper.make_tensor_value_info(n, kind, ["batch", *shape]) for n, kind, shape in values]
    made = onnx.helper.make_graph(graph.nodes, "encoder", [put_in], [out], graph.constants)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.fixture(scope="session")
def classifier(trained: Trained) -> Path:
    """The trained model behind another encoder, which takes no exporter to write."""
    model, card = load_model(trained.model)
    out = trained.root / "classifier.onnx"
    info = EncoderInfo(
        "lr.safetensors", "lr", card.model.in_dim, card.weights_sha256, "MIT", mpp=2.0, mpp_required=True
    )
    named = dataclasses.replace(card, encoder="lr.safetensors")
    tile = TileSettings(resolutions=(2.0,), tile_px=64)
    header = ClassifierHeader(named, dataclasses.replace(info, tile_px=64), tile=tile, written_by="test")
    write_classifier(out, joined(plain_encoder(card.model.in_dim), model, card), header)
    return out


WITHOUT_TORCH = """
import sys
from lrmil.cli import group
try:
    group.main(sys.argv[1:], standalone_mode=False)
finally:
    heavy = {"torch", "timm", "onnx", "onnxscript", "sklearn", "pandas"} & set(sys.modules)
    assert not heavy, heavy
"""


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def with_coarse(trained: Trained, folder: Path) -> list[Path]:
    """The cohort's slides, and one whose pixels are larger than the model's."""
    make_cohort(folder, 1, seed=9, size_px=(256, 256), mpp=3.0, max_slides_per_case=1)
    return [trained.cohort / "slides", next(folder.glob("*.tif")).rename(folder / "coarse.tif")]


def test_slides_are_predicted_without_torch(trained: Trained, classifier: Path, tmp_path: Path) -> None:
    slides = with_coarse(trained, tmp_path)
    command = [sys.executable, "-c", WITHOUT_TORCH, "predict", "--model", classifier, *slides, "-o", tmp_path / "onnx"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert "AssertionError" not in done.stderr, done.stderr
    rows = table(tmp_path / "onnx")
    assert sorted(row["status"] for row in rows) == [*["done"] * 6, "failed"]
    coarse = next(row for row in rows if row["status"] == "failed")
    assert coarse["slide_id"] == "coarse"
    assert coarse["reason"].startswith("2 um/px is 33.3% finer than the slide's 3 um/px")
    assert all(0 < float(row["probability_tumour"]) < 1 for row in rows if row["status"] == "done")
    head = json.loads((tmp_path / "onnx" / "predictions.json").read_text())["model"]
    assert head["classes"] == ["benign", "tumour"]


@pytest.mark.slow
def test_predictions_are_those_of_torch(trained: Trained, exported: Path, tmp_path: Path) -> None:
    slides = with_coarse(trained, tmp_path)
    settings = tmp_path / "exact.toml"
    settings.write_text('[extract]\nprecision = "float32"\n')
    for model, name in ((exported, "onnx"), (trained.model, "torch")):
        done = trained.run("predict", "--model", model, *slides, "-o", tmp_path / name, "--config", settings)
        assert done.exit_code == 1, done.output
    own, other = table(tmp_path / "onnx"), table(tmp_path / "torch")
    assert len(own) == 7
    for a, b in zip(own, other, strict=True):
        exact = ("slide_id", "case_id", "status", "predicted", "tiles", "top_tile_x", "top_tile_y", "reason")
        assert [a[name] for name in exact] == [b[name] for name in exact]
        if a["status"] == "done":
            assert float(a["probability_tumour"]) == pytest.approx(float(b["probability_tumour"]), abs=3e-4)


def test_a_file_says_what_it_takes_and_whom_it_has_seen(trained: Trained, classifier: Path) -> None:
    header = read_header(classifier)
    assert header.accepted_mpp == pytest.approx((1.95, 2.05))
    assert (header.tile.resolutions, header.tile.tile_px) == ((2.0,), 64)
    assert (header.card.encoder, header.encoder.precision) == ("lr.safetensors", "float32")
    assert header.card.seen == load_model(trained.model)[1].seen
    assert ClassifierHeader.from_json(header.to_json(), classifier) == header
    proto = onnx.load(classifier)
    onnx.checker.check_model(proto)
    assert [value.name for value in proto.graph.input] == ["tiles", "bag"]
    assert [value.name for value in proto.graph.output] == ["features", "logits", "probabilities", "attention_logits"]
    # Nothing in it says where the encoder lay.
    assert str(trained.root) not in classifier.read_bytes().decode("latin-1")


def test_features_and_probabilities_do_not_depend_on_batches(classifier: Path) -> None:
    session = OnnxClassifier.load(classifier, device="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), np.uint8)
    whole = session.encode(tiles)
    parts = np.concatenate([session.encode(tiles[:1]), session.encode(tiles[1:17]), session.encode(tiles[17:])])
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    logits, _ = session.forward(whole)
    raw = onnxruntime.InferenceSession(classifier.read_bytes(), providers=["CPUExecutionProvider"])
    found = raw.run(["probabilities"], {"tiles": tiles[:1], "bag": whole})[0]
    np.testing.assert_allclose(found, session.header.card.probabilities(logits[None])[0], atol=1e-6)
    with pytest.raises(ConfigError, match=r"tiles must be uint8 \(B, 64, 64, 3\)"):
        session.encode(np.zeros((1, 32, 32, 3), np.uint8))


def test_the_encoder_is_not_run_where_only_the_head_is_asked(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = OnnxClassifier.load(classifier, device="cpu")
    features = np.zeros((3, session.header.card.model.in_dim), np.float32)
    seen: list[tuple[int, ...]] = []
    run = session._session.run

    def watched(wanted: list[str], feed: dict[str, np.ndarray], options: object) -> object:
        seen.append(feed["tiles"].shape)
        return run(wanted, feed, options)

    monkeypatch.setattr(session, "_session", SimpleNamespace(run=watched))
    session.forward(features)
    assert seen == [(0, 64, 64, 3)]


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut":
        return content[: len(content) // 2]
    if how == "flipped":
        at = len(content) // 2
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    if how == "other":
        graph = onnx.helper.make_graph([], "nothing", [], [])
        return onnx.helper.make_model(graph).SerializeToString()
    if how == "later":
        body = content[: -len(digest_entry(b""))].replace(b'"format_version": 1', b'"format_version": 9')
        return body + digest_entry(body)
    return how.encode()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "no readable ONNX file, or was cut off"),
        ("flipped", "is damaged, or was changed by another program"),
        ("other", "no classifier: it has no lrmil_classifier metadata"),
        ("later", "has the format version 9, this lrmil reads up to 1"),
        ("pickle or so", "no readable ONNX file"),
    ],
)
def test_what_is_no_classifier_is_refused_before_it_is_run(
    classifier: Path, tmp_path: Path, how: str, message: str
) -> None:
    path = tmp_path / "c.onnx"
    path.write_bytes(damaged(classifier.read_bytes(), how))
    with pytest.raises(ModelFileError, match=message):
        OnnxClassifier.load(path)
    with pytest.raises(ModelFileError, match=r"there\.onnx does not exist"):
        read_header(tmp_path / "there.onnx")


def test_what_cannot_be_done_with_a_classifier_says_so(trained: Trained, classifier: Path, tmp_path: Path) -> None:
    slides = trained.cohort / "slides"
    given = trained.run("predict", "--model", classifier, slides, "-o", tmp_path / "a", "-e", "texture")
    assert "holds its own encoder; leave out --encoder" in given.output
    cuda = trained.run("predict", "--model", classifier, slides, "-o", tmp_path / "b", "--device", "cuda:0")
    assert "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu" in cuda.output
    config = tmp_path / "c.toml"
    config.write_text('[extract]\nprecision = "bfloat16"\n')
    half = trained.run("predict", "--model", classifier, slides, "-o", tmp_path / "c", "--config", config)
    assert "the classifier computes in float32, and bfloat16 is asked for" in half.output
    for arguments, said in (
        (["-o", tmp_path / "x.bin"], "must end in .onnx"),
        (["-o", tmp_path / "x.onnx", "--quantise", "int8"], "say where they are: --bags JOB"),
        (["-o", tmp_path / "x.onnx", "-e", "texture"], "encoder texture has weights"),
        (["-o", tmp_path / "x.onnx", "--quantise", "int8", "--precision", "bfloat16"], "give one of them"),
    ):
        assert said in trained.run("export", "--model", trained.model, *arguments).output
    for fold in ("fold_1", "fold_2"):
        (tmp_path / "run" / fold).mkdir(parents=True)
        (tmp_path / "run" / fold / "model.safetensors").write_bytes(trained.model.read_bytes())
    several = trained.run("export", "--model", tmp_path / "run", "-o", tmp_path / "x.onnx")
    assert "holds 2 models, a fold's each; give one of them" in several.output
    assert list(tmp_path.glob("*.onnx")) == []


def test_a_classifier_is_not_judged_on_slides_that_it_has_seen(
    trained: Trained, classifier: Path, tmp_path: Path
) -> None:
    predicted = trained.run("predict", "--model", classifier, trained.cohort / "slides", "-o", tmp_path / "p")
    assert predicted.exit_code == 0, predicted.output
    bags = tmp_path / "p" / "job" / "bags"
    labels = tmp_path / "labels.csv"
    ids = [a.slide_id for a in trained.attrs]
    labels.write_text(
        "slide_id,label\n" + "".join(f"{s},{'tumour' if i % 2 else 'benign'}\n" for i, s in enumerate(ids))
    )
    judge = ["evaluate", "--model", classifier, "--bags", bags, "--labels", labels, "--replicates", 10]
    refused = trained.run(*judge, "-o", tmp_path / "e")
    assert "was trained on 3 of them" in refused.output
    allowed = trained.run(*judge, "-o", tmp_path / "e", "--allow-seen")
    assert allowed.exit_code == 0, allowed.output
    judged = {row["slide_id"]: row for row in table(tmp_path / "e")}
    for row in table(tmp_path / "p"):
        assert float(judged[row["slide_id"]]["probability_tumour"]) == pytest.approx(
            float(row["probability_tumour"]), abs=1e-4
        )


@pytest.mark.slow
def test_int8_says_what_it_changes_and_is_refused_above_its_bound(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    command = ["export", "--model", trained.model, "--bags", trained.cohort / "job", "--quantise", "int8", "-o", out]
    made = trained.run(*command, "--calibration-tiles", 8, "--most-change", 5)
    assert made.exit_code == 0, made.output
    assert "int8 against float32 on 2 slides (part val)" in made.output
    header = read_header(out)
    change = header.quantisation["largest_logit_change"]
    assert header.encoder.precision == "int8"
    assert header.quantisation["calibration_slides"] == 3
    assert 0 < change < 5
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    out.unlink()
    refused = trained.run(*command, "--calibration-tiles", 8, "--most-change", change / 2)
    assert refused.exit_code == 2
    assert "int8 changes a logit of slide" in refused.output
    assert not out.exists()


@pytest.mark.slow
def test_bfloat16_is_told_where_the_runtime_has_no_kernels(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    made = trained.run("export", "--model", trained.model, "--precision", "bfloat16", "-o", out)
    assert made.exit_code == 0, made.output
    types = {tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    said = trained.run("predict", "--model", out, trained.cohort / "slides", "-o", tmp_path / "p")
    # A runtime that learns bfloat16 on this processor predicts.
    assert said.exit_code == 0 or "has no kernels here for" in said.output, said.output
