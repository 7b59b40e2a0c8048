"""Whole problems against the CPU, to the bit, with poisoned outputs and workspaces, on every place.

On a GPU ten thousand random codebooks and as many with a sketch; elsewhere a few, which shows that
the comparison works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grace_kernels
from grace_kernels import Sketch, testing

from . import problems
from .conftest import COMPILED, PLACES_ON, on_this
from .problems import (
    CPU,
    DTYPES,
    Place,
    Problem,
    compare,
    compare_sketched,
    plain_problem,
    random_problem,
    regime_problems,
)

CODEBOOKS, FIRST = 10_000, 1000
ON_A_CPU = Place(CPU, "cpu" if COMPILED else "reference", "reference")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a GPU share ten thousand codebooks out, a form to a test; elsewhere take each form once.

    A thousand come early and the bulk last. A form has kernels of its own for Triton to compile,
    which many processes do at once.
    """
    if "numbers" not in metafunc.fixturenames:
        return
    forms = problems.SKETCHED_FORMS if "sketch" in metafunc.function.__name__ else problems.FORMS
    shares = [range(forms)]
    if metafunc.config.getoption("--gpu"):
        shares = [range(form, FIRST, forms) for form in range(forms)]
        shares += [range(s[-1] + forms, CODEBOOKS, forms) for s in shares]
    marked = [pytest.param(s, marks=[pytest.mark.bulk] * (s.start >= forms)) for s in shares]
    metafunc.parametrize("numbers", marked, ids=lambda s: f"{s.start} to {s[-1]} by {s.step}")


def test_random_codebooks_are_answered_as_on_the_cpu(places: list[Place], numbers: range) -> None:
    for number in numbers:
        problem = random_problem(number, large=places[0].gpu)
        right = problems.answers(problems.onto(problem, CPU), places[0].truth)
        for place in places:
            if place.gpu or place.backend != "triton" or quick(problem.query, problem.keys):
                operations = problems.operations_of(place, number)
                told = compare(place, problem, operations, right)
                assert told == [], (place.backend, place.forms, problem.name)


def test_random_codebooks_with_a_sketch_are_answered_as_without(
    places: list[Place], numbers: range
) -> None:
    for number in numbers if places[0].gpu else numbers[::2]:
        case = problems.random_sketched(number)
        fast = quick(case.query, case.keys)
        asked = [p for p in places if p.gpu or p.backend != "triton" or fast]
        assert compare_sketched(asked, case) == [], case.name


