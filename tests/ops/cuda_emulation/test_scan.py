"""The CUDA kernels, emulated: index and distance to the bit, whatever the kernel and the grid."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_kernels import reference
from grace_kernels.testing import INF, NAN, Case, regimes, same_bits, ties_within_rounding

from .emulator import Emulator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
CASES = [
    pytest.param(case, id=f"{str(dtype)[6:]}: {case.name}")
    for dtype in DTYPES
    for case in regimes(dtype)
]
# Batch sizes on both sides of every change of kernel (1, 4, 8, 16) and of block of queries.
BATCHES = [1, 2, 4, 5, 8, 9, 16, 17, 64, 65]
# What a step on tensor cores errs by, at most, of the sum of |products| and |accumulator|.
MMA_ERROR = 2.0**-18.8


def expect(
    emulator: Emulator, query: Tensor, keys: Tensor, radii: Tensor, count: Any = None
) -> None:
    """Assert that both operators answer as the reference does."""
    for name in ("nearest", "lookup"):
        index, distance = emulator(name, query, keys, radii, count)
        expected = getattr(reference, name)(query, keys, radii, count)
        assert index.tolist() == expected[0].tolist()
        assert same_bits(distance, expected[1]), (distance, expected[1])


def codebook(dtype: torch.dtype, n: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (as many as keys) near keys, with ties, dead slots and a NaN radius."""
    generator = torch.Generator().manual_seed(seed)
    spread = (0.01, 0.1, 1.0)[seed % 3]
    centre = 3 * torch.randn(dim, generator=generator)
    keys = (centre + spread * torch.randn(n, dim, generator=generator)).to(dtype)
    keys[n // 2 :: 7] = keys[: len(keys[n // 2 :: 7])]
    near = keys[torch.randint(n, (n,), generator=generator)].float()
    query = (near + 0.3 * spread * torch.randn(n, dim, generator=generator)).to(dtype)
    radii = torch.full((n,), 0.3 * spread * dim**0.5)
    radii[2], radii[3], radii[n - 1] = -INF, NAN, 0.0
    return query, keys, radii


@pytest.mark.parametrize("case", CASES)
def test_every_regime_is_answered_to_the_bit_by_every_kernel(
    case: Case, emulator: Emulator
) -> None:
    count = None if case.count is None else torch.tensor(case.count)
    batch = case.query.shape[0]
    with emulator.device(mma_error=MMA_ERROR):
        for copies in (1, -(-9 // max(1, batch)), -(-17 // max(1, batch))):
            query = case.query.repeat(copies, 1)
            for name in ("nearest", "lookup"):
                index, distance = emulator(name, query, case.keys, case.radii, count)
                expected = getattr(reference, name)(case.query, case.keys, case.radii, count)
                assert index.tolist() == expected[0].tolist() * copies
                assert same_bits(distance, expected[1].repeat(copies)), (distance, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("processors", [1, 5])
def test_batch_size_slices_and_the_order_of_blocks_do_not_matter(
    dtype: torch.dtype, batch: int, processors: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 150, 72, batch)
    with emulator.device(processors=processors, mma_error=MMA_ERROR) as controls:
        for seed in (0, 100):
            controls.seed = seed
            expect(emulator, query[:batch], keys, radii)
        assert controls.launches == 4
        assert controls.grid_x > 1 or processors == 1 or batch > 40


def near_keys(batch: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries `[batch, 40]`, each next to one of the keys `[n, 40]`."""
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(n, 40, generator=generator).to(dtype)
    return (keys[torch.arange(batch) * 7 % n].float() + 0.01).to(dtype), keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 17])
@pytest.mark.parametrize("n", [1, 31, 33, 255, 257, 600])
def test_slices_below_at_and_above_a_tile_of_keys(
    dtype: torch.dtype, batch: int, n: int, emulator: Emulator
) -> None:
    query, keys = near_keys(batch, n, dtype)
    # Enough bytes per multiprocessor for the narrow tensor kernel, where it is fp16 or bf16.
    with emulator.device(processors=1, mma_error=MMA_ERROR):
        expect(emulator, query, keys, torch.full((n,), 0.1))
        wide = torch.cat([keys] * (1 + 900 // n)), torch.full((n * (1 + 900 // n),), 0.1)
        expect(emulator, query, *wide, torch.tensor(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 6, 9, 20])
@pytest.mark.parametrize("dim", [256, 257, 800])
def test_rows_below_at_and_above_a_ring(
    dtype: torch.dtype, batch: int, dim: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 40, dim, dim)
    with emulator.device(processors=2, mma_error=MMA_ERROR):
        expect(emulator, query[:batch], keys, radii)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 17])
@pytest.mark.parametrize("dim", [64, 61])
@pytest.mark.parametrize(("stride", "offset"), [(80, 0), (71, 0), (72, 8), (80, 3)])
def test_rows_may_start_anywhere_and_nothing_behind_them_matters(
    dtype: torch.dtype, batch: int, dim: int, stride: int, offset: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 30, dim, dim)

    def apart(rows: Tensor) -> Tensor:
        memory = torch.full((offset + rows.shape[0] * stride,), NAN, dtype=dtype)
        view = memory[offset:].as_strided(rows.shape, (stride, 1), offset)
        view.copy_(rows)
        return view

    with emulator.device(processors=2):
        expect(emulator, apart(query[:batch]), apart(keys), radii)
        expect(emulator, query[:batch], apart(keys), radii)
        expect(emulator, apart(query[:batch]), keys, radii.repeat_interleave(3)[::3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 9, 17])
@pytest.mark.parametrize("dim", [8, 13, 64, 300])
def test_nothing_is_read_outside_the_arguments(
    dtype: torch.dtype, batch: int, dim: int, emulator: Emulator
) -> None:
    # The arguments end where a page ends behind which nothing is mapped.
    query, keys, radii = codebook(dtype, 21, dim, 1)
    fences = []

    def at_the_end(rows: Tensor) -> Tensor:
        size = rows.numel() * rows.element_size()
        pages = -(-size // mmap.PAGESIZE)
        fence = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        memory = torch.frombuffer(fence, dtype=torch.uint8)
        address = memory.data_ptr() + pages * mmap.PAGESIZE
        protect(address, 0)
        fences.append((fence, address))
        end = pages * mmap.PAGESIZE
        placed = memory[end - size : end].view(rows.dtype).view(rows.shape)
        return placed.copy_(rows)

    with emulator.device(processors=2):
        try:
            query, keys, radii = (at_the_end(t) for t in (query[:batch], keys, radii))
            expect(emulator, query, keys, radii)
        finally:
            for _, address in fences:
                protect(address, 3)


def protect(address: int, how: int) -> None:
    """Forbid (0) or allow (3) access to a page."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), how) == 0


@pytest.mark.parametrize("batch", [1, 4, 17])
def test_rows_more_than_two_to_the_31_elements_apart_are_reached(
    batch: int, emulator: Emulator, tmp_path: Path
) -> None:
    stride = 2**30 + 64
    # A file of holes but for three rows: 4 GiB of memory are not granted everywhere.
    memory = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16
    )
    keys = memory.as_strided((3, 64), (stride, 1))
    keys.copy_(torch.arange(3.0)[:, None].expand(3, 64))
    assert 2 * stride > 2**31
    with emulator.device():
        query = torch.full((batch, 64), 1.9, dtype=torch.bfloat16)
        expect(emulator, query, keys, torch.full((3,), 9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 17])
def test_the_margin_is_what_makes_the_answer_exact(
    dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    wrong = {1.0: 0, 0.0: 0}
    for scale in wrong:
        with emulator.device(processors=2, margin_scale=scale, mma_error=MMA_ERROR):
            for seed in range(6):
                centre = 3.0 if seed % 2 and dtype != torch.bfloat16 else 0.0
                query, keys = ties_within_rounding(dtype, 40, 200, 1.0, seed, centre)
                query, radii = query.repeat(batch, 1), torch.full((40,), INF)
                index, _ = emulator("nearest", query, keys, radii)
                expected = reference.nearest(query[:1], keys, radii)[0].item()
                wrong[scale] += sum(got != expected for got in index.tolist())
    assert wrong[1.0] == 0
    assert wrong[0.0] > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_a_tensor_core_that_errs_more_than_assumed_is_noticed_here(
    dtype: torch.dtype, emulator: Emulator
) -> None:
    # Otherwise the emulated error would prove nothing about the margin.
    wrong = 0
    with emulator.device(processors=1, mma_error=2.0**-12):
        for seed in range(4):
            query, keys = ties_within_rounding(dtype, 40, 200, 1.0, seed, 4.0)
            index, _ = emulator("nearest", query.repeat(9, 1), keys, torch.full((40,), INF))
            expected = reference.nearest(query, keys, torch.full((40,), INF))[0].item()
            wrong += sum(got != expected for got in index.tolist())
    assert wrong > 0


@pytest.mark.parametrize("batch", [1, 4, 9])
@pytest.mark.parametrize("count", [-(2**40), -1, 0, 3, 20, 21, 2**40])
def test_a_count_outside_its_range_acts_as_the_nearer_bound(
    count: int, batch: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(torch.bfloat16, 20, 32, 0)
    within = torch.tensor(min(20, max(0, count)))
    with emulator.device():
        for name in ("nearest", "lookup"):
            got = emulator(name, query[:batch], keys, radii, torch.tensor(count))
            expected = getattr(reference, name)(query[:batch], keys, radii, within)
            assert got[0].tolist() == expected[0].tolist()
            assert same_bits(got[1], expected[1])


@pytest.mark.parametrize("batch", [1, 4, 9, 17])
def test_every_slice_resolves_its_own_ties(batch: int, emulator: Emulator) -> None:
    # More ties in every group than a group remembers, dead slots among them.
    keys = torch.ones(400, 24, dtype=torch.bfloat16)
    radii = torch.full((400,), 9.0)
    radii[:150] = -INF
    keys[160] = 1.0078125
    with emulator.device(processors=4):
        expect(emulator, torch.zeros(batch, 24, dtype=torch.bfloat16), keys, radii)
        expect(emulator, torch.full((batch, 24), NAN, dtype=torch.bfloat16), keys, radii)
        expect(emulator, torch.full((batch, 24), INF, dtype=torch.bfloat16), keys, radii)
        radii[399] = INF
        expect(emulator, torch.full((batch, 24), INF, dtype=torch.bfloat16), keys, radii)


def test_the_emulated_tensor_core_errs_by_all_that_the_margin_allows(emulator: Emulator) -> None:
    assert emulator.tensor_error == MMA_ERROR


def far_ties(dtype: torch.dtype, n: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys of which all but the last are as far from them, the last farther; no radii."""
    keys = torch.ones(n, 24, dtype=dtype)
    keys[n - 1] = 2.0
    return torch.zeros(batch, 24, dtype=dtype), keys, torch.full((n,), 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 8, 9, 17])
@pytest.mark.parametrize("radius", [100.0, INF])
def test_ties_beyond_their_radii_block_a_farther_entry_of_another_slice(
    dtype: torch.dtype, batch: int, radius: float, emulator: Emulator
) -> None:
    # The largest radius of their own slice would have left them out.
    query, keys, radii = far_ties(dtype, 64, batch)
    radii[3:63] = -INF  # three in one slice
    radii[63] = radius
    with emulator.device(processors=4, mma_error=MMA_ERROR) as controls:
        expect(emulator, query, keys, radii)
        assert emulator("lookup", query, keys, radii)[0].tolist() == [-1] * batch
        assert controls.grid_x > 1
        radii[:3] = NAN
        expect(emulator, query, keys, radii)
        radii[:3] = 100.0
        expect(emulator, query, keys, radii)
        assert emulator("lookup", query, keys, radii)[0].tolist() == [0] * batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 8, 9, 17])
@pytest.mark.parametrize("radius", [0.25, 0.0, -1.0, NAN, -INF])
@pytest.mark.parametrize("scale", [1.0, 3e4])
def test_ties_beyond_all_radii_are_not_scored(
    dtype: torch.dtype, batch: int, radius: float, scale: float, emulator: Emulator
) -> None:
    query, keys, radii = far_ties(dtype, 300, batch)
    radii[:] = radius
    keys *= scale
    with emulator.device(processors=3, mma_error=MMA_ERROR) as controls:
        expect(emulator, query, keys, radii)
        controls.scored = 0
        emulator("lookup", query, keys, radii)
        assert controls.scored == 0
        if radius != -INF:
            emulator("nearest", query, keys, radii)
            assert controls.scored >= 300 * batch


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_a_largest_radius_equal_to_the_distance_of_the_winner_keeps_it(
    batch: int, emulator: Emulator
) -> None:
    # Every key is there twice, so that a slice knows the distance exactly, without a margin.
    generator = torch.Generator().manual_seed(batch)
    with emulator.device(processors=1):
        for _ in range(20):
            query = torch.randn(1, 40, generator=generator).bfloat16()
            keys = torch.randn(4, 40, generator=generator).bfloat16().repeat(2, 1)
            index, distance = reference.nearest(query, keys, torch.ones(8))
            radii = torch.zeros(8)
            radii[index] = distance
            slots, distances = emulator("lookup", query.repeat(batch, 1), keys, radii)
            assert slots.tolist() == index.tolist() * batch
            assert same_bits(distances, distance.repeat(batch))
