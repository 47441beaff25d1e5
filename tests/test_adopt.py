"""Other tools' features in bags: what was exported comes back, what lies beside the grid is mapped by overlap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_pipe.adopt import map_tiles
from wsi_pipe.bag import read_bag, read_header, read_level
from wsi_pipe.cli import group, run_group
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.synthetic import make_cohort

SIDE = 64.0


def cli(*arguments: object) -> int:
    return run_group(group, "wsi-pipe", [str(a) for a in arguments])


def grid(cells: list[tuple[int, int]], side: float = SIDE) -> TileGrid:
    return TileGrid(
        TileSpec(0.5, 64), (0.5, 0.5), (0.0, 0.0), (side, side), (side, side), np.array(cells, np.int32),
        np.ones(len(cells), np.float32),
    )  # fmt: skip


def test_tiles_on_the_grid_keep_their_features() -> None:
    corners = np.array([[64.4, 0.0], [0.0, 63.6]])
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    found = map_tiles(grid([(0, 0), (1, 0), (0, 1)]), corners, (SIDE, SIDE), values)
    assert found.exact
    assert found.rows.tolist() == [1, 2]
    assert found.values is not None
    assert found.values.tolist() == values.tolist()


def test_tiles_beside_the_grid_are_weighted_by_their_overlap() -> None:
    """Each tile of the grid is a quarter under the first tile and three quarters under the second."""
    corners = np.array([[-48.0, 0.0], [16.0, 0.0]])
    values = np.array([[0.0], [8.0]], np.float32)
    found = map_tiles(grid([(0, 0), (1, 0)]), corners, (SIDE, SIDE), values)
    assert not found.exact
    # The second cell has a quarter covered by the second tile alone, too little to count.
    assert found.rows.tolist() == [0]
    assert found.values is not None
    assert found.values[0, 0] == pytest.approx(6.0)
    assert found.covered[0] == pytest.approx(1.0)
    # Tiles of twice the side: four of the grid below each.
    found = map_tiles(grid([(0, 0), (1, 1), (2, 0)]), np.array([[0.0, 0.0]]), (128.0, 128.0), values[1:])
    assert found.rows.tolist() == [0, 1]
    assert found.values is not None
    assert found.values.tolist() == [[8.0], [8.0]]
    # The weighted mean is that of the points below each cell.
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(-1, 4) * 50.0, np.arange(-1, 4) * 50.0), axis=-1).reshape(-1, 2) + 7
    values = rng.normal(size=(len(corners), 1))
    found = map_tiles(grid([(1, 1)]), corners, (50.0, 50.0), values)
    xs, ys = (64 + rng.uniform(0, 64, 40_000) for _ in range(2))
    below = [np.flatnonzero(((corners <= p) & (p < corners + 50)).all(axis=1))[0] for p in np.stack([xs, ys], 1)[:4000]]
    assert found.values is not None
    assert found.values[0, 0] == pytest.approx(values[below].mean(), abs=0.06)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides with texture features of 64 px tiles at 20x and 5x, and their export to every tool."""
    root = tmp_path_factory.mktemp("adopt")
    make_cohort(root / "slides", 2, seed=3, size_px=(512, 512), mpp=0.5, max_slides_per_case=1)
    slides = ["--slides", root / "slides" / "slides.csv"]
    assert cli("run", *slides, "-o", root / "job", "-r", "20x", "-r", "5x", "--tile-px", 64) == 0
    for tool in ("trident", "clam", "stamp", "slide2vec"):
        assert cli("export", root / "job", "--to", tool, "-r", "20x", "-o", root / tool) == 0
    return root


@pytest.mark.parametrize("tool", ["trident", "clam", "stamp", "slide2vec"])
def test_what_was_exported_comes_back(job: Path, tool: str, tmp_path: Path) -> None:
    slides = ["--slides", job / "slides" / "slides.csv"]
    check = 4 if tool == "trident" else 0
    adopt = ["adopt", job / tool, "--from", tool, *slides, "-o", tmp_path / "job", "-r", "5x", "--check", check]
    assert cli(*adopt, "-e", "texture") == 0
    assert cli("verify", tmp_path / "job") == 0
    for path in sorted((job / "job" / "bags").glob("*.h5")):
        jobs = (job / "job", tmp_path / "job")
        old, new = (read_level(folder / "bags" / path.name, "20x", "texture") for folder in jobs)
        places = [{cell: i for i, cell in enumerate(map(tuple, view.grid.cells.tolist()))} for view in (old, new)]
        assert places[0].keys() == places[1].keys()
        order = [places[1][cell] for cell in places[0]]
        # To the last bit of what was exported: no tile was mixed with another.
        assert np.array_equal(np.asarray(new.features)[order], np.asarray(old.features, np.float32))
        held = read_header(tmp_path / "job" / "bags" / path.name)
        assert held.features["20x"]["texture"].precision == "adopted"
        told = json.loads(held.features["20x"]["texture"].transform)
        assert (told["adopted"], told["mapped"]) == (tool, "tile by tile")
        assert [level.grid.label for level in read_bag(tmp_path / "job" / "bags" / path.name).levels] == ["5x", "20x"]


