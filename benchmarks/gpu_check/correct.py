"""Stage `correct`: every backend against the CPU, to the bit."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import grace_kernels
from grace_kernels import Backend

from . import process, sanitizer, sketched, special
from .journal import CutOff, Journal, Row, Skipped, Wrong
from .place import Place
from .problems import DTYPES, compare, random_problem, regime_problems

COMPARING = 100.0  # seconds after which a row of many problems counts as hung
LEAST = 30.0  # seconds: with less, the sanitizer is not begun
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)")


def rows(place: Place, log: Path) -> list[Row]:
    """Return the rows of this stage, the most telling first."""
    each = place.pick(500, 250, 20)
    total = place.pick(10_000, 1_000, 40)
    random = [
        Row(
            f"codebooks {start} to {start + each - 1}",
            partial(_random, place, start, each),
            limit=COMPARING,
        )
        for start in range(0, total, each)
    ]
    pruned = [
        Row(
            f"sketched codebooks {start} to {start + each - 1}",
            partial(_sketched, place, start, each),
            limit=COMPARING,
        )
        for start in range(0, total, each)
    ]
    odd = [
        Row(f"{name}, {backend}", partial(check, place, backend))
        for name, check in {**sketched.CHECKS, **special.CHECKS}.items()
        if place.gpu or not (place.quick and name in special.SLOW)
        for backend in place.backends
    ]
    found = [
        *[
            Row(f"answers, {backend}", partial(_answers, place, backend))
            for backend in place.backends
        ],
        *[
            Row(
                f"regimes, {str(dtype).removeprefix('torch.')}",
                partial(_regimes, place, dtype),
                limit=COMPARING,
            )
            for dtype in DTYPES
        ],
        *random[:2],
        *pruned[:2],
        *odd,
    ]
    if place.gpu:
        found.append(Row("operator tests", partial(_operator_tests, place, log), limit=200))
        found.append(Row("compute-sanitizer works", partial(_sanitizer_works, place), limit=90))
        found += [
            Row(f"{tool}, {backend}", partial(_sanitized, place, log, tool, backend), limit=150)
            for tool in ("memcheck", "racecheck")
            for backend in place.backends
        ]
    return [
        *found,
        *random[2:],
        *pruned[2:],
    ]  # the bulk: what the time does not reach, a second run does


def usable(place: Place) -> tuple[Backend, ...]:
    """Return the backends that answer here at all; one that does not has a failed row of its own.

    Raises:
        Wrong: none does.
    """
    keys, radii = torch.eye(4, device=place.device), torch.ones(4, device=place.device)
    found: list[Backend] = []
    reasons = []
    for backend in place.backends:
        try:
            grace_kernels.nearest(keys[:1], keys, radii, backend=backend)
            found.append(backend)
        except grace_kernels.BackendUnavailable as error:
            reasons.append(str(error))
    if not found:
        raise Wrong("; ".join(reasons))
    return tuple(found)


def _answers(place: Place, backend: Backend) -> dict[str, Any]:
    """Make one call, and time it: the first compiles what has to be compiled."""
    keys, radii = torch.eye(4, device=place.device), torch.ones(4, device=place.device)
    start = time.perf_counter()
    index, distance = grace_kernels.nearest(keys, keys, radii, backend=backend)
    got = index.tolist(), distance.tolist()
    if got != ([0, 1, 2, 3], [0.0] * 4):
        raise Wrong(f"four unit vectors must find themselves, got {got}")
    return {"first call seconds": time.perf_counter() - start}


def _judge(
    place: Place,
    problems: Iterable[Any],
    expected: int | None,
    differ: Callable[..., dict[Backend, list[str]]] = compare,
) -> dict[str, Any]:
    """Compare problems one by one, by `differ`; stop with what was reached before the time ends."""
    backends = usable(place)
    end = time.monotonic() + min(0.8 * COMPARING, place.remaining() - 1)
    wrong: dict[str, list[str]] = {backend: [] for backend in backends}
    number = 0
    for problem in problems:
        if time.monotonic() >= end:
            break
        for backend, found in differ(place, problem, backends).items():
            if found:
                wrong[backend].append(f"{problem.name}: {'; '.join(found)}")
        number += 1
    result: dict[str, Any] = {"problems": number}
    for backend in backends:
        result[f"wrong, {backend}"] = len(wrong[backend])
    result["first wrong"] = {backend: lines[:3] for backend, lines in wrong.items() if lines}
    if any(wrong.values()):
        first = next(lines[0] for lines in wrong.values() if lines)
        raise Wrong(first, result)
    silent = [backend for backend in place.backends if backend not in backends]
    if silent:
        raise Wrong(f"{', '.join(silent)} must answer here, and does not", result)
    if expected is not None and number < expected:
        raise CutOff(f"the time ended after {number} of {expected}, all right", result)
    return result


def _random(place: Place, start: int, number: int) -> dict[str, Any]:
    problems = (random_problem(place.seed, n) for n in range(start, start + number))
    return _judge(place, problems, number)


def _sketched(place: Place, start: int, number: int) -> dict[str, Any]:
    cases = sketched.cases(place.seed, range(start, start + number))
    return _judge(place, cases, number, sketched.compare)


def _regimes(place: Place, dtype: torch.dtype) -> dict[str, Any]:
    problems = list(regime_problems(dtype))
    if not place.gpu:
        problems = problems[::6]
    return _judge(place, problems, len(problems))


def _operator_tests(place: Place, log: Path) -> dict[str, Any]:
    """Run the operators' own tests on the GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "--gpu", "-q", "--no-header"]
    command += ["--maxfail=20", "-p", "no:cacheprovider", "--durations=5"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
    limit = min(190.0, place.remaining() - 3)
    text, code = _run(command, limit, log, "operator tests")
    counts = {name.rstrip("s"): int(n) for n, name in _COUNTS.findall(text.strip()[-400:])}
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result: dict[str, Any] = {**counts, "status": code, "failing": failed[:20]}
    if code is None:
        reached = re.findall(r"\[ *(\d+)%\]", text)
        told = f"no end within {limit:.0f} s, at {reached[-1] if reached else 0} %"
        raise (CutOff if limit < 190 and not failed else Wrong)(told, result)
    if code != 0 or not counts.get("passed"):
        end = "\n".join(text.splitlines()[-6:])
        raise Wrong("\n".join([*failed[:5], end])[-1200:], result)
    return result


def _sanitizer_works(place: Place) -> dict[str, Any]:
    """Try compute-sanitizer on a torch program."""
    tool = sanitizer.program()
    if tool is None:
        raise Skipped("there is no compute-sanitizer")
    limit = _time_for(place, 80.0)
    text, code = sanitizer.run(tool, "memcheck", "trivial", limit)
    if code is None:
        raise (CutOff if limit < 80 else Wrong)(f"no end within {limit:.0f} s")
    if code != 0 or "ERROR SUMMARY: 0 errors" not in text:
        raise Skipped(f"it does not work on a trivial program, status {code}: {text[-400:]}")
    return {"trivial program": "0 errors"}


def _time_for(place: Place, most: float) -> float:
    left = place.remaining() - 3
    if left < LEAST:
        raise CutOff(f"not begun with {max(0.0, left):.0f} s left")
    return min(most, left)


def _sanitized(place: Place, log: Path, tool: str, backend: Backend) -> dict[str, Any]:
    program = sanitizer.program()
    tried = Journal(log.parent / "rows.jsonl").rows("correct").get("compute-sanitizer works", {})
    if program is None or tried.get("status") == "skipped":
        raise Skipped("compute-sanitizer does not work here, see its row")
    if tried.get("status") != "ok":
        raise CutOff("whether compute-sanitizer works here is not known yet, see its row")
    limit = _time_for(place, 140.0)
    text, code = sanitizer.run(program, tool, backend, limit)
    with log.open("a") as file:
        file.write(f"--- {tool}, {backend}\n{text[-20000:]}\n")
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer: Device not supported")
    lines = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    problems = re.findall(r"^problems (\d+) wrong (\d+)$", text, flags=re.MULTILINE)
    result = {"summary": "; ".join(lines), "status": code}
    if code is None:
        raise (CutOff if limit < 140 else Wrong)(f"no end within {limit:.0f} s", result)
    if not problems:
        raise Wrong(f"the program did not end: {text[-600:]}", result)
    result["problems"], result["wrong"] = map(int, problems[-1])
    clean = bool(lines) and all(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in lines)
    if code != 0 or result["wrong"] or not clean:
        kinds = sorted(set(re.findall(r"========= ((?:Invalid|Error|Warning|Race)[^\n]*)", text)))
        raise Wrong("; ".join([*lines, *kinds[:5]]) or text[-600:], result)
    return result


def _run(command: list[str], limit: float, log: Path, title: str) -> tuple[str, int | None]:
    """Run a program; return what it printed, which goes to the log too, and its status."""
    text, status = process.run(command, limit)
    with log.open("a") as file:
        file.write(f"--- {title}\n{text}\n")
    return text, status
