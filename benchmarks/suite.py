"""One run of the benchmarks, from the environment to the files."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import grace_kernels

from .rows import Progress, Row, Run, Settings
from .timing import Flush, last_level_cache

PARTS = {
    "operators": ("operators", "run"),
    "call": ("call", "run"),
    "pruned": ("pruned", "run"),
    "model": ("model", "run"),
    "edits": ("edits", "run"),
    "growth": ("edits", "growth"),
}
"""Module and function of each part: `function(settings, progress) -> list[Row]`."""

READ = "read bandwidth"
PEERS = ("faiss-cpu", "usearch", "scikit-learn", "pykeops")
Shown = Callable[[str], AbstractContextManager[Progress]]


def runs(
    settings: Settings, parts: Iterable[str], show: Shown, command: str
) -> Iterator[tuple[str, Run]]:
    """Yield the run on the CPU and, where there is a GPU, the one on that, with their names."""
    done = run(settings, parts, show, command)
    quick = "quick-" if settings.quick else ""
    yield f"{quick}cpu-{done.environment['instructions']}-{settings.threads}threads", done
    if torch.cuda.is_available():
        from .gpu import run as run_on_gpu

        with show("gpu") as progress:
            yield run_on_gpu(settings, progress)


def run(settings: Settings, parts: Iterable[str], show: Shown, command: str) -> Run:
    """Run the parts one after the other and return their rows and what they depend on.

    Args:
        settings: for all parts.
        parts: names in `PARTS`.
        show: given a part's name, shows how far it is.
        command: what was typed, to be kept with the figures.

    Raises:
        ValueError: a part is unknown.
    """
    parts = list(parts)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts must be among {', '.join(PARTS)}, got {part}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    try:
        about = environment(settings, command)
        bandwidth = about["read GB/s"]
        found = [Row("read", kind="bound", name=READ, cache="cold", unit="GB/s", median=bandwidth)]
        for part in parts:
            module, function = PARTS[part]
            with show(part) as progress:
                found += getattr(importlib.import_module(f".{module}", __package__), function)(
                    settings, progress
                )
    finally:
        torch.set_num_threads(threads_before)
    about["load average after"] = _load()
    about["seconds"] = round(time.monotonic() - start)
    return Run(about, found)


def environment(settings: Settings, command: str) -> dict[str, Any]:
    """Return what the figures depend on; nothing that names this machine."""
    versions = {name: _version(name) for name in ("torch", "numpy", "transformers", *PEERS)}
    flush = Flush()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "commit": _commit(),
        "quick": settings.quick,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "instructions": grace_kernels.build_info()["cpu"].get("isa", "reference"),
        "last-level cache MiB": last_level_cache() >> 20,
        "read GB/s": float(f"{flush.bandwidth(settings.budget) / 1e9:.4g}"),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version is not None},
        "load average before": _load(),
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


def _commit() -> str | None:
    """Return the commit of the sources, with a + where they were changed; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed, perhaps inside somebody else's repository
    head = git("rev-parse", "HEAD")
    return f"{head}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}"
