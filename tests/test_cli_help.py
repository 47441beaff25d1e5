"""What a user meets of every command: help, units, the environment, spelling mistakes, how much is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lrmil.cli import group as lrmil
from wsi_pipe.cli import group as wsi_pipe
from wsi_pipe.cli import messages, run_group
from wsi_pipe.cli.environment import FORBIDDEN, SHARED, variables
from wsi_pipe.cli.layout import Layout, flag_of, is_number, is_switch, options_of, record, sections
from wsi_pipe.cli.options import settings_from
from wsi_pipe.config import JobSettings

PROGRAMS = {"wsi-pipe": wsi_pipe, "lrmil": lrmil}


def every_command() -> list[tuple[str, str]]:
    return [(program, name) for program, group in PROGRAMS.items() for name in group.table]  # type: ignore[attr-defined]


def loaded(program: str, name: str) -> tuple[click.Command, click.Context, Layout]:
    group = PROGRAMS[program]
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command, click.Context(command, info_name=name), group.layout  # type: ignore[attr-defined]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, program: str = "wsi-pipe") -> str:
    capsys.readouterr()
    assert run_group(PROGRAMS[program], program, arguments) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("WSI_PIPE_RUN_", "WSI_PIPE_WORKERS", "LRMIL_")):
            monkeypatch.delenv(name)
    yield
    messages.be(0)


@pytest.mark.parametrize(("program", "name"), every_command())
def test_every_option_says_what_it_does(program: str, name: str) -> None:
    command, ctx, layout = loaded(program, name)
    for option in options_of(command, ctx):
        names, text = record(option, layout, ctx)
        where = f"{program} {name} {names}"
        words = text.partition("[")[0].strip()
        assert words, f"{where}: what does it do?"
        assert words.endswith((".", "?")), f"{where}: {words}"
        if is_number(option):
            assert not re.search(r"\b(INTEGER|FLOAT)\b", names), (
                f"{where}: name its unit, with metavar= or in the layout"
            )
            assert option.required or text.endswith("]"), f"{where}: what is its default? write it as [...]"
        assert not re.search(r"\bTEXT\b", names), f"{where}: say with metavar= what stands for it"


@pytest.mark.parametrize(("program", "name"), every_command())
def test_no_environment_changes_what_results_mean(
    program: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every variable that could be meant is set; no switch, and none of the forbidden options, hears it."""
    command, ctx, _ = loaded(program, name)
    options = [option for option in command.get_params(ctx) if isinstance(option, click.Option)]
    deaf = [option for option in options if is_switch(option) or flag_of(option) in FORBIDDEN or option.hidden]
    for option in deaf:
        for spelling in {flag_of(option).removeprefix("--"), *(s.lstrip("-") for s in option.opts), str(option.name)}:
            upper = spelling.replace("-", "_").upper()
            for variable in (f"{program}_{name}_{upper}", f"{program}_{upper}", f"WSI_PIPE_{upper}"):
                monkeypatch.setenv(variable.replace("-", "_").upper(), "1")
        assert option.envvar is None
    assert {"--random-weights", "--redo", "--override-mpp", "--allow-random", "--allow-seen", "--yes", "--repair"} & {
        flag_of(option) for option in options
    } <= {flag_of(option) for option in deaf}
    bare = command.make_context(name, [], resilient_parsing=True)
    for option in deaf:
        if option.name in bare.params:
            assert bare.get_parameter_source(option.name) is not click.core.ParameterSource.ENVIRONMENT
            assert is_switch(option) <= (bare.params[option.name] in (False, None, 0, option.default)), option.name


def test_the_forbidden_are_all_that_a_reviewer_would_name() -> None:
    """Whatever is called so is a switch, or forbidden, in whichever command, also in one that is yet to come."""
    dangerous = re.compile(r"random|redo|override|allow|force|yes|repair|overwrite|ignore|skip|only|limit|no-")
    for program, name in every_command():
        command, ctx, _ = loaded(program, name)
        for option in options_of(command, ctx):
            if dangerous.search(flag_of(option)):
                assert variables(program, name, option) is None, f"{program} {name} {flag_of(option)}"


