"""The same query bits and entries give the same bits, whatever else is in the call."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits

from .conftest import COMPILED
from .test_compile import in_a_fresh_process


def codebook(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, radii and queries of which some are near keys, with ties among the keys."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, dim, generator=generator)
    keys[n // 2 :: 5] = keys[: len(keys[n // 2 :: 5])]
    query = keys[::7] + 0.3 * torch.randn(len(keys[::7]), dim, generator=generator)
    radii = torch.full((n,), 0.31 * math.sqrt(dim))
    return query, keys, radii


def test_batch_size_and_position_do_not_matter(backend: str) -> None:
    query, keys, radii = codebook(60, 200)
    alone = [grace_kernels.lookup(x[None], keys, radii, backend=backend) for x in query]
    assert {i.item() >= 0 for i, _ in alone} == {True, False}
    for batch in (1, 2, 3, 4, 5, 8, 9):
        for shift in range(batch):
            who = [(shift + b) % len(query) for b in range(batch)]
            index, distance = grace_kernels.lookup(query[who], keys, radii, backend=backend)
            assert index.tolist() == [alone[w][0].item() for w in who]
            assert same_bits(distance, torch.cat([alone[w][1] for w in who]))


def test_more_queries_than_fit_one_pass_are_answered_alike(isa: str) -> None:
    query, keys, radii = codebook(60, 40)
    many = query.repeat(40, 1)
    assert len(many) > 256
    index, distance = grace_kernels.nearest(many, keys, radii, backend="cpu")
    expected = grace_kernels.nearest(query, keys, radii, backend="cpu")
    assert torch.equal(index, expected[0].repeat(40))
    assert same_bits(distance, expected[1].repeat(40))


def test_capacity_does_not_matter(backend: str) -> None:
    query, keys, radii = codebook(50, 70)
    expected = grace_kernels.lookup(query, keys, radii, backend=backend)
    for extra in (1, 7, 100):
        wide = torch.cat([keys, torch.full((extra, 70), math.nan)])
        more = torch.cat([radii, torch.full((extra,), math.inf)])
        for count in (50, torch.tensor(50)):
            index, distance = grace_kernels.lookup(query, wide, more, count, backend=backend)
            assert torch.equal(index, expected[0])
            assert same_bits(distance, expected[1])


def test_the_number_of_threads_does_not_matter(isa: str, threads: None) -> None:
    # 3 MB of keys: several chunks for several threads; ties lie in different chunks.
    query, keys, radii = codebook(3000, 256)
    query = query[:9]
    answers = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        answers += [grace_kernels.nearest(query, keys, radii, backend="cpu") for _ in range(5)]
    expected = grace_kernels.nearest(query, keys, radii, backend="reference")
    for index, distance in answers:
        assert torch.equal(index, expected[0])
        assert same_bits(distance, expected[1])


def test_the_lowest_of_equal_slots_wins_across_threads(isa: str, threads: None) -> None:
    keys = torch.ones(4000, 300)
    keys[:1234] = 2.0
    torch.set_num_threads(4)
    for _ in range(20):
        index, _ = grace_kernels.nearest(
            torch.zeros(3, 300), keys, torch.zeros(4000), backend="cpu"
        )
        assert index.tolist() == [1234] * 3


def test_a_permutation_of_the_keys_maps_the_index(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    query, keys, radii = codebook(64, 90)
    order = torch.randperm(64, generator=generator)
    before = grace_kernels.nearest(query, keys, radii, backend=backend)
    after = grace_kernels.nearest(query, keys[order], radii[order], backend=backend)
    assert same_bits(before[1], after[1])
    for b, slot in enumerate(before[0].tolist()):
        ties = (keys[order] == keys[slot]).all(dim=1).nonzero()
        assert after[0][b].item() == ties.min().item()


def test_calls_from_several_python_threads_do_not_disturb_each_other(isa: str) -> None:
    problems = [codebook(n, dim, seed) for seed, (n, dim) in enumerate([(1200, 256), (70, 33)] * 2)]
    expected = [grace_kernels.lookup(*p, backend="reference") for p in problems]

    def ask(worker: int) -> bool:
        right = True
        for _ in range(6 if len(problems[worker][1]) > 100 else 60):
            index, distance = grace_kernels.lookup(*problems[worker], backend="cpu")
            right &= torch.equal(index, expected[worker][0])
            right &= same_bits(distance, expected[worker][1])
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_flushing_subnormals_changes_no_answer_and_stays_set(isa: str) -> None:
    query = torch.tensor([[3e-40, 0.0], [1e-42, 0.0], [2e-20, 0.0]])
    keys = torch.tensor([[1e-40, 0.0], [1e-22, 0.0]])
    expected = grace_kernels.nearest(query, keys, torch.ones(2), backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine does not flush subnormals")
    try:
        index, distance = grace_kernels.nearest(query, keys, torch.ones(2), backend="cpu")
        assert torch.tensor([1e-42]).mul(1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(index, expected[0])
    assert same_bits(distance, expected[1])


@pytest.mark.skipif(not COMPILED, reason="not compiled")
def test_worker_threads_that_flush_subnormals_change_no_answer() -> None:
    # Threads inherit the setting where they start, so it has to come before any parallel work. The
    # baseline widens fp16 subnormals by way of fp32 ones.
    printed = in_a_fresh_process(
        """
        import torch, grace_kernels
        torch.set_num_threads(4)
        flushes = torch.set_flush_denormal(True)
        keys = torch.ones(4000, 512, dtype=torch.int16).view(torch.float16)
        index, distance = grace_kernels.nearest(
            torch.zeros(1, 512, dtype=torch.float16), keys, torch.ones(4000), backend="cpu"
        )
        print(flushes, index.item(), distance.item())
        """,
        GRACE_KERNELS_ISA="baseline",
        OMP_NUM_THREADS="4",
    )
    assert printed.split()[1:] == ["0", "1.3486991292666062e-06"]  # 2^-24 sqrt(512), rounded


@st.composite
def lookups(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw a lookup whose elements come from few values, so that ties and extremes abound."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    n, batch = draw(st.integers(0, 40)), draw(st.integers(0, 9))
    dim = draw(st.sampled_from([1, 3, 8, 17, 70, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    finfo = torch.finfo(dtype)
    specials = [0.0, 1.0, 1.0 + finfo.eps, -1.0, finfo.tiny, finfo.tiny * finfo.eps, finfo.max]
    palette = draw(
        st.lists(
            st.sampled_from([*specials, math.inf, math.nan]) | st.floats(-1e4, 1e4),
            min_size=1,
            max_size=4,
        )
    )
    # Mostly ordinary values: rows that are all special answer all alike.
    common = torch.randn(3, generator=generator).tolist()
    values = torch.tensor(common * draw(st.sampled_from([1, 30])) + palette)

    def rows(count: int) -> Tensor:
        pick = torch.randint(len(values), (count, dim), generator=generator)
        return values[pick].to(dtype)

    radius = torch.tensor([0.0, 1.0, 30.0, -1.0, math.inf, -math.inf, math.nan])
    radii = radius[torch.randint(len(radius), (n,), generator=generator)]
    keys, query = rows(n), rows(batch)
    if n and batch and draw(st.booleans()):
        query[0] = keys[-1]
    count = draw(st.none() | st.integers(0, n))
    return query, keys, radii, None if count is None else torch.tensor(count)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arguments=lookups())
def test_kernels_and_reference_agree_on_whatever_is_drawn(isa: str, arguments: tuple) -> None:
    for operation in (grace_kernels.nearest, grace_kernels.lookup):
        index, distance = operation(*arguments, backend="cpu")
        expected = operation(*arguments, backend="reference")
        assert torch.equal(index, expected[0])
        assert same_bits(distance, expected[1])
