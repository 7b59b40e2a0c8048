"""The odd cases of stage `correct`: near ties, faults, torch's own checks, large offsets.

Every check takes the place and the name of a backend and returns what is recorded. In a rehearsal
they run on the CPU where that means something, and say so where not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend, testing

from .journal import Skipped, Wrong
from .place import Place
from .problems import Problem, answers, compare, differences, onto, poisoned

_CPU = torch.device("cpu")


def plain_problem(dtype: torch.dtype, n: int, dim: int, batch: int, width: int) -> Problem:
    """Return an orderly problem: every query near a key, every second one within its radius."""
    generator = torch.Generator().manual_seed(n + dim + batch)
    keys = torch.randn(n, dim, generator=generator).to(dtype)
    at = torch.randint(n, (batch,), generator=generator)
    query = (keys[at].float() + 0.05 * torch.randn(batch, dim, generator=generator)).to(dtype)
    radii = torch.full((n,), math.sqrt(dim))
    radii[at[1::2]] = 1e-3
    around = torch.randn(3 * batch + 2, width, generator=generator)
    return Problem(
        name=f"{n} keys {dtype}, width {dim}, {batch} queries",
        query=query,
        keys=keys,
        radii=radii,
        count=None,
        around=around,
        hidden=around[: 3 * batch],
        query_row=torch.arange(batch),
        first_row=3 * torch.arange(batch),
        last_row=3 * torch.arange(batch) + 2,
        values=torch.randn(n, width, generator=generator),
    )


def large_shapes(place: Place, backend: Backend) -> dict[str, Any]:
    """Wide keys, many keys, many queries, each against the CPU."""
    shapes = place.pick(
        [(30_000, 768, 1), (30_000, 768, 64), (5_000, 4096, 8), (2_000, 11008, 512), (3, 64, 5000)],
        [(30_000, 768, 1), (5_000, 4096, 64), (3, 64, 5000)],
        [(300, 64, 3)],
    )
    checked = 0
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for n, dim, batch in shapes:
            problem = plain_problem(dtype, n, dim, batch, 256)
            found = compare(place, problem, (backend,))[backend]
            if found:
                raise Wrong(f"{problem.name}: {'; '.join(found)}")
            checked += 1
    return {"shapes": checked}


def near_ties(place: Place, backend: Backend) -> dict[str, Any]:
    """Keys whose distances tie within the rounding of any fast sum, wide ones too."""
    checked = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, dim in place.pick([(500, 768), (300, 4096), (64, 11008)], [(500, 768)], [(40, 64)]):
            for centre in (0.0, 8.0):
                for batch in (1, 9, 70):
                    query, keys = testing.ties_within_rounding(dtype, n, dim, 1.0, dim, centre)
                    problem = plain_problem(dtype, n, dim, batch, 16)
                    queries = query.repeat(batch, 1)
                    problem = replace(
                        problem, name=f"near ties {n} x {dim} {dtype}", query=queries, keys=keys
                    )
                    found = compare(place, problem, (backend,))[backend]
                    if found:
                        raise Wrong(f"{problem.name}, centre {centre}: {'; '.join(found)}")
                    checked += 1
    return {"problems": checked}


def clamped(place: Place, backend: Backend) -> dict[str, Any]:
    """Index arguments outside their ranges act as the nearer bound, on a GPU."""
    if not place.gpu:
        raise Skipped("a CPU raises instead")
    far = 1 << 40
    checked = 0
    for dtype in (torch.bfloat16, torch.float32):
        problem = plain_problem(dtype, 50, 96, 8, 33)
        problem = replace(problem, radii=torch.full((50,), 99.0))
        rows = problem.hidden.shape[0]
        query_row = torch.tensor([0, 1, 8, far, -1, -far, 6, 7])
        # Sequence 6 begins before row 0, 7 ends behind the last; 1 is the wrong way round.
        first = torch.tensor([6, 9, 0, 0, 0, 0, -far, 21])
        last = torch.tensor([8, 7, 3, 3, 3, 3, 2, far])
        for count, used in ((60, 50), (far, 50), (-1, 0), (-far, 0), (49, 49)):
            right = replace(
                problem,
                count=torch.tensor(used),
                query_row=torch.where(query_row < 8, query_row, -1),
                first_row=first.clamp(0, rows),
                last_row=torch.maximum(last.clamp(0, rows), first.clamp(0, rows)),
            )
            wild = replace(
                problem,
                count=torch.tensor(count),
                query_row=query_row,
                first_row=first,
                last_row=last,
            )
            expected = answers(onto(right, _CPU), place.truth)
            with poisoned():
                got = answers(onto(wild, place.device), backend)
            found = differences(expected, got)
            if found:
                raise Wrong(f"count {count}, {dtype}: {'; '.join(found)}")
            checked += 1
    return {"problems": checked}


def _expect_error(kind: type[BaseException], words: tuple[str, ...], call: Callable) -> str:
    """Return the first line of the error, which must hold one of `words`, in any case."""
    try:
        call()
    except kind as error:
        text = str(error)
        if not any(word in text.lower() for word in words):
            raise Wrong(f"the error must say {' or '.join(words)}, got: {text[:300]}") from error
        return text.splitlines()[0][:200]
    raise Wrong(f"{kind.__name__} must be raised, nothing was")


def other_device(place: Place, backend: Backend) -> dict[str, Any]:
    """A codebook on another device than the query: an error that names it, nothing written."""
    if not place.gpu:
        raise Skipped("there is one device")
    problem = plain_problem(torch.bfloat16, 50, 64, 4, 16)
    mine = onto(problem, place.device)
    told = {}
    for name in ("keys", "radii", "values"):
        mixed = replace(mine, **{name: getattr(problem, name)})
        told[name] = _expect_error(
            ValueError,
            (f"{name} must be on the device of",),
            lambda mixed=mixed: grace_kernels.adapt_(
                mixed.hidden,
                mixed.query,
                mixed.query_row,
                mixed.first_row,
                mixed.last_row,
                mixed.keys,
                mixed.radii,
                mixed.values,
                backend=backend,
            ),
        )
    _untouched(problem, mine)
    return told


def _untouched(problem: Problem, mine: Problem) -> None:
    for name in ("around", "keys", "radii", "values"):
        if not testing.same_bits(getattr(problem, name), getattr(mine, name).cpu()):
            raise Wrong(f"{name} was written to by a call that failed")


def out_of_memory(place: Place, backend: Backend) -> dict[str, Any]:
    """Outputs that do not fit: a clear error, nothing written, and the next call works."""
    if not place.gpu:
        raise Skipped("needs a GPU's allocator")
    problem = plain_problem(torch.bfloat16, 50, 64, 4, 16)
    mine = onto(problem, place.device)
    right = answers(onto(problem, _CPU), place.truth)
    many = 1 << 24  # outputs of 200 MB
    zero = torch.zeros(1, dtype=torch.int64, device=place.device).expand(many)
    ask = zero - 1
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(place.device).total_memory
    allowed = torch.cuda.memory_reserved(place.device) + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), place.device)
    try:
        book = (mine.keys, mine.radii)
        told = _expect_error(
            RuntimeError,
            ("out of memory",),
            lambda: grace_kernels.lookup(mine.query[:1].expand(many, 64), *book, backend=backend),
        )
        adapt_told = _expect_error(
            RuntimeError,
            ("out of memory",),
            lambda: grace_kernels.adapt_(
                mine.hidden,
                mine.query,
                ask,
                ask,
                ask,
                *book,
                mine.values,
                backend=backend,
            ),
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
    torch.cuda.synchronize()
    _untouched(problem, mine)
    found = differences(right, answers(mine, backend))
    if found:
        raise Wrong(f"afterwards: {'; '.join(found)}")
    return {"lookup": told, "adapt_": adapt_told}


def opcheck(place: Place, backend: Backend) -> dict[str, Any]:
    """torch.library.opcheck on the backend's own operators and on grace::*."""
    spaces = {"triton": "grace_triton", "cuda": "grace_cuda"}
    names = ["grace", spaces.get(backend, "grace_reference")]
    problem = onto(plain_problem(torch.float32, 9, 20, 3, 7), place.device)
    count = torch.tensor(4, device=place.device)
    dense = problem.query.T.contiguous().T, problem.keys.T.contiguous().T, problem.radii
    rows = problem.query_row, problem.first_row, problem.last_row
    checked = 0
    for name in names:
        space = getattr(torch.ops, name)
        for op in (space.nearest.default, space.lookup.default):
            for arguments in (
                (problem.query, problem.keys, problem.radii),
                (problem.query, problem.keys, problem.radii, count),
                dense,
                (problem.query[:0], problem.keys[:0], problem.radii[:0]),
            ):
                torch.library.opcheck(op, arguments)
                checked += 1
        book = problem.keys, problem.radii, problem.values, count
        hidden = problem.hidden.contiguous()
        for h in (hidden, hidden.T.contiguous().T):
            torch.library.opcheck(space.adapt_.default, (h, problem.query, *rows, *book))
            checked += 1
    return {"checks": checked, "operators": ", ".join(names)}


