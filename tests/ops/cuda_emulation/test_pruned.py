"""pruned_lookup and pruned_adapt_ of the CUDA kernels, emulated: same bits, fewer keys read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grace_kernels import Sketch, reference
from grace_kernels.sketch_layout import (
    BLOCK,
    COORDINATES,
    COUNTERS,
    DIRECTIONS,
    ERROR,
    HEAD,
    HEAD_NUMBERS,
    MIDDLE,
    OUTLIERS,
    RESIDUAL,
)
from grace_kernels.testing import INF, NAN, SketchCase, random_codebook, same_bits

from .emulator import Emulator
from .test_launch import problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MMA_ERROR = 2.0**-18.8
# On both sides of every change of kernel and of block of queries.
BATCHES = [1, 2, 4, 5, 8, 9, 16, 17, 64, 70]


def expect(
    emulator: Emulator,
    query: Tensor,
    keys: Tensor,
    radii: Tensor,
    sketch: Sketch,
    count: int | None = None,
) -> dict[str, int]:
    """Assert that the answer is brute force's to the bit; return what has been counted."""
    before = sketch.counters.clone()
    rows = None if count is None else torch.tensor(count)
    index, distance = emulator("pruned_lookup", query, keys, radii, rows, *sketch.tensors())
    n = len(keys) if count is None else min(max(count, 0), len(keys))
    expected = reference.lookup(query, keys[:n], radii[:n])
    assert index.tolist() == expected[0].tolist()
    assert same_bits(distance, expected[1]), (distance, expected[1])
    counts = (sketch.counters - before).tolist()
    assert counts[0] == len(query)
    assert counts[1] == len(query) * min(int(sketch.covered), n)
    assert 0 <= counts[3] <= len(query) * n
    return dict(zip(COUNTERS, counts, strict=True))


