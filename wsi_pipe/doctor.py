"""What of this installation works: one finding after the other, each with the remedy where something is wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from wsi_pipe import __version__
from wsi_pipe.compiled import LIBRARIES, was_built
from wsi_pipe.errors import in_words, lacks_package

__all__ = ["Finding", "examine"]

State = Literal["ok", "note", "failed"]
HUB_TIMEOUT_S = 5.0
LEAST_PYTHON = (3, 11)
SPACE_GB = 5.0
SELF_TEST_PX = 1024


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: "failed" where slides cannot be processed as they should, "note" where something is slower, or missing that
    not all need. told: what was found. remedy: what to do about it, "" where nothing is to be done.
    """

    topic: str
    name: str
    state: State
    told: str
    remedy: str = ""


def examine(*, self_test: bool = True, hub_timeout_s: float = HUB_TIMEOUT_S) -> Iterator[Finding]:
    """Look at everything, in an order in which the first failure explains later ones; nothing raises, nothing hangs.

    hub_timeout_s: for how long at most the hub is waited for. Home folders are told as ``~``: findings are sent around.
    """
    parts: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("C parts", _compiled),
        ("codecs", _codecs),
        ("machine", _machine),
        ("folders", _folders),
        ("hub", lambda: _hub(hub_timeout_s)),
        ("encoders", _encoders),
    ]
    if self_test:
        parts.append(("self-test", _self_test))
    for topic, look in parts:
        try:
            yield from look()
        except Exception as error:
            what, remedy = lacks_package(error) if isinstance(error, ImportError) else in_words(error)
            yield Finding(topic, topic, "failed", what, remedy or "")


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "wsi-pipe", "ok", f"{__version__} in {_shown(Path(__file__).parent)}")
    python = f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform(terse=True)}"
    old = sys.version_info[:2] < LEAST_PYTHON
    least = ".".join(map(str, LEAST_PYTHON))
    yield Finding(
        "versions", "Python", "failed" if old else "ok", python, f"install Python {least} or later" if old else ""
    )
    try:
        needs = metadata.requires("wsi-pipe") or []
    except metadata.PackageNotFoundError:
        yield Finding("versions", "packages", "note", "wsi-pipe is not installed: packages cannot be compared")
        return
    fine = []
    for need in needs:
        match = re.match(r"(?P<name>[\w.-]+)\s*(\[.*?\])?\s*(>=\s*(?P<least>[\w.]+))?", need)
        if match is None or "extra ==" in need:
            continue
        name, wanted = match["name"], match["least"]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", name, "failed", "is not installed", f"pip install '{need}'")
            continue
        if wanted and not _at_least(found, wanted):
            yield Finding("versions", name, "failed", f"{found}, {wanted} is needed", f"pip install -U '{need}'")
        else:
            fine.append(f"{name} {found}")
    yield Finding("versions", "packages", "ok", ", ".join(fine))


def _at_least(found: str, wanted: str) -> bool:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])

    return numbers(found) >= numbers(wanted)


def _compiled() -> Iterator[Finding]:
    for name, (_, what) in LIBRARIES.items():
        built = was_built(name)
        told = "built" if built else f"not built: {what} is slower, its results are the same"
        remedy = "" if built else "install a C compiler (gcc or clang), then wsi-pipe again"
        yield Finding("C parts", name, "ok" if built else "note", told, remedy)


NEEDED = ("JPEG", "JPEG 2000", "LZW", "deflate", "OpenSlide")
PACKAGES = {"OpenSlide": "openslide-bin openslide-python", "JPEG": "simplejpeg imagecodecs"}


def _codecs() -> Iterator[Finding]:
    from wsi_pipe.slides.codecs.health import codec_health

    for name, told, error in codec_health():
        if error is None:
            yield Finding("codecs", name, "ok", told)
            continue
        what = lacks_package(error)[0] if isinstance(error, ImportError) else str(error) or type(error).__name__
        remedy = f"pip install --force-reinstall {PACKAGES.get(name, 'imagecodecs')}"
        if isinstance(error, ImportError):
            remedy = lacks_package(error)[1]
        yield Finding("codecs", name, "failed" if name in NEEDED else "note", what, remedy)


def _machine() -> Iterator[Finding]:
    import psutil

    from wsi_pipe.cores import available_cores

    cores, memory = available_cores(), psutil.virtual_memory()
    yield Finding("machine", "cores", "ok", f"{cores} of {os.cpu_count()}")
    low = memory.available < 2 << 30
    told = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"
    yield Finding("machine", "memory", "note" if low else "ok", told, "give --memory 512, or free some" if low else "")
    import torch

    from wsi_pipe.encoders.devices import cpu_has_bfloat16, resolve_devices, resolve_precision

    devices = resolve_devices("auto")
    for device in devices:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
        yield Finding(
            "machine", str(device), "ok", f"{kind}, {resolve_precision('auto', device)}, torch {torch.__version__}"
        )
    if devices[0].type == "cpu":
        there = shutil.which("nvidia-smi") is not None
        told = "none that torch sees" + (", though a driver is installed" if there else "")
        half = "" if cpu_has_bfloat16() else "; this processor has no hardware for bfloat16"
        remedy = (
            "install a torch build for this driver's CUDA: https://pytorch.org/get-started/locally" if there else ""
        )
        yield Finding("machine", "GPU", "note", told + half, remedy)


