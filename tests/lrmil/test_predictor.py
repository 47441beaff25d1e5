"""What is predicted equals the model's own arithmetic, and features of another kind are refused by name."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import wsi_pipe as wp
from lrmil.checkpoint import ModelCard, save_model
from lrmil.config import ModelSettings
from lrmil.errors import ModelMismatchError, StoreError
from lrmil.experiment import write_slide_files
from lrmil.model import MILModel, build_model
from lrmil.predictor import (
    Predictor,
    attention_geojson,
    find_encoder,
    predict_slides,
    write_attention,
    write_predictions,
)
from wsi_pipe.bag import check_bag, read_attrs, read_bag
from wsi_pipe.encoders import load_encoder
from wsi_pipe.errors import BagError
from wsi_pipe.manifest import SlideEntry

MakeBag = Callable[..., Path]
DIM = 8


def make_model(name: str = "gated-abmil", dim: int = DIM, seed: int = 0) -> MILModel:
    torch.manual_seed(seed)
    model = build_model(ModelSettings(name, in_dim=dim, classes=3, hidden=16, attention_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def make_card(model: MILModel, **changes: object) -> ModelCard:
    card = ModelCard(
        model.settings,
        ("a", "b", "c"),
        encoder="timm:some/net",
        weights_sha256="ab" * 32,
        level="5x",
        mpp=2.0,
        tile_px=256,
        temperature=1.7,
    )
    return dataclasses.replace(card, **changes)  # type: ignore[arg-type]


def random_features(n: int = 12, seed: int = 0) -> NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float16)


def test_prediction_is_the_models_arithmetic(make_bag: MakeBag) -> None:
    model, features = make_model(), random_features()
    path = make_bag("s", features, case_id="p")
    got = Predictor(model, make_card(model)).predict_bag(path, top_tiles=4)
    with torch.no_grad():
        output = model(torch.from_numpy(features.astype(np.float32)), torch.tensor([0, 12]))
    assert output.attention_logits is not None
    assert got.attention is not None
    p = torch.softmax(output.logits[0].double() / 1.7, 0).numpy()
    a = torch.softmax(output.attention_logits.double(), 0).numpy()
    assert (got.status, got.slide_id, got.case_id, got.tiles) == ("done", "s", "p", 12)
    assert list(got.probabilities.values()) == pytest.approx(p.tolist(), abs=1e-6)
    assert got.predicted == "abc"[int(p.argmax())]
    assert got.entropy_nats == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
    assert got.attention == pytest.approx(a, abs=1e-6)
    assert got.attention.sum() == pytest.approx(1, abs=1e-5)
    assert [t.row for t in got.top_tiles] == np.argsort(-a)[:4].tolist()
    first = got.top_tiles[0]
    # Tiles lie five in a row, each 2048 level-0 pixels wide.
    assert (first.x, first.y) == (first.row % 5 * 2048.0, first.row // 5 * 2048.0)


def test_models_without_attention_say_so(make_bag: MakeBag, tmp_path: Path) -> None:
    model = make_model("mean")
    predictor = Predictor(model, make_card(model))
    got = predictor.predict_bag(make_bag("s", random_features()))
    assert got.attention is None
    assert got.top_tiles == ()
    assert write_attention(got, "m") is False
    with pytest.raises(StoreError, match="no attention per tile"):
        attention_geojson(got, "m")
    failed = write_slide_files(got, predictor, tmp_path, geojson=True)
    assert failed.status == "failed"
    assert failed.probabilities == got.probabilities


def test_empty_bag_has_its_reason_and_no_numbers(make_bag: MakeBag, tmp_path: Path) -> None:
    model = make_model()
    predictor = Predictor(model, make_card(model))
    got = predictor.predict_bag(make_bag("s", np.zeros((0, DIM), np.float16)))
    assert (got.status, got.reason) == ("empty", "no tissue found")
    write_predictions(tmp_path, [got], predictor)
    with open(tmp_path / "predictions.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["status"], row["predicted"], row["probability_a"], row["entropy_nats"]) == ("empty", "", "", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_sha256": "cd" * 32}, r"s\.h5: encoder weights abababababab .*trained on cdcdcdcdcdcd"),
        ({"level": "20x"}, r"s\.h5 has no level '20x'.*trained on timm:some/net"),
        ({"tile_px": 512}, r"s\.h5: tile size in px 256, but the model was trained on 512"),
        ({"mpp": 2.05}, r"s\.h5: tiles of 2 um/px, but the model was trained on 2\.05 um/px"),
        (
            {"weights_sha256": "", "encoder": "uni"},
            r"s\.h5 has no encoder at 5x 'uni' \(the model was trained on uni at 5x of 256 px\); it has net",
        ),
    ],
)
def test_features_of_another_kind_are_refused_by_name(
    make_bag: MakeBag, change: dict[str, object], message: str
) -> None:
    model = make_model()
    with pytest.raises(ModelMismatchError, match=message):
        Predictor(model, make_card(model, **change)).predict_bag(make_bag("s", random_features()))


def test_features_of_another_dimension_are_refused(make_bag: MakeBag) -> None:
    model = make_model(dim=DIM + 1)
    with pytest.raises(ModelMismatchError, match="feature dimension 8, but the model was trained on 9"):
        Predictor(model, make_card(model)).predict_bag(make_bag("s", random_features()))


def test_foreign_bags_need_the_users_word_and_are_held_to_it(tmp_path: Path) -> None:
    features = random_features()
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, np.zeros((12, 2))
    model = make_model()
    trained_on_clam = make_card(model, weights_sha256="", encoder="resnet50", level="20x", mpp=None, tile_px=None)
    # The model's own facts stand in for what a bag of CLAM leaves open, but a user who says otherwise is believed.
    assert Predictor(model, trained_on_clam).predict_bag(path).status == "done"
    with pytest.raises(ModelMismatchError, match="encoder uni, but the model was trained on resnet50"):
        Predictor(model, trained_on_clam).predict_bag(path, encoder="uni")
    with pytest.raises(ModelMismatchError, match="encoder weights not stated"):
        Predictor(model, make_card(model, tile_px=None)).predict_bag(path)


def test_a_refused_bag_stops_nothing(make_bag: MakeBag) -> None:
    model = make_model()
    paths = [make_bag("bad", random_features(), weights="cd" * 32), make_bag("good", random_features())]
    got = list(Predictor(model, make_card(model)).predict_bags(paths))
    assert [(p.slide_id, p.status) for p in got] == [("bad", "failed"), ("good", "done")]


def test_attention_goes_into_the_bag_and_nothing_else_changes(make_bag: MakeBag) -> None:
    model = make_model()
    path = make_bag("s", random_features(), deep=True)
    before = read_bag(path)
    predictor = Predictor(model, make_card(model))
    got = predictor.predict_bag(path)
    assert write_attention(got, "m")
    assert write_attention(got, "m")  # again: replaced, not added
    after = read_bag(path)
    assert got.attention is not None
    assert np.array_equal(after.levels[0].attention["m"], got.attention)
    assert np.array_equal(after.levels[0].features["net"].values, before.levels[0].features["net"].values)
    assert read_attrs(path) == before.attrs
    assert predictor.predict_bag(path).probabilities == got.probabilities


def test_attention_that_was_bad_is_replaced(make_bag: MakeBag) -> None:
    model = make_model()
    path = make_bag("s", random_features())
    got = Predictor(model, make_card(model)).predict_bag(path)
    assert write_attention(got, "m")
    with h5py.File(path, "r+") as file:
        file["levels/5x/attention/m"][:] = np.nan
    assert check_bag(path) != []
    assert write_attention(got, "m")
    assert check_bag(path) == []


def test_attention_does_not_make_a_damaged_bag_anew(make_bag: MakeBag) -> None:
    model = make_model()
    path = make_bag("s", random_features())
    got = Predictor(model, make_card(model)).predict_bag(path)
    with h5py.File(path, "r+") as file:
        file["levels/5x/features/net"][0] = 7
    before = path.read_bytes()
    with pytest.raises(BagError, match=r"s\.h5 is not written: .*their digest differs"):
        write_attention(got, "m")
    assert path.read_bytes() == before
    with h5py.File(path, "r+") as file:
        del file["levels/5x/cells"]
    with pytest.raises(BagError, match=r"s\.h5: attention is not written into it: is damaged"):
        write_attention(got, "m")


def test_geojson_places_tiles_in_level_0_pixels(make_bag: MakeBag) -> None:
    model = make_model()
    got = Predictor(model, make_card(model)).predict_bag(make_bag("s", random_features()))
    data = attention_geojson(got, "m")
    assert data["type"] == "FeatureCollection"
    assert got.attention is not None
    tile = data["features"][7]  # cell (2, 1)
    assert tile["geometry"]["coordinates"] == [[[4096, 2048], [6144, 2048], [6144, 4096], [4096, 4096], [4096, 2048]]]
    assert tile["properties"]["objectType"] == "tile"
    assert tile["properties"]["measurements"]["m attention"] == pytest.approx(float(got.attention[7]))
    ranks = [f["properties"]["measurements"]["m attention percentile"] for f in data["features"]]
    assert sorted(ranks) == pytest.approx([100 * (i + 1) / 12 for i in range(12)])
    assert int(np.argmax(ranks)) == int(got.attention.argmax())
    parts = [f["properties"]["measurements"]["m attention, share of the highest"] for f in data["features"]]
    assert parts == pytest.approx((got.attention / got.attention.max()).tolist())
    colours = [f["properties"]["color"] for f in data["features"]]
    assert colours[int(got.attention.argmax())] == [253, 231, 37], "the end of viridis"
    json.dumps(data, allow_nan=False)


def test_geojson_counts_from_where_qupath_does_and_says_so(make_bag: MakeBag) -> None:
    """QuPath crops slides to the scan's bounds; coordinates in bags are the whole image's."""
    model = make_model()
    predictor = Predictor(model, make_card(model))
    path = make_bag("s", random_features())
    old = attention_geojson(predictor.predict_bag(path), "m")
    assert old["wsi_pipe"] == {"frame": "image"}  # of a version that did not keep the bounds
    with h5py.File(path, "r+") as file:
        file.attrs["bounds_l0"] = [1000, 300, 4000, 5000]
    assert check_bag(path) == []
    got = predictor.predict_bag(path)
    new = attention_geojson(got, "m")
    assert new["wsi_pipe"] == {"frame": "qupath", "origin_l0": [1000, 300]}
    for before, after in zip(old["features"], new["features"], strict=True):
        shift = np.subtract(before["geometry"]["coordinates"], after["geometry"]["coordinates"])
        assert (shift == [1000, 300]).all()
    assert got.top_tiles[0].x == got.coords[got.top_tiles[0].row, 0]  # type: ignore[index]


def test_geojson_of_bags_in_micrometres_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["feats"], file["coords"] = random_features(), np.arange(24.0).reshape(12, 2)
        file.attrs.update(extractor="net", unit="um", tile_size_um=256.0, tile_size_px=128)
    model = make_model()
    card = make_card(model, encoder="net", weights_sha256="", level="5x", tile_px=128)
    got = Predictor(model, card).predict_bag(tmp_path / "slide.h5")
    with pytest.raises(StoreError, match="level-0 pixels"):
        attention_geojson(got, "m")


def test_json_and_csv_agree_and_hold_no_nan(make_bag: MakeBag, tmp_path: Path) -> None:
    model = make_model()
    save_model(tmp_path / "model.safetensors", model, make_card(model))
    predictor = Predictor.load(tmp_path / "model.safetensors")
    assert predictor.name.startswith("gated-abmil-")
    paths = [make_bag(f"s{i}", random_features(seed=i)) for i in range(3)]
    got = list(predictor.predict_bags([*paths, tmp_path / "gone.h5"]))
    write_predictions(tmp_path, got, predictor)
    data = json.loads((tmp_path / "predictions.json").read_text())
    assert data["model"]["classes"] == ["a", "b", "c"]
    assert data["model"]["sha256"] == predictor.sha256
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, slide, prediction in zip(rows, data["slides"], got, strict=True):
        assert row["slide_id"] == slide["slide_id"]
        assert row["status"] == slide["status"]
        if prediction.status == "done":
            assert float(row["probability_b"]) == pytest.approx(slide["probabilities"]["b"], rel=1e-5)
            assert math.fsum(slide["probabilities"].values()) == pytest.approx(1)
    assert rows[3]["status"] == "failed"
    assert "gone.h5" in rows[3]["reason"]


def test_an_encoder_file_is_where_the_model_says_or_beside_it_and_is_the_one_that_it_names(tmp_path: Path) -> None:
    first, beside = tmp_path / "training" / "lr.safetensors", tmp_path / "lr.safetensors"
    first.parent.mkdir()
    first.write_bytes(b"one")
    named = make_card(make_model(), encoder=str(first), weights_sha256=hashlib.sha256(b"one").hexdigest())
    assert find_encoder(named, tmp_path / "model.safetensors") == str(first)
    beside.write_bytes(b"one")
    first.write_bytes(b"trained again")
    assert find_encoder(named, tmp_path / "model.safetensors") == str(beside)


def test_an_encoder_file_is_looked_for_beside_the_model(tmp_path: Path) -> None:
    model = make_model()
    card = make_card(model, encoder="/somewhere/else/lr.safetensors")
    says = r"lr\.safetensors, is neither in /somewhere/else, as the model says, nor beside it"
    with pytest.raises(ModelMismatchError, match=says):
        find_encoder(card, tmp_path / "model.safetensors")
    (tmp_path / "lr.safetensors").touch()
    assert find_encoder(card, tmp_path / "model.safetensors") == str(tmp_path / "lr.safetensors")
    assert find_encoder(card, tmp_path / "model.safetensors", "given") == "given"
    assert find_encoder(make_card(model, encoder="texture"), tmp_path / "model.safetensors") == "texture"
    with pytest.raises(ModelMismatchError, match="does not name its encoder"):
        find_encoder(make_card(model, encoder=""), tmp_path / "model.safetensors")


def test_slides_in_one_go_read_one_resolution_only(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    info = load_encoder("texture").info
    model = make_model(dim=info.dim)
    card = make_card(model, encoder="texture", weights_sha256=info.weights_sha256)
    predictor = Predictor(model, card)
    good = make_slide(tmp_path / "slides" / "good.tif")
    (tmp_path / "slides" / "bad.tif").write_bytes(b"no slide")
    entries = [SlideEntry("good", str(good), "p1"), SlideEntry("bad", str(tmp_path / "slides" / "bad.tif"), "p2")]
    ends: list[str] = []
    found = predict_slides(
        predictor,
        entries,
        tmp_path / "job",
        encoder="texture",
        finished=lambda outcome: ends.append(outcome.slide_id),
    )
    got = {p.slide_id: p for p in found}
    assert sorted(ends) == ["bad", "good"]
    assert got["bad"].status == "failed"
    assert got["bad"].reason
    bag = tmp_path / "job" / "bags" / "good.h5"
    assert [level.grid.label for level in read_bag(bag).levels] == ["5x"]
    assert got["good"].case_id == "p1"
    again = predictor.predict_bag(bag)
    assert again.probabilities == got["good"].probabilities
    drawn = write_slide_files(got["good"], predictor, tmp_path, heatmaps=True, geojson=True, pyramids=True)
    assert drawn.status == "done"
    assert (tmp_path / "heatmaps" / "good.png").is_file()
    # The pyramid lies where the slide does: its um are the slide's.
    with wp.open(tmp_path / "heatmaps" / "good.ome.tif") as pyramid, wp.open(good) as slide:
        assert pyramid.mpp is not None
        assert slide.mpp is not None
        assert pyramid.size[0] * pyramid.mpp[0] == pytest.approx(slide.size[0] * slide.mpp[0], rel=1e-3)
        assert len(pyramid.levels) > 1
    # Without its file the picture is the job's own.
    good.unlink()
    (tmp_path / "heatmaps" / "good.png").unlink()
    assert write_slide_files(got["good"], predictor, tmp_path, heatmaps=True).status == "done"
    assert (tmp_path / "heatmaps" / "good.png").is_file()


def test_another_encoder_is_refused_before_any_slide_is_read(tmp_path: Path) -> None:
    model = make_model(dim=load_encoder("texture").info.dim)
    predictor = Predictor(model, make_card(model, encoder="texture"))
    entries = [SlideEntry("gone", str(tmp_path / "gone.tif"), "p")]
    with pytest.raises(ModelMismatchError, match=r"encoder texture has weights .*trained on texture"):
        list(predict_slides(predictor, entries, tmp_path / "job", encoder="texture"))
    assert not (tmp_path / "job").exists()