def clusters(
    dtype: torch.dtype, n: int, dim: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Sketch]:
    """Queries of which two thirds are near keys, keys in groups, radii of a fifth of their gaps."""
    generator = torch.Generator().manual_seed(n + dim + batch)
    centres = 5 * torch.randn(1 + n // 20, dim, generator=generator)
    keys = centres[torch.randint(len(centres), (n,), generator=generator)]
    keys = (keys + torch.randn(n, dim, generator=generator)).to(dtype)
    query = keys[torch.randint(n, (batch,), generator=generator)].float()
    query += 0.05 * torch.randn(batch, dim, generator=generator)
    query[2::3] += torch.randn(len(query[2::3]), dim, generator=generator)
    radii = torch.full((n,), 0.2 * dim**0.5)
    return query.to(dtype), keys, radii, Sketch.fit(keys, radii)


def repeated(case: SketchCase, seed: int) -> Tensor:
    """Repeat the queries of a case so that every kernel has its turn."""
    batch = case.query.shape[0]
    wanted = (batch, batch, 16, 70, 30)[seed % 5]
    return case.query.repeat(-(-wanted // batch), 1)[: max(wanted, 1)]


@pytest.mark.parametrize("part", range(8))
def test_random_codebooks_are_answered_as_without_a_sketch(part: int, emulator: Emulator) -> None:
    resolved = 0
    for seed in range(part * 30, part * 30 + 30):
        case = random_codebook(seed)
        sketch = case.sketch()
        with emulator.device(processors=1 + seed % 4, mma_error=MMA_ERROR):
            counts = expect(
                emulator, repeated(case, seed), case.keys, case.radii, sketch, case.count
            )
        resolved += counts["scanned"] < counts["pairs"]
    assert resolved >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dim", [72, 61])
def test_most_keys_are_never_read(
    dtype: torch.dtype, batch: int, dim: int, emulator: Emulator
) -> None:
    query, keys, radii, sketch = clusters(dtype, 600, dim, batch)
    with emulator.device(processors=2, mma_error=MMA_ERROR) as controls:
        counts = expect(emulator, query, keys, radii, sketch)
        assert controls.launches == 1
    assert counts["scanned"] == 0
    assert batch // 2 <= counts["scored"] <= 3 * batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 6, 20])
def test_the_tail_resolves_what_the_head_leaves_open(
    dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    # Eight of 64 equal directions show an eighth of a squared distance.
    generator = torch.Generator().manual_seed(batch)
    keys = torch.randn(300, 64, generator=generator).to(dtype)
    query = (keys[:batch].float() + 0.1 * torch.randn(batch, 64, generator=generator)).to(dtype)
    radii = torch.full((300,), 4.5)
    sketch = Sketch.fit(keys, radii)
    with emulator.device(processors=1, mma_error=MMA_ERROR):
        counts = expect(emulator, query, keys, radii, sketch)
        assert counts["scanned"] == 0
        assert counts["scored"] <= 2 * batch


@pytest.mark.parametrize(("batch", "near"), [(1, 33), (8, 5), (16, 3), (32, 3)])
def test_a_full_list_is_scored_and_one_that_overflows_is_forgotten(
    batch: int, near: int, emulator: Emulator
) -> None:
    # Two slices of 128 rows; room for the block's queries and a quarter of the rows.
    generator = torch.Generator().manual_seed(batch)
    radii = torch.ones(256)
    with emulator.device(processors=2 if batch > 16 else 1) as controls:
        for more in (0, 1):
            keys = 50 + torch.randn(256, 16, generator=generator)
            rows = torch.randperm(128, generator=generator)[: near + more]
            keys[rows] = 0.01 * torch.randn(near + more, 16, generator=generator)
            keys = keys.bfloat16()
            query = torch.zeros(batch, 16, dtype=torch.bfloat16)
            counts = expect(emulator, query, keys, radii, Sketch.fit(keys, radii))
            assert controls.grid_x == 2
            assert counts["scored"] == (0 if more else near * batch)
            assert counts["scanned"] == (128 * batch if more else 0)


def test_no_list_is_longer_than_there_is_room_for(emulator: Emulator) -> None:
    generator = torch.Generator().manual_seed(0)
    radii = torch.ones(10000)
    with emulator.device(processors=1):
        for near in (1024, 1025, 5000):
            keys = 50 + torch.randn(10000, 8, generator=generator)
            keys[torch.randperm(5000, generator=generator)[:near]] *= 0.005
            query = torch.full((1, 8), 0.25)
            counts = expect(emulator, query, keys, radii, Sketch.fit(keys, radii))
            fits = near == 1024
            assert counts["scored"] == (near if fits else 0)
            assert counts["scanned"] == (0 if fits else 5024)


def exact_sketch(stored: Tensor, off: float, dim: int, dtype: torch.dtype, radii: Tensor) -> Sketch:
    """Make a sketch by hand: of whole numbers `[N, M]`, the first M coordinates of keys.

    A key is off by exactly `off`; a last number besides, if there is one, is the residual. Nothing
    is lost, so that bounds are as sharp as they can be.
    """
    sketch = Sketch(len(stored), dim, dtype)
    directions = min(stored.shape[1], DIRECTIONS if dim <= DIRECTIONS else HEAD, dim)
    sketch.directions[:directions, :directions] = torch.eye(directions)
    sketch.scales[ERROR], sketch.scales[MIDDLE] = off or 1.0, 0.0
    codes = torch.zeros(len(stored), COORDINATES + DIRECTIONS, dtype=torch.int8)
    codes[:, ERROR] = int(off > 0)
    coordinates = codes[:, COORDINATES:]
    coordinates[:, :directions] = stored[:, :directions].to(torch.int8)
    if stored.shape[1] > directions:
        codes[:, RESIDUAL] = stored[:, directions].to(torch.int8)
    slot = torch.arange(len(stored))
    sketch.head[slot // BLOCK, :, slot % BLOCK] = codes[:, :HEAD_NUMBERS]
    sketch.tail[slot // BLOCK, :, slot % BLOCK] = codes[:, HEAD_NUMBERS:]
    sketch.rows = len(stored)
    sketch.active = True
    sketch.update_radii_(radii, 0, len(stored))
    return sketch


def sharp(
    emulator: Emulator, dtype: torch.dtype, batch: int, off: float, radius: float, residual: bool
) -> int:
    """Count wrong answers where every query is at exactly the distance T from its key.

    Along one coordinate lie what is stored, the key (`off` farther out) and the query (`radius`
    farther), so that the bound is T itself. With `residual` that coordinate is one that P drops.
    """
    generator = torch.Generator().manual_seed(batch)
    dim, wrong = 80 if residual else 40, 0
    for _ in range(4):
        stored = torch.randint(-100, 101, (batch + 40, 9 if residual else dim), generator=generator)
        if residual:
            stored[:, 8] = torch.randint(60, 101, (batch + 40,), generator=generator)
        keys = torch.zeros(batch + 40, dim)
        keys[:, : stored.shape[1]] = stored
        where = torch.full((batch + 40,), 8)
        if not residual:
            where = torch.randint(dim, where.shape, generator=generator)
        row = torch.arange(batch + 40)
        out = torch.where(keys[row, where] < 0, -1.0, 1.0)
        keys[row, where] += off * out
        query = keys.clone()
        query[row, where] += radius * out
        keys, query = keys.to(dtype), query[:batch].to(dtype)
        radii = torch.full((len(keys),), radius)
        sketch = exact_sketch(stored, off, dim, dtype, radii)
        index, distance = emulator("pruned_lookup", query, keys, radii, None, *sketch.tensors())
        assert sketch.counts()["scanned"] == 0
        wrong += int((index != torch.arange(batch)).sum())
        assert (distance[index >= 0] == radius).all()
    return wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 8, 16, 40])
@pytest.mark.parametrize("residual", [False, True], ids=["along a direction", "along none"])
@pytest.mark.parametrize(("off", "radius"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.0), (0.0, 0.0)])
def test_a_query_at_exactly_its_radius_is_never_lost(
    dtype: torch.dtype, batch: int, residual: bool, off: float, radius: float, emulator: Emulator
) -> None:
    with emulator.device(processors=2, mma_error=MMA_ERROR):
        assert sharp(emulator, dtype, batch, off, radius, residual) == 0


@pytest.mark.parametrize("residual", [False, True], ids=["along a direction", "along none"])
def test_without_the_margin_for_its_own_sketch_a_query_would_be_lost(
    residual: bool, emulator: Emulator
) -> None:
    with emulator.device(processors=2, mma_error=MMA_ERROR, margin_scale=0.0):
        assert sum(sharp(emulator, torch.float32, 16, 0.5, r, residual) for r in (0.0, 1.0)) > 10


def test_the_rounding_of_the_distances_themselves_is_allowed_for(emulator: Emulator) -> None:
    # Whole numbers: products and sums are exact, and T is rounded down for half of the queries.
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-100, 101, (60, 40), generator=generator)
    moved = torch.randint(-4, 5, (60, 40), generator=generator)
    query = (keys + moved).float()
    down = 0
    with emulator.device(processors=1, margin_scale=0.0):
        for b in range(60):
            radius = moved[b].double().square().sum().sqrt()
            radii = torch.full((60,), float(radius.float()))
            down += int(radius.float().double() < radius)
            sketch = exact_sketch(keys, 0.0, 40, torch.float32, radii)
            counts = expect(emulator, query[b : b + 1], keys.float(), radii, sketch)
            assert (counts["scored"], counts["scanned"]) == (1, 0)
    assert down > 10


def test_a_query_that_holds_a_nan_is_no_reason_to_scan(emulator: Emulator) -> None:
    for batch in (1, 8, 20):
        query, keys, radii, sketch = clusters(torch.bfloat16, 300, 64, batch)
        query[0, 9] = NAN
        with emulator.device(processors=2):
            assert expect(emulator, query, keys, radii, sketch)["scanned"] == 0


@pytest.mark.parametrize("value", [INF, 3e38])
def test_a_query_too_large_for_the_sketch_is_looked_for_among_all_keys(
    value: float, emulator: Emulator
) -> None:
    query, keys, radii, sketch = clusters(torch.float32, 300, 64, 4)
    query[1, 7] = value
    with emulator.device(processors=2):
        assert expect(emulator, query, keys, radii, sketch)["scanned"] == 1200
        radii[5] = INF
        sketch.update_radii_(radii, 5, 6)
        expect(emulator, query, keys, radii, sketch)


@pytest.mark.parametrize("batch", [1, 20])
def test_rows_not_covered_are_scanned_and_the_others_are_not(
    batch: int, emulator: Emulator
) -> None:
    query, keys, radii, _ = clusters(torch.bfloat16, 600, 64, batch)
    sketch = Sketch.fit(keys, radii, 200)
    sketch.update_radii_(radii, 200, 600)
    with emulator.device(processors=4) as controls:
        counts = expect(emulator, query, keys, radii, sketch)
        assert controls.grid_x > 3
        assert 400 * batch <= counts["scanned"] < 500 * batch
        sketch.active = False
        off = expect(emulator, query, keys, radii, sketch)
        assert (off["pairs"], off["scanned"]) == (0, 600 * batch)
        sketch.active = True
        sketch.extend(keys, 200, 600)
        assert expect(emulator, query, keys, radii, sketch)["scanned"] == 0


@pytest.mark.parametrize("batch", [1, 8, 9, 70])
@pytest.mark.parametrize("many", [3, OUTLIERS, 50])
def test_a_few_large_radii_do_not_make_everything_a_candidate(
    many: int, batch: int, emulator: Emulator
) -> None:
    query, keys, radii, _ = clusters(torch.bfloat16, 800, 64, batch)
    with emulator.device(processors=2, mma_error=MMA_ERROR):
        for radius in (12.0, 1e4, INF):
            generator = torch.Generator().manual_seed(many)
            out = torch.randperm(800, generator=generator)[:many]
            large = radii.clone()
            large[out] = radius
            counts = expect(emulator, query, keys, large, Sketch.fit(keys, large))
            if many <= OUTLIERS and radius == 12.0:
                assert counts["scored"] + counts["scanned"] < 0.2 * counts["pairs"]


@pytest.mark.parametrize("batch", [1, 8, 9, 70])
def test_dead_slots_neither_answer_nor_block_and_ties_go_to_the_lowest_live_slot(
    batch: int, emulator: Emulator
) -> None:
    _, keys, radii, _ = clusters(torch.bfloat16, 300, 64, batch)
    keys[100:200] = keys[:100]
    keys[200:] = keys[:100]
    radii[:100] = -INF
    query = keys[torch.arange(batch)]
    with emulator.device(processors=1, mma_error=MMA_ERROR):
        counts = expect(emulator, query, keys, radii, Sketch.fit(keys, radii))
        assert (counts["scored"] >= 2 * batch) == (counts["scanned"] == 0)
    index, _ = reference.lookup(query, keys, radii)
    assert index.tolist() == list(range(100, 100 + batch))


@pytest.mark.parametrize("batch", [1, 8, 9, 20])
def test_a_key_blocks_a_farther_one_whose_large_radius_is_not_sketched_yet(
    batch: int, emulator: Emulator
) -> None:
    # The blocker is farther than every radius that its own slice knows of, and the other slice has
    # nothing else that would block.
    _, keys, radii, _ = clusters(torch.bfloat16, 256, 64, batch)
    radii[128:] = -INF
    keys[255] = 60.0
    radii[255] = 1e3
    sketch = Sketch.fit(keys, radii, 255)
    sketch.update_radii_(radii, 255, 256)
    query = keys[torch.arange(batch)].float() + 0.5
    with emulator.device(processors=2):
        counts = expect(emulator, query.bfloat16(), keys, radii, sketch)
    assert counts["scanned"] > 0
    index, distance = reference.nearest(query, keys.float(), radii)
    assert (index < 255).all()
    assert (distance > radii[0]).all()


@pytest.mark.parametrize("count", [-(2**40), 0, 7, 33, 599, 600, 2**40])
def test_a_count_outside_its_range_acts_as_the_nearer_bound(count: int, emulator: Emulator) -> None:
    for batch in (1, 20):
        query, keys, radii, sketch = clusters(torch.bfloat16, 600, 64, batch)
        with emulator.device(processors=2):
            assert expect(emulator, query, keys, radii, sketch, count)["scanned"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 61])
def test_rows_and_the_sketch_may_start_anywhere(
    dtype: torch.dtype, dim: int, emulator: Emulator
) -> None:
    def odd_start(t: Tensor) -> Tensor:
        return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)

    for batch in (1, 9, 20):
        query, keys, radii, sketch = clusters(dtype, 200, dim, batch)
        apart = torch.cat([keys, torch.full_like(keys, NAN)], dim=1)[:, :dim]
        wide = torch.full((200, 3), NAN)
        wide[:, 1] = radii
        with emulator.device(processors=2):
            expect(emulator, odd_start(query), apart, wide[:, 1], sketch)
            for name in ("centre", "directions", "scales"):
                setattr(sketch, name, odd_start(getattr(sketch, name)))
            assert expect(emulator, query, odd_start(keys), radii, sketch)["scanned"] == 0


