"""Clocks and counters: seconds, processor time, memory, bytes, the GPU, and what other programs do meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from wsi_pipe.benchmark.records import GpuSpent, Machine, Spent
from wsi_pipe.cores import available_cores

__all__ = [
    "ForeignLoad",
    "Gpu",
    "Meter",
    "PeakMemory",
    "available_cores",
    "drop_cache",
    "give_back_memory",
    "io_read_bytes",
    "machine",
]

VERSIONS_OF = (
    "numpy", "opencv-python-headless", "torch", "timm", "tifffile", "imagecodecs", "simplejpeg", "openslide-python",
    "h5py",
)  # fmt: skip
SAMPLE_S = 0.02


class Meter:
    """Wall and processor seconds since it was made; processor time covers all threads of the process."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        """Until now."""
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def give_back_memory() -> None:
    """Have the C library return free memory to the system, where it can.

    Else a pass that is given what an earlier one has freed would seem to need no memory of its own.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most resident memory of the process since it was made.

    Linux keeps the peak itself, and starts anew when asked to; where it does not, samples are taken. start_bytes: what
    the process held then, which is also what other passes left in it.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.start_bytes: int = self._process.memory_info().rss
        self._sampled: int = self.start_bytes
        self._stop: threading.Event | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def _sample(self) -> None:
        assert self._stop is not None
        while not self._stop.wait(SAMPLE_S):
            self._sampled = max(self._sampled, self._process.memory_info().rss)

    def bytes(self) -> int:
        """The peak; call once."""
        if self._stop is None:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
            return int(self._process.memory_info().rss)
        self._stop.set()
        self._thread.join()
        return self._sampled


def io_read_bytes() -> int | None:
    """Bytes that the process has read so far, from whatever kind of file, or None where the system does not count."""
    try:
        return int(psutil.Process().io_counters().read_chars)
    except (AttributeError, OSError, psutil.Error):
        return None


def drop_cache(path: Path) -> None:
    """Ask the system to forget a local file's pages; nothing happens where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        with contextlib.suppress(OSError):
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


class ForeignLoad:
    """What share of the machine's processors other programs used since it was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests' time is counted in user time already.
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return busy, time.process_time(), time.perf_counter()

    def share(self) -> float:
        """0 to 1."""
        busy, own, wall = self._now()
        whole = (wall - self._wall) * (psutil.cpu_count() or 1)
        return min(max((busy - self._busy - (own - self._own)) / whole, 0.0), 1.0) if whole > 0 else 0.0


class Gpu:
    """The CUDA devices among ``devices``, which are torch's names, such as "cuda:1".

    Energy and utilisation come from NVML, memory from torch. Of several devices energy, busy seconds and memory are
    added up, and utilisation is their mean. name: None where there is none of them.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self.name: str | None = None
        self._indices: list[int] = []
        self._handles: list[Any] = []
        self._nvml: Any = None
        self._torch: Any = None
        wanted = sorted({int(name.partition(":")[2] or 0) for name in devices if name.startswith("cuda")})
        if not wanted:
            return
        import torch

        if not torch.cuda.is_available():
            return
        self._torch, self._indices = torch, wanted
        self.name = ", ".join(torch.cuda.get_device_name(index) for index in wanted)
        try:
            import pynvml  # in the extra "gpu"

            pynvml.nvmlInit()
            # NVML numbers the devices of the machine, torch those that the process sees: the UUID tells which is which.
            uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in wanted]
            names = [uuid if uuid.startswith("GPU-") else f"GPU-{uuid}" for uuid in uuids]
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
            self._nvml = pynvml
        except Exception:  # no NVML, an old driver, a device that hides its counters: measure without them
            self._nvml = None

    def wait(self) -> None:
        """Until the devices have done all that they were given."""
        for index in self._indices:
            self._torch.cuda.synchronize(index)

    @contextmanager
    def watch(self) -> Iterator[list[GpuSpent]]:
        """Measure the block; the list holds the result afterwards, and nothing without a GPU."""
        result: list[GpuSpent] = []
        if not self._indices:
            yield result
            return
        for index in self._indices:
            self._torch.cuda.reset_peak_memory_stats(index)
        self.wait()
        samples: list[float] = []
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(stop, samples), daemon=True)
        energy, start = self._energy(), time.perf_counter()
        sampler.start()
        try:
            yield result
        finally:
            self.wait()
            elapsed = time.perf_counter() - start
            after = self._energy()
            stop.set()
            sampler.join()
            share = sum(samples) / len(samples) / 100 if samples else None
            result.append(
                GpuSpent(
                    energy_j=(after - energy) / 1000 if after is not None and energy is not None else None,
                    utilisation=share,
                    busy_s=share * elapsed * len(self._indices) if share is not None else None,
                    peak_memory_bytes=sum(int(self._torch.cuda.max_memory_allocated(i)) for i in self._indices),
                )
            )

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded."""
        if self._nvml is None:
            return None
        try:
            return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self._handles)
        except self._nvml.NVMLError:
            return None

    def _sample(self, stop: threading.Event, samples: list[float]) -> None:
        while self._nvml is not None and not stop.wait(SAMPLE_S):
            try:
                rates = [int(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in self._handles]
                samples.append(sum(rates) / len(rates))
            except self._nvml.NVMLError:
                return


def machine(gpu: Gpu) -> Machine:
    """The machine and the versions that figures depend on."""
    versions = {}
    for name in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        gpu=gpu.name,
        versions=versions,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
