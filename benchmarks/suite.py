"""One run of the benchmarks, from the environment to what was measured."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import grace_kernels

from .measurements import Measurement, Progress, Run, Settings
from .timing import Flush, last_level_cache

PARTS = {
    "operators": ("operators", "run"),
    "call": ("call", "run"),
    "pruned": ("pruned", "run"),
    "model": ("model", "run"),
    "edits": ("edits", "run"),
    "growth": ("edits", "growth"),
}
"""Module and function of each part: `function(settings, progress) -> Iterable[Measurement]`."""
ON_A_GPU = {
    "ceilings": ("gpu", "ceilings"),
    "forms": ("gpu_forms", "run"),
    "operators": ("gpu_operators", "run"),
    "pruned": ("gpu_pruned", "run"),
    "edits": ("gpu_edits", "run"),
    "more": ("gpu_operators", "more"),
}
"""Likewise on a GPU, by worth: a time that ends leaves out the last."""

KEPT = 10.0  # seconds; what was measured since is lost with a process that is ended
READ = "read bandwidth"
PEERS = ("faiss-cpu", "usearch", "scikit-learn", "pykeops")
Shown = Callable[[str], AbstractContextManager[Progress]]


def parts_on(device: str) -> dict[str, tuple[str, str]]:
    """Return the parts that a device has."""
    return PARTS if device == "cpu" else ON_A_GPU


def stem(run: Run, settings: Settings) -> str:
    """Return the name of a run, under which its files are written."""
    if settings.device == "rehearsal":
        return "rehearsal"
    quick = "quick-" if settings.quick else ""
    if settings.device == "cuda":
        return quick + re.sub(r"[^a-z0-9]+", "-", run.environment["gpu"].lower()).strip("-")
    return f"{quick}cpu-{run.environment['instructions']}-{settings.threads}threads"


def run(
    settings: Settings,
    parts: Iterable[str],
    show: Shown,
    command: str,
    *,
    commit: str | None = None,
    keep: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Run the parts one after the other and return what they measured and what it depends on.

    A part on a GPU that fails, as one does that loses the device, ends the run; what was measured
    until then stays, and the environment says why.

    Args:
        settings: for all parts.
        parts: names in `parts_on(settings.device)`.
        show: given a part's name, shows how far it is.
        command, commit: to be kept with the figures; None: git knows the commit, if any.
        keep: called with the run so far, every ten seconds or so and whenever a part has ended.

    Raises:
        ValueError: a part is unknown.
    """
    parts, known = list(parts), parts_on(settings.device)
    for part in parts:
        if part not in known:
            raise ValueError(f"parts must be among {', '.join(known)}, got {part}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    try:
        about = environment(settings, command)
        about["commit"] = commit or about["commit"]
        found = []
        if settings.device == "cpu":
            how = {"kind": "bound", "cache": "cold", "unit": "GB/s"}
            found.append(Measurement("read", name=READ, **how, median=about["read GB/s"]))
        for part in parts:
            module, function = known[part]
            measure = getattr(importlib.import_module(f".{module}", __package__), function)
            try:
                with show(part) as progress:
                    kept = time.monotonic()
                    for one in measure(settings, progress):
                        found.append(one)
                        if time.monotonic() > kept + KEPT:
                            keep(Run(about, found))
                            kept = time.monotonic()
            except Exception as error:
                if settings.device != "cuda":
                    raise
                about["failed"] = f"{part}: {type(error).__name__}: {error}"[:300]
                break
            finally:
                keep(Run(about, found))
    finally:
        torch.set_num_threads(threads_before)
    about["load average after"] = _load()
    about["seconds"] = round(time.monotonic() - start)
    return Run(about, found)


def environment(settings: Settings, command: str) -> dict[str, Any]:
    """Return what the figures depend on; nothing that names this machine."""
    on_cpu = settings.device == "cpu"
    packages = (
        "torch",
        *(("numpy", "transformers", *PEERS) if on_cpu else ("triton", "transformers")),
    )
    versions = {name: _version(name) for name in packages}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "commit": _commit(),
        "quick": settings.quick,
        **(_gpu() if settings.device == "cuda" else {}),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "instructions": grace_kernels.build_info()["cpu"].get("isa", "reference"),
        **(_caches(settings) if on_cpu else {}),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version is not None},
        "load average before": _load(),
    }


def _caches(settings: Settings) -> dict[str, Any]:
    bandwidth = Flush().bandwidth(settings.budget)
    return {
        "last-level cache MiB": last_level_cache() >> 20,
        "read GB/s": float(f"{bandwidth / 1e9:.4g}"),
    }


def _gpu() -> dict[str, Any]:
    """Return what the GPU is, and its clocks as they are found."""
    found = torch.cuda.get_device_properties(0)
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "temperature.gpu",
        "power.draw",
        "pstate",
    )
    line = _printed(
        "nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"
    )
    smi = dict(zip(fields, line.split(", "), strict=False)) if line else {}
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory bytes": found.total_memory,
        "L2 bytes": getattr(found, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "nvcc": _printed("nvcc", "--version").rpartition("\n")[2] or None,
        "driver": smi.pop("driver_version", None),
        "clocks as found": ", ".join(f"{name} {value}" for name, value in smi.items()) or None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else []


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _printed(*command: str) -> str:
    """Return what a program prints beside the sources, nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str | None:
    """Return the commit of the sources, with a + where they were changed; None outside git."""
    if not _printed("git", "ls-files", "--error-unmatch", Path(__file__).name):
        return None  # perhaps inside somebody else's repository
    head = _printed("git", "rev-parse", "HEAD")
    changed = _printed("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else None
