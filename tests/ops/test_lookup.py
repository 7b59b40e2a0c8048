"""nearest and lookup: the right answer to the bit, regime by regime, on every implementation."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import reference
from grace_kernels.testing import (
    Case,
    fusion_shows,
    oracle,
    oracle_squared_distance,
    order_shows,
    regimes,
    same_bits,
    swap_shows,
    ties_within_rounding,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    pytest.param(case, id=f"{str(dtype)[6:]}: {case.name}")
    for dtype in DTYPES
    for case in regimes(dtype)
]
_oracle_answers: dict[int, tuple] = {}


def answers_of_the_oracle(case: Case) -> tuple:
    """Both operations' answers, computed once for all implementations."""
    if id(case) not in _oracle_answers:
        _oracle_answers[id(case)] = tuple(
            oracle(case.query, case.keys, case.radii, case.count, bounded=bounded)
            for bounded in (False, True)
        )
    return _oracle_answers[id(case)]


@pytest.mark.parametrize("case", CASES)
def test_index_and_distance_equal_the_oracle_to_the_bit(case: Case, backend: str) -> None:
    counts = [case.count]
    if case.count is not None:
        counts.append(torch.tensor(case.count))
    operations = (grace_kernels.nearest, grace_kernels.lookup)
    for operation, expected in zip(operations, answers_of_the_oracle(case), strict=True):
        for count in counts:
            index, distance = operation(case.query, case.keys, case.radii, count, backend=backend)
            assert index.tolist() == expected[0].tolist()
            assert same_bits(distance, expected[1]), (distance, expected[1])


@pytest.mark.parametrize("dim", [1, 8, 100, 256, 700])
def test_the_reference_sums_in_the_order_of_the_oracle(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(3, dim, generator=generator) * 100
    keys = torch.randn(4, dim, generator=generator)
    expected = [
        [oracle_squared_distance(x, k) for k in keys.double().tolist()]
        for x in query.double().tolist()
    ]
    assert reference.squared_distances(query, keys).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inputs_tell_one_order_of_the_sum_from_another(dtype: torch.dtype) -> None:
    # Otherwise the comparisons above could not see a kernel that sums in an order of its own.
    def roots(sums: Tensor) -> list[float]:
        return sums.float().double().sqrt().float().tolist()

    for dim in (300, 700):
        query, key = order_shows(dtype, 24, dim)
        squares = query.double().square()
        canonical = oracle(query, key, torch.ones(1), None, bounded=False)[1].tolist()
        assert len(set(canonical)) > 1
        for other in (squares, squares.flip(1), squares[:, torch.arange(dim) * 7 % dim]):
            assert roots(other.cumsum(1)[:, -1]) != canonical
    query, key = fusion_shows(dtype)
    canonical = oracle(query, key, torch.ones(1), None, bounded=False)[1].tolist()
    for row, distance in zip(query.double(), canonical, strict=True):
        fused = Fraction(0)
        for difference in (row - key.double()[0]).tolist():
            fused = Fraction(float(fused + Fraction(difference) ** 2))
        assert roots(torch.tensor(float(fused), dtype=torch.float64)) != distance


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_neighbours_in_a_lane_change_places(dtype: torch.dtype, backend: str) -> None:
    for place in range(2, 15):
        query, keys = swap_shows(dtype, place, lane=place % 9)
        (index, distance), far = oracle(query, keys, torch.ones(2), None, bounded=False), 2.0**10
        assert (index.item(), distance.item()) == (1, far)
        queries = query.expand(1 + place % 6, 600)
        index, distance = grace_kernels.nearest(queries, keys, torch.ones(2), backend=backend)
        assert index.tolist() == [1] * len(queries)
        assert distance.tolist() == [far] * len(queries)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [1e-3, 1.0, 64.0, 200.0, 1e4])
