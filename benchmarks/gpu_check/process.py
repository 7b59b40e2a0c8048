"""Run a program with a time limit that what it starts cannot outlast."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path

from .journal import ROOT


def run(
    command: list[str], limit: float, environment: dict[str, str] | None = None
) -> tuple[str, int | None]:
    """Run a program in the repository; return what it printed and its status, None if too late.

    The output goes to a file: a pipe would be waited for as long as a process that the program has
    started holds it. The program stays in this process's group, with which it may be ended.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        status: int | None
        try:
            status = process.wait(timeout=max(0.1, limit))
        except subprocess.TimeoutExpired:
            status = None
            for each in [*_descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read().decode(errors="replace"), status


def _descendants(process: int) -> list[int]:
    """Return the processes that one has started, the youngest last."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    found = []
    for child in map(int, children):
        found += [child, *_descendants(child)]
    return found
