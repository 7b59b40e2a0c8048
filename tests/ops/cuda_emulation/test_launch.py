"""adapt_ and the launcher of the CUDA kernels, emulated: rows written, tickets, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from grace_kernels import reference
from grace_kernels.testing import same_bits

from .emulator import Emulator

VALUE_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def problem(dtype: torch.dtype, value_dtype: torch.dtype, batch: int, width: int) -> list[Tensor]:
    """Arguments of adapt_ in order: hits, misses, sequences that do not ask, ranges of rows."""
    generator = torch.Generator().manual_seed(batch + width)
    keys = torch.randn(12, 24, generator=generator).to(dtype)
    source = torch.randn(batch + 3, 24, generator=generator).to(dtype)
    slots = torch.randint(12, (batch,), generator=generator)
    source[1 : batch + 1 : 2] = keys[slots][::2]
    query_row = torch.arange(1, batch + 1)
    query_row[3::5] = -1
    first = torch.arange(batch) * 2
    last = first + torch.arange(batch) % 3
    return [
        torch.randn(2 * batch + 3, width, generator=generator).to(value_dtype),
        source,
        query_row,
        first,
        last,
        keys,
        torch.full((12,), 0.5),
        torch.randn(12, width, generator=generator).to(value_dtype),
    ]


def expect(emulator: Emulator, arguments: list[Tensor], clamped: list[Tensor] | None = None) -> int:
    """Assert that adapt_ does what the reference does (with `clamped`); return the hits."""
    exact = [*(clamped or arguments)]
    exact[0] = exact[0].clone()
    expected = reference.adapt_(*exact)
    index, distance = emulator("adapt_", *arguments)
    assert index.tolist() == expected[0].tolist()
    assert same_bits(distance, expected[1])
    assert same_bits(arguments[0], exact[0])
    return int((index >= 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("batch", [1, 5, 20, 70])
def test_hits_write_their_rows_and_nothing_else_is_touched(
    dtype: torch.dtype, value_dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    hits = 0
    with emulator.device() as controls:
        for width in (1, 7, 16, 600):
            hits += expect(emulator, problem(dtype, value_dtype, batch, width))
        assert controls.launches == 4
    assert hits > 0


@pytest.mark.parametrize(
    "layout", ["columns first", "rows apart", "every other column", "odd start"]
)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_hidden_source_and_values_may_have_any_strides(
    layout: str, value_dtype: torch.dtype, emulator: Emulator
) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "columns first":
            return t.T.contiguous().T
        if layout == "rows apart":
            return torch.cat([t, torch.full_like(t, math.nan)], dim=1)[:, : t.shape[1]]
        if layout == "odd start":
            memory = t.new_zeros(t.numel() + 1)[1:].view(t.shape)
            return memory.copy_(t)
        return t.repeat_interleave(2, dim=1)[:, ::2]

    arguments = problem(torch.bfloat16, value_dtype, 20, 16)
    for at in (0, 1, 5, 7):
        arguments[at] = laid_out(arguments[at])
    for at in (2, 3, 4):
        arguments[at] = arguments[at].repeat_interleave(3)[::3]
    with emulator.device():
        assert expect(emulator, arguments) > 0
    if layout == "rows apart":
        assert arguments[0]._base is not None
        assert arguments[0]._base[:, 16:].isnan().all()


@pytest.mark.parametrize("batch", [3, 20])
def test_index_arguments_out_of_range_are_clamped(batch: int, emulator: Emulator) -> None:
    arguments = problem(torch.bfloat16, torch.float32, batch, 16)
    hidden, source, query_row, first, last = arguments[:5]
    rows = hidden.shape[0]
    query_row[1] = source.shape[0]
    query_row[2] = 2**62
    first[0], last[0] = -(2**62), 2
    last[batch - 1] = 2**62
    exact = [*arguments]
    exact[2] = torch.where(query_row < source.shape[0], query_row, -1)
    exact[3], exact[4] = first.clamp(0, rows), last.clamp(0, rows)
    with emulator.device():
        assert expect(emulator, arguments, exact) > 0
        arguments[4], exact[4] = first - 1, exact[3]  # last before first: empty
        assert expect(emulator, arguments, exact) > 0


def test_where_ranges_overlap_the_last_hit_of_a_block_stands(emulator: Emulator) -> None:
    for width, batch in ((16, 64), (5, 64), (600, 8)):
        arguments = problem(torch.bfloat16, torch.float32, batch, width)
        arguments[3] = arguments[3] // 3
        arguments[4] = arguments[3] + 9
        with emulator.device():
            assert expect(emulator, arguments) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 8, 20, 70])
def test_the_layers_input_and_output_may_be_one_tensor(
    dtype: torch.dtype, batch: int, emulator: Emulator
) -> None:
    # Every hit writes over the query of the sequence before it, of another block too, which may be
    # the last to arrive.
    arguments = problem(dtype, dtype, batch, 24)
    both = arguments[1]
    both[:batch] = arguments[5][torch.arange(batch) % 12]
    arguments[0] = both
    arguments[2] = torch.arange(batch)
    arguments[3] = (torch.arange(batch) - 1).clamp(min=0)
    arguments[4] = arguments[3] + 1
    exact = [*arguments]
    exact[0], exact[1] = both.clone(), both.clone()
    reference.adapt_(*exact)
    with emulator.device(processors=2) as controls:
        for seed in (1, 2, 3):
            controls.seed = seed
            arguments[0] = arguments[1] = both.clone()
            emulator("adapt_", *arguments)
            assert same_bits(arguments[0], exact[0])


def test_empty_batches_codebooks_sources_and_outputs_work(emulator: Emulator) -> None:
    arguments = problem(torch.bfloat16, torch.float32, 5, 8)
    none = torch.zeros(0, dtype=torch.int64)
    with emulator.device() as controls:
        index, distance = emulator("adapt_", *arguments[:2], none, none, none, *arguments[5:])
        assert (index.shape, distance.shape, controls.launches) == ((0,), (0,), 0)
        empty = [*arguments]
        for at in (5, 6, 7):
            empty[at] = empty[at][:0]
        assert expect(emulator, empty) == 0
        nobody = [*arguments]
        nobody[1], nobody[2] = nobody[1][:0], nobody[2] * 0 - 1
        assert expect(emulator, nobody) == 0
        narrow = [*arguments]
        narrow[0], narrow[7] = narrow[0][:, :0], narrow[7][:, :0]
        assert expect(emulator, narrow) > 0
        gone = [*arguments]
        gone[0], gone[3], gone[4] = gone[0][:0], gone[3] * 0, gone[4] * 0
        assert expect(emulator, gone) > 0


def lookup_arguments(batch: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    keys = torch.eye(16, dtype=dtype)
    return [keys.repeat(-(-batch // 16), 1)[:batch], keys, torch.ones(16)]


def test_more_queries_than_a_launch_takes_are_answered_alike(emulator: Emulator) -> None:
    arguments = lookup_arguments(4100)
    with emulator.device(processors=1) as controls:
        index, distance = emulator("lookup", *arguments)
        assert controls.launches == 2
    assert index.tolist() == [b % 16 for b in range(4100)]
    assert distance.eq(0).all()


def test_calls_on_a_stream_share_tickets_and_captured_calls_never_do(emulator: Emulator) -> None:
    with emulator.device() as controls:
        seen = []
        for capturing in (False, True, True, False, True):
            controls.capturing = capturing
            emulator("lookup", *lookup_arguments(20))
            seen.append(controls.tickets)
        assert controls.mallocs == 1
        assert seen[0] == seen[3]
        assert len(set(seen)) == 4


@pytest.mark.parametrize("batch", [1, 100])
def test_the_first_call_may_be_a_captured_one(batch: int, emulator: Emulator) -> None:
    with emulator.device(capturing=True) as controls:
        index, _ = emulator("lookup", *lookup_arguments(batch))
        assert controls.mallocs == 1
    assert index.tolist() == [b % 16 for b in range(batch)]


def test_streams_have_tickets_of_their_own_and_captures_never_run_out(emulator: Emulator) -> None:
    words = 4 * 512  # bytes
    with emulator.device() as controls:
        eager = [emulator.take(stream, 512) for stream in (0, 8, 16, 8, 0)]
        assert eager[3:] == [eager[1], eager[0]]
        assert len(set(eager)) == 3
        controls.capturing = True
        captured = [emulator.take(8, 512) for _ in range(511)]
        assert controls.mallocs == 2  # 1 MiB each
        taken = sorted({*eager, *captured})
        assert len(taken) == 514
        assert min(b - a for a, b in itertools.pairwise(taken)) == words
        single = [emulator.take(8, 1) for _ in range(4)]
        assert [at - single[0] for at in single] == [0, 4, 8, 12]
        assert min(abs(single[0] - at) for at in taken) >= words


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fail_launch", "grace_cuda: the launch failed: an emulated error"),
        ("fail_malloc", "grace_cuda: allocating tickets .* failed: an emulated error"),
    ],
)
def test_a_failure_is_a_clear_error_and_nothing_is_written(
    setting: str, message: str, emulator: Emulator
) -> None:
    arguments = problem(torch.bfloat16, torch.float32, 5, 8)
    before = arguments[0].clone()
    with emulator.device(**{setting: 1}):
        with pytest.raises(RuntimeError, match=message):
            emulator("adapt_", *arguments)
        assert same_bits(arguments[0], before)
    with emulator.device():
        assert expect(emulator, arguments) > 0


def test_memory_that_is_not_to_be_had_is_an_error_that_says_what_was_wanted(
    emulator: Emulator,
) -> None:
    keys = torch.eye(16)
    query = keys[:1].expand(2**46, 16)
    with emulator.device() as controls:
        with pytest.raises(
            RuntimeError,
            match=rf"grace_cuda: index of {8 * 2**46} bytes could not be allocated on cuda:-?\d+ "
            r"\(out of memory\?\): \S",
        ):
            emulator("lookup", query, keys, torch.ones(16))
        assert controls.launches == 0


def test_a_failure_after_the_first_launch_says_what_was_answered(emulator: Emulator) -> None:
    with emulator.device(processors=1, fail_launch=1, good_launches=1) as controls:
        with pytest.raises(RuntimeError, match=r"query 4096 and later .* before answered, failed"):
            emulator("lookup", *lookup_arguments(4100))
        assert controls.launches == 1


def test_the_launches_of_a_call_share_tickets_even_in_a_capture(emulator: Emulator) -> None:
    with emulator.device(processors=1, capturing=True) as controls:
        taken = []
        for batch in (4100, 20):
            emulator("lookup", *lookup_arguments(batch))
            taken.append(controls.tickets)
        assert taken[1] - taken[0] == 4 * (4096 // 64)


def test_a_slice_has_no_more_rows_than_an_int_can_count(emulator: Emulator) -> None:
    keys = torch.zeros(1, 8, dtype=torch.bfloat16)
    with emulator.device(processors=1) as controls:
        for rows, slices in ((2**30, 1), (2**30 + 1, 2), (2**36, 64)):
            many = keys.expand(rows, 8), torch.zeros(1).expand(rows), torch.tensor(70)
            assert emulator("lookup", keys.expand(65, 8), *many)[0].tolist() == [0] * 65
            assert controls.grid_x == slices
        more = 2**36 + 1
        with pytest.raises(RuntimeError, match=f"at most {2**36} rows on CUDA, got {more}"):
            emulator("lookup", keys, keys.expand(more, 8), torch.zeros(1).expand(more))


def test_a_device_with_little_shared_memory_gets_the_narrow_kernel(emulator: Emulator) -> None:
    arguments = lookup_arguments(64)
    blocks = []
    for limit in (227 << 10, 99 << 10):
        with emulator.device(shared_limit=limit) as controls:
            assert emulator("lookup", *arguments)[0].tolist() == [b % 16 for b in range(64)]
            assert controls.shared_bytes <= limit
            blocks.append(controls.grid_y)
    assert blocks == [1, 4]


def test_the_grid_depends_on_shapes_and_not_on_count(emulator: Emulator) -> None:
    grids = set()
    with emulator.device(processors=7) as controls:
        for count in (0, 1, 16):
            emulator("lookup", *lookup_arguments(1), torch.tensor(count))
            grids.add((controls.grid_x, controls.grid_y))
    assert grids == {(2, 1)}


def test_rows_too_wide_are_refused(emulator: Emulator) -> None:
    wide = torch.zeros(1, dtype=torch.bfloat16).as_strided((1, 2**24 + 1), (1, 0))
    with emulator.device(), pytest.raises(RuntimeError, match="at most 16777216 columns"):
        emulator("lookup", wide, wide, torch.ones(1))
