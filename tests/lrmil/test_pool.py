"""One vector a slide: means, tiles of most attention, and slide encoders with the published key names."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import wsi_pipe as wp
from wsi_pipe.bag import check_bag, read_bag, read_grids, read_slide_vectors, write_attention
from wsi_pipe.cli import group, run_group
from wsi_pipe.errors import ConfigError, ResolutionError, UnknownEncoderError, WeightsError
from wsi_pipe.pooling import SLIDE_ENCODERS, pool_job
from wsi_pipe.pooling.networks import load_network

MakeBag = Callable[..., Path]
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("WSI_PIPE_WEIGHTS", raising=False)
    monkeypatch.delenv("WSI_PIPE_PINS", raising=False)


def rows(n: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def gated(at: str, dim: int, hidden: int, heads: int = 1) -> Shapes:
    shapes = linear(f"{at}attention_a.0", hidden, dim) | linear(f"{at}attention_b.0", hidden, dim)
    return shapes | linear(f"{at}attention_c", heads, hidden)


def chief() -> Shapes:
    """CHIEF_pretraining.pth: the attention net, and parts of branches that have no share in the slide's vector.

    Source: raw2features, slide_embedders/chief.py (its "small" size: 768, 512, 256).
    """
    shapes = linear("attention_net.0", 512, 768) | gated("attention_net.3.", 512, 256)
    return (
        shapes | linear("classifiers", 2, 768) | linear("text_to_vision.0", 768, 768) | {"organ_embedding": (19, 768)}
    )


def feather(dim: int) -> Shapes:
    """FEATHER. Source: mahmoodlab/MIL-Lab, src/models/abmil.py (ABMILModel: defaults 512 and 384, one head)."""
    shapes = linear("model.patch_embed.0", 512, dim) | gated("model.global_attn.", 512, 384)
    return shapes | linear("model.classifier", 108, 512)


def heads(at: str, dim: int) -> Shapes:
    shapes: Shapes = {}
    for layer, (out, into) in zip((0, 4, 8), ((512, dim), (512, 512), (2048, 512)), strict=True):
        shapes |= linear(f"{at}pre_attn.{layer}", out, into)
        shapes |= {f"{at}pre_attn.{layer + 1}.{kind}": (out,) for kind in ("weight", "bias")}
    for head in range(4):
        shapes |= gated(f"{at}attn.{head}.", 512, 512)
    return shapes


def madeleine() -> Shapes:
    """MADELEINE. Source: mahmoodlab/MADELEINE, madeleine/models/Model.py, as saved from several GPUs."""
    shapes = heads("wsi_embedders.", 512) | linear("projector", 512, 2048) | linear("token_projector", 128, 2048)
    return {f"module.{key}": shape for key, shape in shapes.items()}


def tangle() -> Shapes:
    """TANGLE v2. Source: raw2features, slide_embedders/tangle.py (4 heads, hidden 512)."""
    shapes = heads("wsi_embedder.", 1024) | linear("wsi_embedder.proj_multihead", 512, 2048)
    return shapes | linear("rna_embedder.layers.0", 64, 32)


PUBLISHED: dict[str, tuple[Callable[[], Shapes], str, str]] = {
    "chief": (chief, "ctranspath", "10x"),
    "madeleine": (madeleine, "conch", "10x"),
    "tangle": (tangle, "uni", "5x"),
    "feather-uni": (lambda: feather(1024), "uni", "5x"),
    "feather-uni2": (lambda: feather(1536), "uni2-h", "20x"),
}


def checkpoint(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = {
        key: torch.randn(shape, generator=generator) / math.sqrt(max(math.prod(shape[1:]), 1))
        for key, shape in shapes.items()
    }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_checkpoint_with_published_keys_gives_its_vector(name: str, make_bag: MakeBag, tmp_path: Path) -> None:
    spec = SLIDE_ENCODERS[name]
    shapes, encoder, level = PUBLISHED[name]
    dim = {"ctranspath": 768, "conch": 512, "uni": 1024, "uni2-h": 1536}[encoder]
    checkpoint(tmp_path / "weights.pth", shapes())
    bag = make_bag("a", rows(6, dim), encoder=encoder, deep=level != "5x")
    done = list(pool_job(bag.parent, name, level=level, weights=tmp_path / "weights.pth"))
    assert [item.status for item in done] == ["written"], done
    found = read_slide_vectors(bag)[name]
    assert found.values.shape == (spec.dim,)
    assert np.isfinite(found.values).all()
    assert (found.slide_encoder, found.level, found.encoder) == (name, level, "net")
    assert check_bag(bag) == []
    # Attention over the tiles comes with it, and sums to one.
    held = {item.grid.label: item.attention for item in read_bag(bag).levels}[level]
    assert held[name].sum() == pytest.approx(1, abs=1e-5)


def test_chief_is_the_attention_weighted_mean_of_the_features(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "c.pth", chief())
    tiles = torch.from_numpy(rows(9, 768))
    vector, weights = load_network("chief", tmp_path / "c.pth", "chief")(tiles)

    def affine(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    hidden = affine("attention_net.0", tiles).clamp_min(0)
    at = "attention_net.3.attention_"
    scores = affine(f"{at}c", affine(f"{at}a.0", hidden).tanh() * affine(f"{at}b.0", hidden).sigmoid())
    torch.testing.assert_close(weights, scores[:, 0].softmax(0))
    torch.testing.assert_close(vector, (scores[:, 0].softmax(0)[:, None] * tiles).sum(0))


def test_heads_are_laid_out_by_feature_then_head(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "t.pth", tangle())
    tiles = torch.from_numpy(rows(7, 1024))
    network: Any = load_network("tangle", tmp_path / "t.pth", "tangle")
    vector, _ = network(tiles)
    embedded = network.pre_attn(tiles).reshape(7, 512, 4)
    pooled = torch.empty(512, 4)
    for head in range(4):
        own = embedded[:, :, head]
        pooled[:, head] = own.T @ network.attn[head](own)[:, 0].softmax(0)
    at = "wsi_embedder.proj_multihead"
    torch.testing.assert_close(vector, state[f"{at}.weight"] @ pooled.reshape(2048) + state[f"{at}.bias"])


def test_a_file_that_does_not_fit_names_its_keys(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "f.safetensors", feather(1024))
    del state["model.global_attn.attention_b.0.bias"]
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(WeightsError, match=r"attention_b\.0\.bias"):
        load_network("feather", tmp_path / "f.safetensors", "feather")
    with pytest.raises(WeightsError, match=r"attention_net\.0\.weight"):
        load_network("chief", tmp_path / "f.safetensors", "chief")


def test_a_cohort_is_pooled_by_its_means(make_bag: MakeBag, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {name: rows(5 + place, 4, place) for place, name in enumerate("abc")}
    for name, values in features.items():
        make_bag(name, values, case_id=f"case {name}")
    job = make_bag("empty", rows(0, 4)).parent
    assert run_group(group, "wsi-pipe", ["pool", str(job), "--slide-encoder", "mean"]) == 0
    assert "3 written, 1 empty; 3 vectors of mean" in " ".join(capsys.readouterr().out.split())
    for name, values in features.items():
        np.testing.assert_allclose(read_slide_vectors(job / f"{name}.h5")["mean"].values, values.mean(0), atol=1e-6)
    with (job / "slide-mean.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["slide_id"], row["case_id"]) for row in table] == [(name, f"case {name}") for name in "abc"]
    assert float(table[1]["f2"]) == pytest.approx(float(features["b"].mean(0)[2]), rel=1e-6)
    # Called again nothing changes; another vector stands beside it.
    before = (job / "a.h5").read_bytes()
    arguments = ["pool", str(job), "--slide-encoder", "mean", "--json"]
    assert run_group(group, "wsi-pipe", arguments) == 0
    assert {item["status"] for item in json.loads(capsys.readouterr().out)} == {"unchanged", "empty"}
    assert (job / "a.h5").read_bytes() == before
    done = list(pool_job(job, "mean-spread", name="both"))
    assert {item.status for item in done} == {"written", "empty"}
    held = read_slide_vectors(job / "a.h5")
    assert set(held) == {"mean", "both"}
    np.testing.assert_allclose(held["both"].values[4:], features["a"].std(0), atol=1e-6)
    np.testing.assert_array_equal(wp.open_bag(job / "a.h5").vectors["both"], held["both"].values)


def test_new_features_are_pooled_anew(make_bag: MakeBag) -> None:
    bag = make_bag("a", rows(5, 4), fingerprint="first")
    list(pool_job(bag.parent, "mean"))
    make_bag("a", rows(5, 4, 1), fingerprint="second")
    assert read_slide_vectors(bag) == {}
    assert [item.status for item in pool_job(bag.parent, "mean")] == ["written"]


def test_tiles_of_most_attention_on_their_own_and_on_a_finer_grid(make_bag: MakeBag) -> None:
    bag = make_bag("a", rows(6, 4), deep=True)
    weights = np.array([0.05, 0.4, 0.05, 0.3, 0.1, 0.1], np.float32)
    write_attention(bag, "5x", "mil", weights)
    list(pool_job(bag.parent, "top-attention", level="5x", attention="mil", top=2))
    np.testing.assert_allclose(read_slide_vectors(bag)["top-attention"].values, rows(6, 4)[[1, 3]].mean(0), atol=1e-6)
    list(pool_job(bag.parent, "top-attention", level="20x", attention="mil", top=1, name="fine"))
    # The fixture's fine features are those of the tile above, plus 200.
    np.testing.assert_allclose(read_slide_vectors(bag)["fine"].values, rows(6, 4)[1] + 200, atol=1e-4)
    write_attention(bag, "20x", "late", np.full(24, 1 / 24, np.float32))
    done = list(pool_job(bag.parent, "top-attention", level="5x", attention="late"))
    assert done[0].status == "failed"
    assert "finer than 5x" in done[0].reason
    assert (
        "no attention of nobody"
        in next(iter(pool_job(bag.parent, "top-attention", level="5x", attention="nobody"))).reason
    )
    assert [grid.label for grid in read_grids(bag)] == ["5x", "10x", "20x"]


def test_other_features_scales_and_tiles_are_refused(make_bag: MakeBag, tmp_path: Path) -> None:
    checkpoint(tmp_path / "c.pth", chief())
    other = make_bag("a", rows(4, 768), encoder="uni", folder="other").parent
    with pytest.raises(ConfigError, match="no slide has features of any/ctranspath"):
        pool_job(other, "chief", weights=tmp_path / "c.pth")
    with pytest.raises(ConfigError, match="takes features of ctranspath, not of uni"):
        pool_job(other, "chief", encoder="uni", weights=tmp_path / "c.pth")
    coarse = make_bag("a", rows(4, 768), encoder="ctranspath", folder="coarse").parent
    with pytest.raises(ResolutionError, match="was made for tiles at 10x"):
        pool_job(coarse, "chief", weights=tmp_path / "c.pth")
    conch = make_bag("a", rows(4, 768), encoder="conch_v1_5", folder="conch", deep=True).parent
    with pytest.raises(ResolutionError, match=r"tiles of 256 um, and these are 128 um.*512 px"):
        pool_job(conch, "feather", level="20x")
    assert read_slide_vectors(coarse / "a.h5") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slide_encoder": "titn"}, "did you mean titan"),
        ({"slide_encoder": "top-attention"}, "needs attention"),
        ({"slide_encoder": "mean", "attention": "mil"}, "takes no attention"),
        ({"slide_encoder": "mean", "weights": Path("x.pth")}, "has no weights"),
        ({"slide_encoder": "mean", "name": "a/b"}, "is no name for a vector"),
    ],
)
def test_mistakes_of_a_call(arguments: dict[str, Any], message: str, make_bag: MakeBag) -> None:
    job = make_bag("a", rows(4, 4)).parent
    with pytest.raises((ConfigError, UnknownEncoderError), match=message):
        pool_job(job, **arguments)


def test_a_damaged_bag_ends_itself_alone(make_bag: MakeBag) -> None:
    job = make_bag("a", rows(4, 4)).parent
    make_bag("b", rows(4, 4)).write_bytes(b"no bag")
    assert {item.slide_id: item.status for item in pool_job(job, "mean")} == {"a": "written", "b": "left out"}


def test_weights_that_lie_on_no_hub_say_where_they_are(make_bag: MakeBag) -> None:
    job = make_bag("a", rows(4, 768), encoder="ctranspath", deep=True).parent
    with pytest.raises(WeightsError, match=r"hms-dbmi/CHIEF says where.*--weights FILE"):
        pool_job(job, "chief", level="10x")


def test_code_of_others_runs_only_where_it_is_trusted(make_bag: MakeBag, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_bag("a", rows(4, 2560), encoder="virchow", deep=True).parent
    asked: list[tuple[str, dict[str, Any]]] = []

    class Model(torch.nn.Module):
        def slide_representations(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"image_embedding": tiles.mean(1)[:, :1280]}

    def load(repo: str, **options: Any) -> Model:
        asked.append((repo, options))
        return Model()

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModel=SimpleNamespace(from_pretrained=load)))
    monkeypatch.setitem(SLIDE_ENCODERS, "prism", _any_tiles(SLIDE_ENCODERS["prism"]))
    with pytest.raises(ConfigError, match=r"runs with your rights.*--trust-remote-code"):
        pool_job(job, "prism", level="20x")
    assert asked == []
    assert [item.status for item in pool_job(job, "prism", level="20x", trust_remote_code=True)] == ["written"]
    spec = SLIDE_ENCODERS["prism"]
    assert asked == [("paige-ai/Prism", {"revision": spec.revision, "trust_remote_code": True})]
    assert read_slide_vectors(job / "a.h5")["prism"].values.shape == (1280,)


def _any_tiles(spec: Any) -> Any:
    import dataclasses

    return dataclasses.replace(spec, tile_um=None)


def test_every_slide_encoder_says_what_it_needs() -> None:
    for spec in SLIDE_ENCODERS.values():
        if spec.kind in ("network", "remote"):
            assert spec.encoder, spec.name
            assert spec.dim, spec.name
            assert spec.sources, spec.name
            assert spec.licence, spec.name
            assert spec.hub_id or spec.page, spec.name