def test_tiles_of_hs2p_are_taken_without_features(job: Path, tmp_path: Path) -> None:
    slides = ["--slides", job / "slides" / "slides.csv"]
    assert cli("adopt", job / "slide2vec", "--from", "hs2p", *slides, "-o", tmp_path / "job") == 0
    path = next((tmp_path / "job" / "bags").glob("*.h5"))
    old, new = (read_bag(folder / "bags" / path.name).levels[-1].grid for folder in (job / "job", tmp_path / "job"))
    assert sorted(map(tuple, new.cells.tolist())) == sorted(map(tuple, old.cells.tolist()))


def edited(job: Path, folder: Path, change: str) -> Path:
    """TRIDENT's files of the first slide, changed."""
    shutil.copytree(job / "trident", folder)
    for path in folder.glob("*/features_*/*.h5"):
        with h5py.File(path, "r+") as file:
            if change == "moved":
                file["coords"][...] = file["coords"][()] + 21
            elif change == "off":
                file["coords"][0] = (100_000, 0)
            elif change == "size":
                file["coords"].attrs["level0_width"] = 999
            elif change == "resolution":
                file["coords"].attrs["target_magnification"] = 10
            elif change == "features":
                file["features"][...] = -file["features"][()]
    return folder


def test_tiles_that_lie_between_cells_are_mapped_by_overlap(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = ["--slides", job / "slides" / "slides.csv"]
    folder = edited(job, tmp_path / "trident", "moved")
    adopt = ["adopt", folder, "--from", "trident", *slides, "-o", tmp_path / "job", "-e", "texture", "--check", 0]
    assert cli(*adopt) == 0
    assert "by overlap" in capsys.readouterr().out
    path = next((tmp_path / "job" / "bags").glob("*.h5"))
    assert "mean of overlapping" in read_header(path).features["20x"]["texture"].transform


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("off", "lie off the slide"),
        ("size", "999 x 512 px"),
        ("resolution", "says 1 um/px, but its tiles of 64 px have 0.5"),
        ("features", "median cosine of -1"),
    ],
)
def test_files_that_do_not_fit_the_slide_fail_alone(
    job: Path, tmp_path: Path, change: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = ["--slides", job / "slides" / "slides.csv"]
    folder = edited(job, tmp_path / "trident", change)
    # The other slide is as it was.
    good = sorted((job / "trident").glob("*/features_*/*.h5"))[1]
    shutil.copy(good, next(folder.glob("*/features_*")) / good.name)
    assert cli("adopt", folder, "--from", "trident", *slides, "-o", tmp_path / "job", "-e", "texture") == 1
    output = capsys.readouterr()
    assert said in output.err
    assert "1 adopted from trident, 1 failed" in output.out


def test_what_is_no_output_of_the_tool_is_refused(job: Path, tmp_path: Path) -> None:
    slides = ["--slides", job / "slides" / "slides.csv"]
    assert cli("adopt", job / "slides", "--from", "clam", *slides, "-o", tmp_path / "job") == 2
    # CLAM's files do not say which encoder it was, where CLAM wrote them.
    folder = tmp_path / "clam" / "h5_files"
    folder.mkdir(parents=True)
    for path in (job / "clam" / "h5_files").glob("*.h5"):
        with h5py.File(path) as old, h5py.File(folder / path.name, "w") as new:
            new["features"], new["coords"] = old["features"][()], old["coords"][()]
    assert cli("adopt", tmp_path / "clam", "--from", "clam", *slides, "-o", tmp_path / "job") == 1


@pytest.mark.slow
def test_a_student_learns_from_adopted_features(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is one that cannot be had; nothing but its features is asked."""
    from lrmil.distill.request import DistillRequest
    from lrmil.distill.settings import DistillSettings
    from lrmil.distill.teachers import load_teachers
    from lrmil.errors import SettingsError

    slides = ["--slides", job / "slides" / "slides.csv"]
    adopt = ["adopt", job / "trident", "--from", "trident", *slides, "-o", tmp_path / "job", "-r", "5x", "--check", 1]
    (wrong,) = (job / "trident").glob("*/features_texture")
    own = tmp_path / "trident" / wrong.parent.name / "features_uni_v1"
    shutil.copytree(wrong, own)
    assert cli("adopt", tmp_path / "trident", *adopt[2:], "-e", "uni") == 0
    request = DistillRequest(
        tmp_path / "job" / "bags", "uni", "timm:test_vit2", "5x", "20x", tmp_path / "lr.safetensors"
    )
    (teacher,) = load_teachers(request, "cpu")
    assert teacher.encoder.info.name == "uni"
    with pytest.raises(SettingsError, match="another tool"):
        load_teachers(DistillRequest(**{**vars(request), "compute": True}), "cpu")
    from lrmil.distill import run_distillation

    settings = DistillSettings(epochs=1, device="cpu")
    run_distillation(DistillRequest(**{**vars(request), "settings": settings, "random_student": True}))
    assert (tmp_path / "lr.safetensors").is_file()