def compiles(place: Place, backend: Backend) -> dict[str, Any]:
    """torch.compile(fullgraph=True) gives the same bits; an entry more compiles nothing anew."""
    problem = onto(plain_problem(torch.bfloat16, 64, 96, 5, 33), place.device)
    rows = problem.query_row, problem.first_row, problem.last_row
    book = problem.keys, problem.radii

    def serve(hidden: Tensor, source: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        out = hidden * 1.0
        a = grace_kernels.adapt_(
            out,
            source,
            *rows,
            *book,
            problem.values,
            count,
            backend=backend,
        )
        b = grace_kernels.nearest(source, *book, 7, backend=backend)
        c = grace_kernels.lookup(source * 1.0, *book, count, backend=None)
        return (out, *a, *b, *c)

    torch._dynamo.reset()
    frames: list[int] = []
    inductor = "inductor" if place.gpu else "aot_eager"

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(1)
        return torch._dynamo.lookup_backend(inductor)(graph, inputs)

    compiled = torch.compile(serve, fullgraph=True, backend=counting)
    with torch.no_grad():
        for used in (40, 41, 64, 0):
            count = torch.tensor(used, device=place.device)
            expected = serve(problem.hidden, problem.query, count)
            got = compiled(problem.hidden, problem.query, count)
            for part, (mine, want) in enumerate(zip(got, expected, strict=True)):
                if not testing.same_bits(mine.cpu(), want.cpu()):
                    raise Wrong(f"count {used}: part {part} differs from the eager call")
    if len(frames) != 1:
        raise Wrong(f"one graph must be compiled, got {len(frames)}")
    return {"graphs": len(frames), "compiler": inductor}


def large_offsets(place: Place, backend: Backend) -> dict[str, Any]:
    """Keys, values, queries and written rows behind 2^31 elements."""
    if not place.gpu:
        raise Skipped("takes 15 GB")
    n, dim = 600_000, 4096
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(place.device)[0]
    if free < 3.5 * n * dim * 2:
        raise Skipped(f"takes {3.5 * n * dim * 2 / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    generator = torch.Generator(place.device).manual_seed(place.seed)
    keys = torch.empty(n, dim, dtype=torch.bfloat16, device=place.device)
    keys.normal_(generator=generator)
    radii = torch.full((n,), 4.0, device=place.device)
    hidden = torch.zeros(n, dim, dtype=torch.bfloat16, device=place.device)
    wanted = torch.tensor([n - 1, 3, 550_000, 524_287, 524_288, 1], device=place.device)
    noise = torch.randn(6, dim, device=place.device, generator=generator)
    query = (keys[wanted].float() + 0.01 * noise).bfloat16()
    with poisoned():
        index, distance = grace_kernels.lookup(query, keys, radii, backend=backend)
    if index.tolist() != wanted.tolist():
        raise Wrong(f"keys {wanted.tolist()} must answer, got {index.tolist()}")
    near = keys[wanted].cpu()
    for b in range(6):
        right = grace_kernels.nearest(query[b : b + 1].cpu(), near[b : b + 1], torch.ones(1))[1]
        if not testing.same_bits(distance[b : b + 1].cpu(), right):
            raise Wrong(f"distance {distance[b].item()} must be {right.item()}")
    apart = 524_300  # rows of 4096: the second query begins behind 2^31 elements
    far = keys[5::apart]
    index, distance = grace_kernels.lookup(far, keys, radii, backend=backend)
    if index.tolist() != [5, 5 + apart] or distance.tolist() != [0.0, 0.0]:
        raise Wrong(f"far queries must find themselves, got {index.tolist()} {distance.tolist()}")
    rows = torch.tensor([n - 2, 524_290, 0], device=place.device)
    ask = torch.tensor([n - 1, 524_300, 7], device=place.device)
    args = (ask, rows, rows + 2, keys, radii, keys)  # the values are the keys
    grace_kernels.adapt_(hidden, keys, *args, backend=backend)
    for first, asked in zip(rows.tolist(), ask.tolist(), strict=True):
        for row in (first, first + 1):
            if not testing.same_bits(hidden[row], keys[asked]):
                raise Wrong(f"row {row} must hold value {asked}")
            hidden[row].zero_()
    written = sum(int(part.count_nonzero()) for part in hidden.split(100_000))
    if written:
        raise Wrong(f"{written} elements outside the rows were written")
    del keys, hidden
    torch.cuda.empty_cache()
    return {"elements": n * dim}


def warmed_up(place: Place, backend: Backend) -> dict[str, Any]:
    """`grace_kernels.warmup` takes what a server would say and writes nothing of anyone's."""
    for dtype in (torch.bfloat16, torch.float32):
        grace_kernels.warmup(64, 32, dtype, place.device, batch_sizes=(1, 8, 64), backend=backend)
    problem = plain_problem(torch.bfloat16, 100, 64, 8, 32)
    found = compare(place, problem, (backend,))[backend]
    if found:
        raise Wrong("; ".join(found))
    return {"dtypes": 2}


CHECKS: dict[str, Callable[[Place, Backend], dict[str, Any]]] = {
    "large shapes": large_shapes,
    "near ties": near_ties,
    "clamped": clamped,
    "codebook on another device": other_device,
    "out of memory": out_of_memory,
    "offsets beyond 2^31": large_offsets,
    "opcheck": opcheck,
    "torch.compile": compiles,
    "warmup": warmed_up,
}
SLOW = ("opcheck", "torch.compile")  # left out of a quick rehearsal: the CPU's tests make them too
