"""Where it runs: a GPU, or a CPU that rehearses. Capture, replay, timing, environment."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend

from .journal import ROOT, ContextLost, short_traceback

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """A device and how much is to be done on it.

    Args:
        device: the GPU, or the CPU of a rehearsal.
        seed: of all random inputs.
        quick: fewer codebooks, replays and shapes.
        deadline: monotonic seconds at which the stage ends.
    """

    device: torch.device
    seed: int = 0
    quick: bool = False
    deadline: float = float("inf")

    @property
    def gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.type == "cuda"

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Names of the implementations under test."""
        return ("triton", "cuda") if self.gpu else (_best_on_cpu(),)

    @property
    def available(self) -> tuple[Backend, ...]:
        """Those of `backends` that the package says it has here."""
        info = grace_kernels.build_info()
        return tuple(b for b in self.backends if b == "reference" or info[b]["available"])

    @property
    def truth(self) -> Backend:
        """Name of the implementation on the CPU that says what is right."""
        return _best_on_cpu() if self.gpu else "reference"

    def remaining(self) -> float:
        """Return the seconds left of the stage's budget."""
        return self.deadline - time.monotonic()

    def settle(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        if self.gpu:
            torch.cuda.synchronize()

    def pick(self, gpu: Any, quick: Any, rehearsal: Any) -> Any:
        """Return the one of three sizes that fits."""
        if not self.gpu:
            return rehearsal
        return quick if self.quick else gpu


def _best_on_cpu() -> Backend:
    return "cpu" if grace_kernels.build_info()["cpu"]["available"] else "reference"


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Collect garbage now and not before the end: a collection may free memory of the device."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Captured:
    """A function's work as a CUDA graph; in a rehearsal, the function called again.

    Args:
        function: takes nothing, returns tensors. Runs three times before the capture, on another
            stream, so that nothing is compiled, loaded or looked up during it.
        keep: keep the graph itself beside the executable one, for `nodes.count`.

    Attributes:
        outputs: what the function returned; each replay writes these tensors anew.

    Raises:
        ContextLost: the capture failed; torch may be left with its stream as the current one.
    """

    def __init__(
        self, place: Place, function: Callable[[], Tensors], *, keep: bool = False, warm: int = 3
    ) -> None:
        self.function = function
        self.graph: Any = None
        if not place.gpu:
            self.outputs = function()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        try:
            with _without_collections(), torch.cuda.graph(self.graph):
                self.outputs = function()
            if keep:
                self.graph.instantiate()
            torch.cuda.synchronize()
        except Exception as error:
            raise ContextLost(f"the capture failed: {short_traceback(error)}") from error

    def replay(self) -> None:
        """Do the work again, on the current stream."""
        if self.graph is not None:
            self.graph.replay()
            return
        for old, new in zip(self.outputs, self.function(), strict=True):
            old.copy_(new)


def summary(seconds: Sequence[float], calls: int) -> dict[str, float]:
    """Return median, p20 and p80 in microseconds per call."""
    ordered = sorted(1e6 * s / calls for s in seconds)
    return {
        "us": round(statistics.median(ordered), 3),
        "p20": round(ordered[len(ordered) // 5], 3),
        "p80": round(ordered[len(ordered) * 4 // 5], 3),
        "runs": len(ordered),
    }


def time_replays(
    place: Place, replay: Callable[[], Any], calls: int, seconds: float = 0.04
) -> dict[str, float]:
    """Time `replay`, which makes `calls` calls, several times back to back.

    On a GPU between events, queued without waiting: the host runs ahead, so what is timed is the
    device alone.
    """
    if not place.gpu:
        return time_eager(place, replay, calls, seconds)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        first.record()
        replay()
        last.record()
        last.synchronize()
    once = max(1e-6, first.elapsed_time(last) / 1e3)
    repeats = int(min(30, max(5, seconds / once)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    taken = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    return summary(taken, calls)


def time_eager(
    place: Place, function: Callable[[], Any], calls: int, seconds: float = 0.03
) -> dict[str, float]:
    """Time `function`, of `calls` calls, by the host's clock, the device idle at both ends."""
    taken: list[float] = []
    function()
    place.settle()
    end = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 30):
        start = time.perf_counter()
        function()
        place.settle()
        taken.append(time.perf_counter() - start)
    return summary(taken, calls)


def slug(name: str) -> str:
    """Return a device's name as it stands in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _printed(*command: str) -> str:
    """Return what a program prints, or nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def smi(*fields: str) -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU."""
    query = f"--query-gpu={','.join(fields)}"
    line = _printed("nvidia-smi", "-i", "0", query, "--format=csv,noheader")
    parts = line.splitlines()[0].split(", ") if line else []
    return dict(zip(fields, parts, strict=False))


def clocks() -> dict[str, str]:
    """Return the clocks, the temperature and the power as they are now."""
    return smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")


SOURCES = (
    "setup.py",
    "csrc",
    "grace_kernels",
    "python",
    "benchmarks/gpu_check",
    "tests/ops",
    "tests/edit/tiny_models.py",
)


def sources_digest() -> str:
    """Return a digest of all that a row may depend on, which names it where there is no git."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return what the figures depend on; nothing that names this machine."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    head = _printed("git", "rev-parse", "HEAD")
    changed = _printed("git", "status", "--porcelain", "--untracked-files=no")
    about: dict[str, Any] = {
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "nvcc": _printed("nvcc", "--version").rpartition("\n")[2] or None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit or head or None,
        "changed since": bool(changed) if head else None,  # without git nobody knows
        "sources": sources_digest(),
    }
    if device.type == "cuda":
        about.update(gpu_figures(device))
        about["driver"] = smi("driver_version").get("driver_version")
        about["clocks as found"] = clocks()
    return about


def gpu_figures(device: torch.device) -> dict[str, Any]:
    """Return the size of a GPU."""
    found = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": found.multi_processor_count,
        "memory bytes": found.total_memory,
        "L2 bytes": getattr(found, "L2_cache_size", 0) or 60 << 20,
        "capability": f"{found.major}.{found.minor}",
    }


def build_libraries() -> list[str]:
    """Return the names of the compiled libraries that lie in the package."""
    return sorted(path.name for path in (ROOT / "grace_kernels").glob("*.so"))
