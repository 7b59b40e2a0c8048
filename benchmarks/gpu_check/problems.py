"""Inputs of the operators: random codebooks by number, the regimes, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend, testing
from grace_kernels.testing import Draw

from .place import Place, Tensors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUE_DTYPES = (*DTYPES, torch.float64)
FORMS = 36
BATCHES = ((1, 1), (2, 2), (3, 4), (5, 16), (17, 32), (33, 130))
WIDTHS = (1, 2, 7, 8, 16, 31, 63, 64, 65, 96, 128, 255, 256, 257, 300, 512, 768, 1024)
VALUE_WIDTHS = (1, 3, 8, 33, 64, 256, 300)
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Problem:
    """Arguments of all three operators. `hidden` is a view into `around`, whose rest is a guard."""

    name: str
    query: Tensor
    keys: Tensor
    radii: Tensor
    count: Tensor | None
    around: Tensor
    hidden: Tensor
    query_row: Tensor
    first_row: Tensor
    last_row: Tensor
    values: Tensor


class Compared(Protocol):
    """What backends are compared by."""

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""


@dataclass(frozen=True)
class Answers:
    """What the operators returned, and all memory round `hidden` after `adapt_`."""

    nearest: Tensors
    lookup: Tensors
    adapt: Tensors
    around: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        named = {}
        for op in ("nearest", "lookup", "adapt"):
            named[f"{op} index"], named[f"{op} distance"] = getattr(self, op)
        return {**named, "written rows": self.around}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device` with the strides and the offset that `tensor` has."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    copy = flat.clone() if device.type == "cpu" else flat.to(device)
    return copy.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def onto(problem: Problem, device: torch.device) -> Problem:
    """Return a copy of a problem on `device`, layouts included."""
    arguments: dict[str, Any] = {}
    for field in fields(Problem):
        item = getattr(problem, field.name)
        if isinstance(item, Tensor) and field.name != "hidden":
            item = moved(item, device)
        arguments[field.name] = item
    h = problem.hidden
    arguments["hidden"] = arguments["around"].as_strided(h.size(), h.stride(), h.storage_offset())
    return Problem(**arguments)


def answers(problem: Problem, backend: Backend) -> Answers:
    """Run all three operators of a backend on a problem; writes into its `hidden`."""
    book = (problem.keys, problem.radii)
    count = problem.count
    nearest = grace_kernels.nearest(problem.query, *book, count, backend=backend)
    lookup = grace_kernels.lookup(problem.query, *book, count, backend=backend)
    rows = (problem.query_row, problem.first_row, problem.last_row)
    adapt = grace_kernels.adapt_(
        problem.hidden,
        problem.query,
        *rows,
        *book,
        problem.values,
        count,
        backend=backend,
    )
    return Answers(nearest, lookup, adapt, problem.around)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN and the largest integers: outputs and workspaces."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(was, warn_only=warn)


def differences(expected: Compared, got: Compared) -> list[str]:
    """Say what is not equal to the bit, with the first place and both values."""
    found = []
    right = expected.parts()
    for name, tensor in got.parts().items():
        mine, want = tensor.cpu(), right[name]
        if testing.same_bits(mine, want):
            continue
        if mine.shape != want.shape or mine.dtype != want.dtype:
            found.append(
                f"{name}: {mine.dtype} {list(mine.shape)} for {want.dtype} {list(want.shape)}"
            )
            continue
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mine.element_size()]
        unequal = mine.contiguous().view(kind) != want.contiguous().view(kind)
        at = tuple(unequal.nonzero()[0].tolist())
        found.append(
            f"{name}: {int(unequal.sum())} differ, first at {list(at)}: "
            f"{mine[at].item()} for {want[at].item()}"
        )
    return found


@dataclass(frozen=True)
class Form:
    """What a kernel may be compiled for: dtypes, widths, strides, the size of the batch."""

    dtype: torch.dtype
    value_dtype: torch.dtype
    dim: int
    width: int
    batches: tuple[int, int]
    counted: bool
    margins: tuple[tuple[int, int], ...]  # of query, keys and values, as parts of wider matrices
    guard: int
    turned: bool  # hidden is stored column by column


def form_of(number: int) -> Form:
    """Return the form of a codebook: one of `FORMS`, each in turn.

    Triton compiles a kernel anew for another dtype, another tile and another divisibility of a
    width or a stride, which takes seconds; so there are few forms and many codebooks of each.
    """
    draw, number = Draw(977, number % FORMS), number % FORMS
    plain = (0, 0)
    return Form(
        dtype=DTYPES[number % len(DTYPES)],
        value_dtype=draw.one_of(VALUE_DTYPES),
        dim=draw.one_of(WIDTHS),
        width=draw.one_of(VALUE_WIDTHS),
        batches=BATCHES[number // len(DTYPES) % len(BATCHES)],
        counted=draw.chance(0.7),
        margins=tuple(
            draw.one_of((plain, plain, (0, 8), (8, 8), (1, 2), (3, 0))) for _ in range(3)
        ),
        guard=draw.one_of((0, 0, 1, 8)),
        turned=draw.chance(0.2),
    )


def random_problem(seed: int, number: int, large: bool = True) -> Problem:
    """Return random codebook `number`: its size, values and radii follow from `seed` and it."""
    draw, form = Draw(seed, number), form_of(number)
    most = draw.one_of((4, 40, 40, 400, 400, 3000)) if large else 40
    n = draw.below(min(most, max(4, 600_000 // form.dim)) + 1)
    low, high = form.batches
    batch = 0 if draw.chance(0.02) else low + draw.below(high - low + 1)
    kind = draw.one_of(("normal", "normal", "grid", "near ties", "far", "special", "duplicates"))
    query, keys = _points(draw, kind, form.dtype, n, batch, form.dim)
    radii = _radii(draw, query, keys)
    count = None
    if form.counted:
        used = draw.one_of((n, draw.below(n + 1), draw.below(n + 1), 0 if draw.chance(0.2) else n))
        count = torch.tensor(used)
        if draw.chance(0.7):  # what lies behind must not matter
            keys[used:] = draw.one_of((NAN, INF, 0.0))
            radii[used:] = draw.one_of((NAN, INF))
    rows = 3 * batch + draw.below(4)
    if form.turned:
        around = draw.normal(form.width + 2, 3 * BATCHES[-1][1] + 10).to(form.value_dtype)
        hidden = around[1 : 1 + form.width, 1 : 1 + rows].T
    else:
        around = draw.normal(rows + 2, form.width + 2 * form.guard).to(form.value_dtype)
        hidden = around[1 : 1 + rows, form.guard : form.guard + form.width]
    first = 3 * torch.arange(batch) + torch.randint(2, (batch,), generator=draw.generator)
    last = first + torch.randint(0, 3, (batch,), generator=draw.generator)
    last = torch.minimum(last, 3 * torch.arange(batch) + 3)
    query_row = torch.randint(-1, max(1, batch), (batch,), generator=draw.generator)
    values = draw.normal(n, form.width).to(form.value_dtype)
    return Problem(
        name=(
            f"codebook {number} of seed {seed}: {kind}, {n} keys {form.dtype}, width {form.dim}, "
            f"{batch} queries, count {None if count is None else int(count)}, values "
            f"{form.value_dtype}"
        ).replace("torch.", ""),
        query=_inside(query, form.margins[0]),
        keys=_inside(keys, form.margins[1]),
        radii=radii,
        count=count,
        around=around,
        hidden=hidden,
        query_row=query_row,
        first_row=first,
        last_row=last,
        values=_inside(values, form.margins[2]),
    )


def _points(
    draw: Draw, kind: str, dtype: torch.dtype, n: int, batch: int, dim: int
) -> tuple[Tensor, Tensor]:
    if kind == "near ties" and n > 0:
        centre = draw.one_of((0.0, 0.0, 2.0, 64.0))
        scale = draw.one_of((0.05, 1.0))
        query, keys = testing.ties_within_rounding(
            dtype, n, dim, scale, draw.below(1 << 30), centre
        )
        return query.repeat(batch, 1), keys
    scale = {"far": draw.one_of((30.0, 1000.0))}.get(kind, 1.0)
    keys = draw.normal(n, dim) * scale
    query = draw.normal(batch, dim) * scale
    if kind == "grid":  # many exact ties
        keys, query = keys.clamp(-1, 1).round(), query.clamp(-1, 1).round()
    if n > 0 and batch > 0:
        at = torch.randint(n, (batch,), generator=draw.generator)
        noise = draw.one_of((0.0, 1e-3, 0.05)) * scale
        near = draw.where(batch, 0.6)[:, None]
        query = torch.where(near, keys[at] + noise * query, query)
    if kind == "duplicates" and n > 1:
        keys = keys[torch.randint(max(1, n // 3), (n,), generator=draw.generator)]
    if kind == "special" and dim > 0:
        for rows in (keys, query):
            for _ in range(3):
                if len(rows):
                    rows[draw.below(len(rows)), draw.below(dim)] = draw.one_of((NAN, INF, -INF))
    return query.to(dtype), keys.to(dtype)


def _radii(draw: Draw, query: Tensor, keys: Tensor) -> Tensor:
    n, dim = keys.shape
    typical = math.sqrt(2 * dim) * draw.one_of((0.05, 0.4, 1.0, 3.0))
    radii = torch.full((n,), typical)
    if draw.chance(0.5):
        radii = radii * torch.rand(n, generator=draw.generator)
    if draw.chance(0.5):
        odd = torch.tensor([-INF, -INF, -1.0, 0.0, -0.0, NAN, INF])
        chosen = odd[torch.randint(len(odd), (n,), generator=draw.generator)]
        radii = torch.where(draw.where(n, draw.one_of((0.1, 0.5, 1.0))), chosen, radii)
    if draw.chance(0.3) and n and len(query):
        # Exactly the distance, and one step beside it.
        index, distance = grace_kernels.nearest(query[:1], keys, radii)
        if int(index) >= 0:
            edge = distance[0]
            step = draw.one_of((0.0, -INF, INF))
            at = edge if step == 0 else torch.nextafter(edge, torch.tensor(step))
            radii[int(index)] = at
    return radii


def _inside(rows: Tensor, margins: tuple[int, int]) -> Tensor:
    """Return the same rows as part of a wider matrix, whose rest is NaN."""
    left, right = margins
    if margins == (0, 0):
        return rows
    wide = torch.full((rows.shape[0], rows.shape[1] + left + right), NAN, dtype=rows.dtype)
    inner = wide[:, left : left + rows.shape[1]]
    inner.copy_(rows)
    return inner


def regime_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield the regimes of `grace_kernels.testing`, with rows to write."""
    for number, case in enumerate(testing.regimes(dtype)):
        problem = random_problem(7, number, large=False)
        batch, n = len(case.query), len(case.keys)
        around = torch.arange(3 * batch * 5, dtype=torch.float32).view(-1, 5) + 2
        yield replace(
            problem,
            name=f"{case.name}, {dtype}".replace("torch.", ""),
            query=case.query,
            keys=case.keys,
            radii=case.radii,
            count=None if case.count is None else torch.tensor(case.count),
            around=around,
            hidden=around,
            query_row=torch.arange(batch),
            first_row=3 * torch.arange(batch),
            last_row=3 * torch.arange(batch) + 2,
            values=-torch.arange(float(n * 5)).view(n, 5) - 1,
        )


def compare(
    place: Place, problem: Problem, backends: tuple[Backend, ...]
) -> dict[Backend, list[str]]:
    """Return what each backend gets wrong on a problem, against the CPU."""
    cpu = torch.device("cpu")
    right = answers(onto(problem, cpu), place.truth)
    found = {}
    for backend in backends:
        mine = onto(problem, place.device)
        with poisoned():
            got = answers(mine, backend)
        wrong = differences(right, got)
        for name in ("query", "keys", "radii", "values", "query_row", "first_row", "last_row"):
            if not testing.same_bits(getattr(mine, name).cpu(), getattr(problem, name)):
                wrong.append(f"{name} was written to")
        found[backend] = wrong
    return found
