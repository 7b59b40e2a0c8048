"""Whole problems, arguments of all operators at once, and their comparison on any device.

`random_problem(number)` makes the same codebook wherever it is called, so that one which failed on
a GPU can be looked at without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend, Sketch, testing
from grace_kernels.testing import Draw
from grace_kernels.triton import forms as triton_forms

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUE_DTYPES = (*DTYPES, torch.float64)
FORMS = 36
BATCHES = ((1, 1), (2, 2), (3, 4), (5, 16), (17, 32), (33, 130))
"""Queries by which Triton and CUDA choose another way."""
ALIGNED, ODD = (16, 64, 96, 128, 256, 512, 768, 1024), (2, 7, 8, 31, 63, 65, 255, 257, 300)
"""Widths: Triton compiles for multiples of 16, and for the others."""
VALUE_WIDTHS = (1, 3, 8, 33, 64, 256, 300)
INF, NAN = math.inf, math.nan
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """An implementation, the device it runs on, and the one that says what is right on a CPU.

    `forms`: of its kernels, those that are to be in use: of csrc/cuda/forms.h or of
    grace_kernels/triton/forms.py.
    """

    device: torch.device
    backend: Backend
    truth: Backend
    forms: str = ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the forms in use inside the block."""
        if not self.forms:
            yield
            return
        use = triton_forms.use if self.backend == "triton" else torch.ops.grace_cuda_forms.use
        use(self.forms)
        try:
            yield
        finally:
            use("")

    @property
    def gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"

    def pick(self, gpu: Any, cpu: Any) -> Any:
        """Return the one of two sizes that fits; Triton interprets slowly."""
        return gpu if self.gpu else cpu


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


OPERATIONS = ("nearest", "lookup", "adapt")


def answers(
    problem: Problem, backend: Backend, operations: Sequence[str] = OPERATIONS
) -> dict[str, Tensor]:
    """Run operators on a problem, of which `adapt` writes into its `hidden`.

    Returns:
        Tensors by name; all memory round `hidden` is among them.
    """
    p, found = problem, {}
    how: dict[str, Any] = {"count": p.count, "backend": backend}
    for name in operations:
        if name == "adapt":
            rows, codebook = (p.query_row, p.first_row, p.last_row), (p.keys, p.radii, p.values)
            got = grace_kernels.adapt_(p.hidden, p.query, *rows, *codebook, **how)
        else:
            got = getattr(grace_kernels, name)(p.query, p.keys, p.radii, **how)
        found[f"{name} index"], found[f"{name} distance"] = got
    return {**found, "written rows": p.around}


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


def differences(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """Say what is not equal to the bit, with the first place and both values."""
    found = []
    for name, want in expected.items():
        mine = got[name].cpu()
        if testing.same_bits(mine, want):
            continue
        if mine.shape != want.shape or mine.dtype != want.dtype:
            what = (f"{t.dtype} {list(t.shape)}" for t in (mine, want))
            found.append(f"{name}: {' for '.join(what)}")
            continue
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mine.element_size()]
        unequal = mine.contiguous().view(kind) != want.contiguous().view(kind)
        at = tuple(unequal.nonzero()[0].tolist())
        found.append(
            f"{name}: {int(unequal.sum())} differ, first at {list(at)}: "
            f"{mine[at].item()} for {want[at].item()}"
        )
    return found


def compare(
    place: Place,
    problem: Problem,
    operations: Sequence[str] = OPERATIONS,
    right: dict[str, Tensor] | None = None,
) -> list[str]:
    """Return what a place gets wrong on a problem, against the CPU.

    `right` is what all operators must give, where it is known already.
    """
    if right is None:
        right = answers(onto(problem, CPU), place.truth, operations)
    asked = (*operations, "written")
    right = {name: right[name] for name in right if name.partition(" ")[0] in asked}
    mine = onto(problem, place.device)
    with poisoned(), place.in_use():
        wrong = differences(right, answers(mine, place.backend, operations))
    for name in ("query", "keys", "radii", "values", "query_row", "first_row", "last_row"):
        if not testing.same_bits(getattr(mine, name).cpu(), getattr(problem, name)):
            wrong.append(f"{name} was written to")
    return wrong


