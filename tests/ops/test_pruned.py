"""A sketch changes the speed of a lookup, never its answer: on a CPU, by instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.testing import Case, random_codebook, regimes, same_bits

from .conftest import COMPILED, ISAS, using_isa

pytestmark = pytest.mark.skipif(not COMPILED, reason="not compiled")

CODEBOOKS = 10_000
SHARE = 500  # of them in one test
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], of: object) -> None:
    assert got[0].tolist() == expected[0].tolist(), of
    assert same_bits(got[1], expected[1]), of


def clustered(n: int, dim: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys in clusters some 14 apart and less than 2 wide, and queries 0.1 or so from some keys."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(200, dim, generator=generator) * 10 / dim**0.5
    keys = centres[torch.randint(200, (n,), generator=generator)]
    keys = keys + torch.randn(n, dim, generator=generator) / dim**0.5
    near = torch.randint(n, (batch,), generator=generator)
    query = keys[near] + 0.1 * torch.randn(batch, dim, generator=generator) / dim**0.5
    return keys.to(dtype), query.to(dtype)


@pytest.mark.parametrize("first", range(0, CODEBOOKS, SHARE))
def test_random_codebooks_are_answered_as_without_a_sketch(first: int, threads: None) -> None:
    torch.set_num_threads(1)  # so small that a second thread would be waited for
    answered = 0
    for seed in range(first, first + SHARE):
        case = random_codebook(seed)
        sketch = case.sketch()
        for isa in ISAS:
            with using_isa(isa):
                expected = grace_kernels.lookup(case.query, case.keys, case.radii, case.count)
                got = grace_kernels.lookup(
                    case.query, case.keys, case.radii, case.count, sketch=sketch, backend="cpu"
                )
            assert_same(got, expected, case.name)
        answered += int((expected[0] >= 0).sum())
    assert answered > SHARE  # hits, not misses alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_inputs_by_regime_are_answered_as_by_the_reference(
    dtype: torch.dtype, isa: str
) -> None:
    for case in regimes(dtype):
        if case.keys.shape[1] == 0:
            continue
        expected = grace_kernels.lookup(
            case.query, case.keys, case.radii, case.count, backend="reference"
        )
        for rows in {0, len(case.keys) // 2, len(case.keys)}:
            sketch = Sketch.fit(case.keys, case.radii, rows)
            sketch.update_radii_(case.radii, 0, len(case.radii))
            got = grace_kernels.lookup(
                case.query, case.keys, case.radii, case.count, sketch=sketch, backend="cpu"
            )
            assert_same(got, expected, case.name)


def larger(dtype: torch.dtype) -> Iterator[Case]:
    """Codebooks of several chunks, some of which the sketch resolves and some not."""
    n, dim = 5000, 72
    keys, query = clustered(n, dim, dtype, 7)
    few = torch.full((n,), 0.5)
    yield Case("small radii", query, keys, few)
    yield Case("everything is within reach", query, keys, torch.full((n,), 1e3))
    yield Case("infinite radii", query, keys, torch.full((n,), math.inf))
    yield Case("radii about as large as clusters", query, keys, torch.full((n,), 2.0))
    for row in (0, 1023, 1024, 4999):
        outlier = few.clone()
        outlier[row] = 1e3
        yield Case(f"an outlier at {row}", query, keys, outlier)
    crowded = few.clone()
    crowded[1024:2048] = 1e3
    yield Case("a chunk of large radii", query, keys, crowded)
    blocked = few.clone()
    blocked[1024:] = -1.0
    yield Case("many that block", query, keys, blocked)
    dead = few.clone()
    dead[: 3 * 1024 + 500] = -math.inf
    yield Case("most are dead", query, keys, dead)
    twins = keys.clone()
    twins[2500:] = keys[:2500]
    yield Case("twins in two chunks", query, twins, few)
    back = torch.cat([keys[2500:], keys[2500:]])
    yield Case("twins the other way round", query, back, few, 4600)
    strange = torch.cat([query, query[:1] * math.inf, query[:1] * math.nan, query[:1] * 1000])
    yield Case("queries that cannot be sketched", strange, keys, few)
    yield Case("the same and infinite radii", strange, keys, torch.full((n,), math.inf))
    many = torch.cat([query + 0.001 * i for i in range(30)])
    yield Case("more queries than are taken at once", many, keys, crowded)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks_of_several_chunks_are_answered_as_without_a_sketch(
    dtype: torch.dtype, workers: int, isa: str, threads: None
) -> None:
    torch.set_num_threads(workers)
    for case in larger(dtype):
        expected = grace_kernels.lookup(case.query, case.keys, case.radii, case.count)
        for rows in (5000, 1500):
            sketch = Sketch.fit(case.keys, case.radii, rows)
            got = grace_kernels.lookup(
                case.query, case.keys, case.radii, case.count, sketch=sketch, backend="cpu"
            )
            assert_same(got, expected, (case.name, rows))
            if workers == 2:  # what is sketched makes no difference to who waits for whom
                break


@pytest.mark.parametrize("more", [2, 8, 128], ids="{} queries beyond a pass".format)
def test_a_pass_that_reads_in_its_second_part_alone_reads_with_its_own_queries(
    more: int, isa: str
) -> None:
    # The queries of the first pass lie in a crowd, whose rows are read at once; those of the second
    # are within one large radius, so that what is nearer than that row has to be read.
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2048, 256, generator=generator)
    keys[1024:] *= 0.001
    radii = torch.full((2048,), 0.1)
    radii[500] = 100.0
    crowd = 0.001 * torch.randn(128, 256, generator=generator)
    query = torch.cat([crowd, 0.4 * keys[500] + 0.9 * torch.randn(more, 256, generator=generator)])
    sketch = Sketch.fit(keys, radii)
    got = grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    expected = grace_kernels.lookup(query, keys, radii, backend="reference")
    assert (expected[0][128:] >= 0).any() or more == 2
    assert_same(got, expected, more)


def test_few_keys_are_read_where_radii_are_small(isa: str) -> None:
    keys, query = clustered(20_000, 300, torch.bfloat16, 8)
    radii = torch.full((20_000,), 0.3)
    sketch = Sketch.fit(keys, radii)
    index, _ = grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert (index >= 0).all()
    assert sketch.counts() == {
        "queries": 8,
        "pairs": 160_000,
        "scored": sketch.counts()["scored"],
        "scanned": 0,
    }
    assert sketch.counts()["scored"] < 200


def test_an_outlier_that_no_query_is_within_costs_nothing(isa: str) -> None:
    keys, query = clustered(20_000, 300, torch.bfloat16, 8)
    radii = torch.full((20_000,), 0.3)
    keys[7] = 1000.0
    radii[7] = 500.0
    sketch = Sketch.fit(keys, radii)
    grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert sketch.counts()["scanned"] == 0
    assert sketch.counts()["scored"] < 400


def test_what_the_sketch_cannot_resolve_is_read_once(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(20_000, 300, generator=generator)
    radii = torch.full((20_000,), 1e4)
    sketch = Sketch.fit(keys, radii)
    query = torch.randn(1, 300, generator=generator)
    index, _ = grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert (index >= 0).all()
    assert 10_000 < sketch.counts()["scanned"] <= 20_000


@pytest.mark.parametrize("value", [math.inf, 3e38])
def test_a_query_that_cannot_be_sketched_is_answered_without_the_sketch_and_alone(
    value: float, isa: str
) -> None:
    keys, query = clustered(3000, 100, torch.float32, 4)
    query[1, 7] = value
    radii = torch.full((3000,), 0.3)
    sketch = Sketch.fit(keys, radii)
    expected = grace_kernels.lookup(query, keys, radii, backend="reference")
    got = grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert_same(got, expected, value)
    assert sketch.counts()["scanned"] == 3000  # for one query of four


def test_rows_that_are_not_covered_are_read(isa: str) -> None:
    keys, query = clustered(3000, 100, torch.float32, 2)
    radii = torch.full((3000,), 0.3)
    sketch = Sketch.fit(keys, radii, 1000)
    grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert sketch.counts()["pairs"] == 2000
    assert sketch.counts()["scanned"] == 4000
    sketch.active = False
    grace_kernels.lookup(query, keys, radii, sketch=sketch, backend="cpu")
    assert sketch.counts()["pairs"] == 2000


def test_radii_that_the_sketch_was_not_told_of_count_all_the_same(isa: str) -> None:
    keys, query = clustered(5000, 100, torch.float32, 5)
    radii = torch.full((5000,), 1e-6)
    sketch = Sketch.fit(keys, radii)
    radii[:] = 0.5
    expected = grace_kernels.lookup(query, keys, radii)
    assert (expected[0] >= 0).all()
    assert_same(grace_kernels.lookup(query, keys, radii, sketch=sketch), expected, "")


@pytest.mark.parametrize("rows", [0, 5, 40, 64])
def test_an_infinite_radius_reaches_an_infinite_distance_read_or_not(rows: int, isa: str) -> None:
    keys = torch.full((64, 100), 3e38)
    radii = torch.full((64,), -math.inf)
    radii[40:] = math.inf
    sketch = Sketch.fit(keys, radii, rows)
    sketch.update_radii_(radii, 0, 64)
    index, distance = grace_kernels.lookup(torch.zeros(2, 100), keys, radii, sketch=sketch)
    assert index.tolist() == [40, 40]
    assert distance.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("functional", [False, True])
def test_adapt_writes_what_it_writes_without_a_sketch(functional: bool, isa: str) -> None:
    keys, query = clustered(3000, 100, torch.float32, 6)
    query[1] = 100.0
    radii = torch.full((3000,), 0.3)
    values = torch.randn(3000, 7, generator=torch.Generator().manual_seed(0))
    sketch = Sketch.fit(keys, radii)
    rows = torch.tensor([3, 1, -1, 5]), torch.tensor([0, 2, 0, 7]), torch.tensor([2, 4, 9, 9])
    results = []
    for given in (None, sketch):
        hidden = torch.zeros(9, 7)
        if functional:
            hidden, index, distance = grace_kernels.adapt(
                hidden, query, *rows, keys, radii, values, sketch=given, backend="cpu"
            )
        else:
            index, distance = grace_kernels.adapt_(
                hidden, query, *rows, keys, radii, values, sketch=given, backend="cpu"
            )
        results.append((index, distance, hidden))
    assert (results[0][0] >= 0).tolist() == [True, False, False, True]
    assert_same(results[1], results[0], "")
    assert same_bits(results[1][2], results[0][2])
    assert sketch.counts()["queries"] == 3


def test_gradients_are_those_without_a_sketch() -> None:
    keys, query = clustered(3000, 100, torch.float32, 4)
    radii = torch.full((3000,), 0.3)
    sketch = Sketch.fit(keys, radii)
    gradients = []
    for given in (None, sketch):
        hidden = torch.zeros(4, 7, requires_grad=True)
        values = torch.ones(3000, 7, requires_grad=True)
        rows = torch.arange(4)
        out, _, _ = grace_kernels.adapt(
            hidden, query, rows, rows, rows + 1, keys, radii, values, sketch=given
        )
        (out * torch.arange(28.0).view(4, 7)).sum().backward()
        gradients.append((hidden.grad, values.grad))
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)
    assert gradients[0][1].any()


def test_operators_pass_opcheck() -> None:
    keys, query = clustered(3000, 100, torch.float32, 4)
    radii, values = torch.full((3000,), 0.3), torch.ones(3000, 7)
    sketch, count = Sketch.fit(keys, radii), torch.tensor(2000)
    rows = torch.arange(4)
    lookup = (query, keys, radii, count, *sketch.tensors())
    torch.library.opcheck(torch.ops.grace.pruned_lookup.default, lookup)
    adapt = (torch.zeros(4, 7), query, rows, rows, rows + 1, keys, radii, values, None)
    torch.library.opcheck(torch.ops.grace.pruned_adapt_.default, (*adapt, *sketch.tensors()))


def test_a_compiled_lookup_sees_what_the_sketch_is_told() -> None:
    keys, query = clustered(3000, 100, torch.float32, 4)
    radii = torch.full((3000,), 0.3)
    radii[2000:] = -math.inf
    sketch, count = Sketch.fit(keys, radii, 2000), torch.tensor(2000)

    def ask(query: Tensor) -> tuple[Tensor, Tensor]:
        return grace_kernels.lookup(query, keys, radii, count, sketch=sketch)

    with torch.compiler.set_stance("default"):
        compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
        assert_same(compiled(query), ask(query), "as fitted")
        radii[2000:] = 0.3
        count.fill_(3000)
        sketch.extend(keys, 2000, 3000)
        sketch.update_radii_(radii, 2000, 3000)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(compiled(query), grace_kernels.lookup(query, keys, radii), "extended")
            sketch.active = False
            assert_same(compiled(query), grace_kernels.lookup(query, keys, radii), "off")
    before = sketch.counts()["queries"]
    sketch.active = True
    compiled(query)
    assert sketch.counts()["queries"] == before + 4


def test_tensors_that_are_no_sketch_of_the_keys_are_refused() -> None:
    keys, query = clustered(300, 100, torch.float32, 4)
    radii = torch.full((300,), 0.3)
    tensors = list(Sketch.fit(keys, radii).tensors())
    for at, wrong in ((0, tensors[0][1:]), (3, tensors[3][:5]), (8, tensors[8][:3])):
        given = [*tensors[:at], wrong, *tensors[at + 1 :]]
        with pytest.raises(RuntimeError, match="the tensors must be those of a sketch"):
            torch.ops.grace.pruned_lookup(query, keys, radii, None, *given)