def test_options_come_from_the_environment_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _, _ = loaded("wsi-pipe", "run")
    monkeypatch.setenv("WSI_PIPE_WORKERS", "3")
    monkeypatch.setenv("WSI_PIPE_RUN_RESOLUTION", "20x,5x")
    monkeypatch.setenv("WSI_PIPE_RUN_OUT", str(tmp_path / "job"))
    monkeypatch.setenv("WSI_PIPE_REDO", "1")
    ctx = command.make_context("run", ["a.svs"])
    assert (ctx.params["workers"], ctx.params["resolutions"], ctx.params["redo"]) == (3, (0.5, 2.0), False)
    err = capsys.readouterr().err
    assert "note: --workers 3, as WSI_PIPE_WORKERS says" in err
    assert "WSI_PIPE_RUN_OUT" in err
    # The command's own variable goes before the shared one, and the call before both.
    monkeypatch.setenv("WSI_PIPE_RUN_WORKERS", "5")
    assert command.make_context("run", ["a.svs"]).params["workers"] == 5
    assert command.make_context("run", ["a.svs", "--workers", "7"]).params["workers"] == 7
    assert loaded("wsi-pipe", "plan")[0].make_context("plan", []).params["workers"] == 3


def test_a_scheduler_in_the_call_goes_before_workers_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipe.asked import where_from
    from wsi_pipe.cli.options import settled

    command, _, _ = loaded("wsi-pipe", "run")
    monkeypatch.setenv("WSI_PIPE_WORKERS", "3")
    monkeypatch.setenv("WSI_PIPE_RESOURCES", "GPU=1")
    with command.make_context("run", ["a.svs", "-o", "job", "--scheduler", "tcp://h:1"]) as ctx:
        where = where_from(settled(ctx.params))
        assert (where.scheduler, where.workers, where.resources) == ("tcp://h:1", 1, {"GPU": 1.0})
    with command.make_context("run", ["a.svs", "-o", "job"]) as ctx:
        where = where_from(settled(ctx.params))
        assert (where.scheduler, where.workers, where.resources) == (None, 3, None)


def test_prune_takes_nothing_from_the_environment() -> None:
    command, ctx, _ = loaded("wsi-pipe", "prune")
    assert [option for option in options_of(command, ctx) if option.envvar] == []


@pytest.mark.parametrize("name", ["segment", "tile", "extract", "assemble", "run", "plan"])
def test_the_short_help_can_be_taken_in(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, ctx, layout = loaded("wsi-pipe", name)
    short, left_out = sections(command, layout, ctx, everything=False)
    assert 8 <= sum(map(len, short.values())) - len(short["Help"]) <= 18
    everything, none = sections(command, layout, ctx, everything=True)
    assert none == 0
    assert sum(map(len, everything.values())) == len(options_of(command, ctx))
    text = shown(capsys, name, "--help")
    assert f"{left_out} more options: wsi-pipe {name} --help-all" in text
    assert "--stain-min" not in text
    for heading in short:
        assert f"\n{heading}:\n" in text
    whole = shown(capsys, name, "--help-all")
    assert "--stain-min OD" in whole
    assert "more options" not in whole
    assert "WSI_PIPE_WORKERS" in whole or f"WSI_PIPE_{name.upper()}_NAME" in whole


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("program", "name"), every_command())
def test_help_keeps_to_the_width(
    program: str, name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(capsys, name, "--help-all", program=program)
    examples = {line.strip() for line in (loaded(program, name)[0].help or "").splitlines()}
    long = [line for line in text.splitlines() if len(line) > width and line.strip() not in examples]
    assert long == []
    assert "\x1b" not in text


def test_an_option_that_no_table_names_is_shown() -> None:
    command = click.Command("new", params=[click.Option([f"--own-{i}"], help="Own.") for i in range(20)])
    found, left_out = sections(command, Layout("wsi-pipe"), click.Context(command), everything=False)
    assert left_out == 0
    assert len(found["Options"]) == 21


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rnu"], "Did you mean run?"),
        (["verfy", "x"], "Did you mean verify?"),
        (["run", "--resolutoin", "20x"], "--resolution"),
        (["run", "x", "-o", "job", "--set", "segment.stain_mim=1"], "did you mean segment.stain_min?"),
        (["run", "x", "-o", "job", "--set", "stain_min=1"], "did you mean segment.stain_min?"),
        (["run", "x", "-o", "job", "--set", "tile.overlap=1"], "did you mean tile.overlap_px?"),
        (["run", "x", "-o", "job", "--set", "tile.nothing=1"], "known ones are tile.resolutions, tile.tile_px"),
        (["run", "x", "-o", "job", "--set", "segment.stain_min=much"], "--set segment.stain_min=much: "),
        (["run", "x", "-o", "job", "--set", "segment.stain_min=9"], "stain_seed 0.022 must be at least stain_min 9"),
        (["run", "x", "-o", "job", "--set", "segment.stain_min"], "not of the form KEY=VALUE"),
        (["run", "x", "-o", "job", "--set", "redo=true"], "give --redo"),
        (["run", "x", "-o", "job", "--set", "extract.random_weights=true"], "give --random-weights"),
        (
            ["run", "x", "-o", "job", "--tile-px", "64", "--set", "tile.tile_px=64"],
            "tile.tile_px is given by --set and",
        ),
        (["run", "x", "-o", "job", "-r", "20x,5y"], "'5y' is not understood"),
        (["run", "x", "-o", "job", "-q", "-v"], "-q and -v are given"),
    ],
)
def test_mistakes_are_answered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_group(wsi_pipe, "wsi-pipe", arguments) == 2
    err = capsys.readouterr().err
    assert hint in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_settings_by_name_are_those_of_the_options() -> None:
    def settings(*arguments: str) -> JobSettings:
        command, _, _ = loaded("wsi-pipe", "run")
        with command.make_context("run", ["a.svs", "-o", "nowhere/job", *arguments]) as ctx:
            return settings_from(ctx.params, None, None)

    by_name = settings(
        *("--set", "segment.stain_min=0.02", "--set", "tile.tile_px=224", "--set", "tile.resolutions=['20x', 2.0]"),
        *("--set", "extract.encoders.5x=['texture']", "--set", "reader=tiff", "--set", "segment.drop_pen=false"),
    )
    by_option = settings(
        *("--stain-min", "0.02", "--tile-px", "224", "-r", "20x,2um", "--reader", "tiff", "--no-drop-pen"),
    )
    assert by_name.segment == by_option.segment
    assert by_name.tile == by_option.tile
    assert by_name.reader == "tiff"
    assert by_name.extract.encoders == {"*": ("texture",), "5x": ("texture",)}
    assert settings("-r", "20x,5x").tile == settings("-r", "20x", "-r", "5x").tile
    assert settings("-r", "20x,5x", "-r", "10x").tile.resolutions == (0.5, 2.0, 1.0)
    file = settings("-r", "20x,5x", "--set", "extract.encoders.5x=['lr.safetensors']").extract.encoders["5x"]
    assert file == (str(Path("lr.safetensors").absolute()),)
    # The later of two, as with options.
    assert settings("--set", "tile.tile_px=1", "--set", "tile.tile_px=64").tile.tile_px == 64