def sketched(
    case: testing.SketchCase, device: torch.device, sketch: Sketch | None, backend: Backend
) -> dict[str, Tensor]:
    """Answer a codebook with a sketch or without; return tensors by name.

    The count is given, so that triton compiles little.
    """
    batch, n = len(case.query), len(case.keys)
    query, keys, radii = (t.to(device) for t in (case.query, case.keys, case.radii))
    count = torch.tensor(n if case.count is None else case.count, device=device)
    how: dict[str, Any] = {"count": count, "sketch": sketch, "backend": backend}
    index, distance = grace_kernels.lookup(query, keys, radii, **how)
    found = {"pruned lookup index": index, "pruned lookup distance": distance}
    values = torch.arange(float(n * 5), device=device).view(n, 5)
    around = torch.full((2 * batch + 1, 5), -1.0, device=device)
    rows = torch.arange(batch, device=device)
    first = 2 * rows + 1  # a row that must stay as it is on either side
    index, distance = grace_kernels.adapt_(
        around, query, rows, first, first + 1, keys, radii, values, **how
    )
    found |= {"pruned adapt index": index, "pruned adapt distance": distance}
    return {**found, "rows written through a sketch": around}


SKETCHED_FORMS = 24


def random_sketched(number: int) -> testing.SketchCase:
    """Return random codebook `number` with a sketch, in one of `SKETCHED_FORMS`, each in turn.

    A form has a type (by the number's remainder), a kind of width, and queries of one tile.
    """
    draw = Draw(83, number)
    widths = ((16, 64, 80), (2, 7, 8, 9, 24, 31, 40, 63, 65, 130))[number // len(DTYPES) % 2]
    low, high = ((1, 1), (2, 2), (3, 4), (5, 16))[number // (2 * len(DTYPES)) % 4]
    batch = low + draw.below(high - low + 1)
    return testing.random_codebook(number, dim=draw.one_of(widths), batch=batch)


def compare_sketched(places: Sequence[Place], case: testing.SketchCase) -> list[str]:
    """Return what some places get wrong with a sketch, against the CPU without one."""
    right = sketched(case, CPU, None, places[0].truth)
    made = case.sketch()
    return [told for place in places for told in _compare_sketched(place, case, made, right)]


def _compare_sketched(
    place: Place, case: testing.SketchCase, sketch: Sketch, right: dict[str, Tensor]
) -> list[str]:
    sketch = sketch.to(place.device)
    told = [tensor.clone() for tensor in sketch.tensors()[:-1]]  # all but the counters
    with poisoned(), place.in_use():
        wrong = differences(right, sketched(case, place.device, sketch, place.backend))
    if not all(map(torch.equal, sketch.tensors()[:-1], told)):
        wrong.append("the sketch was written to")
    return [f"{place.backend} {place.forms}: {told}" for told in wrong]


@dataclass(frozen=True)
class Form:
    """What a kernel may be compiled for: dtypes, layouts, the size of the batch.

    Triton compiles a kernel anew for another dtype, another tile and another divisibility of a
    width or a stride, which takes seconds; so there are few forms and many codebooks of each. What
    a form leaves open is nothing that a kernel is compiled for.
    """

    dtype: torch.dtype
    value_dtype: torch.dtype
    widths: tuple[int, ...]
    value_width: int
    batches: tuple[int, int]
    counted: bool
    layouts: tuple[str, ...]  # of query, keys and values, see `_laid_out`
    guard: int
    turned: bool  # hidden is stored column by column


def form_of(number: int) -> Form:
    """Return the form of a codebook: one of `FORMS`, each in turn."""
    number %= FORMS
    draw = Draw(977, number)
    return Form(
        dtype=DTYPES[number % len(DTYPES)],
        value_dtype=draw.one_of(VALUE_DTYPES),
        widths=(ALIGNED, ODD)[number // (FORMS // 2)],
        value_width=draw.one_of(VALUE_WIDTHS),
        batches=BATCHES[number // len(DTYPES) % len(BATCHES)],
        counted=draw.chance(0.7),
        layouts=tuple(draw.one_of(("plain", "plain", "wide", "shifted")) for _ in range(3)),
        guard=draw.one_of((0, 0, 1, 8)),
        turned=draw.chance(0.2),
    )


def random_problem(number: int, *, large: bool = True, seed: int = 0) -> Problem:
    """Return random codebook `number`: its size, values and radii follow from it and the seed."""
    draw, form = Draw(seed, number), form_of(number)
    dim = draw.one_of(form.widths)
    most = draw.one_of((4, 40, 40, 400, 400, 3000)) if large else 40
    n = draw.below(min(most, max(4, 600_000 // dim)) + 1)
    low, high = form.batches
    batch = 0 if draw.chance(0.02) else low + draw.below(high - low + 1)
    kind = draw.one_of(("normal", "normal", "grid", "near ties", "far", "special", "duplicates"))
    query, keys = _points(draw, kind, form.dtype, n, batch, dim)
    radii = _radii(draw, query, keys)
    count = None
    if form.counted:
        used = draw.one_of((n, draw.below(n + 1), draw.below(n + 1), 0 if draw.chance(0.2) else n))
        count = torch.tensor(used)
        if draw.chance(0.7):  # what lies behind must not matter
            keys[used:] = draw.one_of((NAN, INF, 0.0))
            radii[used:] = draw.one_of((NAN, INF))
    rows, width = 3 * batch + draw.below(4), form.value_width
    if form.turned:
        around = draw.normal(width + 2, 3 * BATCHES[-1][1] + 10).to(form.value_dtype)
        hidden = around[1 : 1 + width, 1 : 1 + rows].T
    else:
        around = draw.normal(rows + 2, width + 2 * form.guard).to(form.value_dtype)
        hidden = around[1 : 1 + rows, form.guard : form.guard + width]
    first = 3 * torch.arange(batch) + torch.randint(2, (batch,), generator=draw.generator)
    last = first + torch.randint(0, 3, (batch,), generator=draw.generator)
    last = torch.minimum(last, 3 * torch.arange(batch) + 3)
    query_row = torch.randint(-1, max(1, batch), (batch,), generator=draw.generator)
    values = draw.normal(n, width).to(form.value_dtype)
    name = f"codebook {number} of seed {seed}: {kind}, {n} keys {form.dtype}, width {dim}, {batch} "
    name += f"queries, count {None if count is None else int(count)}, values {form.value_dtype}"
    laid_out = map(_laid_out, (query, keys, values), form.layouts)
    query, keys, values = laid_out
    return Problem(
        name=name.replace("torch.", ""),
        query=query,
        keys=keys,
        radii=radii,
        count=count,
        around=around,
        hidden=hidden,
        query_row=query_row,
        first_row=first,
        last_row=last,
        values=values,
    )


def operations_of(place: Place, number: int) -> Sequence[str]:
    """Return the operators that a random codebook is asked: of Triton's one less to compile."""
    return (OPERATIONS[number % 2], "adapt") if place.backend == "triton" else OPERATIONS


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


def _laid_out(rows: Tensor, layout: str) -> Tensor:
    """Return the same rows as part of a wider matrix whose rest is NaN, unless it is `plain`.

    `wide`: rows begin at multiples of 16 bytes and are multiples of 16 elements apart; `shifted`:
    neither.
    """
    if layout == "plain":
        return rows
    n, width = rows.shape
    left = 8 if layout == "wide" else 1
    stride = -(-(width + left) // 16) * 16 + (0 if layout == "wide" else 3)
    matrix = torch.full((n, stride), NAN, dtype=rows.dtype)
    inner = matrix[:, left : left + width]
    inner.copy_(rows)
    return inner


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


def regime_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield the regimes of `grace_kernels.testing`, with rows to write."""
    for case in testing.regimes(dtype):
        batch, n = len(case.query), len(case.keys)
        around = torch.arange(3 * batch * 5, dtype=torch.float32).view(-1, 5) + 2
        yield replace(
            plain_problem(dtype, 1, 1, batch, 5),
            name=f"{case.name}, {dtype}".replace("torch.", ""),
            query=case.query,
            keys=case.keys,
            radii=case.radii,
            count=torch.tensor(n if case.count is None else case.count),
            around=around,
            hidden=around,
            values=-torch.arange(float(n * 5)).view(n, 5) - 1,
        )