def test_a_key_is_at_distance_zero_from_itself(
    dtype: torch.dtype, norm: float, backend: str
) -> None:
    keys = torch.randn(30, 768, generator=torch.Generator().manual_seed(1))
    keys = (keys * (norm / keys.norm(dim=1, keepdim=True))).to(dtype)
    index, distance = grace_kernels.lookup(keys, keys, torch.zeros(30), backend=backend)
    assert index.tolist() == list(range(30))
    assert distance.tolist() == [0.0] * 30


def test_a_hit_includes_a_distance_equal_to_the_radius(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys = torch.randn(1, 50, generator=generator), torch.randn(1, 50, generator=generator)
    _, distance = grace_kernels.nearest(query, keys, torch.zeros(1), backend=backend)
    below = torch.nextafter(distance, torch.zeros(1))
    assert grace_kernels.lookup(query, keys, distance, backend=backend)[0].item() == 0
    assert grace_kernels.lookup(query, keys, below, backend=backend)[0].item() == -1


def test_the_nearest_entry_decides_even_if_a_farther_ball_covers_the_query(backend: str) -> None:
    keys = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    radii = torch.tensor([10.0, 0.5])
    index, distance = grace_kernels.lookup(torch.tensor([[2.0, 0.0]]), keys, radii, backend=backend)
    assert index.item() == -1
    assert distance.item() == math.inf


def test_the_reference_holds_few_pairs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(8)
    query, keys = torch.randn(23, 40, generator=generator), torch.randn(11, 40, generator=generator)
    radii, count = torch.full((11,), 8.0), torch.tensor(9)
    expected = reference.lookup(query, keys, radii, count)
    pairs = []
    whole = reference.squared_distances

    def watched(query: Tensor, keys: Tensor) -> Tensor:
        pairs.append(query.shape[0] * keys.shape[0])
        return whole(query, keys)

    monkeypatch.setattr(reference, "squared_distances", watched)
    for budget, most in ((1, 1), (5 * (40 + 256), 5), (40 * (40 + 256), 40)):
        monkeypatch.setattr(reference, "_BUDGET", budget)
        index, distance = reference.lookup(query, keys, radii, count)
        assert max(pairs) <= most
        assert sum(pairs) == 23 * 11
        assert torch.equal(index, expected[0])
        assert same_bits(distance, expected[1])
        pairs.clear()


def test_rows_may_have_any_stride(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(5, 33, generator=generator)
    keys = torch.randn(40, 33, generator=generator)
    radii = torch.full((40,), 7.0)
    expected = grace_kernels.lookup(query, keys, radii, backend=backend)
    apart = torch.full((40, 90), math.nan)
    apart[:, 20:53] = keys
    middle = grace_kernels.nearest(query, keys[3:4], radii[:1])[1].median().item()
    views = {
        "rows apart": (query, apart[:, 20:53], radii),
        "columns first": (query.T.contiguous().T, keys.T.contiguous().T, radii),
        "every other radius": (query, keys, radii.repeat_interleave(2)[::2]),
        "one key for all": (query, keys[3:4].expand(40, 33), torch.full((40,), middle)),
        "reversed queries": (query.flip(0).contiguous().flip(0), keys, radii),
    }
    for name, arguments in views.items():
        index, distance = grace_kernels.lookup(*arguments, backend=backend)
        wanted = expected
        if name == "one key for all":
            same = keys[3].repeat(40, 1), arguments[2]
            wanted = grace_kernels.lookup(query, *same, backend="reference")
            assert set(wanted[0].tolist()) == {0, -1}
        assert torch.equal(index, wanted[0]), name
        assert same_bits(distance, wanted[1]), name


def test_row_offsets_beyond_two_to_the_31_elements_are_right(backend: str, tmp_path: Path) -> None:
    step = 2**30 + 8
    # A file of holes but for three rows: 4 GiB of memory are not granted everywhere.
    memory = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=2 * step + 64, dtype=torch.bfloat16
    )
    keys = memory.as_strided((3, 64), (step, 1))
    for n in range(3):
        keys[n] = float(n)
    query = torch.full((1, 64), 2.0, dtype=torch.bfloat16)
    index, distance = grace_kernels.nearest(query, keys, torch.ones(3), backend=backend)
    assert (index.item(), distance.item()) == (2, 0.0)


@pytest.mark.parametrize("dim", [40, 768, 2500])
@pytest.mark.parametrize(
    ("dtype", "norm"),
    [
        *((torch.float32, norm) for norm in (1e-3, 1.0, 1e2, 1e4)),
        (torch.float16, 1.0),
        (torch.bfloat16, 1.0),
    ],
)
def test_the_coarse_pass_never_loses_the_winner(
    dtype: torch.dtype, dim: int, norm: float, isa: str
) -> None:
    # The keys tie, or nearly, so a coarse pass that trusted its own order would take another. That
    # a plain fp32 sum does is asserted, lest this test prove nothing.
    scale = norm / math.sqrt(dim)
    misled = 0
    for seed in range(8):
        # Far from zero an expanded |x|^2 - 2 x k + |k|^2 would cancel; near it all forms agree.
        far = 1000 if dtype == torch.float32 else 4
        offset = far * scale if seed % 2 else 0.0
        query, keys = ties_within_rounding(dtype, 60, dim, scale, seed, offset)
        radii = torch.full((60,), math.inf)
        squares = (query.float() - keys.float()).square()
        fp32 = reduce(torch.add, squares.unbind(1))  # one by one: torch.sum has orders of its own
        for operation in (grace_kernels.nearest, grace_kernels.lookup):
            index, distance = operation(query, keys, radii, backend="cpu")
            expected = operation(query, keys, radii, backend="reference")
            assert index.item() == expected[0].item()
            assert same_bits(distance, expected[1])
            misled += int(fp32.argmin().item() != index.item())
    if dtype == torch.float32:
        assert misled > 0


def agree(query: Tensor, keys: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Assert that the kernels answer as the reference does; return its answer to `nearest`."""
    for operation in (grace_kernels.lookup, grace_kernels.nearest):
        index, distance = operation(query, keys, radii, backend="cpu")
        expected = operation(query, keys, radii, backend="reference")
        assert torch.equal(index, expected[0])
        assert same_bits(distance, expected[1])
    return expected


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dim", [50, 768, 3000])
def test_the_margin_around_a_rescored_key_keeps_what_may_still_win(
    dim: int, batch: int, isa: str
) -> None:
    # Twice as many near ties as the list of candidates holds, so that it is re-scored half way.
    radii = torch.full((60,), math.inf)
    for seed in range(40):
        query, keys, (index, distance) = near_ties(dim, seed)
        for operation in (grace_kernels.nearest, grace_kernels.lookup):
            got = operation(query.expand(batch, dim), keys, radii, backend="cpu")
            assert torch.equal(got[0], index.expand(batch))
            assert same_bits(got[1], distance.expand(batch))


@cache
def near_ties(dim: int, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return a query, 60 keys and the reference's answer, made once for all kernels."""
    query, keys = ties_within_rounding(torch.float32, 60, dim, 1.0, seed)
    return query, keys, reference.nearest(query, keys, torch.full((60,), math.inf))


@pytest.mark.parametrize("dim", [50, 768, 3000])
def test_a_largest_radius_equal_to_the_distance_of_the_winner_keeps_it(dim: int, isa: str) -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(5, dim, generator=generator)
        keys = torch.randn(9, dim, generator=generator)
        index, distance = grace_kernels.nearest(query, keys, torch.ones(9), backend="reference")
        for b in range(5):
            radii = torch.zeros(9)
            radii[index[b]] = distance[b]
            slot, reach = grace_kernels.lookup(query[b : b + 1], keys, radii, backend="cpu")
            assert slot.item() == index[b].item()
            assert same_bits(reach, distance[b : b + 1])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dim", [900, 1500])
def test_a_key_far_at_first_and_near_in_the_end_is_not_given_up(
    dim: int, batch: int, isa: str
) -> None:
    # One half adds to its sum all along, the other has all of it in the first elements, and less.
    keys = torch.zeros(40, dim)
    keys[:20, :64], keys[:20, 64:] = 1.0, 0.02
    keys[20:, :64] = 0.98 + 1e-4 * torch.arange(20)[:, None]
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        query, radii = torch.zeros(batch, dim), torch.full((40,), math.inf)
        index, _ = agree(query, keys[order], radii)
        assert order[index].tolist() == [20] * batch


@pytest.mark.parametrize(("batch", "vectors"), [(1, 4), (2, 2), (3, 1), (4, 1)])
@pytest.mark.parametrize("dim", [768, 4096, 20000])
def test_the_margin_covers_what_a_lane_of_fp32_loses(
    dim: int, batch: int, vectors: int, isa: str
) -> None:
    # Key 0 sums to 1 in each lane and then to many squares of 0.49 units in the last place, which
    # fp32 drops one by one; key 2 is nearer than key 0, but farther than what is left of that.
    lost = (dim / 8 - 4) * 0.245 / vectors
    key = torch.zeros(dim)
    key[:8], key[32:] = 1.0, math.sqrt(0.49 * 2.0**-24)
    other = torch.zeros(dim)
    other[:8] = 1 + max(2, 2 * round(lost / 4)) * 2.0**-24
    keys = torch.stack([key, key, other, key])
    index, _ = oracle(torch.zeros(1, dim), keys, torch.ones(4), None, bounded=False)
    assert index.item() == 2
    index, _ = agree(torch.zeros(batch, dim), keys, torch.full((4,), 9.0))
    assert index.tolist() == [2] * batch


@pytest.mark.parametrize("dim", [8, 40, 300])
def test_squares_that_fp32_cannot_hold_are_still_compared(dim: int, isa: str) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(30, dim, generator=generator) * 2.0**-73
        for batch in (1, 2, 3, 4):
            agree(torch.zeros(batch, dim), keys, torch.full((30,), math.inf))


def test_many_candidates_are_pruned_without_losing_the_winner(isa: str) -> None:
    # Ever nearer keys: each is a candidate when it is met and fills the list.
    key = torch.zeros(1, 300)
    keys = key + torch.linspace(2.0, 1.0, 500)[:, None]
    keys = torch.cat([keys, keys.flip(0)])
    for batch in (1, 2, 3, 4, 6):
        index, distance = grace_kernels.nearest(
            key.expand(batch, 300), keys, torch.ones(1000), backend="cpu"
        )
        assert index.tolist() == [499] * batch
        assert distance.tolist() == [math.sqrt(300.0)] * batch or same_bits(
            distance, torch.full((batch,), 300.0).double().sqrt().float()
        )


@pytest.mark.parametrize("front", [8, 64, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_is_not_given_up_while_it_can_still_win(
    dtype: torch.dtype, front: int, isa: str
) -> None:
    # Key 1 differs from the query at the end of the row only and sets the mark; the others differ
    # in the first elements only, nearly as much, each a little less than the one before, so that
    # soon all there is to know of them is known. Key 0 is for other queries in the batch, which
    # must not lend their own, smaller mark.
    for dim in (front + 100, 5000):
        keys = torch.zeros(26, dim)
        keys[0] = 100.0
        keys[1, -8:] = 8.0
        keys[2:, :7] = 8.0
        keys[2:, front - 1] = 7.0 - torch.arange(24) / 8
        keys, radii = keys.to(dtype), torch.full((26,), 40.0)
        here = torch.zeros(1, dim, dtype=dtype)
        expected = grace_kernels.nearest(here, keys, radii, backend="reference")
        assert expected[0].item() == 25
        for elsewhere, batch in ((0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (4, 8), (8, 9)):
            query = torch.cat(
                [keys[:1].expand(elsewhere, dim), here.expand(batch - elsewhere, dim)]
            )
            for operation in (grace_kernels.nearest, grace_kernels.lookup):
                index, distance = operation(query, keys, radii, backend="cpu")
                assert index.tolist() == [0] * elsewhere + [25] * (batch - elsewhere)
                assert distance[:elsewhere].tolist() == [0.0] * elsewhere
                assert same_bits(distance[elsewhere:], expected[1].expand(batch - elsewhere))
