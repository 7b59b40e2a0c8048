"""Fill Triton's cache with what the later stages will need, on all cores at once.

A kernel is compiled for dtypes, a tile and the divisibility of widths and strides, in seconds each
and on one core. Every form is given to one of several processes; what these compile, the processes
of the later stages find on disk. As a program: one of the processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_kernels.testing import SketchCase

from . import sketched
from .journal import ROOT, CutOff, Wrong
from .place import Place, sources_digest
from .problems import (
    BATCHES,
    DTYPES,
    FORMS,
    Problem,
    answers,
    onto,
    random_problem,
    regime_problems,
)
from .special import plain_problem


def problems() -> list[Problem]:
    """Return one problem per form among those that the later stages will meet."""
    return list({form(problem): problem for problem in _all()}.values())


def _all() -> Iterator[Problem]:
    for number in range(FORMS):
        drawn = (random_problem(0, n, large=False) for n in itertools.count(number, FORMS))
        yield next(problem for problem in drawn if len(problem.query))
    for dtype in DTYPES:
        yield from regime_problems(dtype)
        for _, batch in BATCHES:
            plain = plain_problem(dtype, 20, 64, batch, 16)
            yield plain
            around = plain.around.to(dtype)
            yield replace(
                plain,
                count=torch.tensor(20),
                around=around,
                hidden=around[: 3 * batch],
                values=plain.values.to(dtype),
            )


def sketched_cases() -> list[SketchCase]:
    """Return one codebook with a sketch per form among those that the later stages will meet."""
    drawn = sketched.cases(0, range(800))
    return list({sketched_form(case): case for case in drawn}.values())


def sketched_form(case: SketchCase) -> tuple[Any, ...]:
    """Return what a kernel that takes a sketch may be compiled for in `sketched.found`."""
    return (case.keys.dtype, _tile(len(case.query)), _number(case.keys.shape[1]))


def _number(n: int) -> str:
    return "1" if n == 1 else "16" if n % 16 == 0 else "odd"


def _tile(batch: int) -> int:
    return next((n for n, (_, most) in enumerate(BATCHES) if batch <= most), len(BATCHES))


def form(problem: Problem) -> tuple[Any, ...]:
    """Return what a kernel may be compiled for."""

    def layout(tensor: Tensor) -> tuple[Any, ...]:
        aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
        return (tensor.dtype, aligned, *map(_number, tensor.stride()))

    batch = len(problem.query_row)
    tensors = (problem.query, problem.keys, problem.hidden, problem.values)
    widths = (_number(problem.keys.shape[1]), _number(problem.values.shape[1]))
    return (batch > 0, _tile(batch), problem.count is None, *widths, *map(layout, tensors))


def marker() -> Path:
    """Return the file that says that these sources were warmed up on this machine."""
    return Path(tempfile.gettempdir()) / f"gpu-check-warm-{sources_digest()}"


def row(place: Place, log: Path) -> dict[str, Any]:
    """Run the processes and add up what they say."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    start = time.monotonic()
    late = 0
    with contextlib.ExitStack() as stack:
        running, outputs = [], []
        for worker in range(workers):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", f"{__package__}.warm", str(worker), str(workers)]
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))
            outputs.append(output)
        for process in running:
            try:
                process.wait(timeout=max(0.1, place.remaining() - 3))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late += 1
        lines = []
        for output in outputs:
            output.seek(0)
            lines += output.read().splitlines()
    with log.open("a") as file:
        file.write("\n".join(["--- triton compiles", *lines, ""]))
    made = sum(line.startswith("made ") for line in lines)
    said = [line for line in lines if line.startswith("failed ")]
    ended = sum(process.returncode == 0 for process in running)
    result = {
        "forms": made,
        "failed": len(said),
        "processes": workers,
        "seconds": round(time.monotonic() - start, 1),
    }
    if late:
        raise CutOff(f"the budget ended before {late} of {workers} processes did", result)
    if said or ended < workers:
        raise Wrong(f"{workers - ended} processes did not end well; {'; '.join(said[:3])}", result)
    marker().touch()
    return result


def main(worker: int, workers: int) -> None:
    """Make every call of one process's share."""
    device = torch.device("cuda", 0)
    made: list[tuple[str, Callable[[], Any]]] = [
        (problem.name, lambda problem=problem: answers(onto(problem, device), "triton"))
        for problem in problems()
    ]
    made += [
        (
            case.name,
            lambda case=case: sketched.found(case, device, case.sketch().to(device), "triton"),
        )
        for case in sketched_cases()
    ]
    for name, call in made[worker::workers]:
        start = time.monotonic()
        try:
            call()
            torch.cuda.synchronize()
            print(f"made {name}: {time.monotonic() - start:.1f} s", flush=True)
        except Exception as error:
            told = str(error).splitlines() or [""]
            print(f"failed {name}: {type(error).__name__}: {told[0]}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
