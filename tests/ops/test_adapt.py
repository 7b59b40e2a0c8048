"""adapt_ and adapt: which rows are written, with what, and where the gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import ops
from grace_kernels.testing import same_bits

VALUE_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def problem(
    dtype: torch.dtype = torch.float32, value_dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Five sequences over 20 rows: a hit, a miss, one that does not ask, two hits of one entry."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(12, 24, generator=generator)
    source = torch.randn(9, 24, generator=generator)
    source[4] = keys[5] + 0.01
    source[7] = keys[2] - 0.01
    source[1] = keys[2] + 0.02
    return {
        "hidden": torch.randn(20, 7, generator=generator).to(value_dtype),
        "source": source.to(dtype),
        "query_row": rows(4, 0, -1, 7, 1),
        "first_row": rows(0, 3, -50, 10, 15),
        "last_row": rows(3, 6, 99, 11, 15 + 3),
        "keys": keys.to(dtype),
        "radii": torch.full((12,), 0.5),
        "values": torch.randn(12, 7, generator=generator).to(value_dtype),
    }


def expected_hidden(p: dict[str, Tensor]) -> Tensor:
    hidden = p["hidden"].clone()
    hidden[0:3] = p["values"][5]
    hidden[10] = p["values"][2]
    hidden[15:18] = p["values"][2]
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_hits_write_their_rows_and_nothing_else_is_touched(
    dtype: torch.dtype, value_dtype: torch.dtype, backend: str
) -> None:
    p = problem(dtype, value_dtype)
    expected = expected_hidden(p)
    untouched = p["hidden"].clone()
    out, index, distance = grace_kernels.adapt(**p, backend=backend)
    assert same_bits(p["hidden"], untouched)
    assert same_bits(out, expected)
    asked, reach = grace_kernels.lookup(
        p["source"][rows(4, 0, 7, 1)], p["keys"], p["radii"], backend=backend
    )
    assert index.tolist() == [5, -1, -1, 2, 2]
    assert asked.tolist() == [5, -1, 2, 2]
    assert same_bits(distance[rows(0, 1, 3, 4)], reach)
    assert distance[2].item() == math.inf

    written = grace_kernels.adapt_(**p, backend=backend)
    assert same_bits(p["hidden"], expected)
    assert torch.equal(written[0], index)
    assert same_bits(written[1], distance)


def test_a_nan_in_an_untouched_row_keeps_its_bits(backend: str) -> None:
    p = problem()
    p["hidden"].view(torch.int32)[5:9] = 0x7FC00123
    expected = expected_hidden(p)
    grace_kernels.adapt_(**p, backend=backend)
    assert same_bits(p["hidden"], expected)


@pytest.mark.parametrize("layout", ["columns first", "rows apart", "every other column"])
def test_hidden_source_and_values_may_have_any_strides(layout: str, backend: str) -> None:
    p = problem()
    expected = expected_hidden(p)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "columns first":
            return t.T.contiguous().T
        if layout == "rows apart":
            return torch.cat([t, torch.full_like(t, math.nan)], dim=1)[:, : t.shape[1]]
        return t.repeat_interleave(2, dim=1)[:, ::2]

    for name in ("hidden", "source", "values", "keys"):
        p[name] = laid_out(p[name])
    p["query_row"] = p["query_row"].repeat_interleave(3)[::3]
    grace_kernels.adapt_(**p, backend=backend)
    assert same_bits(p["hidden"], expected)
    if layout == "rows apart":
        assert p["hidden"]._base is not None
        assert p["hidden"]._base[:, 7:].isnan().all()


def test_the_layers_input_and_output_may_be_one_tensor(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 6, 16, generator=generator)
    both = torch.cat([keys[3:4], keys[4:5]])
    # Row 1 asks after row 0 was written to in no implementation: queries are read first.
    index, _ = grace_kernels.adapt_(
        both,
        both,
        rows(0, 1),
        rows(1, 0),
        rows(2, 1),
        keys,
        torch.zeros(6),
        values,
        backend=backend,
    )
    assert index.tolist() == [3, 4]
    assert torch.equal(both, torch.stack([values[4], values[3]]))


@pytest.mark.parametrize("count", [0, 2, 3, torch.tensor(3)])
def test_entries_after_count_do_not_answer(count: int | Tensor, backend: str) -> None:
    p = problem()
    before = p["hidden"].clone()
    index, _ = grace_kernels.adapt_(**p, count=count, backend=backend)
    hit = int(count) > 2
    assert index.tolist() == ([-1, -1, -1, 2, 2] if hit else [-1] * 5)
    assert torch.equal(p["hidden"], before) != hit


def test_empty_batches_codebooks_and_outputs_work(backend: str) -> None:
    p = problem()
    before = p["hidden"].clone()
    none = rows()
    index, distance = grace_kernels.adapt_(
        **{**p, "query_row": none, "first_row": none, "last_row": none}, backend=backend
    )
    assert index.shape == distance.shape == (0,)
    empty = {"keys": p["keys"][:0], "radii": p["radii"][:0], "values": p["values"][:0]}
    index, distance = grace_kernels.adapt_(**{**p, **empty}, backend=backend)
    assert index.tolist() == [-1] * 5
    assert distance.tolist() == [math.inf] * 5
    assert torch.equal(p["hidden"], before)
    nobody = {"source": p["source"][:0], "query_row": rows(-1, -1, -1, -1, -1)}
    assert grace_kernels.adapt_(**{**p, **nobody}, backend=backend)[0].tolist() == [-1] * 5
    zero = {"hidden": p["hidden"][:0], "first_row": p["first_row"] * 0, "last_row": rows(*[0] * 5)}
    assert grace_kernels.adapt_(**{**p, **zero}, backend=backend)[0].tolist() == [5, -1, -1, 2, 2]
    narrow = {"hidden": p["hidden"][:, :0], "values": p["values"][:, :0]}
    assert grace_kernels.adapt_(**{**p, **narrow}, backend=backend)[0].tolist() == [5, -1, -1, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_row": rows(4, 0, -1, 9, 1)}, r"query_row must be less than 9, got 9 at \[3\]"),
        (
            {"first_row": rows(0, -1, 0, 10, 15)},
            r"first_row must lie .* got -1 at \[1\]",
        ),
        ({"first_row": rows(0, 3, 0, 10, 21)}, r"first_row must lie in \[0, 20\], got 21 at \[4\]"),
        ({"last_row": rows(3, 6, 9, 9, 18)}, r"last_row must lie in \[10, 20\], got 9 at \[3\]"),
        ({"last_row": rows(3, 6, 9, 11, 21)}, r"last_row must lie in \[15, 20\], got 21 at \[4\]"),
        ({"count": torch.tensor(13)}, r"count must lie in \[0, 12\], got 13"),
        ({"count": torch.tensor(-1)}, r"count must lie in \[0, 12\], got -1"),
    ],
)
def test_an_index_out_of_range_raises_and_nothing_is_written(
    changes: dict, message: str, backend: str
) -> None:
    p = {**problem(), **changes}
    before = p["hidden"].clone()
    with pytest.raises(ValueError, match=message):
        grace_kernels.adapt_(**p, backend=backend)
    assert torch.equal(p["hidden"], before)


@pytest.mark.parametrize("name", ["hidden", "values"])
def test_adapt_in_place_refuses_to_drop_a_gradient(name: str, backend: str) -> None:
    p = problem()
    p[name] = p[name].requires_grad_().clone()
    with pytest.raises(RuntimeError, match=f"{name} must not require a gradient in adapt_"):
        grace_kernels.adapt_(**p, backend=backend)
    with torch.no_grad():
        index, _ = grace_kernels.adapt_(**p, backend=backend)
    assert index.tolist() == [5, -1, -1, 2, 2]


def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    p = problem(value_dtype=torch.float64)

    def function(hidden: Tensor, values: Tensor) -> Tensor:
        return grace_kernels.adapt(**{**p, "hidden": hidden, "values": values}, backend=backend)[0]

    hidden, values = p["hidden"].requires_grad_(), p["values"].requires_grad_()
    assert torch.autograd.gradcheck(function, (hidden, values))
    assert torch.autograd.gradcheck(lambda v: function(hidden.detach(), v), (values,))
    assert torch.autograd.gradcheck(lambda h: function(h, values.detach()), (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_to_the_values_that_replaced_the_rows(
    dtype: torch.dtype, backend: str
) -> None:
    p = problem(value_dtype=dtype)
    p["source"].requires_grad_()
    p["keys"].requires_grad_()
    hidden, values = p["hidden"].requires_grad_(), p["values"].requires_grad_()
    out, index, distance = grace_kernels.adapt(**p, backend=backend)
    assert not index.requires_grad
    assert not distance.requires_grad
    upstream = torch.randn(20, 7, generator=torch.Generator().manual_seed(9)).to(dtype)
    out.backward(upstream)
    replaced = torch.zeros(20, dtype=torch.bool)
    replaced[[0, 1, 2, 10, 15, 16, 17]] = True
    assert hidden.grad is not None
    assert values.grad is not None
    assert torch.equal(hidden.grad, torch.where(replaced[:, None], 0, upstream))
    expected = torch.zeros(12, 7)
    for row, slot in ((0, 5), (1, 5), (2, 5), (10, 2), (15, 2), (16, 2), (17, 2)):
        expected[slot] += upstream[row].float()
    assert same_bits(values.grad, expected.to(dtype))
    assert p["source"].grad is None
    assert p["keys"].grad is None


def test_an_upstream_nan_in_a_replaced_row_does_not_reach_hidden() -> None:
    p = problem()
    upstream = torch.ones(20, 7)
    upstream[0] = math.nan
    hidden, values = ops.adapt_backward(
        upstream, rows(5, -1, -1, 2, 2), p["first_row"], p["last_row"], 12
    )
    assert not hidden.isnan().any()
    assert values[5].isnan().all()
    assert not values[2].isnan().any()


def test_gradients_have_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(400, 33, generator=generator)
    index = torch.randint(0, 3, (40,), generator=generator)
    first = torch.arange(40) * 10
    runs = [ops.adapt_backward(grad, index, first, first + 10, 3)[1] for _ in range(5)]
    assert all(same_bits(run, runs[0]) for run in runs)