def _folders() -> Iterator[Finding]:
    from wsi_pipe.slides.storage.staging import default_cache_dir

    for name, folder, remedy in (
        ("temporary", Path(tempfile.gettempdir()), "name another folder in TMPDIR"),
        ("cache of slides", default_cache_dir(), "name another folder in WSI_PIPE_CACHE, or give --cache"),
    ):
        yield _folder("folders", name, folder, remedy, needed=name == "temporary")


def _folder(topic: str, name: str, folder: Path, remedy: str, *, needed: bool) -> Finding:
    """Whether a file can be written there, or where the folder would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    bad: State = "failed" if needed else "note"
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            free_gb = shutil.disk_usage(there).free / 1e9
    except OSError as error:
        return Finding(topic, name, bad, f"{_shown(folder)}: {error.strerror or error}", remedy)
    told = f"{_shown(folder)}{'' if there == folder else ' (not made yet)'}, {free_gb:,.0f} GB free"
    low = free_gb < SPACE_GB
    return Finding(topic, name, "note" if low else "ok", told, f"free some space, or {remedy}" if low else "")


def _hub(timeout_s: float) -> Iterator[Finding]:
    from wsi_pipe.encoders import hub

    state = hub.hub_state()
    login = "logged in" if state.token else "nobody is logged in: gated encoders need hf auth login"
    yield Finding("hub", "login", "ok" if state.token else "note", login)
    yield _folder("hub", "weights", state.cache, "name another folder in HF_HOME", needed=False)
    by_hand = f"weights that are here already load; others go by hand into the folder of {hub.WEIGHTS_FOLDER_VARIABLE}"
    if state.offline:
        told = f"HF_HUB_OFFLINE is set: {state.endpoint} is not asked"
        yield Finding("hub", "access", "note", told, f"unset HF_HUB_OFFLINE to download; {by_hand}")
        return
    if state.proxy:
        yield Finding("hub", "access", "ok", f"{state.endpoint}, through a proxy, which was not tried")
        return
    answer: list[bool] = []
    # Names may be looked up for minutes where there is no network, and no timeout reaches that.
    asker = threading.Thread(target=lambda: answer.append(hub.reachable(timeout_s)), daemon=True)
    asker.start()
    asker.join(timeout_s + 0.5)
    if answer and answer[0]:
        yield Finding("hub", "access", "ok", f"{state.endpoint} answers")
        return
    told = f"{state.endpoint} does not answer" + ("" if answer else f" within {timeout_s:g} s")
    yield Finding("hub", "access", "note", told, f"to download weights, connect or set a proxy; {by_hand}")


def _encoders() -> Iterator[Finding]:
    from wsi_pipe.encoders import list_encoders

    found = list_encoders()
    loads = [item.name for item in found if item.loads]
    yield Finding("encoders", "load now", "ok" if loads else "failed", ", ".join(loads) or "none")
    lacks = [item.name for item in found if not item.loads]
    if lacks:
        told = f"{len(lacks)}: {', '.join(lacks)}"
        yield Finding("encoders", "need a download", "note", told, "wsi-pipe encoders says what each lacks")


def _self_test() -> Iterator[Finding]:
    """A synthetic slide taken all the way, and its bag checked."""
    from wsi_pipe.bag import check_bag
    from wsi_pipe.config import JobSettings
    from wsi_pipe.job import open_job
    from wsi_pipe.job.run import process
    from wsi_pipe.manifest import SlideEntry
    from wsi_pipe.slides.writing.write import write_pyramid
    from wsi_pipe.synthetic import SlideSpec, SyntheticSlide

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wsi-pipe-doctor-") as folder:
        slide = Path(folder) / "synthetic.tif"
        spec = SlideSpec(seed=0, size_px=(SELF_TEST_PX, SELF_TEST_PX))
        write_pyramid(slide, SyntheticSlide(spec).levels((1, 4)), mpp=spec.mpp)
        entries, settings = [SlideEntry("synthetic", str(slide), "synthetic")], JobSettings()
        paths = open_job(Path(folder) / "job", settings, entries)
        (outcome,) = process(entries, settings, paths)
        problems = check_bag(paths.bag("synthetic")) if outcome.status == "done" else [outcome.reason or outcome.status]
    seconds = time.monotonic() - start
    if problems:
        yield Finding(
            "self-test", "slide to bag", "failed", "; ".join(problems), outcome.remedy or "please report this output"
        )
        return
    tiles = ", ".join(
        f"{count:,} {'tile' if count == 1 else 'tiles'} at {label}" for label, count in outcome.tiles.items()
    )
    yield Finding("self-test", "slide to bag", "ok", f"{tiles}, a valid bag, {seconds:.1f} s")


def _shown(path: Path) -> str:
    """A path without the user's name."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