def quick(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Tell whether triton interprets a problem in less than a second."""
    return len(query) * len(keys) * keys.shape[1] < 250


@pytest.mark.too_long_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_regimes_are_answered_as_on_the_cpu(dtype: torch.dtype, place: Place) -> None:
    for problem in regime_problems(dtype):  # test_lookup.py has the other two operators
        assert compare(place, problem, ["adapt"]) == [], problem.name


SHAPES = [(30_000, 768, 1), (30_000, 768, 64), (5_000, 4096, 8), (2_000, 11008, 512), (3, 64, 5000)]


@pytest.mark.too_long_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{} x {}, {} queries".format(*shape))
def test_large_shapes_are_answered_as_on_the_cpu(
    shape: tuple[int, int, int], dtype: torch.dtype, place: Place
) -> None:
    n, dim, batch = shape
    if not place.gpu:
        n, dim, batch = n // 500 + 1, dim // 64, -(-batch // 64)
    assert compare(place, plain_problem(dtype, n, dim, batch, 256), ["adapt"]) == []


@pytest.mark.too_long_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [0.0, 8.0])
def test_distances_that_nearly_tie_are_told_apart(
    centre: float, dtype: torch.dtype, place: Place
) -> None:
    for n, dim in place.pick([(500, 768), (300, 4096), (64, 11008)], [(40, 64)]):
        for batch in (1, 9, 70):
            query, keys = testing.ties_within_rounding(dtype, n, dim, 1.0, dim, centre)
            queries = {"query": query.repeat(batch, 1), "keys": keys}
            problem = replace(plain_problem(dtype, n, dim, batch, 16), **queries)
            assert compare(place, problem, ["adapt"]) == [], (n, dim, batch)


# What follows shows that the comparison sees what it is there for.


def test_what_is_not_written_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with problems.poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(not COMPILED, reason="not compiled")
@pytest.mark.parametrize("part", ["nearest", "lookup", "adapt"])
@pytest.mark.parametrize("output", ["index", "distance"])
def test_an_output_that_is_never_written_is_found(
    part: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = problems.answers

    def forgetting(problem: Problem, backend: Any, operations: Any) -> dict[str, torch.Tensor]:
        got = plain(problem, backend, operations)
        if backend == ON_A_CPU.backend:
            got[f"{part} {output}"] = torch.empty_like(got[f"{part} {output}"])
        return got

    monkeypatch.setattr(problems, "answers", forgetting)
    (told,) = compare(ON_A_CPU, random_problem(7, large=False))
    assert told.startswith(f"{part} {output}: ")


@pytest.mark.skipif(not COMPILED, reason="not compiled")
def test_a_bit_a_guard_and_an_input_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(7, large=False)
    assert compare(ON_A_CPU, problem) == []
    plain = problems.answers

    def spoilt(change: Callable[[Problem, dict[str, torch.Tensor]], Any]) -> list[str]:
        def answers(problem: Problem, backend: Any, operations: Any) -> dict[str, torch.Tensor]:
            got = plain(problem, backend, operations)
            if backend == "cpu":
                change(problem, got)
            return got

        monkeypatch.setattr(problems, "answers", answers)
        return compare(ON_A_CPU, problem)

    for change, message in (
        (
            lambda p, got: got["nearest distance"].view(torch.int32)[0].add_(1),
            "nearest distance: 1",
        ),
        (lambda p, got: got["lookup index"][0].add_(1), "lookup index: 1 differ"),
        (lambda p, got: got["adapt index"][0].add_(1), "adapt index: 1 differ"),
        (lambda p, got: p.around.view(-1)[-1].add_(1), "written rows: 1 differ"),
        (lambda p, got: p.keys[0, 0].add_(1), "keys was written to"),
    ):
        (told,) = spoilt(change)
        assert told.startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("index", "pruned lookup index: 1 differ"),
        ("distance", "pruned adapt distance: 1 differ"),
        ("row", "rows written through a sketch: 1 differ"),
        ("sketch", "the sketch was written to"),
    ],
)
def test_what_a_sketch_makes_wrong_is_found(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in map(problems.random_sketched, range(20)) if len(case.query) > 1)
    assert compare_sketched([ON_A_CPU], case) == []
    lookup, adapt = grace_kernels.lookup, grace_kernels.adapt_

    def spoilt_lookup(*args: Any, **how: Any) -> Any:
        got = lookup(*args, **how)
        if how["sketch"] is not None:
            got[0][1] += name == "index"
            how["sketch"].head.view(-1)[0] += name == "sketch"
        return got

    def spoilt_adapt(hidden: torch.Tensor, *args: Any, **how: Any) -> Any:
        got = adapt(hidden, *args, **how)
        if how["sketch"] is not None:
            got[1].view(torch.int32)[0] += name == "distance"
            hidden[-1, -1] += name == "row"
        return got

    monkeypatch.setattr(grace_kernels, "lookup", spoilt_lookup)
    monkeypatch.setattr(grace_kernels, "adapt_", spoilt_adapt)
    assert message in compare_sketched([ON_A_CPU], case)[0]


def test_random_codebooks_cover_the_kinds_and_are_the_same_wherever_made() -> None:
    made = [random_problem(number) for number in range(200)]
    again = random_problem(123)
    for name in ("query", "keys", "radii", "values", "query_row"):
        one, other = getattr(made[123], name), getattr(again, name)
        assert testing.same_bits(one, other)
        assert one.stride() == other.stride()
    assert {p.keys.dtype for p in made} == set(DTYPES)
    assert {p.values.dtype for p in made} == set(problems.VALUE_DTYPES)
    hits = [bool((grace_kernels.lookup(p.query, p.keys, p.radii)[0] >= 0).any()) for p in made[:60]]
    assert any(hits)
    assert not all(hits)
    for holds in (
        lambda p: p.keys.stride(0) > p.keys.shape[1] + 1,
        lambda p: p.hidden.numel() > 0 and p.hidden.stride(-1) != 1,
        lambda p: p.count is not None and 0 < int(p.count) < len(p.keys),
        lambda p: (p.radii == -torch.inf).any(),
        lambda p: p.radii.isnan().any(),
        lambda p: p.query.isnan().any(),
        lambda p: len(p.keys) == 0,
        lambda p: len(p.query) == 0,
        lambda p: len(p.keys) > 1000,
        lambda p: (p.query_row < 0).any(),
    ):
        assert sum(bool(holds(p)) for p in made) >= 3


def compiled_for(problem: Problem) -> tuple[Any, ...]:
    """Return all that Triton may compile a kernel for."""

    def number(n: int) -> str:
        return "1" if n == 1 else "16" if n % 16 == 0 else "other"

    def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
        aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
        return (tensor.dtype, aligned, *map(number, tensor.stride()))

    p = problem
    batch = next(n for n, (_, most) in enumerate(problems.BATCHES) if len(p.query_row) <= most)
    widths = number(p.keys.shape[1]), number(p.values.shape[1])
    return (batch, p.count is None, *widths, *map(layout, (p.query, p.keys, p.hidden, p.values)))


def test_all_codebooks_of_a_form_need_the_same_kernels_and_there_are_few_forms() -> None:
    forms: dict[int, set[Any]] = {}
    for number in range(250):
        problem = random_problem(number, large=False)
        if len(problem.query) and len(problem.keys) > 1:
            forms.setdefault(number % problems.FORMS, set()).add(compiled_for(problem))
    assert len(forms) == problems.FORMS
    assert {len(found) for found in forms.values()} == {1}
    every = set().union(*forms.values())
    assert {(form[0], form[2]) for form in every} == {
        (batch, width) for batch in range(6) for width in ("16", "other")
    }


def test_all_codebooks_of_a_form_with_a_sketch_need_the_same_kernels() -> None:
    forms: dict[int, set[Any]] = {}
    for number in range(72):
        case = problems.random_sketched(number)
        tile = next(n for n, (_, most) in enumerate(problems.BATCHES) if len(case.query) <= most)
        found = case.keys.dtype, tile, case.keys.shape[1] % 16 == 0
        forms.setdefault(number % problems.SKETCHED_FORMS, set()).add(found)
    assert {len(found) for found in forms.values()} == {1}
    assert len(set().union(*forms.values())) == problems.SKETCHED_FORMS


def test_copies_for_a_device_keep_strides_offset_and_every_bit() -> None:
    wide = torch.arange(60.0).view(6, 10)
    part = wide[1:5:2, 3:8]
    copy = problems.moved(part, CPU)
    assert (copy.stride(), copy.storage_offset()) == (part.stride(), part.storage_offset())
    assert torch.equal(copy, part)
    copy += 1
    assert wide[1, 3] == 13


@pytest.mark.too_long_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sketch_fitted_on_the_device_holds_and_spares_nearly_all_keys(
    dtype: torch.dtype, place: Place
) -> None:
    spared(place, dtype, *place.pick((50_000, 768), (3000, 96)))


def spared(place: Place, dtype: torch.dtype, n: int, dim: int) -> None:
    """Fit a sketch on the device; assert that its bounds hold and that hardly a key is read."""
    query, keys = clustered(n, dim, dtype)
    radii = torch.ones(n)
    right = grace_kernels.lookup(query, keys, radii, backend=place.truth)
    there = [t.to(place.device) for t in (query, keys, radii)]
    sketch = Sketch.fit(*there[1:])
    assert len(sketch.faults(*there[1:])) == 0
    for batch in (1, 16):
        sketch.counters.zero_()
        for start in range(0, 16, batch):
            part = slice(start, start + batch)
            how = {"sketch": sketch, "backend": place.backend}
            with problems.poisoned():
                got = grace_kernels.lookup(there[0][part], *there[1:], **how)
            for mine, want in zip(got, right, strict=True):
                assert testing.same_bits(mine.cpu(), want[part])
        counts = sketch.counts()
        if place.backend != "reference":  # which looks at no sketch
            assert (counts["queries"], counts["pairs"]) == (16, 16 * n)
        assert counts["scanned"] == 0
        assert counts["scored"] <= 0.01 * 16 * n


@pytest.mark.skipif(not COMPILED, reason="the reference does not look at sketches")
def test_a_lookup_that_reads_every_key_in_spite_of_a_sketch_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spared(ON_A_CPU, torch.float32, 2000, 40)
    lookup, fit = grace_kernels.lookup, Sketch.fit

    def scanning(*args: Any, sketch: Sketch | None = None, **how: Any) -> Any:
        if sketch is not None:
            sketch.counters[3] += 1
        return lookup(*args, sketch=sketch, **how)

    def misled(keys: torch.Tensor, radii: torch.Tensor) -> Sketch:
        sketch = fit(keys, radii)
        sketch.head[3, 2:] = 100
        return sketch

    for target, name, spoilt in (
        (grace_kernels, "lookup", scanning),
        (Sketch, "fit", misled),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, spoilt)
            with pytest.raises(AssertionError):
                spared(ON_A_CPU, torch.float32, 2000, 40)


def clustered(n: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries `[16, dim]`, every second one near a key, and keys `[n, dim]` in clusters."""
    generator = torch.Generator().manual_seed(n + dim)
    centres = 3 * torch.randn(n // 50 + 1, dim, generator=generator)
    at = torch.randint(len(centres), (n,), generator=generator)
    keys = centres[at] + torch.randn(n, dim, generator=generator)
    query = keys[torch.randint(n, (16,), generator=generator)]
    query = query + 0.01 * torch.randn(16, dim, generator=generator)
    query[::2] += torch.randn(8, dim, generator=generator)
    return query.to(dtype), keys.to(dtype)


def test_each_form_is_asked_for_by_one_of_three_names() -> None:
    def left(only: str | None) -> list[str]:
        return on_this(SimpleNamespace(getoption=lambda name: only), PLACES_ON[True])

    alone = left("warpgroups")
    assert alone == [name for name in left(None) if "warpgroups" in name] != []
    assert "cuda-gpu" in left("cuda")
    assert (
        sorted(left("cuda") + alone + left("triton"))
        == sorted(left(None))
        == sorted(PLACES_ON[True])
    )
