"""What only the Triton kernels have: forms, tiles, slices, tickets and clamped indices.

That they answer as the oracle does is tested with all other implementations in test_lookup.py and
test_adapt.py. Here triton interprets them on a CPU: the program is the one that GPUs run, its
scheduling and its arithmetic on tensor cores are not.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits, ties_within_rounding

from . import interpreter
from .problems import Place
from .test_adapt import expected_hidden, problem, rows

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCHES = [1, 2, 4, 9, 20, 40, 70]  # one or more for each row of the table for few keys


@pytest.fixture
def triton() -> Iterator[ModuleType]:
    """The launcher, its kernels interpreted."""
    with interpreter.interpreting() as launcher:
        yield launcher


def agree(query: Tensor, keys: Tensor, radii: Tensor, count: int | None = None) -> Tensor:
    """Assert that the kernels answer as the reference does; return the slots that answer."""
    rows_in_use = None if count is None else torch.tensor(count)
    for operation in (grace_kernels.nearest, grace_kernels.lookup):
        index, distance = operation(query, keys, radii, rows_in_use, backend="triton")
        expected = operation(query, keys, radii, rows_in_use, backend="reference")
        assert torch.equal(index, expected[0])
        assert same_bits(distance, expected[1])
    return index


def codebook(
    dtype: torch.dtype, batch: int, entries: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of which half are near a key, keys of which some are equal or dead, radii."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(entries, dim, generator=generator)
    keys[entries // 2 :: 7] = keys[: len(keys[entries // 2 :: 7])]
    query = torch.randn(batch, dim, generator=generator)
    near = torch.randint(0, entries, (batch,), generator=generator)[::2]
    query[::2] = keys[near] + 0.01 * query[::2]
    radii = torch.rand(entries, generator=generator) * 0.02 * math.sqrt(dim)
    radii[::11] = -math.inf
    return query.to(dtype), keys.to(dtype), radii


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        *((torch.float32, batch) for batch in BATCHES),
        *((torch.bfloat16, batch) for batch in BATCHES),
        *((torch.float16, batch) for batch in (2, 20)),
    ],
)
def test_every_tile_answers_over_several_tiles_slices_and_blocks(
    triton: ModuleType, dtype: torch.dtype, batch: int
) -> None:
    query, keys, radii = codebook(dtype, batch, 280, 257)
    index = agree(query, keys, radii)
    assert batch < 9 or {-1} < set(index.tolist())


@pytest.mark.parametrize(
    ("batch", "dim"), [(1, 1800), (1, 48), (9, 48), (20, 48), (40, 48), (200, 48)]
)
def test_many_keys_have_tiles_of_their_own(place: Place, batch: int, dim: int) -> None:
    if place.backend != "triton":
        pytest.skip("the others have no tiles")
    query, keys, radii = codebook(torch.bfloat16, batch, 3300, dim)
    query, keys, radii, count = (
        t.to(place.device) for t in (query, keys, radii, torch.tensor(3201))
    )
    index, distance = grace_kernels.lookup(query, keys, radii, count, backend="triton")
    on_a_cpu = (t.cpu() for t in (query, keys, radii, count))
    expected = grace_kernels.lookup(*on_a_cpu, backend=place.truth)
    assert torch.equal(index.cpu(), expected[0])
    assert same_bits(distance.cpu(), expected[1])
    assert batch < 9 or {-1} < set(index.tolist())


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_neither_the_table_nor_the_number_of_slices_matters(
    triton: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    multiprocessors: int,
) -> None:
    monkeypatch.setattr(triton, "machine", lambda device: (capability, multiprocessors))
    for batch in (1, 9, 40):
        query, keys, radii = codebook(torch.bfloat16, batch, 200, 70)
        agree(query, keys, radii)
        agree(query, keys, radii, count=67)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "centre"), [(1, 0.0), (1, 4.0), (3, 4.0), (5, 4.0)])
def test_nearly_tied_keys_are_told_apart(
    triton: ModuleType, dtype: torch.dtype, batch: int, centre: float
) -> None:
    query, keys = ties_within_rounding(dtype, 40, 300, 1.0, 1, centre)
    agree(query.expand(batch, 300), keys, torch.full((40,), math.inf))


def test_a_crowded_group_is_scored_in_all_its_rows(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 1)  # two tiles of 64, four rows to a group
    for seed in range(2):
        query, keys = ties_within_rounding(torch.float32, 100, 60, 1.0, seed, 4.0)
        radii = torch.full((100,), math.inf)
        for turn in (0, 50):
            agree(query.expand(5, 60), keys.roll(turn, 0), radii)


def test_a_count_beyond_the_capacity_reaches_nothing_behind_it(triton: ModuleType) -> None:
    memory = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    radii, values = torch.full((200,), 0.5), torch.ones(200, 7)
    p = {**problem(), "keys": memory[:12], "radii": radii[:12], "values": values[:12]}
    memory[12:] = p["source"][4]  # what asks first would hit any of these
    p["source"][4:8] = memory[12]
    for count in (12, 13, 99, 2**40):
        index, _ = grace_kernels.adapt_(**p, count=torch.tensor(count), backend="triton")
        assert index.tolist() == [-1] * 5


@pytest.mark.parametrize("batch", [1, 5])
def test_a_dead_slot_does_not_come_back_where_a_slice_scores_all_its_rows(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 1)  # groups of several rows
    query, keys = ties_within_rounding(torch.float32, 40, 60, 1.0, 1, 4.0)
    query, radii = query.expand(batch, 60), torch.full((40,), math.inf)
    winner, _ = grace_kernels.nearest(query, keys, radii, backend="reference")
    radii[winner] = -math.inf
    assert winner[0].item() not in agree(query, keys, radii).tolist()
    radii[0] = -math.inf
    far = torch.full((batch, 60), math.inf)  # from all alike: the lowest live slot
    wanted = 2 if winner[0].item() == 1 else 1
    assert agree(far, keys, radii).tolist() == [wanted] * batch


def test_without_its_margin_a_kernel_would_take_the_wrong_key(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.tiles, "error_bound", lambda *_: (0.0, 0.0))
    for batch in (1, 6):
        wrong = 0
        for seed in range(6):
            query, keys = ties_within_rounding(torch.float32, 40, 300, 1.0, seed, 4.0)
            query, radii = query.expand(batch, -1), torch.full((40,), math.inf)
            index, _ = grace_kernels.nearest(query, keys, radii, backend="triton")
            expected, _ = grace_kernels.nearest(query, keys, radii, backend="reference")
            wrong += int(not torch.equal(index, expected))
        assert wrong > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_bound_holds_for_products_that_lose_as_much_as_a_tensor_core_may(
    triton: ModuleType, dtype: torch.dtype
) -> None:
    # Large norms and small distances, the worst there is for |x|^2 + |k|^2 - 2 x.k.
    generator = torch.Generator().manual_seed(3)
    for norm, spread in ((100.0, 1.0), (100.0, 0.01)):
        centre = torch.randn(1, 140, generator=generator) * norm
        keys = (centre + spread * torch.randn(20, 140, generator=generator)).to(dtype)
        query = (centre + spread * torch.randn(5, 140, generator=generator)).to(dtype)
        agree(query, keys, torch.full((20,), spread * 16))


def test_the_tables_take_every_batch_with_a_bound_below_one_percent(triton: ModuleType) -> None:
    tiles = triton.tiles
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for size, table in tiles.table(capability).items():
            for few in (True, False):
                batches = [t.batch for t in table if (t.slots == 0) == few and t.width is None]
                assert batches == [*sorted(batches[:-1]), None] or not (few or batches)
            for tile in table:
                asked = size, tile.batch or 10**6, tile.slots, tile.width or 10**6
                assert tiles.choose(capability, *asked) == tile
                assert not tile.direct or tile.groups == tile.keys
                for dim in (1, 768, 4096, 11008):
                    relative, absolute = tiles.error_bound(tile, dim, size)
                    assert 2**-20 < relative < 0.01
                    assert 0 < absolute < 1e-31
            # Beyond the terms the bound was derived for, nothing is concluded from a coarse result.
            assert tiles.error_bound(table[0], 1 << 21, size)[1] == math.inf


def test_the_slices_follow_the_capacity_and_stay_countable(triton: ModuleType) -> None:
    tile = triton.tiles.choose((9, 0), 2, 1)
    assert triton.slices_of(tile, 0, 768, 1, 132) == 1
    assert triton.slices_of(tile, 1000, 768, 1, 132) == 63
    assert triton.slices_of(tile, 10**6, 768, 1, 132) == 264
    assert triton.slices_of(tile, 2**31, 64, 1, 1) == 2
    assert triton.slices_of(tile, 2**31, 11008, 4096, 1) == 6
    many = triton.tiles.choose((9, 0), 2, 1, 10**5, 768)
    assert triton.slices_of(many, 10**4, 768, 1, 132) == 79
    wide = triton.tiles.choose((9, 0), 2, 4096)
    assert triton.slices_of(wide, 10**6, 768, 4096, 132) == 2


def test_rows_too_wide_for_the_bound_are_compared_exactly(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = triton.tiles.error_bound
    monkeypatch.setattr(
        triton.tiles, "error_bound", lambda tile, _, size, *more: bound(tile, 2**21, size, *more)
    )
    for batch in (1, 6):
        query, keys, radii = codebook(torch.float32, batch, 30, 50)
        agree(query, keys, radii)


def test_outputs_and_workspace_may_hold_anything_before_and_tickets_are_zero_after(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(math.nan if made.is_floating_point() else 7)

    monkeypatch.setattr(torch, "empty", poisoned)
    for batch in (1, 6, 70):
        query, keys, radii = codebook(torch.float16, batch, 130, 20)
        agree(query, keys, radii, count=100)
        agree(query, keys, radii, count=0)
        agree(query, keys, radii)
    counters = triton.tickets.take(torch.device("cpu"), 3)
    assert counters.tolist() == [0] * len(counters)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("order", [1, -1])
def test_a_blocker_in_one_slice_stops_an_answer_from_another(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int, order: int
) -> None:
    # Three entries at distance 1 that reach less far, in one slice; one at 2 that reaches it, in
    # another. Without the largest radius of all, the first slice would drop what it has to score.
    entries = 128
    keys = torch.full((entries, 8), 100.0)
    radii = torch.full((entries,), 0.1)
    keys[:3], keys[-1] = 0.0, 0.0
    keys[:3, 0], keys[-1, 0], radii[-1] = 1.0, 2.0, 5.0
    monkeypatch.setattr(triton, "slices_of", lambda *_: 2)
    query = torch.zeros(batch, 8)
    ordered = torch.arange(entries) if order == 1 else torch.arange(entries).flip(0)
    assert agree(query, keys[ordered], radii[ordered]).tolist() == [-1] * batch
    radii[:3] = -math.inf
    reached = ordered.tolist().index(entries - 1)
    assert agree(query, keys[ordered], radii[ordered]).tolist() == [reached] * batch


@pytest.mark.parametrize("radii_in_a_pass", [0, 10**6])
def test_a_slice_resolves_alike_with_and_without_the_largest_radius(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, radii_in_a_pass: int
) -> None:
    import triton.language as tl

    kernel = importlib.import_module("grace_kernels.triton.lookup_kernel")
    monkeypatch.setattr(kernel, "_RADII", tl.constexpr(radii_in_a_pass))
    for batch in (1, 5):
        query, keys = ties_within_rounding(torch.float32, 30, 90, 1.0, 2, 4.0)
        _, distance = grace_kernels.nearest(query, keys, torch.ones(30), backend="reference")
        radii = torch.full((30,), 0.5 * distance.item())
        assert agree(query.expand(batch, 90), keys, radii).tolist() == [-1] * batch
        radii[3] = 2 * distance.item()
        agree(query.expand(batch, 90), keys, radii)


def test_queries_beyond_one_launch_are_answered_too(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_MOST_QUERIES", 4)
    query, keys, radii = codebook(torch.float32, 11, 40, 20)
    agree(query, keys, radii)
    p = problem()
    kernel, launches = triton.lookup_kernels[2], []

    class SecondFails:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            if len(launches) == 2:
                raise OSError("out of resources")
            return kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "lookup_kernels", [SecondFails()] * 3)
        with pytest.raises(RuntimeError, match="first 4 queries were answered"):
            grace_kernels.adapt_(**problem(), backend="triton")
    expected = expected_hidden(p)
    index, _ = grace_kernels.adapt_(**p, backend="triton")
    assert index.tolist() == [5, -1, -1, 2, 2]
    assert same_bits(p["hidden"], expected)


def test_index_arguments_out_of_range_are_clamped(triton: ModuleType) -> None:
    p = problem()
    first, last = rows(-3, 3, -50, 10, 15), rows(3, 6, 99, 11, 2**40)
    changes = {"query_row": rows(4, 9, 2**33, 7, 1), "first_row": first, "last_row": last}
    expected = p["hidden"].clone()
    expected[0:3] = p["values"][5]
    expected[10] = p["values"][2]
    expected[15:20] = p["values"][2]
    index, distance = grace_kernels.adapt_(
        **{**p, **changes}, count=torch.tensor(99), backend="triton"
    )
    assert index.tolist() == [5, -1, -1, 2, 2]
    assert distance[1:3].tolist() == [math.inf] * 2
    assert same_bits(p["hidden"], expected)

    p = problem()
    before = p["hidden"].clone()
    backwards = {"first_row": rows(3, 3, 3, 19, 25), "last_row": rows(0, 6, 9, -4, 30)}
    index, _ = grace_kernels.adapt_(**{**p, **backwards}, backend="triton")
    assert index.tolist() == [5, -1, -1, 2, 2]
    index, _ = grace_kernels.adapt_(**p, count=torch.tensor(-1), backend="triton")
    assert index.tolist() == [-1] * 5
    assert same_bits(p["hidden"], before)


def test_a_hidden_that_is_its_own_source_is_read_before_it_is_written(triton: ModuleType) -> None:
    # More queries than a block has: an early block writes over what a late one asks with.
    generator = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 40, 16, generator=generator)
    both = keys.clone()
    every = torch.arange(40)
    index, _ = grace_kernels.adapt_(
        both, both, every, 39 - every, 40 - every, keys, torch.zeros(40), values, backend="triton"
    )
    assert index.tolist() == every.tolist()
    assert torch.equal(both, values.flip(0))


def test_a_launch_that_fails_says_so_and_writes_nothing(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise OSError("out of resources")

    monkeypatch.setattr(triton, "lookup_kernels", [Broken()] * 3)
    p = problem()
    before = p["hidden"].clone()
    with pytest.raises(RuntimeError, match=r"did not start on cpu.*out of resources"):
        torch.ops.grace_triton.adapt_(*p.values())
    assert same_bits(p["hidden"], before)


def test_tickets_are_shared_by_no_two_threads_and_by_no_two_captures(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tickets, device = triton.tickets, torch.device("cpu")
    mine = tickets.take(device, 2)
    assert tickets.take(device, 2).data_ptr() == mine.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(tickets.take, device, 2).result()
    captured = [tickets._fresh(device, 20, capturing=True) for _ in range(2)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in (mine, theirs, *captured))
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    wide = tickets.take(device, 50)
    assert wide.numel() >= 50

    monkeypatch.setattr(tickets, "_slabs", {})
    with pytest.raises(RuntimeError, match="device must be warmed up before a lookup is captured"):
        tickets._fresh(device, 1, capturing=True)
    tickets.take(device, 1)  # an eager call, of a stream that has its counters
    assert tickets._fresh(device, 1, capturing=True).tolist() == [0]

    def fails(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("none left")

    monkeypatch.setattr(tickets, "_slabs", {})
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(RuntimeError, match="counters of arrivals on cpu could not be allocated"):
        tickets.take(device, 1)


def test_a_tile_spreads_its_rows_over_groups_without_losing_one(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every row of a tile in turn is the nearest, in every place, beside two rows nearly as near.
    table = triton.tiles.table((9, 0))[2]
    (tile,) = (t for t in table if t.batch == 16 and not t.slots)
    monkeypatch.setattr(triton.tiles, "choose", lambda *_: replace(tile, keys=32, groups=8))
    keys = torch.zeros(96, 20)
    keys[:, 0] = 10.0
    for place in range(0, 96, 13):
        here = keys.clone()
        here[place, 0] = 1.0
        here[(place + 1) % 96, 0] = 1.0
        here[(place + 40) % 96, 0] = 1.0
        wanted = min(place, (place + 1) % 96, (place + 40) % 96)
        query = torch.zeros(5, 20, dtype=torch.bfloat16)
        index, _ = grace_kernels.nearest(
            query, here.to(torch.bfloat16), torch.ones(96), backend="triton"
        )
        assert index.tolist() == [wanted] * 5
