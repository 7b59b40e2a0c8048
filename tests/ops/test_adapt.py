"""adapt_ and adapt: which rows are written, with what, and where the gradients go."""

from __future__ import annotations

import math
from typing import Any

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


@pytest.mark.index_values_are_checked
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


@pytest.mark.on_a_cpu
@pytest.mark.parametrize("name", ["hidden", "values"])
def test_adapt_in_place_refuses_to_drop_a_gradient(name: str, backend: str) -> None:
    p = problem()
    p[name] = p[name].requires_grad_().clone()
    with pytest.raises(RuntimeError, match=f"{name} must not require a gradient in adapt_"):
        grace_kernels.adapt_(**p, backend=backend)
    with torch.no_grad():
        index, _ = grace_kernels.adapt_(**p, backend=backend)
    assert index.tolist() == [5, -1, -1, 2, 2]


@pytest.mark.on_a_cpu
def test_a_backward_that_saved_what_was_overwritten_raises(backend: str) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    hidden = x.exp()  # saves its result
    one = rows(0)
    with torch.no_grad():
        index, _ = grace_kernels.adapt_(
            hidden,
            torch.zeros(1, 4),
            one,
            one,
            one + 1,
            torch.zeros(1, 4),
            torch.ones(1),
            torch.full((1, 3), 7.0),
            backend=backend,
        )
    assert index.item() == 0
    assert hidden.tolist() == [[7.0] * 3, [1.0] * 3]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@pytest.mark.index_values_are_checked
def test_a_call_that_fails_does_not_count_as_a_modification(backend: str) -> None:
    p = problem()
    version = p["hidden"]._version
    with pytest.raises(ValueError, match="count"):
        grace_kernels.adapt_(**p, count=torch.tensor(13), backend=backend)
    assert p["hidden"]._version == version
    grace_kernels.adapt_(**p, backend=backend)
    assert p["hidden"]._version > version


@pytest.mark.on_a_cpu
def test_inference_tensors_are_written_to_all_the_same(backend: str) -> None:
    with torch.inference_mode():
        p = {name: tensor.clone() for name, tensor in problem().items()}
        expected = expected_hidden(p)
        grace_kernels.adapt_(**p, backend=backend)
        assert same_bits(p["hidden"], expected)


@pytest.mark.too_long_interpreted
def test_where_ranges_overlap_the_last_hit_stands_and_gets_the_gradient(backend: str) -> None:
    p = problem(value_dtype=torch.float64)
    p["first_row"], p["last_row"] = rows(0, 0, 0, 1, 2), rows(6, 20, 20, 4, 3)
    hidden, values = p["hidden"].requires_grad_(), p["values"].requires_grad_()

    def function(hidden: Tensor, values: Tensor) -> Tensor:
        return grace_kernels.adapt(**{**p, "hidden": hidden, "values": values}, backend=backend)[0]

    # Sequences 0, 3, 4 hit entries 5, 2, 2; both of the later ones lie within the first.
    out = function(hidden, values)
    assert torch.equal(out[:6], values[[5, 2, 2, 2, 5, 5]])
    assert torch.equal(out[6:], hidden[6:])
    out.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [0, 0, 3, 0, 0, 3, 0, 0, 0, 0, 0, 0]
    assert torch.autograd.gradcheck(function, (hidden, values))
    written = p["hidden"].detach().clone()
    with torch.no_grad():
        grace_kernels.adapt_(**{**p, "hidden": written}, backend=backend)
    assert torch.equal(written, out)


@pytest.mark.on_a_cpu
def test_no_gradient_is_built_for_frozen_values(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        asked.append(arguments[-1])
        return ops.reference_adapt_backward(*arguments)

    monkeypatch.setattr(ops, "adapt_backward", watched)
    for name, slots in (("hidden", 0), ("values", 12)):
        p = problem()
        p[name].requires_grad_()
        grace_kernels.adapt(**p, backend=backend)[0].sum().backward()
        assert asked.pop() == slots
        expected = torch.zeros(12) if name == "values" else torch.ones(20)
        if name == "values":
            expected[5], expected[2] = 3.0, 4.0
        else:
            expected[[0, 1, 2, 10, 15, 16, 17]] = 0.0
        assert p[name].grad is not None
        assert torch.equal(p[name].grad[:, 0], expected)


@pytest.mark.on_a_cpu
def test_torch_func_differentiates_adapt_or_refuses(backend: str) -> None:
    p = problem(value_dtype=torch.float64)

    def loss(hidden: Tensor, values: Tensor) -> Tensor:
        changed = {**p, "hidden": hidden, "values": values}
        return grace_kernels.adapt(**changed, backend=backend)[0].square().sum()

    plain = p["hidden"].clone().requires_grad_(), p["values"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(*plain), plain)
    arguments = p["hidden"], p["values"]
    for got, want in zip(torch.func.grad(loss, (0, 1))(*arguments), expected, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="forward mode AD"):
        torch.func.jvp(loss, arguments, arguments)
    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.func.vmap(loss, (0, None))(torch.stack([p["hidden"]] * 2), p["values"])


@pytest.mark.on_a_cpu
@pytest.mark.parametrize(
    ("strides", "overlaps"),
    [
        ((0, 1), True),
        ((1, 0), True),
        ((0, 0), True),
        ((1, 1), True),
        ((6, 19), True),  # only the first element of the last column, in the last row but one
        ((7, 19), False),
        ((6, 20), True),
        ((2, 6), True),
        ((1, 20), False),
        ((1, 19), True),
        ((7, 1), False),
        ((6, 1), True),
        ((14, 2), False),
        ((12, 2), True),
    ],
)
def test_a_hidden_that_overlaps_itself_is_refused(
    strides: tuple[int, int], overlaps: bool, backend: str
) -> None:
    hidden = torch.zeros(400).as_strided((20, 7), strides)
    place = torch.arange(20)[:, None] * strides[0] + torch.arange(7) * strides[1]
    assert (place.unique().numel() < 140) == overlaps
    p = {**problem(), "hidden": hidden}
    if not overlaps:
        grace_kernels.adapt_(**p, backend=backend)
        return
    with pytest.raises(ValueError, match="hidden must not hold two elements in one place"):
        grace_kernels.adapt_(**p, backend=backend)
    assert hidden.eq(0).all()
    assert same_bits(
        grace_kernels.adapt(**p, backend=backend)[0], expected_hidden({**p, "hidden": hidden + 0})
    )


@pytest.mark.on_a_cpu
def test_a_hidden_that_shares_memory_with_values_is_refused(backend: str) -> None:
    p = problem()
    memory = torch.zeros(60 * 7)
    p["values"] = memory[21 * 7 : 33 * 7].view(12, 7)
    for start in (7 + 1, 21 * 7, 33 * 7 - 1):  # the first and the last meet in one element
        p["hidden"] = memory[start : start + 20 * 7].view(20, 7)
        with pytest.raises(ValueError, match="hidden must not share memory with values"):
            grace_kernels.adapt_(**p, backend=backend)
    apart = torch.zeros(32 * 7)
    p["values"], p["hidden"] = apart[: 12 * 7].view(12, 7), apart[12 * 7 :].view(20, 7)
    p["values"].copy_(problem()["values"])
    expected = expected_hidden(p)
    grace_kernels.adapt_(**p, backend=backend)
    assert same_bits(p["hidden"], expected)


@pytest.mark.too_long_interpreted
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
