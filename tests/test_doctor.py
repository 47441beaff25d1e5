"""``wsi-pipe doctor`` and ``init``: what is told, what fails, and that neither hangs nor overwrites."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsi_pipe import doctor
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings, from_mapping, load_toml
from wsi_pipe.encoders import hub
from wsi_pipe.files import parse_toml
from wsi_pipe.override import keys_of
from wsi_pipe.template import settings_template


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda timeout_s=0.0: False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)


def named(findings: list[doctor.Finding], name: str) -> doctor.Finding:
    return next(item for item in findings if item.name == name)


@pytest.mark.usefixtures("no_network")
def test_all_is_looked_at_and_a_slide_is_taken_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_group(group, "wsi-pipe", ["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True
    found = {(item["topic"], item["name"]): item for item in result["findings"]}
    topics = {topic for topic, _ in found}
    assert topics == {"versions", "C parts", "codecs", "machine", "folders", "hub", "encoders", "self-test"}
    assert "a valid bag" in found["self-test", "slide to bag"]["told"]
    assert all(found["codecs", name]["state"] == "ok" for name in doctor.NEEDED)
    assert "numpy" in found["versions", "packages"]["told"]
    assert "texture" in found["encoders", "load now"]["told"]
    assert found["hub", "access"]["state"] == "note"
    assert "huggingface.co does not answer" in found["hub", "access"]["told"]
    assert str(Path.home()) + "/" not in json.dumps(result).replace(str(Path(doctor.__file__).parent), "")


@pytest.mark.usefixtures("no_network")
def test_what_is_broken_fails_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from wsi_pipe.slides.codecs import health

    def damaged() -> str:
        raise ValueError("decodes to something else")

    def lacking() -> str:
        raise ModuleNotFoundError("No module named 'zarr'", name="zarr")

    monkeypatch.setitem(health._CHECKS, "JPEG", damaged)
    monkeypatch.setitem(health._CHECKS, "OME-Zarr", lacking)
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["numpy>=99.1", "no-such-package>=1", "openpyxl; extra == 'excel'"]
    )
    monkeypatch.setattr(doctor, "was_built", lambda name: False)
    monkeypatch.setenv("WSI_PIPE_CORES", "many")
    monkeypatch.setenv("WSI_PIPE_CACHE", "/proc/nowhere")
    found = list(doctor.examine(self_test=False))
    assert (named(found, "JPEG").state, named(found, "OME-Zarr").state) == ("failed", "note")
    assert "pip install" in named(found, "OME-Zarr").remedy
    assert named(found, "numpy").state == "failed"
    assert named(found, "numpy").remedy == "pip install -U 'numpy>=99.1'"
    assert named(found, "no-such-package").told == "is not installed"
    assert not any(item.name == "openpyxl" for item in found)
    assert named(found, "resample").state == "note"
    assert "C compiler" in named(found, "resample").remedy
    assert "WSI_PIPE_CORES=many" in named(found, "machine").told
    assert named(found, "cache of slides").state == "note"
    assert all(item.remedy for item in found if item.state == "failed")
    assert run_group(group, "wsi-pipe", ["doctor", "--no-self-test"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "-> pip install -U 'numpy>=99.1'" in out
    assert "necessary things fail" in out
    assert run_group(group, "wsi-pipe", ["doctor", "--no-self-test", "-q"]) == 1
    quiet = capsys.readouterr().out
    assert "FAILED" in quiet
    assert "note" not in quiet


def test_a_self_test_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipe import bag

    monkeypatch.setattr(bag, "check_bag", lambda path: ["features are not finite"])
    (finding,) = doctor._self_test()
    assert (finding.state, finding.told) == ("failed", "features are not finite")


def test_the_hub_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name may hang whatever timeout the connection has."""
    gate = threading.Event()
    monkeypatch.setattr(hub, "reachable", lambda timeout_s=0.0: gate.wait(60))
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    try:
        found = list(doctor._hub(0.0))
    finally:
        gate.set()
    assert named(found, "access").state == "note"
    assert "does not answer within 0 s" in named(found, "access").told


@pytest.mark.parametrize(
    ("state", "told"),
    [({"offline": True}, "HF_HUB_OFFLINE is set"), ({"proxy": True}, "through a proxy"), ({}, "answers")],
)
def test_what_the_hub_would_be_asked(monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], told: str) -> None:
    plain = hub.HubState("https://hub.example", offline=False, proxy=False, token=True, cache=Path("/tmp"))
    monkeypatch.setattr(hub, "hub_state", lambda: dataclasses.replace(plain, **state))
    monkeypatch.setattr(hub, "reachable", lambda timeout_s=0.0: True)
    found = named(list(doctor._hub(1.0)), "access")
    assert told in found.told
    assert "https://hub.example" in found.told


def test_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_state().offline


def test_the_settings_file_is_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_group(group, "wsi-pipe", ["init"]) == 0
    path = tmp_path / "job.toml"
    assert load_toml(JobSettings, path) == JobSettings()
    assert run_group(group, "wsi-pipe", ["init", "-"]) == 0
    assert "[segment]" in capsys.readouterr().out
    # Never overwritten, whatever it is; not even a link that leads nowhere.
    path.write_text("mine")
    (tmp_path / "link.toml").symlink_to(tmp_path / "elsewhere.toml")
    for name in ("job.toml", "link.toml"):
        assert run_group(group, "wsi-pipe", ["init", name]) == 2
        assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert not (tmp_path / "elsewhere.toml").exists()
    assert run_group(group, "wsi-pipe", ["init", "no/such/folder.toml"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def fields(cls: type[Any]) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from fields(hints[item.name])
        elif not item.metadata.get("call_only"):
            yield cls.__name__, item, hints[item.name]


def test_every_setting_says_what_it_is_with_its_unit() -> None:
    text = settings_template(JobSettings(), "Title")
    for owner, item, hint in fields(JobSettings):
        where = f"{owner}.{item.name}"
        assert item.metadata.get("help"), f"{where}: say in its metadata what it does"
        kinds = {hint, *typing.get_args(hint)}
        if kinds & {int, float} and bool not in kinds:
            assert item.metadata.get("unit"), f"{where}: a number has a unit"
        assert re.search(rf"^(# )?{item.name} = ", text, re.MULTILINE), where
    assert len(list(keys_of(JobSettings))) == len(re.findall(r"^(?:# )?[a-z0-9_]+ = ", text, re.MULTILINE))
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_given_as_an_example_can_be_used() -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", settings_template(JobSettings(), "Title"), flags=re.MULTILINE)
    found = from_mapping(JobSettings, parse_toml(text))
    assert found.extract.batch_size is not None
    assert found.cache.folder is not None
    assert found.primary == "20x"
    assert (
        dataclasses.replace(
            found,
            primary=None,
            extract=dataclasses.replace(found.extract, batch_size=None, read_threads=None),
            cache=dataclasses.replace(found.cache, folder=None),
        )
        == JobSettings()
    )


def test_other_settings_than_the_defaults_read_back() -> None:
    changed = from_mapping(
        JobSettings,
        {
            "tile": {"resolutions": ["20x", 4], "allow_upsampling": True},
            "extract": {"encoders": {"*": ['a"b\\c', "ü"], "5x": ["lr.safetensors"]}, "layers": [0, -1]},
            "anonymise": True,
        },
    )
    assert from_mapping(JobSettings, parse_toml(settings_template(changed, "Title\nof two lines"))) == changed
