"""Exported features, read as each tool's own loaders read them: names, types and attributes are stated here again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from numpy.typing import NDArray

from wsi_pipe.bag import Bag, BagAttrs, BagLevel, Features, TileValues, read_level, write_bag
from wsi_pipe.cli import group, run_group
from wsi_pipe.cli.export import FORMATS
from wsi_pipe.encoders.elsewhere import name_elsewhere, same_encoder
from wsi_pipe.encoders.registry import load_registry
from wsi_pipe.errors import BagError, ConfigError, NotOursError
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.interop import EXPORTERS, Exported, export_job, plan_export

MakeSlide = Callable[..., Path]

# A scanner whose 40x is 0.2527 um/px: tiles asked for at 0.5 are cut at 0.5054, and their corners fall between pixels.
MPP_L0 = 0.2527
ORIGIN = (10.25, 20.5)
SIDE = 512.0
CELLS = np.array([[3, 0], [0, 1], [2, 1], [1, 2]], np.int32)


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def values_of(slide_id: str, tiles: int = len(CELLS), dim: int = 6) -> NDArray[np.float16]:
    return np.random.default_rng(sum(map(ord, slide_id))).normal(size=(tiles, dim)).astype(np.float16)


def make_bag(
    folder: Path,
    slide_id: str,
    *,
    case_id: str = "",
    encoder: str = "uni_v1",
    slug: str = "uni",
    tiles: int = len(CELLS),
    weights: str = "",
) -> Path:
    grid = TileGrid(
        TileSpec(0.5), (2 * MPP_L0, 2 * MPP_L0), ORIGIN, (SIDE, SIDE), (SIDE, SIDE), CELLS[:tiles],
        np.linspace(0.4, 1, tiles).astype(np.float32), min_tissue=0.25,
    )  # fmt: skip
    features = Features(encoder, values_of(slide_id, tiles), "cd" * 32, "MIT", "float32", "{}", f"fp-{slide_id}",
                        weights=weights)  # fmt: skip
    sharpness = TileValues(np.arange(tiles, dtype=np.float32), {"method": "m", "version": 1.0})
    level = BagLevel(grid, {slug: features}, quality={"sharpness": sharpness})
    attrs = BagAttrs(
        slide_id, case_id, f"/slides/{slide_id}.svs", "ab" * 32, 40_000, 30_000, (MPP_L0, MPP_L0), "file", "aperio",
        "tiff", "", "0.1.0", "2026-01-01T00:00:00Z", "done" if tiles else "empty", "" if tiles else "no tissue found",
        "seg", "tile", "20x", slug,
    )  # fmt: skip
    path = folder / f"{slide_id}.h5"
    folder.mkdir(exist_ok=True)
    write_bag(path, Bag(attrs, (level,)))
    return path


@pytest.fixture
def bags(tmp_path: Path) -> Path:
    """Two slides of one case, and one slide without tiles."""
    folder = tmp_path / "bags"
    make_bag(folder, "TCGA-A1.0B", case_id="p1")
    make_bag(folder, "s2", case_id="p1")
    make_bag(folder, "blank", case_id="p2", tiles=0)
    return folder


def export(bags: Path, to: str, out: Path, **options: Any) -> dict[str, Exported]:
    return {result.slide_id: result for result in export_job(plan_export(bags, to, **options), out)}


CORNERS = np.asarray(ORIGIN) + CELLS * SIDE
COORDS = np.rint(CORNERS).astype(np.int64)


def test_every_format_on_the_command_line_has_an_exporter() -> None:
    assert set(FORMATS) == set(EXPORTERS)
    assert all(name == exporter.name for name, exporter in EXPORTERS.items())


def test_clam_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = export(bags, "clam", out)
    assert (results["s2"].status, results["blank"].status) == ("written", "empty")
    assert "no tissue found" in results["blank"].reason
    # Its data set takes slide and case from a CSV, and the features from pt_files or h5_files.
    table = pd.read_csv(out / "slides.csv")
    assert table[["case_id", "slide_id"]].to_numpy().tolist() == [["p1", "TCGA-A1.0B"], ["p1", "s2"]]
    for slide_id in table["slide_id"]:
        features = torch.load(out / "pt_files" / f"{slide_id}.pt", weights_only=True)
        assert type(features) is torch.Tensor
        assert features.dtype == torch.float32
        # Not a view of something larger, which would be stored whole.
        assert features.untyped_storage().nbytes() == 4 * features.numel()
        # Its models begin with a linear layer of float32.
        torch.nn.Linear(6, 3)(features)
        with h5py.File(out / "h5_files" / f"{slide_id}.h5") as file:
            from_h5, coords = file["features"][:], file["coords"][:]
        assert np.array_equal(from_h5, values_of(slide_id).astype(np.float32))
        assert np.array_equal(features.numpy(), from_h5)
        assert (coords.dtype, coords.tolist()) == (np.int64, COORDS.tolist())


def test_trident_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert {r.status for r in export(bags, "trident", out).values()} == {"written"}
    folder = out / "20x_256px_0px_overlap"
    with h5py.File(folder / "features_uni_v1" / "s2.h5") as file:
        coords, features = file["coords"][:], file["features"][:]
        attrs = dict(file["coords"].attrs)
    assert (features.dtype, features.shape, coords.tolist()) == (np.float32, (4, 6), COORDS.tolist())
    # A slide encoder such as TITAN takes this of the coordinates' attributes.
    assert attrs["patch_size_level0"] == SIDE
    with h5py.File(folder / "patches" / "s2_patches.h5") as file:
        places, own = file["coords"][:], dict(file["coords"].attrs)
    assert np.array_equal(places, coords)
    # All three must be there, or TRIDENT takes the file for one of CLAM.
    size, source, target = (own[name] for name in ("patch_size", "level0_magnification", "target_magnification"))
    assert (size, target) == (256, 20)
    # A patch read anew covers what the tile covered: its side on level 0 by TRIDENT's formula.
    assert size * source / target == SIDE
    assert size * source // target == own["patch_size_level0"]
    assert (own["level0_width"], own["level0_height"], own["overlap"], own["name"]) == (40_000, 30_000, 0, "s2")
    with h5py.File(folder / "features_uni_v1" / "blank.h5") as file:
        assert (file["features"].shape, file["coords"].shape) == ((0, 6), (0, 2))


def stamp_coords(file: h5py.File) -> tuple[NDArray[np.floating[Any]], float, int]:
    """As STAMP finds coordinates in um, the side of a tile in um and its pixels; 2.0's way and later ones agree."""
    coords, attrs = file["coords"][:], file.attrs
    assert attrs["tile_size"]
    assert attrs["unit"] == "um"
    assert float(attrs["tile_size"]) == float(attrs["tile_size_um"])
    assert "stamp_version" not in attrs, "a later version than the reader's own is refused"
    return coords, float(attrs["tile_size_um"]), int(attrs["tile_size_px"])


