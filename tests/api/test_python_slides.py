"""Slides, tissue, grids, features and bags from Python are those of the command line, and errors say what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

import wsi_pipe as wp
from wsi_pipe.api.slide import Slide
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import TileSettings
from wsi_pipe.errors import (
    BagError,
    ConfigError,
    EncoderOutputError,
    MissingMppError,
    NotOursError,
    ResolutionError,
    SlideError,
    SlideReadError,
)
from wsi_pipe.extract import ExtractItem, extract_features
from wsi_pipe.geometry import TissueMask
from wsi_pipe.slides import open_slide
from wsi_pipe.tiling import plan_grids


def run_job(job: Path, *arguments: object) -> None:
    assert run_group(group, "wsi-pipe", ["run", *map(str, arguments), "-o", str(job)]) == 0


def differing(one: Path, other: Path) -> list[str]:
    """Data sets and attributes in which two HDF5 files differ."""
    with h5py.File(one) as a, h5py.File(other) as b:
        names: dict[str, None] = {}
        for file in (a, b):
            file.visit(lambda name: names.setdefault(name))
        found = []
        for name in ("/", *names):
            if name not in a or name not in b:
                found.append(name)
                continue
            if isinstance(a[name], h5py.Dataset):
                same = a[name].dtype == b[name].dtype and np.array_equal(a[name][()], b[name][()])
                found += [] if same and a[name].chunks == b[name].chunks else [name]
            keys = {*a[name].attrs, *b[name].attrs}
            found += [
                f"{name}@{key}"
                for key in sorted(keys)
                if not (key in a[name].attrs and key in b[name].attrs)
                or np.any(a[name].attrs[key] != b[name].attrs[key])
            ]
        return found


def test_a_bag_written_from_python_is_that_of_the_command_line(slides: list[Path], tmp_path: Path) -> None:
    options = ("-r", "20x", "-r", "5x", "--tile-px", "128", "--min-tissue", "0.3", "--stain-min", "0.015")
    run_job(tmp_path / "job", slides[0], *options)
    with wp.open(slides[0]) as slide:
        grids = slide.grids("5x", "20x", tissue=slide.tissue(stain_min=0.015), tile_px=128, min_tissue=0.3)
        bag = wp.write_bag(tmp_path / "own.h5", slide, grids.encode("texture"))
    assert set(differing(tmp_path / "own.h5", tmp_path / "job" / "bags" / "a.h5")) <= {"/@created_utc"}
    assert bag.check() == []
    # What the job's next run finds there it takes for its own.
    (tmp_path / "job" / "bags" / "a.h5").write_bytes((tmp_path / "own.h5").read_bytes())
    assert not wp.Job(tmp_path / "job").verify()[0].problems


def test_a_mask_and_annotations_that_are_given_end_in_the_same_bag(slides: list[Path], tmp_path: Path) -> None:
    ring = [[100, 100], [900, 100], [900, 900], [100, 900], [100, 100]]
    drawn = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"classification": {"name": "Tumour", "color": [200, 0, 0]}},
            }
        ],
    }
    given = tmp_path / "drawn.geojson"
    given.write_text(json.dumps(drawn))
    run_job(tmp_path / "job", slides[0], "-r", "5x", "--mask", given, "--annotations", given)
    with wp.open(slides[0], annotations=given) as slide:
        grids = slide.grids("5x", tissue=slide.tissue(mask=given))
        bag = wp.write_bag(tmp_path / "own.h5", slide, grids["5x"].encode())
    assert set(differing(tmp_path / "own.h5", tmp_path / "job" / "bags" / "a.h5")) <= {"/@created_utc"}
    assert 0 < bag["5x"].annotation["Tumour"].max() <= 1


def test_tiles_are_read_by_the_engine_s_way(slides: list[Path]) -> None:
    with wp.open(slides[0]) as slide:
        grid = slide.grids("20x", tile_px=96)["20x"]
        before = slide.blocks_decoded
        batches = list(grid.tiles(batch_size=7, threads=2))
        decoded = slide.blocks_decoded - before
        index = np.concatenate([batch.index for batch in batches])
        assert index.tolist() == list(range(len(grid)))
        assert all(batch.pixels.dtype == np.uint8 and batch.pixels.shape[1:] == (96, 96, 3) for batch in batches)
        assert all(np.array_equal(batch.coords, grid.coords[batch.index]) for batch in batches)
        x, y = (int(value) for value in grid.coords[3])
        assert np.array_equal(batches[0].pixels[3], slide.read_region(x, y, 96, 96))
        assert np.array_equal(grid.tile(3), batches[0].pixels[3])
        chosen = [11, 2, 5]
        (some,) = grid.tiles(rows=chosen)
        assert some.index.tolist() == chosen
        assert np.array_equal(np.asarray(some)[1], grid.tile(2))
    item = ExtractItem("a", lambda: open_slide(slides[0]), [grid.layout], {"20x": ["texture"]})
    (engine,) = extract_features([item], {"texture": wp.load_encoder("texture")})
    # Tiles of 96 px share blocks of 256: each is decoded once by either, not once a tile.
    assert decoded == engine.counts["blocks_decoded"] < len(grid)  # type: ignore[union-attr]


def test_grids_are_those_of_the_product(slides: list[Path]) -> None:
    with wp.open(slides[0]) as slide:
        tissue = slide.tissue()
        grids = slide.grids("20x", "5x", tile_px=128)
        laid = plan_grids(
            slide.source.slide.pyramid,
            TissueMask(tissue.mask, tissue.scale_l0),
            TileSettings(resolutions=(0.5, 2.0), tile_px=128),
        )
    assert list(grids) == ["5x", "20x"]
    for grid, wanted in zip(grids.values(), laid, strict=True):
        assert np.array_equal(grid.cells, wanted.cells)
    high, low = grids["0.5um"], grids[2.0]
    assert high.label == "20x"
    assert low.label == "5x"
    assert high.parent is not None
    rows = [low.children(i) for i in range(len(low))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(high)))
    assert all((high.parent[own] == i).all() for i, own in enumerate(rows))
    assert len(high.children(0)) == 0
    assert low.finer_label == "20x"
    frame = high.to_frame()
    assert frame["x"].tolist() == high.coords[:, 0].tolist()
    assert frame["parent"].tolist() == high.parent.tolist()
    with pytest.raises(IndexError, match="has no tile"):
        low.children(len(low))
    assert "0.5um" in grids
    assert "10x" not in grids
    assert "often" not in grids
    with pytest.raises(KeyError, match="no grid 10x: there are 5x, 20x"):
        _ = grids["10x"]


def test_a_thumbnail_needs_no_resolution_and_is_the_mean(
    tmp_path: Path, make_slide: Callable[..., Path], tissue_picture: Callable[..., NDArray[np.uint8]]
) -> None:
    path = make_slide(tmp_path / "bare.tif", mpp=None)
    with wp.open(path) as slide:
        assert slide.mpp is None
        small = slide.thumbnail(192)
        assert small.shape == (160, 192, 3)
        full = tissue_picture().astype(float).reshape(160, 8, 192, 8, 3).mean((1, 3))
        assert np.abs(full - small).mean() < 2
        assert slide.thumbnail(5000).shape == (1280, 1536, 3)
        assert slide.thumbnail(100).shape == (83, 100, 3)
        with pytest.raises(MissingMppError, match=r"wp.open\(path, mpp=0.25\)"):
            slide.tissue()
    with wp.open(path, mpp=0.5, slide_id="mine", case_id="P1") as slide:
        grids = slide.grids("5x")
        bag = wp.write_bag(tmp_path / "mine.h5", slide, grids["5x"].encode())
    assert (bag.slide_id, bag.case_id, bag.attrs.mpp_source) == ("mine", "P1", "user")


def test_what_is_wrong_is_said_with_a_remedy(slides: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="no such file"):
        wp.open(tmp_path / "none.svs")
    with pytest.raises(SlideError, match="not a slide"):
        wp.open(tmp_path)
    (tmp_path / "list.csv").write_text(f"slide\n{slides[0]}\n")
    with pytest.raises(SlideError):
        wp.open(tmp_path / "list.csv")
    with wp.open(slides[0]) as slide:
        with pytest.raises(ConfigError, match="unknown setting 'stain_mim'"):
            slide.tissue(stain_mim=0.02)
        with pytest.raises(ConfigError, match="unknown setting 'tile'"):
            slide.grids("5x", tile=256)
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            slide.grids("5x", min_tissue=2)
        with pytest.raises(ResolutionError, match="finer than the slide"):
            slide.grids("40x")
        with pytest.raises(ConfigError, match="not understood"):
            slide.grids("twenty")
        grids = slide.grids("5x")
        with wp.open(slides[1]) as other:
            with pytest.raises(ConfigError, match="is not of b"):
                other.grids("5x", tissue=slide.tissue())
            with pytest.raises(ConfigError, match="are given for b"):
                wp.write_bag(tmp_path / "b.h5", other, grids)
        features = grids["5x"].encode()
        with pytest.raises(ConfigError, match="given twice"):
            wp.write_bag(tmp_path / "a.h5", slide, features, features)
        with pytest.raises(ConfigError, match="laid otherwise"):
            wp.write_bag(tmp_path / "a.h5", slide, features, slide.grids("5x", tile_px=128)["5x"].encode())
        with pytest.raises(ConfigError, match="has no grids"):
            wp.write_bag(tmp_path / "a.h5", slide)
        with pytest.raises(ConfigError, match="is no part of a bag"):
            wp.write_bag(tmp_path / "a.h5", slide, [np.zeros((3, 4))])  # type: ignore[list-item]
        assert not (tmp_path / "a.h5").exists()
        bag = wp.write_bag(tmp_path / "a.h5", slide, features)
        with pytest.raises(NotOursError, match="is there already"):
            wp.write_bag(tmp_path / "a.h5", slide, features)
        with h5py.File(tmp_path / "foreign.h5", "w") as file:
            file["data"] = 1
        with pytest.raises(NotOursError):
            wp.write_bag(tmp_path / "foreign.h5", slide, features, overwrite=True)
    with pytest.raises(SlideReadError, match="is closed; open it again"):
        next(grids["5x"].tiles())
    with pytest.raises(SlideReadError, match="is closed"):
        grids["5x"].encode()
    with pytest.raises(KeyError, match="has no features of 'uni' at 5x: it has texture"):
        _ = bag["5x"].features["uni"]
    with pytest.raises(KeyError, match="has no level 20x: it has 5x"):
        _ = bag["20x"]
    (tmp_path / "broken.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:3000])
    with pytest.raises(BagError):
        wp.open_bag(tmp_path / "broken.h5")


def mean_of(tiles: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
    assert tiles.dtype == np.uint8
    assert tiles.shape[3] == 3
    return tiles.mean((1, 2))


def test_a_callable_gets_tiles_as_they_are(slides: list[Path], tmp_path: Path) -> None:
    with wp.open(slides[0]) as slide:
        grid = slide.grids("5x")["5x"]
        features = grid.encode(mean_of, dtype="float32")
        tiles = np.concatenate([batch.pixels for batch in grid.tiles()])
        assert np.allclose(features.values, tiles.mean((1, 2)), atol=1e-4)
        assert features.encoder == "mean_of"
        other = grid.encode(mean_of, dtype="float32", version="2")
        assert other.fingerprint != features.fingerprint
        assert grid.encode(mean_of, dtype="float32").fingerprint == features.fingerprint
        bag = wp.write_bag(tmp_path / "a.h5", slide, features)
        assert np.array_equal(bag["5x"].features["mean_of"], features)
        with pytest.raises(ConfigError, match="has no name"):
            grid.encode(lambda tiles: tiles.mean((1, 2)))
        with pytest.raises(ConfigError, match="is the name of an encoder of this program"):
            grid.encode(mean_of, name="uni")
        with pytest.raises(ConfigError, match="mean is given with a callable"):
            grid.encode(mean_of, mean=(0, 0, 0))
        with pytest.raises(ConfigError, match="name is given with an encoder that goes by its name"):
            grid.encode("texture", name="mine")
        with pytest.raises(ConfigError, match="precision is given with a callable"):
            grid.encode(mean_of, precision="float16")
        with pytest.raises(ConfigError, match="device is given with an encoder that is ready"):
            grid.encode(wp.load_encoder("texture"), device="cpu")
        with pytest.raises(EncoderOutputError, match=r"gave uint8 \(1, 1?\d+, "):
            grid.encode(lambda tiles: tiles[:, :, 0], name="flat")
        with pytest.raises(EncoderOutputError, match="NaN or infinity"):
            grid.encode(lambda tiles: np.full((len(tiles), 2), np.nan), name="nan")
        with pytest.raises(ConfigError, match="a int is no encoder"):
            grid.encode(3)  # type: ignore[arg-type]


def test_a_network_gets_normalised_tensors_and_stays_as_it_is(slides: list[Path]) -> None:
    import torch

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.float32
            assert not self.training
            return images.mean((2, 3)) * self.scale

    network = Mean().train()
    with wp.open(slides[0]) as slide:
        grid = slide.grids("5x")["5x"]
        features = grid.encode(network, dtype="float32", device="cpu")
        tiles = np.concatenate([batch.pixels for batch in grid.tiles()]) / 255
        wanted = ((tiles - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).mean((1, 2))
        assert np.allclose(features.values, wanted, atol=1e-4)
        plain = grid.encode(network, dtype="float32", device="cpu", mean=(0, 0, 0), std=(1, 1, 1))
        assert np.allclose(plain.values, tiles.mean((1, 2)), atol=1e-4)
        assert network.training
        assert network.scale.requires_grad
        with torch.no_grad():
            network.scale *= 2
        assert grid.encode(network, dtype="float32", device="cpu").fingerprint != features.fingerprint
        with pytest.raises(EncoderOutputError, match="one image"):
            grid.encode(torch.nn.Identity(), device="cpu")


def test_objects_show_themselves_and_escape_what_comes_from_files(
    tmp_path: Path, make_slide: Callable[..., Path]
) -> None:
    path = make_slide(tmp_path / "<b>evil&.tif")
    with wp.open(path, case_id="<script>alert(1)</script>") as slide:
        grids = slide.grids("5x")
        features = grids["5x"].encode()
        bag = wp.write_bag(tmp_path / "a.h5", slide, features)
        shown: list[Any] = [slide, slide.tissue(), grids, grids["5x"], features, bag, bag["5x"]]
        for item in shown:
            html = item._repr_html_()
            assert "<b>evil" not in html
            assert "<script>" not in html
            assert html.count("<div") == html.count("</div>")
            assert len(html) < 100_000
            assert repr(item).startswith("<")
        assert "data:image/jpeg;base64," in slide._repr_html_()
    assert "closed" in repr(slide)
    assert "closed" in slide._repr_html_()


def test_an_empty_slide_gives_a_valid_bag(tmp_path: Path, make_slide: Callable[..., Path]) -> None:
    white = np.full((512, 512, 3), 245, np.uint8)
    path = make_slide(tmp_path / "white.tif", picture=white)
    run_job(tmp_path / "job", path, "-r", "5x")
    with wp.open(path) as slide:
        tissue = slide.tissue()
        grids = slide.grids("5x")
        bag = wp.write_bag(tmp_path / "own.h5", slide, grids["5x"].encode())
        assert tissue.is_empty
        assert list(grids["5x"].tiles()) == []
        assert "none:" in repr(tissue)
        assert grids._repr_html_()
    assert bag.is_empty
    assert bag["5x"].features["texture"].shape[0] == 0
    assert set(differing(tmp_path / "own.h5", tmp_path / "job" / "bags" / "white.h5")) <= {"/@created_utc"}


def test_a_slide_pickles_as_what_it_takes_to_open_it(slides: list[Path]) -> None:
    with wp.open(str(slides[0]), mpp=0.25) as slide:
        other: Slide = pickle.loads(pickle.dumps(slide))
        assert other.mpp == (0.25, 0.25)
        assert other.source.slide is not slide.source.slide
        assert np.array_equal(other.thumbnail(64), slide.thumbnail(64))
        other.close()
