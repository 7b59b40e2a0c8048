"""What only a device can do wrong: arguments that it cannot refuse, faults, far offsets."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import testing

from . import sanitized
from .problems import (
    CPU,
    Place,
    Problem,
    answers,
    compare,
    differences,
    onto,
    plain_problem,
    poisoned,
)

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.too_long_interpreted


def needs_a_gpu(place: Place, why: str) -> None:
    if not place.gpu:
        pytest.skip(why)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_index_arguments_out_of_range_act_as_the_nearer_bound(
    dtype: torch.dtype, place: Place
) -> None:
    needs_a_gpu(place, "a CPU raises instead")
    far = 1 << 40
    problem = plain_problem(dtype, 50, 96, 8, 33)
    problem = replace(problem, radii=torch.full((50,), 99.0))
    rows = problem.hidden.shape[0]
    query_row = torch.tensor([0, 1, 8, far, -1, -far, 6, 7])
    # Sequence 6 begins before row 0, 7 ends behind the last; 1 is the wrong way round.
    first = torch.tensor([6, 9, 0, 0, 0, 0, -far, 21])
    last = torch.tensor([8, 7, 3, 3, 3, 3, 2, far])
    wild = {"query_row": query_row, "first_row": first, "last_row": last}
    tame = {
        "query_row": torch.where(query_row < 8, query_row, -1),
        "first_row": first.clamp(0, rows),
        "last_row": torch.maximum(last.clamp(0, rows), first.clamp(0, rows)),
    }
    for count, used in ((60, 50), (far, 50), (-1, 0), (-far, 0), (49, 49)):
        right = replace(problem, count=torch.tensor(used), **tame)
        expected = answers(onto(right, CPU), place.truth)
        mine = replace(problem, count=torch.tensor(count), **wild)
        with poisoned():
            got = answers(onto(mine, place.device), place.backend)
        assert differences(expected, got) == [], count


def adapt(problem: Problem, backend: Any, **others: Tensor) -> Any:
    p = replace(problem, **others)
    rows = p.query_row, p.first_row, p.last_row
    return grace_kernels.adapt_(
        p.hidden, p.query, *rows, p.keys, p.radii, p.values, backend=backend
    )


def assert_untouched(problem: Problem, mine: Problem) -> None:
    """Assert that a call that failed has written nothing."""
    for name in ("around", "keys", "radii", "values"):
        assert testing.same_bits(getattr(problem, name), getattr(mine, name).cpu()), name


def test_a_codebook_on_another_device_is_refused_and_nothing_is_written(place: Place) -> None:
    needs_a_gpu(place, "there is one device")
    problem = plain_problem(torch.bfloat16, 50, 64, 4, 16)
    mine = onto(problem, place.device)
    for name in ("keys", "radii", "values"):
        with pytest.raises(ValueError, match=f"{name} must be on the device of"):
            adapt(mine, place.backend, **{name: getattr(problem, name)})
    assert_untouched(problem, mine)


def test_outputs_that_do_not_fit_are_a_clear_error_and_the_next_call_works(place: Place) -> None:
    needs_a_gpu(place, "needs a GPU's allocator")
    problem = plain_problem(torch.bfloat16, 50, 64, 4, 16)
    mine = onto(problem, place.device)
    right = answers(onto(problem, CPU), place.truth)
    many = 1 << 24  # outputs of 200 MB
    ask = torch.zeros(1, dtype=torch.int64, device=place.device).expand(many) - 1
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(place.device).total_memory
    allowed = torch.cuda.memory_reserved(place.device) + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), place.device)
    too_much: tuple[Callable[[], Any], ...] = (
        lambda: grace_kernels.lookup(
            mine.query[:1].expand(many, 64), mine.keys, mine.radii, backend=place.backend
        ),
        lambda: adapt(mine, place.backend, query_row=ask, first_row=ask, last_row=ask),
    )
    try:
        for call in too_much:
            with pytest.raises(RuntimeError, match=r"(?i)out of memory"):
                call()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
    torch.cuda.synchronize()
    assert_untouched(problem, mine)
    assert differences(right, answers(mine, place.backend)) == []


def test_keys_queries_values_and_rows_beyond_two_to_the_31_elements_are_right(
    place: Place,
) -> None:
    n, dim = 600_000, 4096
    needed = 3.5 * n * dim * 2
    needs_a_gpu(place, f"takes {needed / 1e9:.0f} GB")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(place.device)[0] < needed:
        pytest.skip(f"takes {needed / 1e9:.0f} GB, which are not free")
    generator = torch.Generator(place.device).manual_seed(0)
    keys = torch.empty(n, dim, dtype=torch.bfloat16, device=place.device)
    keys.normal_(generator=generator)
    radii = torch.full((n,), 4.0, device=place.device)
    hidden = torch.zeros(n, dim, dtype=torch.bfloat16, device=place.device)
    wanted = torch.tensor([n - 1, 3, 550_000, 524_287, 524_288, 1], device=place.device)
    noise = torch.randn(6, dim, device=place.device, generator=generator)
    query = (keys[wanted].float() + 0.01 * noise).bfloat16()
    with poisoned():
        index, distance = grace_kernels.lookup(query, keys, radii, backend=place.backend)
    assert index.tolist() == wanted.tolist()
    near = keys[wanted].cpu()
    for b in range(6):
        right = grace_kernels.nearest(query[b : b + 1].cpu(), near[b : b + 1], torch.ones(1))[1]
        assert testing.same_bits(distance[b : b + 1].cpu(), right)
    apart = 524_300  # rows of 4096: the second query begins behind 2^31 elements
    index, distance = grace_kernels.lookup(keys[5::apart], keys, radii, backend=place.backend)
    assert index.tolist() == [5, 5 + apart]
    assert distance.tolist() == [0.0, 0.0]
    rows = torch.tensor([n - 2, 524_290, 0], device=place.device)
    ask = torch.tensor([n - 1, 524_300, 7], device=place.device)
    codebook = keys, radii, keys  # the values are the keys
    grace_kernels.adapt_(hidden, keys, ask, rows, rows + 2, *codebook, backend=place.backend)
    for first, asked in zip(rows.tolist(), ask.tolist(), strict=True):
        for row in (first, first + 1):
            assert testing.same_bits(hidden[row], keys[asked]), row
            hidden[row].zero_()
    assert sum(int(part.count_nonzero()) for part in hidden.split(100_000)) == 0


def test_operators_pass_opcheck_on_the_device(place: Place) -> None:
    needs_a_gpu(place, "test_compile.py makes these checks on a CPU")
    problem = onto(plain_problem(torch.float32, 9, 20, 3, 7), place.device)
    count = torch.tensor(4, device=place.device)
    lookup = problem.query, problem.keys, problem.radii
    dense = problem.query.T.contiguous().T, problem.keys.T.contiguous().T, problem.radii
    rows = problem.query_row, problem.first_row, problem.last_row
    for name in ("grace", f"grace_{place.backend}"):
        space = getattr(torch.ops, name)
        for op in (space.nearest.default, space.lookup.default):
            empty = problem.query[:0], problem.keys[:0], problem.radii[:0]
            for arguments in (lookup, (*lookup, count), dense, empty):
                torch.library.opcheck(op, arguments)
        book = problem.keys, problem.radii, problem.values, count
        hidden = problem.hidden.contiguous()
        for h in (hidden, hidden.T.contiguous().T):
            torch.library.opcheck(space.adapt_.default, (h, problem.query, *rows, *book))


def test_a_compiled_call_gives_the_same_bits_and_an_entry_more_compiles_nothing(
    place: Place,
) -> None:
    problem = onto(plain_problem(torch.bfloat16, 64, 96, 5, 33), place.device)
    rows = problem.query_row, problem.first_row, problem.last_row
    book, how = (problem.keys, problem.radii), {"backend": place.backend}

    def serve(hidden: Tensor, source: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        out = hidden * 1.0
        written = grace_kernels.adapt_(out, source, *rows, *book, problem.values, count, **how)
        nearest = grace_kernels.nearest(source, *book, 7, **how)
        return (out, *written, *nearest, *grace_kernels.lookup(source * 1.0, *book, count))

    torch._dynamo.reset()
    frames: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(1)
        compiler = torch._dynamo.lookup_backend(place.pick("inductor", "aot_eager"))
        return compiler(graph, inputs)

    compiled = torch.compile(serve, fullgraph=True, backend=counting)
    with torch.no_grad():
        for used in (40, 41, 64, 0):
            arguments = problem.hidden, problem.query, torch.tensor(used, device=place.device)
            expected = serve(*arguments)
            for mine, want in zip(compiled(*arguments), expected, strict=True):
                assert testing.same_bits(mine.cpu(), want.cpu()), used
    assert len(frames) == 1


def test_warming_up_takes_what_a_server_says_and_calls_are_right_afterwards(place: Place) -> None:
    how: dict[str, Any] = {"batch_sizes": (1, 8), "backend": place.backend}
    grace_kernels.warmup(64, 32, torch.bfloat16, place.device, **how)
    assert compare(place, plain_problem(torch.bfloat16, 100, 64, 8, 32)) == []


def test_what_the_sanitizer_is_run_over_is_right(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitized.main(place.backend, place.device, place.truth) == 0
    assert capsys.readouterr().out == "problems 18 wrong 0\n"


@functools.cache
def sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def under_the_sanitizer(tool: str, what: str) -> tuple[str, int]:
    """Run `sanitized` under compute-sanitizer; return what was printed, and the status.

    Without torch's caching allocator every tensor is an allocation, so that the first byte behind
    one is an error.
    """
    program = sanitizer()
    assert program is not None
    told = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20)
    options = {
        # torch asks what it may do and takes no for an answer; that is no error of a kernel.
        "--report-api-errors": "no",
        # Importing torch takes longer than the tool waits by itself.
        "--launch-timeout": "0",
        "--target-processes": "all",
    }
    if tool == "racecheck":
        options["--racecheck-report"] = "analysis"
    known = [word for option in options.items() if option[0] in told.stdout for word in option]
    command = [program, "--tool", tool, "--error-exitcode", "97", *known]
    command += [sys.executable, "-m", "ops.sanitized", what]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=140)[0], process.returncode
        finally:
            if process.poll() is None:  # the program under the tool would outlast it
                os.killpg(process.pid, signal.SIGKILL)


def judged(text: str, status: int) -> list[str]:
    """Return what is wrong with a run under the sanitizer."""
    summaries = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    wrong = [line for line in summaries if not re.search(r"SUMMARY: 0 (errors|hazards)", line)]
    wrong += sorted(set(re.findall(r"========= ((?:Invalid|Error|Warning|Race)[^\n]*)", text)))
    ended = re.findall(r"^problems (\d+) wrong (\d+)$", text, flags=re.MULTILINE)
    if not ended or not summaries:
        return [*wrong, f"the program did not end: {text[-600:]}"]
    if ended[-1][1] != "0":
        wrong.append(f"{ended[-1][1]} of {ended[-1][0]} problems wrong")
    return wrong if wrong or status == 0 else [f"status {status}: {text[-600:]}"]


@pytest.mark.bulk
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str, place: Place) -> None:
    needs_a_gpu(place, "watches kernels of a GPU")
    if sanitizer() is None:
        pytest.skip("there is no compute-sanitizer")
    text, status = under_the_sanitizer("memcheck", "trivial")
    if status != 0 or "ERROR SUMMARY: 0 errors" not in text:
        pytest.skip(f"compute-sanitizer does not work on a trivial program: {text[-300:]}")
    assert judged(*under_the_sanitizer(tool, place.backend)) == []


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("problems 18 wrong 0\n========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("problems 18 wrong 0\n========= RACECHECK SUMMARY: 0 hazards displayed\n", 0, None),
        ("problems 18 wrong 0\n========= ERROR SUMMARY: 3 errors\n", 97, "ERROR SUMMARY: 3"),
        ("problems 18 wrong 2\n========= ERROR SUMMARY: 0 errors\n", 0, "2 of 18 problems wrong"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "the program did not end"),
        ("problems 18 wrong 0\n", 0, "the program did not end"),
        ("problems 18 wrong 0\n========= ERROR SUMMARY: 0 errors\n", 1, "status 1"),
        (
            "========= Invalid __global__ read of size 4 bytes\nproblems 18 wrong 0\n"
            "========= ERROR SUMMARY: 0 errors\n",
            0,
            "Invalid __global__ read",
        ),
    ],
)
def test_what_the_sanitizer_says_is_judged(text: str, status: int, message: str | None) -> None:
    told = judged(text, status)
    assert told == [] if message is None else message in told[0]