def test_stamp_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(bags, "stamp", out)["blank"].status == "empty"
    kinds = set()
    for path in (out / "feats").glob("*.h5"):
        with h5py.File(path) as file:
            kinds.add(str(file.attrs.get("feat_type")) if "feat_type" in file.attrs else "tile")
    assert kinds == {"tile"}
    table = pd.read_csv(out / "slide.csv", usecols=["PATIENT", "FILENAME"], dtype=str)
    assert table["FILENAME"].str.endswith(".h5").all()
    assert dict(table[["FILENAME", "PATIENT"]].to_numpy()) == {"TCGA-A1.0B.h5": "p1", "s2.h5": "p1"}
    with h5py.File(out / "feats" / table["FILENAME"][1]) as file:
        feats = torch.from_numpy(file["feats"][:]).float()
        coords_um, tile_um, tile_px = stamp_coords(file)
        assert file.attrs["extractor"] == "uni", "six features are none of UNI's 1,024, so STAMP's name is not taken"
    assert np.array_equal(feats.numpy(), values_of("s2").astype(np.float32))
    assert coords_um.dtype == np.float32
    np.testing.assert_allclose(coords_um, CORNERS * MPP_L0, rtol=1e-6)
    # Tiles lie on whole multiples of the side from each other, as its heat maps place them.
    steps = (coords_um - coords_um.min(axis=0)) / tile_um
    np.testing.assert_allclose(steps, CELLS - CELLS.min(axis=0), atol=1e-4)
    assert tile_um / tile_px == pytest.approx(2 * MPP_L0)


