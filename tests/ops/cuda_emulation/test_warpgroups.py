"""The scan by warpgroups and dependent launches, forms that are off by default, emulated."""

from __future__ import annotations

import pytest
import torch

from grace_kernels import reference
from grace_kernels.testing import (
    INF,
    Case,
    random_codebook,
    same_bits,
    ties_within_rounding,
)

from . import test_launch, test_scan
from .emulator import Emulator
from .test_forms import kernel_of
from .test_launch import problem
from .test_pruned import clusters, repeated
from .test_pruned import expect as expect_pruned
from .test_scan import CASES, HALVES, MMA_ERROR, codebook, expect, near_keys

FORM = "warpgroups"
HALF_CASES = [case for case in CASES if case.values[0].keys.dtype in HALVES]
TILE = 256  # keys, 64 where a multiprocessor has no more than that


@pytest.mark.parametrize("case", HALF_CASES)
def test_every_regime_is_answered_to_the_bit(case: Case, emulator: Emulator) -> None:
    count = None if case.count is None else torch.tensor(case.count)
    batch = case.query.shape[0]
    with emulator.device(FORM, mma_error=MMA_ERROR):
        for name, wanted in (("nearest", 17), ("lookup", 65)):
            if wanted == 65 and case.keys.dtype == torch.float16:
                continue  # what differs is in both kernels alike
            copies = -(-wanted // max(1, batch))
            query = case.query.repeat(copies, 1)
            index, distance = emulator(name, query, case.keys, case.radii, count)
            expected = getattr(reference, name)(case.query, case.keys, case.radii, count)
            assert index.tolist() == expected[0].tolist() * copies
            assert same_bits(distance, expected[1].repeat(copies)), (distance, expected[1])


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [(dtype, batch) for dtype in HALVES for batch in (17, 64, 65)] + [(torch.bfloat16, 129)],
)
@pytest.mark.parametrize("processors", [1, 5])
def test_batch_size_slices_and_the_order_of_blocks_and_threads_do_not_matter(
    dtype: torch.dtype, batch: int, processors: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 150, 72, batch)
    with emulator.device(FORM, processors=processors, mma_error=MMA_ERROR) as controls:
        controls.seed = 100 * batch
        expect(emulator, query[:batch], keys, radii)
        # More than 64 are answered in a launch of their own.
        assert controls.launches == (4 if batch > 64 else 2)


@pytest.mark.parametrize(("dtype", "batch"), [*zip(HALVES, (17, 65), strict=True)])
@pytest.mark.parametrize("n", [1, 9, TILE - 1, TILE, TILE + 1, 2 * TILE + 70])
def test_slices_below_at_and_above_a_tile_of_keys(
    dtype: torch.dtype, batch: int, n: int, emulator: Emulator
) -> None:
    query, keys = near_keys(batch, n, dtype)
    with emulator.device(FORM, processors=1, mma_error=MMA_ERROR):
        expect(emulator, query, keys, torch.full((n,), 0.1))
        wide = torch.cat([keys] * (1 + 70 // n)), torch.full((n * (1 + 70 // n),), 0.1)
        expect(emulator, query, *wide, torch.tensor(n))


@pytest.mark.parametrize(("dtype", "batch"), [*zip(HALVES, (65, 17), strict=True)])
@pytest.mark.parametrize(
    ("n", "dim"), [(40, 56), (40, 64), (40, 1016), (130, 8), (130, 264), (130, 320), (700, 64)]
)
def test_rows_below_at_and_above_a_ring_and_tiles_shorter_than_one(
    dtype: torch.dtype, batch: int, n: int, dim: int, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, n, dim, dim)
    with emulator.device(FORM, processors=1, mma_error=MMA_ERROR):
        expect(emulator, query.repeat(2, 1)[:batch], keys, radii)


@pytest.mark.parametrize("batch", [17, 65])
def test_what_a_stage_held_before_does_not_matter(batch: int, emulator: Emulator) -> None:
    # More stages than the ring has, the last of them full of an earlier one behind the rows' end.
    query, keys = ties_within_rounding(torch.bfloat16, 40, 1000, 1.0, batch, 0.0)
    with emulator.device(FORM, processors=1, mma_error=MMA_ERROR):
        expect(emulator, query.repeat(batch, 1), keys, torch.full((40,), INF))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("stride", "offset"), [(80, 0), (72, 8), (80, 3)])
def test_rows_may_start_anywhere_and_nothing_behind_them_matters(
    dtype: torch.dtype, stride: int, offset: int, emulator: Emulator
) -> None:
    with emulator.default_forms(FORM):
        test_scan.test_rows_may_start_anywhere_and_nothing_behind_them_matters(
            dtype, 17, 64, stride, offset, emulator
        )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [8, 64, 304])
def test_nothing_is_read_outside_the_arguments(
    dtype: torch.dtype, dim: int, emulator: Emulator
) -> None:
    with emulator.default_forms(FORM):
        test_scan.test_nothing_is_read_outside_the_arguments(dtype, 17, dim, emulator)


def test_ties_dead_slots_counts_nan_and_infinite_queries(emulator: Emulator) -> None:
    with emulator.default_forms(FORM):
        test_scan.test_every_slice_resolves_its_own_ties(17, emulator)
        for count in (-1, 0, 3, 2**40):
            test_scan.test_a_count_outside_its_range_acts_as_the_nearer_bound(count, 17, emulator)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("radius", [100.0, INF])