@pytest.mark.parametrize("batch", [1, 5, 20, 70])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_hits_write_their_rows_and_only_sequences_that_ask_are_counted(
    value_dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    for width in (7, 16):
        arguments = problem(torch.bfloat16, value_dtype, batch, width)
        exact = [arguments[0].clone(), *arguments[1:]]
        expected = reference.adapt_(*exact)
        sketch = Sketch.fit(arguments[5], arguments[6])
        asked = int((arguments[2] >= 0).sum())
        arguments[2] = torch.where(arguments[2] < 0, 2**40, arguments[2])
        with emulator.device():
            got = emulator("pruned_adapt_", *arguments, None, *sketch.tensors())
        assert got[0].tolist() == expected[0].tolist()
        assert same_bits(got[1], expected[1])
        assert same_bits(arguments[0], exact[0])
        assert sketch.counts()["queries"] == asked
        assert (got[0] >= 0).any() or batch == 1


def test_a_block_of_queries_of_which_none_asks_reads_nothing(emulator: Emulator) -> None:
    arguments = problem(torch.bfloat16, torch.float32, 20, 16)
    arguments[2].fill_(-1)
    before = arguments[0].clone()
    sketch = Sketch.fit(arguments[5], arguments[6])
    with emulator.device():
        index, _ = emulator("pruned_adapt_", *arguments, None, *sketch.tensors())
    assert index.tolist() == [-1] * 20
    assert same_bits(arguments[0], before)
    assert sketch.counters.tolist() == [0, 0, 0, 0]


def test_what_is_no_sketch_of_these_keys_is_refused(emulator: Emulator) -> None:
    query, keys, radii, sketch = clusters(torch.float32, 100, 24, 2)
    with emulator.device() as controls:
        for at, wrong, message in (
            (0, torch.zeros(25), r"centre must have shape \[24\], got \[25\]"),
            (3, sketch.head.float(), "head must be contiguous and of the dtype"),
            (4, sketch.tail[:3], r"tail must have shape \[4, 56, 32\], got \[3, 56, 32\]"),
            (4, sketch.tail.view(4, 32, 56), r"tail must have shape \[4, 56, 32\], got"),
            (8, torch.zeros(8, dtype=torch.int64)[::2], "counters must be contiguous"),
        ):
            tensors = [*sketch.tensors()]
            tensors[at] = wrong
            with pytest.raises(RuntimeError, match=message):
                emulator("pruned_lookup", query, keys, radii, None, *tensors)
        assert controls.launches == 0


def test_a_slice_begins_at_a_multiple_of_32_rows_and_an_empty_codebook_has_none(
    emulator: Emulator,
) -> None:
    with emulator.device(processors=100) as controls:
        for n in (0, 1, 31, 32, 33, 100):
            query, keys, radii, sketch = clusters(torch.float32, max(n, 1), 24, 3)
            if n == 0:
                keys, radii = keys[:0], radii[:0]
            expect(emulator, query, keys, radii, sketch)
            assert controls.grid_x == max(1, math.ceil(n / 32))
