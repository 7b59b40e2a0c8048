"""The gradient of `adapt`: one `torch.autograd.Function` over the forward and backward operators.

Only entered when a gradient is asked for: `register_autograd` would cost every call in grad mode
some 18 microseconds even where nothing requires one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


class Adapt(torch.autograd.Function):
    """`adapt` with gradients for `hidden` and `values`."""

    @staticmethod
    def forward(
        op: Any,
        hidden: Tensor,
        source: Tensor,
        query_row: Tensor,
        first_row: Tensor,
        last_row: Tensor,
        keys: Tensor,
        radii: Tensor,
        values: Tensor,
        count: Tensor | None,
        *sketch: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = hidden.clone(memory_format=torch.contiguous_format)
        index, distance = op(
            out, source, query_row, first_row, last_row, keys, radii, values, count, *sketch
        )
        return out, index, distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what backward needs; apart from `forward`, as torch.func demands."""
        first_row, last_row, values = inputs[4], inputs[5], inputs[8]
        _, index, distance = output
        ctx.save_for_backward(index, first_row, last_row)
        ctx.slots = values.shape[0]
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(index, distance)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _index: Any, _distance: Any) -> tuple[Tensor | None, ...]:
        index, first_row, last_row = ctx.saved_tensors
        wants_hidden, wants_values = ctx.needs_input_grad[1], ctx.needs_input_grad[8]
        # A codebook of frozen values can be far larger than the layer's output.
        slots = ctx.slots if wants_values else 0
        to_hidden, to_values = ops.adapt_backward(grad, index, first_row, last_row, slots)
        hidden = to_hidden if wants_hidden else None
        values = to_values if wants_values else None
        rest = (None,) * (ctx.inputs - 9)
        return (None, hidden, None, None, None, None, None, None, values, *rest)