def test_slide2vec_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "slide2vec", out)
    told = json.loads((out / "tile_embeddings/s2.meta.json").read_text())
    features = torch.load(out / "tile_embeddings/s2.pt", map_location="cpu", weights_only=True)
    assert (told["artifact_type"], told["num_tiles"], told["feature_dim"]) == ("tile_embeddings", *features.shape)
    assert told["encoder_name"] == "uni"
    with np.load(out / told["coordinates_npz_path"], allow_pickle=False) as data:
        x, y, index = data["x"], data["y"], data["tile_index"]
        fractions = data["tissue_fractions"]
    assert (x.dtype, index.tolist()) == (np.int64, [0, 1, 2, 3])
    # Tiles stand by x, then by y: sorting the places again must change nothing.
    assert sorted(zip(x.tolist(), y.tolist(), strict=True)) == list(zip(x.tolist(), y.tolist(), strict=True))
    # Each embedding is still the one of its tile.
    by_place = {tuple(place): row for row, place in enumerate(COORDS.tolist())}
    rows = [by_place[place] for place in zip(x.tolist(), y.tolist(), strict=True)]
    assert np.array_equal(features.numpy(), values_of("s2")[rows].astype(np.float32))
    assert np.array_equal(fractions, np.linspace(0.4, 1, 4).astype(np.float32)[rows])
    meta = json.loads((out / told["coordinates_meta_path"]).read_text())
    # hs2p refuses a key that is missing or one too many.
    assert {part: len(keys) for part, keys in meta.items()} == {
        "provenance": 8, "slide": 3, "tiling": 12, "segmentation": 16, "filtering": 13, "artifact": 5,
    }  # fmt: skip
    tiling = meta["tiling"]
    assert (tiling["n_tiles"], int(tiling["tile_size_lv0"]), int(tiling["read_tile_size_px"])) == (4, 512, 512)
    assert float(tiling["requested_spacing_um"]) == 0.5
    blank = json.loads((out / "tile_embeddings/blank.meta.json").read_text())
    assert (blank["num_tiles"], blank["feature_dim"]) == (0, None)
    assert not (out / "tile_embeddings/blank.pt").exists()
    assert json.loads((out / blank["coordinates_meta_path"]).read_text())["tiling"]["n_tiles"] == 0


def decoded(item: h5py.Group | h5py.Dataset) -> Any:
    """A part of an AnnData file by its published format, as far as these files use it."""
    kind = item.attrs["encoding-type"]
    if kind == "array":
        return item[()]
    if kind == "string-array":
        return [text.decode() for text in item[()].tolist()]
    if kind == "string":
        return item[()].decode()
    if kind == "numeric-scalar":
        return item[()].item()
    if kind == "dict":
        return {name: decoded(value) for name, value in item.items()}
    if kind == "categorical":
        return pd.Categorical.from_codes(decoded(item["codes"]), decoded(item["categories"]), ordered=False)
    assert kind == "dataframe"
    columns = {name: decoded(item[name]) for name in item.attrs["column-order"]}
    return pd.DataFrame(columns, index=decoded(item[item.attrs["_index"]]))


def test_anndata_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "anndata", out)
    with h5py.File(out / "s2.h5ad") as file:
        assert (file.attrs["encoding-type"], file.attrs["encoding-version"]) == ("anndata", "0.1.0")
        assert set(file) == {"X", "obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"}
        features, obs, var = (decoded(file[name]) for name in ("X", "obs", "var"))
        spatial, uns = decoded(file["obsm"])["spatial"], decoded(file["uns"])
    assert np.array_equal(features, values_of("s2").astype(np.float32))
    assert features.dtype == np.float32
    assert obs.index.is_unique
    assert obs.index[0] == "s2/20x/3_0"
    assert obs["slide_id"].tolist() == ["s2"] * 4
    assert obs[["column", "row"]].to_numpy().tolist() == CELLS.tolist()
    assert obs["sharpness"].tolist() == [0, 1, 2, 3]
    assert var.index[-1] == "uni_5"
    # Spots are named by their centres, in pixels of the full image.
    np.testing.assert_allclose(spatial, CORNERS + SIDE / 2)
    assert uns["spatial"]["s2"]["scalefactors"]["spot_diameter_fullres"] == SIDE
    assert uns["wsi_pipe"]["encoder"] == "uni_v1"
    with h5py.File(out / "blank.h5ad") as file:
        assert (decoded(file["X"]).shape, len(decoded(file["obs"]))) == ((0, 6), 0)


