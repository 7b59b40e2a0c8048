"""Forms of the CUDA kernels that are off by default, emulated: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from grace_kernels import reference
from grace_kernels.testing import (
    INF,
    Case,
    random_codebook,
    same_bits,
    swap_shows,
    ties_within_rounding,
)

from . import test_launch, test_scan
from .emulator import Emulator
from .test_launch import problem
from .test_pruned import clusters, repeated
from .test_pruned import expect as expect_pruned
from .test_scan import CASES, DTYPES, HALVES, MMA_ERROR, codebook, expect, near_keys

EXACT, APART = "exact-always", "apart"
FORMS = [EXACT, APART]


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_every_regime_is_answered_to_the_bit(case: Case, forms: str, emulator: Emulator) -> None:
    count = None if case.count is None else torch.tensor(case.count)
    batch = case.query.shape[0]
    with emulator.device(forms, mma_error=MMA_ERROR):
        for copies in (1, -(-9 // max(1, batch))):
            query = case.query.repeat(copies, 1)
            for name in ("nearest", "lookup"):
                index, distance = emulator(name, query, case.keys, case.radii, count)
                expected = getattr(reference, name)(case.query, case.keys, case.radii, count)
                assert index.tolist() == expected[0].tolist() * copies
                assert same_bits(distance, expected[1].repeat(copies)), (distance, expected[1])


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9, 17, 65])
@pytest.mark.parametrize("processors", [1, 5])
def test_batch_size_slices_and_the_order_of_blocks_do_not_matter(
    dtype: torch.dtype, batch: int, processors: int, forms: str, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 150, 72, batch)
    with emulator.device(forms, processors=processors, mma_error=MMA_ERROR) as controls:
        for seed in (0, 100):
            controls.seed = seed
            expect(emulator, query[:batch], keys, radii)
        assert controls.launches == (4 if forms == EXACT else 8)
        assert controls.shared_bytes > 0


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("dim", [248, 256, 264, 260, 2560])
def test_rows_below_at_and_above_a_ring(
    dtype: torch.dtype, batch: int, dim: int, forms: str, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 40, dim, dim)
    with emulator.device(forms, processors=2, mma_error=MMA_ERROR):
        expect(emulator, query[:batch], keys, radii)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lane", [0, 7, 31])
def test_the_order_inside_a_lane_is_the_canonical_one(
    dtype: torch.dtype, lane: int, emulator: Emulator
) -> None:
    for place in (2, 7, 8, 14):
        query, keys = swap_shows(dtype, place, lane)
        for forms in (EXACT, APART):
            with emulator.device(forms):
                for batch in (1, 2, 4, 9):
                    expect(emulator, query.repeat(batch, 1), keys, torch.full((2,), INF))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 4, 9])
@pytest.mark.parametrize("n", [1, 8, 9, 17, 257])
def test_exact_slices_below_at_and_above_what_a_block_takes(
    dtype: torch.dtype, batch: int, n: int, emulator: Emulator
) -> None:
    query, keys = near_keys(batch, n, dtype)
    with emulator.device(EXACT, processors=1):
        expect(emulator, query, keys, torch.full((n,), 0.1))
        wide = torch.cat([keys] * (1 + 300 // n)), torch.full((n * (1 + 300 // n),), 0.1)
        expect(emulator, query, *wide, torch.tensor(n))


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("dim", [8, 13, 300])
def test_nothing_is_read_outside_the_arguments(
    dtype: torch.dtype, batch: int, dim: int, forms: str, emulator: Emulator
) -> None:
    with emulator.default_forms(forms):
        test_scan.test_nothing_is_read_outside_the_arguments(dtype, batch, dim, emulator)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("batch", [1, 4, 9, 17])
def test_ties_dead_slots_nan_and_infinite_queries(
    batch: int, forms: str, emulator: Emulator
) -> None:
    with emulator.default_forms(forms):
        test_scan.test_every_slice_resolves_its_own_ties(batch, emulator)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("count", [-(2**40), 0, 3, 2**40])
def test_a_count_outside_its_range_acts_as_the_nearer_bound(
    count: int, batch: int, forms: str, emulator: Emulator
) -> None:
    with emulator.default_forms(forms):
        test_scan.test_a_count_outside_its_range_acts_as_the_nearer_bound(count, batch, emulator)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius", [100.0, INF])
def test_ties_beyond_their_radii_block_a_farther_entry_of_another_slice(
    dtype: torch.dtype, radius: float, forms: str, emulator: Emulator
) -> None:
    with emulator.default_forms(forms):
        for batch in (1, 4, 9) if forms == EXACT else (4, 9):  # of a grid per query, not of slices
            test_scan.test_ties_beyond_their_radii_block_a_farther_entry_of_another_slice(
                dtype, batch, radius, emulator
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_scan_needs_no_margin(dtype: torch.dtype, emulator: Emulator) -> None:
    with emulator.device(EXACT, processors=2, margin_scale=0):
        for seed in range(6):
            query, keys = ties_within_rounding(dtype, 40, 200, 1.0, seed, 0.0)
            for batch in (1, 2, 9):
                expect(emulator, query.repeat(batch, 1), keys, torch.full((40,), INF))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 17])
def test_the_margin_is_what_makes_an_answer_apart_exact(
    dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    with emulator.default_forms(APART):
        test_scan.test_the_margin_is_what_makes_the_answer_exact(dtype, batch, emulator)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 5, 70])
def test_hits_write_their_rows_and_nothing_else_is_touched(
    dtype: torch.dtype, value_dtype: torch.dtype, batch: int, forms: str, emulator: Emulator
) -> None:
    hits = 0
    with emulator.device(forms):
        for width in (1, 7, 600):
            hits += test_launch.expect(emulator, problem(dtype, value_dtype, batch, width))
    assert hits > 0


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("batch", [1, 2, 8, 20])
def test_the_layers_input_and_output_may_be_one_tensor(
    batch: int, forms: str, emulator: Emulator
) -> None:
    # Every hit writes over the query of the sequence before it, of another block too.
    for dtype in (torch.float32, torch.bfloat16):
        arguments = problem(dtype, dtype, batch, 24)
        both = arguments[1]
        both[:batch] = arguments[5][torch.arange(batch) % 12]
        arguments[2] = torch.arange(batch)
        arguments[3] = (torch.arange(batch) - 1) % batch  # no two of them one row
        arguments[4] = arguments[3] + 1
        exact = [*arguments]
        exact[0] = both.clone()
        exact[1] = both.clone()
        reference.adapt_(*exact)
        with emulator.device(forms, processors=2) as controls:
            for seed in (1, 2):
                controls.seed = seed
                arguments[0] = arguments[1] = both.clone()
                emulator("adapt_", *arguments)
                assert same_bits(arguments[0], exact[0])


@pytest.mark.parametrize("forms", FORMS)
def test_more_queries_than_a_launch_takes_are_answered_alike(
    forms: str, emulator: Emulator
) -> None:
    with emulator.device(forms, processors=1):
        index, distance = emulator("lookup", *test_launch.lookup_arguments(4100))
    assert index.tolist() == [b % 16 for b in range(4100)]
    assert distance.eq(0).all()


@pytest.mark.parametrize("part", range(4))
def test_random_codebooks_through_sketches_begun_apart(part: int, emulator: Emulator) -> None:
    for seed in range(part * 30, part * 30 + 30):
        case = random_codebook(seed)
        sketch = case.sketch()
        with emulator.device("coordinates", processors=1 + seed % 4, mma_error=MMA_ERROR):
            query = repeated(case, seed)
            expect_pruned(emulator, query, case.keys, case.radii, sketch, case.count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 8, 9, 17, 70])
@pytest.mark.parametrize("dim", [61, 600])
def test_a_sketch_begun_apart_spares_as_many_keys(
    dtype: torch.dtype, batch: int, dim: int, emulator: Emulator
) -> None:
    query, keys, radii, sketch = clusters(dtype, 600, dim, batch)
    counts = []
    for forms in ("", "coordinates"):
        with emulator.device(forms, processors=2, mma_error=MMA_ERROR) as controls:
            counts.append(expect_pruned(emulator, query, keys, radii, sketch))
            # More than 64 queries share the directions within blocks.
            assert controls.launches == (2 if forms and batch <= 64 else 1)
    assert counts[1]["scanned"] == counts[0]["scanned"]
    assert counts[1]["scored"] <= counts[0]["scored"] + batch


def kernel_of(
    emulator: Emulator, forms: str, batch: int, n: int, dim: int, dtype: torch.dtype, chip: int
) -> int | None:
    """Return which kernel scans `n` slots, few of them in use."""
    keys = torch.eye(4, dim, dtype=dtype).as_strided((n, dim), (0, 1))  # all of them one row
    query = torch.eye(4, dim, dtype=dtype)[:1].repeat(batch, 1)
    with emulator.device(forms, processors=1, capability=chip) as controls:
        radii = torch.ones(1).expand(n)
        index, _ = emulator("nearest", query, keys, radii, torch.tensor(4))
        assert index.tolist() == [0] * batch
        return controls.kernel


@pytest.mark.parametrize(
    ("dtype", "few"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)]
)
def test_the_exact_form_is_for_few_queries_or_few_squares_where_doubles_are_cheap(
    dtype: torch.dtype, few: int, emulator: Emulator
) -> None:
    def exact(batch: int, n: int, dim: int, chip: int = 90, forms: str = "exact") -> bool:
        asked = batch, n, dim, dtype, chip
        return kernel_of(emulator, forms, *asked) != kernel_of(emulator, "", *asked)

    large = 100_000, 256  # with 2 queries 5.12e7 squares
    assert exact(few, *large)
    assert not exact(few + 1, *large)
    assert exact(8, 1000, 768)
    for capability, cheap in ((80, True), (100, True), (86, False), (103, False), (120, False)):
        assert exact(8, 100, 64, capability) is cheap
        assert exact(8, 100, 64, capability, forms="exact-always")
    assert not exact(8, 100, 61 if dtype != torch.float32 else 63, forms="exact-always")


def test_forms_are_named_or_an_error_says_what_there_is(emulator: Emulator) -> None:
    with emulator.device("apart,exact"):
        assert emulator.forms() == "exact,apart"
    assert emulator.forms() == ""
    with pytest.raises(ValueError, match=r"must be some of exact, exact-always, apart, rows, "):
        emulator.use("exact,more")
    assert emulator.forms() == ""


@pytest.mark.parametrize("dtype", HALVES)
def test_few_wide_rows_to_a_block_are_scanned_on_cuda_cores(
    dtype: torch.dtype, emulator: Emulator
) -> None:
    query, keys, radii = codebook(dtype, 150, 600, 1)
    grids = []
    for forms in ("", "rows"):
        with emulator.device(forms, processors=1, mma_error=MMA_ERROR) as controls:
            expect(emulator, query[:16], keys, radii)
            grids.append(controls.grid_y)
    assert grids == [1, 2]