@pytest.mark.parametrize("spelling", ["--lr", "--learning-rate"])
def test_the_learning_rate_has_one_name_and_an_old_one(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, _ = loaded("lrmil", "distill")
    for arguments in ([spelling, "0.1"], [f"{spelling}=0.1"]):
        assert command.make_context("distill", arguments, resilient_parsing=True).params["lr"] == 0.1
    text = shown(capsys, "distill", "--help-all", program="lrmil")
    assert "--learning-rate RATE" in text
    assert "--lr " not in text


def test_colour_goes_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, and not with NO_COLOR."""
    command = [sys.executable, "-c", "from wsi_pipe.cli import main; main()", "run", "--help"]

    def through_a_terminal(**more: str) -> str:
        import pty

        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **more}
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment)
        os.close(theirs)
        found = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            found += part
        assert process.wait() == 0
        os.close(ours)
        return found.decode()

    assert "\x1b[" in through_a_terminal()
    assert "\x1b[" not in through_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def completions(shell: str, program: str, words: str, current: int) -> list[str]:
    """What click answers to the script of a shell, by its own protocol."""
    module = program.replace("-", "_")
    variable = f"_{module.upper()}_COMPLETE"
    environment = {**os.environ, variable: f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(current)}
    if shell == "fish":
        environment["COMP_CWORD"] = words.split(" ")[current]
    code = f"import sys; sys.argv[0] = {program!r}; from {module}.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    return found.stdout.split("\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert any("run" in line for line in completions(shell, "wsi-pipe", "wsi-pipe ru", 1))
    assert any("--stain-min" in line for line in completions(shell, "wsi-pipe", "wsi-pipe run --stain", 2))
    assert any("--learning-rate" in line for line in completions(shell, "lrmil", "lrmil distill --learn", 2))
    assert any("uni2-h" in line for line in completions(shell, "wsi-pipe", "wsi-pipe run -e uni2", 3))
    if shutil.which(shell):
        variable = {"_WSI_PIPE_COMPLETE": f"{shell}_source"}
        code = "import sys; sys.argv[0] = 'wsi-pipe'; from wsi_pipe.cli import main; main()"
        script = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variable, capture_output=True, text=True, check=True
        ).stdout
        assert "_WSI_PIPE_COMPLETE" in script
        checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_completion_in_bash_itself(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    program = tmp_path / "wsi-pipe"
    program.write_text(f"#!{sys.executable}\nfrom wsi_pipe.cli import main\nmain()\n")
    program.chmod(0o755)
    script = (
        'eval "$(_WSI_PIPE_COMPLETE=bash_source wsi-pipe)"; COMP_WORDS=(wsi-pipe run --stain); COMP_CWORD=2; '
        '_wsi_pipe_completion wsi-pipe; echo "${COMPREPLY[@]}"'
    )
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    found = subprocess.run([bash, "-c", script], env=os.environ | path, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["--stain-min", "--stain-seed"], found.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "key", "value"),
    [
        ("distill", ["--set", "warmup=0.1"], "warmup", 0.1),
        ("distill", ["--set", "learning_rate=0.1"], "lr", 0.1),
        ("distill", ["--set", "lr=0.1"], "lr", 0.1),
        ("distill", ["--learning-rate", "0.1", "--set", "epochs=3"], "lr", 0.1),
        ("train", ["--set", "learning_rate=0.1", "--set", "model.landmarks=64"], "learning_rate", 0.1),
        ("train", ["--set", "min_epochs=3", "--epochs", "4"], "min_epochs", 3),
    ],
)
def test_settings_by_name_of_lrmil(name: str, arguments: list[str], key: str, value: float) -> None:
    from lrmil.cli.distill import _settings
    from lrmil.cli.train import settings_from as train_settings

    command, _, _ = loaded("lrmil", name)
    with command.make_context(name, arguments, resilient_parsing=True) as ctx:
        values = {**ctx.params, "changes": ctx.params["changes"] or (), "seeds": (), "teacher": None, "config": None}
        settings = _settings(values) if name == "distill" else train_settings(values)
    assert getattr(settings, key) == value


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("distill", ["--learning-rate", "0.1", "--set", "lr=0.2"], "lr is given by --set and by its own option"),
        ("distill", ["--set", "warmpu=0.2"], "did you mean warmup"),
        ("train", ["--hidden", "8", "--set", "model.hidden=9"], "model.hidden is given by --set"),
        ("train", ["--set", "model.hiden=9"], "did you mean model.hidden"),
        ("train", ["--set", "loss.bag=0.5"], "there is no teacher"),
    ],
)
def test_mistakes_in_settings_of_lrmil(name: str, arguments: list[str], message: str) -> None:
    from lrmil.cli.distill import _settings
    from lrmil.cli.train import settings_from as train_settings
    from wsi_pipe.errors import ConfigError

    command, _, _ = loaded("lrmil", name)
    with command.make_context(name, arguments, resilient_parsing=True) as ctx:
        values = {**ctx.params, "changes": ctx.params["changes"] or (), "seeds": (), "teacher": None, "config": None}
        with pytest.raises(ConfigError, match=message):
            _settings(values) if name == "distill" else train_settings(values)


def test_where_an_error_arises_is_told_with_vv_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(tmp_path / "no.svs"), "-o", str(tmp_path / "job"), "--set", "tile.tile_px=0"]
    assert run_group(wsi_pipe, "wsi-pipe", arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run_group(wsi_pipe, "wsi-pipe", [*arguments, "-vv"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_quiet_and_verbose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_slide: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = make_slide(tmp_path / "s.svs")  # type: ignore[operator]
    monkeypatch.setenv("WSI_PIPE_BATCH_SIZE", "16")

    def said(*more: str) -> str:
        capsys.readouterr()
        job = tmp_path / f"job{len(list(tmp_path.iterdir()))}"
        assert run_group(wsi_pipe, "wsi-pipe", ["run", str(slide), "-o", str(job), "-r", "5x", *more]) == 0
        return capsys.readouterr().err

    usual = said()
    assert "[1/1] s:" in usual
    assert "as WSI_PIPE_BATCH_SIZE says" in usual
    assert said("-q") == ""
    assert "tile.resolutions" in said("-v")
    capsys.readouterr()
    assert run_group(wsi_pipe, "wsi-pipe", ["-q", "info", str(slide), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_shared_variables_are_of_options_that_there_are() -> None:
    there = {
        flag_of(option)
        for program, name in every_command()
        for command, ctx, _ in [loaded(program, name)]
        for option in options_of(command, ctx)
    }
    assert there >= SHARED


def test_the_page_tells_of_what_there_is() -> None:
    page = (Path(__file__).parents[1] / "docs/cli.md").read_text(encoding="utf-8")
    spelled = {
        spelling
        for program, name in every_command()
        for command, ctx, _ in [loaded(program, name)]
        for option in options_of(command, ctx)
        for spelling in (*option.opts, *option.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page)) <= spelled | {"--help"}
    for flag in SHARED - {"--device", "--threads"}:
        assert f"| `{flag}` | `WSI_PIPE_{flag[2:].replace('-', '_').upper()}` |" in page
    for flag in FORBIDDEN:
        assert f"`{flag}`" in page
    assert max(map(len, page.splitlines())) <= 120
