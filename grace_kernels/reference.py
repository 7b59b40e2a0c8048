"""What every kernel must compute, in plain PyTorch, written to be read.

    s(x, k) = round_to_fp32(sum_i (x_i - k_i)^2)        d(x, k) = sqrt_fp32(s(x, k))

The differences, squares and sums are fp64 and unfused. The order of the sum is fixed so that every
implementation gives the same bits: element i belongs to lane (i // 8) mod 32, a lane adds its
elements in ascending i, and the 32 lanes are folded by halves: 16, 8, 4, 2, 1.

Only these loops decide what is right; speed is the business of the kernels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 32  # partial sums
RUN = 8  # neighbouring elements that one lane takes before the next lane's turn
_BUDGET = 1 << 22  # fp64 differences held at a time (32 MiB)


def squared_distances(query: Tensor, keys: Tensor) -> Tensor:
    """Return the canonical s of every query and key, `[B, N]` fp32; NaN where an element is NaN."""
    return _squared_length(_padded(query)[:, None, :] - _padded(keys)[None, :, :])


def paired_squared_distances(query: Tensor, keys: Tensor) -> Tensor:
    """Return the canonical s of each query and the key in its row, `[B]` fp32; NaN as above."""
    return _squared_length(_padded(query) - _padded(keys))


def _padded(rows: Tensor) -> Tensor:
    # 0 - 0 adds nothing to the end of a lane.
    return F.pad(rows.double(), (0, -rows.shape[1] % (LANES * RUN)))


def _squared_length(difference: Tensor) -> Tensor:
    squares = difference.square().unflatten(-1, (-1, LANES, RUN))
    lanes = squares.new_zeros(*squares.shape[:-3], LANES)
    for chunk in range(squares.shape[-3]):
        for element in range(RUN):
            lanes = lanes + squares[..., chunk, :, element]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0].float()


def nearest(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return index and distance of the nearest live key; see `grace_kernels.nearest`."""
    batch, capacity = query.shape[0], keys.shape[0]
    row = query.shape[1] + LANES * RUN  # fp64 numbers a pair takes
    at_once = max(1, _BUDGET // row)
    if batch > at_once:
        parts = [nearest(part, keys, radii, count) for part in query.split(at_once)]
        return torch.cat([index for index, _ in parts]), torch.cat([reach for _, reach in parts])
    live = radii != -math.inf
    if count is not None:
        _check_count(count, capacity)
        live = live & (torch.arange(capacity, device=keys.device) < count)

    best = query.new_full((batch,), math.inf, dtype=torch.float32)
    index = query.new_full((batch,), -1, dtype=torch.int64)
    step = max(1, _BUDGET // max(1, batch * row))
    for start in range(0, capacity, step):
        s = squared_distances(query, keys[start : start + step])
        s = torch.where(s.isnan(), math.inf, s)
        here = live[start : start + step]
        least = s.masked_fill(~here, math.inf).amin(dim=1)
        at = here & (s == least[:, None])
        # argmax gives the first of equals, and only a strictly smaller s displaces an earlier
        # chunk: among ties the lowest slot wins.
        better = at.any(dim=1) & ((index < 0) | (least < best))
        index = torch.where(better, start + at.int().argmax(dim=1), index)
        best = torch.where(better, least, best)

    index = index.masked_fill(query.isnan().any(dim=1), -1)
    # torch.sqrt of fp32 is not correctly rounded on every CPU; through fp64 it is.
    distance = best.double().sqrt().float()
    return index, distance.masked_fill(index < 0, math.inf)


def lookup(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the nearest live key where its radius covers the query; see `grace_kernels.lookup`."""
    index, distance = nearest(query, keys, radii, count)
    if keys.shape[0] == 0:
        return index, distance
    miss = (index < 0) | ~(distance <= radii[index.clamp(min=0)])
    return index.masked_fill(miss, -1), distance.masked_fill(miss, math.inf)


def adapt_(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the values of hits into rows of `hidden`; see `grace_kernels.adapt_`."""
    if hidden.device.type == "cpu":
        check_rows(query_row, first_row, last_row, source.shape[0], hidden.shape[0])
    asks = (query_row >= 0) & (query_row < source.shape[0])
    if source.shape[0] > 0:
        query = source[torch.where(asks, query_row, 0)]
    else:
        query = source.new_zeros(query_row.shape[0], source.shape[1])
    index, distance = lookup(query, keys, radii, count)
    index = index.masked_fill(~asks, -1)
    distance = distance.masked_fill(~asks, math.inf)

    if index.shape[0] > 0 and keys.shape[0] > 0:
        owner = _owners(index, first_row, last_row, hidden.shape[0])
        slot = index[owner.clamp(min=0)].clamp(min=0)
        hidden.copy_(torch.where((owner >= 0)[:, None], values[slot], hidden))
    return index, distance


def pruned_lookup(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None, *sketch: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `lookup` does: a sketch changes no answer, and here nothing else either."""
    return lookup(query, keys, radii, count)


def pruned_adapt_(
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
) -> tuple[Tensor, Tensor]:
    """Do what `adapt_` does."""
    return adapt_(hidden, source, query_row, first_row, last_row, keys, radii, values, count)


def adapt_backward(
    grad: Tensor, index: Tensor, first_row: Tensor, last_row: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `adapt` for `hidden` `[R, V]` and `values` `[slots, V]`.

    A replaced row passes its gradient to the value that replaced it and zero to `hidden`. The rows
    of one value are added in ascending order, in fp32 (fp64 for fp64), without atomics on a CPU and
    on CUDA, so the sum has the same bits every time. `slots` is 0 where only `hidden` matters.
    """
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_values = grad.new_zeros(slots, grad.shape[1], dtype=wide)
    grad_hidden = grad.clone(memory_format=torch.contiguous_format)
    if index.shape[0] > 0:
        owner = _owners(index, first_row, last_row, grad.shape[0])
        kept = (owner < 0)[:, None]
        grad_hidden = torch.where(kept, grad_hidden, 0)
        if slots > 0:
            slot = index[owner.clamp(min=0)].clamp(min=0)
            rows = torch.where(kept, 0, grad).to(wide)
            if grad.device.type == "cpu":  # in order here, and with atomics on CUDA;
                grad_values.index_add_(0, slot, rows)
            else:  # the other way round: CUDA sorts the indices first
                grad_values.index_put_((slot,), rows, accumulate=True)
    return grad_hidden, grad_values.to(grad.dtype)


def _owners(index: Tensor, first_row: Tensor, last_row: Tensor, rows: int) -> Tensor:
    """Return, for each of `rows` rows, the last batch item whose hit covers it, or -1."""
    row = torch.arange(rows, device=index.device)[:, None]
    covers = (index >= 0) & (row >= first_row) & (row < last_row)
    return torch.where(covers, torch.arange(index.shape[0], device=index.device), -1).amax(dim=1)


def _check_count(count: Tensor, capacity: int) -> None:
    # Reading the value would stall a GPU; there a count outside the range acts as the nearer bound.
    if count.device.type == "cpu" and not 0 <= int(count) <= capacity:
        raise ValueError(f"count must lie in [0, {capacity}], got {int(count)}")


def check_rows(
    query_row: Tensor, first_row: Tensor, last_row: Tensor, source_rows: int, rows: int
) -> None:
    """Raise where an index argument of a sequence that asks lies outside its range; reads them."""
    for b, row in enumerate(query_row.tolist()):
        if row < 0:
            continue
        if row >= source_rows:
            raise ValueError(f"query_row must be less than {source_rows}, got {row} at [{b}]")
        first, last = int(first_row[b]), int(last_row[b])
        if not 0 <= first <= rows:
            raise ValueError(f"first_row must lie in [0, {rows}], got {first} at [{b}]")
        if not first <= last <= rows:
            raise ValueError(f"last_row must lie in [{first}, {rows}], got {last} at [{b}]")