def test_the_anndata_package_reads_it(bags: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    export(bags, "anndata", tmp_path / "out")
    data = anndata.read_h5ad(tmp_path / "out/s2.h5ad")
    assert np.array_equal(data.X, values_of("s2").astype(np.float32))
    assert data.obsm["spatial"].shape == (4, 2)
    assert str(data.obs["slide_id"].dtype) == "category"
    assert anndata.read_h5ad(tmp_path / "out/blank.h5ad").shape == (0, 6)


def test_zarr_reads_it(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "zarr", out)
    told = json.loads((out / "s2.zarr/zarr.json").read_text())
    assert (told["zarr_format"], told["node_type"]) == (3, "group")
    assert "features" in told["consolidated_metadata"]["metadata"]
    opened = zarr.open_group(out / "s2.zarr", mode="r")
    assert np.array_equal(opened["features"][:], values_of("s2").astype(np.float32))
    assert opened["coords"][:].tolist() == COORDS.tolist()
    assert opened["quality/sharpness"][:].tolist() == [0, 1, 2, 3]
    assert opened.attrs["tile_size_l0"] == [SIDE, SIDE]
    blank = zarr.open_group(out / "blank.zarr", mode="r")
    assert blank["features"].shape == (0, 6)
    assert blank.attrs["empty_reason"] == "no tissue found"


def written(out: Path) -> dict[Path, int]:
    """When each file was written, but for the lock, which is taken anew each time."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("to", FORMATS)
def test_a_second_call_writes_nothing_and_a_corrected_case_all(bags: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    export(bags, to, out)
    before = written(out)
    again = export(bags, to, out)
    assert {result.status for result in again.values()} <= {"unchanged", "empty"}
    assert written(out) == before
    assert not list(out.rglob("*.partial"))
    make_bag(bags, "s2", case_id="p9")
    changed = export(bags, to, out)
    assert changed["s2"].status == "written"
    assert changed["TCGA-A1.0B"].status == "unchanged"
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("to", ["clam", "stamp"])
def test_files_of_others_are_not_written_over(bags: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    export(bags, to, out)
    place = next(path for path in sorted(out.rglob("s2.*")) if path.is_file())
    place.write_bytes(b"of the user's own")
    results = export(bags, to, out)
    assert results["s2"].status == "failed"
    assert "somebody changed it" in results["s2"].reason
    assert place.read_bytes() == b"of the user's own"
    place.unlink()
    assert export(bags, to, out)["s2"].status == "written"
    # A file that was there before this slide was ever exported.
    make_bag(bags, "s3")
    foreign = place.with_name(f"s3{place.suffix}")
    foreign.write_bytes(b"mine")
    assert "not made by this program" in export(bags, to, out)["s3"].reason
    assert foreign.read_bytes() == b"mine"


def test_a_folder_of_others_is_refused(bags: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(NotOursError, match=r"notes\.txt"):
        export(bags, "clam", tmp_path / "out")


def test_a_call_that_was_killed_is_taken_up(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "clam", out)
    record = out / ".wsi-pipe-export.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    # Killed after the file was put in place and before that was noted; and in the middle of writing a folder.
    done = next(i for i, line in enumerate(lines) if "pt_files/s2.pt" in line and '"state": null' not in line)
    record.write_text("".join(lines[:done] + lines[done + 1 :]) + '{"file": "cut off')
    left = out / "pt_files" / f".s9.pt.{'a' * 12}.partial"
    left.write_bytes(b"half")
    folder = out / f".s9.zarr.{'b' * 12}.partial"
    (folder / "c").mkdir(parents=True)
    assert export(bags, "clam", out)["s2"].status == "written"
    assert not left.exists()
    assert not folder.exists()


def test_what_is_chosen_must_be_clear(bags: Path, tmp_path: Path) -> None:
    make_bag(bags, "s4", encoder="conch", slug="conch")
    with pytest.raises(ConfigError, match="choose with -r and -e one of 20x/conch, 20x/uni"):
        plan_export(bags, "clam")
    with pytest.raises(ConfigError, match="no slide has features of 5x/any"):
        plan_export(bags, "clam", "5x")
    for name in ("uni", "uni_v1", "UNI", "mahmood-uni"):
        plan = plan_export(bags, "clam", None, name)
        assert (plan.level, plan.slug) == ("20x", "uni")
        assert read_level(bags / "s2.h5", "20x", name).slug == "uni"
    with pytest.raises(BagError, match="no features of uni2 at 20x"):
        read_level(bags / "s2.h5", "20x", "uni2")
    results = export(bags, "clam", tmp_path / "out", encoder="uni")
    assert results["s4"].status == "left out"
    assert "no features of uni at 20x, only conch" in results["s4"].reason
    with pytest.raises(ConfigError, match="holds CLAM files of 20x/uni"):
        export(bags, "clam", tmp_path / "out", encoder="conch")


def test_trident_keeps_encoders_apart_and_coordinates_once(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "trident", out)
    places = out / "20x_256px_0px_overlap/patches/s2_patches.h5"
    before = places.stat().st_mtime_ns
    make_bag(bags, "s2", case_id="p1", encoder="conch", slug="conch")
    assert export(bags, "trident", out, encoder="conch")["s2"].status == "written"
    assert places.stat().st_mtime_ns == before
    assert {path.name for path in places.parents[1].iterdir()} == {"features_uni_v1", "features_conch_v1", "patches"}


def test_files_of_slides_that_are_gone_are_named_and_stay(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(bags, "stamp", out)
    (bags / "s2.h5").unlink()
    results = export(bags, "stamp", out)
    assert results["s2.h5"].status == "kept"
    assert (out / "feats/s2.h5").is_file()
    assert "s2.h5" not in (out / "slide.csv").read_text()
    assert cli("export", bags, "--to", "stamp", "-o", out) == 0


def test_a_second_call_does_not_read_features(bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(bags, "clam", tmp_path / "out")
    read = []
    monkeypatch.setattr("wsi_pipe.interop.export.read_level", lambda path, *more: read.append(path))
    assert {r.status for r in export(bags, "clam", tmp_path / "out").values()} == {"unchanged", "empty"}
    assert read == []


def test_random_weights_are_refused_and_marked(tmp_path: Path) -> None:
    bags = tmp_path / "bags"
    make_bag(bags, "s1", encoder="uni-random", slug="uni-random", weights="random")
    with pytest.raises(ConfigError, match="random weights"):
        plan_export(bags, "stamp")
    export(bags, "stamp", tmp_path / "out", allow_random=True)
    with h5py.File(tmp_path / "out/feats/s1.h5") as file:
        assert file.attrs["extractor"] == "uni-random"
        assert file.attrs["wsi_pipe_weights"] == "random"


def test_a_damaged_bag_fails_alone(bags: Path, tmp_path: Path) -> None:
    with h5py.File(bags / "s2.h5", "r+") as file:
        file["levels/20x/features/uni"][0, 0] += 1
    (bags / "cut.h5").write_bytes((bags / "s2.h5").read_bytes()[:3000])
    shutil.copy(bags / "TCGA-A1.0B.h5", bags / "renamed.h5")
    results = export(bags, "clam", tmp_path / "out")
    assert results["s2"].status == "failed"
    assert "not what was written" in results["s2"].reason
    assert (results["cut"].status, results["renamed"].status) == ("left out", "left out")
    assert "bag of another slide" in results["renamed"].reason
    assert results["TCGA-A1.0B"].status == "written"


def test_a_job_on_the_command_line(tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = tmp_path / "job", tmp_path / "out"
    make_slide(tmp_path / "in/a.svs")
    (tmp_path / "in/b.svs").write_bytes(b"no slide")
    assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", "--no-report") == 1
    capsys.readouterr()
    assert cli("export", job, "--to", "clam", "-r", "5x", "-e", "texture", "-o", out) == 1
    shown = capsys.readouterr().out
    assert "1 written" in shown
    assert "left out" in shown
    assert "it failed" in shown
    assert torch.load(out / "pt_files/a.pt", weights_only=True).shape[1] == 162
    assert cli("export", job, "--to", "clam", "-r", "10x", "-o", out) == 2
    assert "5x/texture" in capsys.readouterr().err
    assert cli("export", tmp_path / "in", "--to", "clam", "-o", out) == 2


def test_names_of_encoders_are_of_one_encoder_each() -> None:
    owner: dict[str, str] = {}
    for entry in load_registry().values():
        for name in (*entry.elsewhere.values(), *entry.aliases, entry.name):
            assert owner.setdefault(name.lower(), entry.name) == entry.name, name
    assert same_encoder("uni_v1", "mahmood-uni")
    assert same_encoder("uni_v1-random", "uni-random")
    assert not same_encoder("uni", "uni-random")
    assert not same_encoder("uni", "uni2")
    assert name_elsewhere("uni", "stamp", 1024) == "mahmood-uni"
    assert name_elsewhere("uni-random", "trident") == "uni_v1-random"
    # STAMP's own virchow2 is the CLS token alone, ours has the mean of the patches too.
    assert name_elsewhere("virchow2", "stamp", 2560) != "virchow2"
    assert name_elsewhere("some-file", "stamp") == "some-file"