def test_ties_beyond_their_radii_block_a_farther_entry_of_another_slice(
    dtype: torch.dtype, radius: float, emulator: Emulator
) -> None:
    with emulator.default_forms(FORM):
        test_scan.test_ties_beyond_their_radii_block_a_farther_entry_of_another_slice(
            dtype, 17, radius, emulator
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_the_margin_is_what_makes_the_answer_exact(dtype: torch.dtype, emulator: Emulator) -> None:
    with emulator.default_forms(FORM):
        test_scan.test_the_margin_is_what_makes_the_answer_exact(dtype, 17, emulator)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("forms", "chain"), [("", 32), (FORM, 64)])
@pytest.mark.parametrize("batch", [17, 65])
def test_errors_that_add_up_to_all_that_the_margin_allows_change_nothing(
    dtype: torch.dtype, forms: str, chain: int, batch: int, emulator: Emulator
) -> None:
    # All magnitude is in the first step of a chain, and every step errs by all of it: upwards for
    # the key in an even place, which is a little too far, downwards for the one in an odd place.
    query = torch.zeros(1, 512)
    query[0].view(-1, chain)[:, :16] = 1
    keys = torch.zeros(80, 512)
    keys[40:42] = query
    keys[40, 0] += 2.0**-6
    query, keys = query.to(dtype), keys.to(dtype)
    found = {}
    for scale in (1.0, 0.4):
        with emulator.device(forms, processors=1, margin_scale=scale, mma_error=-MMA_ERROR):
            index, _ = emulator("nearest", query.repeat(batch, 1), keys, torch.ones(80))
            found[scale] = set(index.tolist())
    assert found[1.0] == {41}
    assert found[0.4] == {40}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [20, 70])
def test_hits_write_their_rows_and_nothing_else_is_touched(
    dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    with emulator.device(FORM):
        for width in (7, 600):
            assert test_launch.expect(emulator, problem(dtype, torch.float32, batch, width)) > 0


def test_it_is_for_many_aligned_halves_on_one_capability_without_a_sketch(
    emulator: Emulator,
) -> None:
    def taken(batch: int, dim: int, dtype: torch.dtype, chip: int = 90) -> bool:
        asked = batch, 100, dim, dtype, chip
        return kernel_of(emulator, FORM, *asked) != kernel_of(emulator, "", *asked)

    for dtype in HALVES:
        assert taken(17, 64, dtype)
        assert not taken(16, 64, dtype)
        assert not taken(17, 61, dtype)
        assert not taken(17, 64, dtype, 80)
        assert not taken(17, 64, dtype, 100)
    assert not taken(17, 64, torch.float32)
    query, keys, radii, sketch = clusters(torch.bfloat16, 100, 64, 20)
    with emulator.device(FORM) as controls:
        expect_pruned(emulator, query, keys, radii, sketch)
        assert controls.launches == 1


def test_slices_are_as_many_as_multiprocessors_however_many_records_there_are(
    emulator: Emulator,
) -> None:
    query, keys, radii = codebook(torch.bfloat16, 65, 8, 0)
    many = query, keys.repeat(40, 1), radii.repeat(40), torch.tensor(0)
    with emulator.device(FORM, processors=132, fail_launch=2, good_launches=1) as controls:
        with pytest.raises(RuntimeError, match="out of memory"):
            emulator("nearest", *many)
        assert (controls.grid_x, controls.grid_y) == (132, 1)  # of the launch that did not fail


@pytest.mark.parametrize("forms", ["apart,dependent", "warpgroups,apart,dependent"])
@pytest.mark.parametrize("batch", [1, 9, 20, 70])
def test_answers_apart_may_begin_before_the_scan_has_ended(
    batch: int, forms: str, emulator: Emulator
) -> None:
    query, keys, radii = codebook(torch.bfloat16, 150, 72, batch)
    with emulator.device(forms, processors=5, mma_error=MMA_ERROR) as controls:
        expect(emulator, query[:batch], keys, radii)
        assert (controls.launches, controls.dependent) == (4, 2)
        for width in (7, 600):
            arguments = problem(torch.bfloat16, torch.float32, batch, width)
            test_launch.expect(emulator, arguments)
    with emulator.device(forms, capability=80) as controls:
        expect(emulator, query[:batch], keys, radii)
        assert (controls.launches, controls.dependent) == (4, 0)


def test_a_lookup_may_begin_before_sketches_of_its_queries_are_there(emulator: Emulator) -> None:
    counts = []
    for forms in ("coordinates", "coordinates,dependent"):
        with emulator.device(forms, processors=2, mma_error=MMA_ERROR) as controls:
            for batch in (1, 9, 17):
                query, keys, radii, sketch = clusters(torch.bfloat16, 600, 264, batch)
                counts.append(expect_pruned(emulator, query, keys, radii, sketch))
            assert controls.dependent == (3 if "dependent" in forms else 0)
            for seed in range(6):
                case = random_codebook(seed)
                sketch = case.sketch()
                query = repeated(case, seed)
                expect_pruned(emulator, query, case.keys, case.radii, sketch, case.count)
    assert counts[:3] == counts[3:]  # nothing was scanned because a sketch was not there
