"""Settings: TOML there and back, refusals, fingerprints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipe.config import (
    ExtractSettings,
    JobSettings,
    SegmentSettings,
    TileSettings,
    dump_toml,
    fingerprint,
    from_mapping,
    load_toml,
    to_mapping,
)
from wsi_pipe.errors import ConfigError


@given(
    resolutions=st.lists(st.sampled_from([0.25, 0.3, 0.5, 1.0, 2.0, 4.0]), unique=True, min_size=1),
    tissue=st.floats(0, 1),
    names=st.lists(st.sampled_from(["texture", "uni", "timm:vit_tiny@a b.pt"]), unique=True, min_size=1),
    layers=st.lists(st.integers(-12, 12), unique=True),
    batch=st.one_of(st.none(), st.integers(1, 512)),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    resolutions: list[float],
    tissue: float,
    names: list[str],
    layers: list[int],
    batch: int | None,
) -> None:
    settings = JobSettings(
        segment=SegmentSettings(mpp=10.0),
        tile=TileSettings(resolutions=tuple(resolutions), min_tissue=tissue),
        extract=ExtractSettings(encoders={"*": tuple(names), "5x": ("x",)}, layers=tuple(layers), batch_size=batch),
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(dump_toml(settings), encoding="utf-8")
    assert load_toml(JobSettings, path) == settings


def test_resolutions_may_be_written_as_magnification() -> None:
    assert from_mapping(TileSettings, {"resolutions": ["20x", "2um"]}).resolutions == (0.5, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tile]\ncolour = 1", r"tile: unknown setting 'colour'; known ones are .*min_tissue"),
        ("[tile]\ntile_px = 'big'", r"tile.tile_px: 'big' is not a valid int"),
        ("[tile]\nallow_upsampling = 1", "tile.allow_upsampling: 1 is not a valid bool"),
        ("[tile]\nmin_tissue = true", "tile.min_tissue: True is not a valid float"),
        ("[tile]\nresolutions = ['20y']", "'20y' is not understood"),
        ("[tile]\nresolutions = []", "no resolution is given"),
        ("[tile]\nresolutions = [0.5, 0.5]", "a resolution is given twice"),
        ("[tile]\nmin_tissue = 3", "min_tissue 3.0 must lie between"),
        ("[extract]\ndtype = 'int8'", "must be float16 or float32"),
        ("[extract.encoders]\n'5x' = 'a'", "encoders.5x: 'a' is not a valid"),
        ("[tile", "is not valid TOML"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_toml(JobSettings, path)
    assert str(path) in str(caught.value)


def test_missing_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_toml(JobSettings, tmp_path / "none.toml")


def test_a_level_has_its_own_encoders_or_those_for_all() -> None:
    settings = ExtractSettings(encoders={"*": ("a", "b"), "5x": ("c",)})
    assert settings.encoders_of("20x") == ("a", "b")
    assert settings.encoders_of("5x") == ("c",)


def test_fingerprint_sees_every_setting_and_no_order_of_keys() -> None:
    base = TileSettings()
    changed = [
        dataclasses.replace(base, resolutions=(0.5,)),
        dataclasses.replace(base, tile_px=224),
        dataclasses.replace(base, overlap_px=1),
        dataclasses.replace(base, min_tissue=0.3),
        dataclasses.replace(base, judge_um=64.0),
        dataclasses.replace(base, mpp_tolerance=0.0),
        dataclasses.replace(base, max_upsampling=0.0),
        dataclasses.replace(base, allow_upsampling=True),
        dataclasses.replace(base, min_sharpness=0.1),
    ]
    assert len(changed) == len(dataclasses.fields(base))
    assert len({fingerprint(s) for s in [base, *changed]}) == len(changed) + 1
    assert fingerprint({"a": 1, "b": (2,)}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint("a", "b") != fingerprint("ab")


def test_to_mapping_leaves_out_what_is_not_set() -> None:
    assert "batch_size" not in to_mapping(ExtractSettings())
