"""compute-sanitizer over small shapes: how it is run, and, as a program, what it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import cast

import torch

from grace_kernels import Backend

from . import process
from .place import Place
from .problems import compare, random_problem
from .special import plain_problem


def program() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def run(path: str, tool: str, what: str, limit: float) -> tuple[str, int | None]:
    """Run this file under compute-sanitizer; return what was printed and the status, if it ended.

    Without torch's caching allocator every tensor is an allocation, so that the first byte behind
    one is an error.
    """
    command = [path, "--tool", tool, "--error-exitcode", "97"]
    options = {
        # torch asks what it may do and takes no for an answer; that is no error of a kernel.
        "--report-api-errors": "no",
        # Importing torch takes longer than the tool waits by itself.
        "--launch-timeout": "0",
        "--target-processes": "all",
    }
    if tool == "racecheck":
        options["--racecheck-report"] = "analysis"
    known = _help(path)
    for option, value in options.items():
        if option in known:
            command += [option, value]
    command += [sys.executable, "-m", "benchmarks.gpu_check.sanitizer", what]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return process.run(command, limit, environment)


def _help(path: str) -> str:
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=20)
    return done.stdout + done.stderr


def sanitized(what: str) -> None:
    """Be the program under the sanitizer: small shapes of every path, compared with the CPU."""
    if what == "trivial":
        print(torch.zeros(4, device="cuda").add_(1).cpu().tolist())
        return
    place, backend = Place(torch.device("cuda")), cast(Backend, what)
    problems = [random_problem(3, number, large=False) for number in range(12)]
    problems += [
        plain_problem(dtype, n, dim, batch, 33)
        for dtype in (torch.bfloat16, torch.float32)
        for n, dim, batch in ((300, 100, 1), (300, 65, 9), (70, 768, 70))
    ]
    wrong = 0
    for problem in problems:
        found = compare(place, problem, (backend,))[backend]
        wrong += bool(found)
        for line in found:
            print(f"{problem.name}: {line}")
    torch.cuda.synchronize()
    print(f"problems {len(problems)} wrong {wrong}", flush=True)


if __name__ == "__main__":
    sanitized(sys.argv[1])
