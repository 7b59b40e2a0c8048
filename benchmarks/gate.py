"""The gate before the clock: what the right answers are, and whether a contestant gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits

_PIECE = 1 << 25  # elements of keys that are widened at a time
_ROUNDING = 1e-5  # of a distance: what sums in float32 lose, and nothing to speak of

Answer = tuple[Tensor, Tensor | None]
"""Index and distance of each query; None from a peer that gives no distance."""


def nearest_few(query: Tensor, keys: Tensor) -> Tensor:
    """Return the slots `[B, 4]` of the four nearest keys of each query, ascending.

    They come from a float64 product, whose error is a billion times smaller than the gaps of
    random data.
    """
    few = min(4, len(keys))
    wide = query.double()
    scores, slots = [], []
    step = max(1, _PIECE // max(1, keys.shape[1]))
    for start in range(0, len(keys), step):
        part = keys[start : start + step].double()
        least = (part.square().sum(dim=1) - 2 * (wide @ part.T)).topk(
            min(few, len(part)), dim=1, largest=False
        )
        scores.append(least.values)
        slots.append(least.indices + start)
    best = torch.cat(scores, dim=1).topk(few, dim=1, largest=False).indices
    return torch.cat(slots, dim=1).gather(1, best).sort(dim=1).values  # ties: the lowest


def right_answers(
    query: Tensor,
    keys: Tensor,
    radii: Tensor,
    slot: Tensor | None = None,
    *,
    operations: Sequence[str] = ("nearest", "lookup"),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what operations must give, on the CPU: the reference decides among few keys.

    Args:
        query: `[B, D]`.
        keys: `[N, D]`, on the device of the query.
        radii: `[N]`.
        slot: what `nearest_few` gave for these keys, for other radii perhaps.
        operations: of which the answers are wanted.
    """
    if slot is None:
        slot = nearest_few(query, keys)
    near, reach = keys[slot].to("cpu", query.dtype), radii[slot].cpu()
    query, slot = query.cpu(), slot.cpu()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in operations:
        operation = getattr(grace_kernels, name)
        index = torch.full((len(query),), -1)
        distance = torch.full((len(query),), math.inf)
        for b in range(len(query)):
            at, d = operation(query[b : b + 1], near[b], reach[b], backend="reference")
            if int(at) >= 0:
                index[b], distance[b] = slot[b, int(at)], d[0]
        found[name] = index, distance
    return found


def judged(got: Answer, right: tuple[Tensor, Tensor]) -> tuple[str, str]:
    """Return `exact`, `rounded` or `wrong`, and what there is to say."""
    index, distance = got[0].cpu(), got[1]
    off = int((index != right[0]).sum())
    if off:
        return "wrong", f"{off} of {len(index)} indices wrong"
    if distance is None:
        return "rounded", "gives no distance"
    distance = distance.cpu()
    if same_bits(distance, right[1]):
        return "exact", ""
    hit = right[0] >= 0
    if not same_bits(distance[~hit], right[1][~hit]):
        return "wrong", "a distance without a hit"
    error = ((distance - right[1])[hit].abs() / right[1][hit].clamp(min=1e-30)).max()
    if error.isnan():
        return "wrong", "a distance is NaN"
    if error < _ROUNDING:
        return "rounded", ""
    return "rounded", f"distances off by up to {float(error):.1g} of themselves"


def judged_call(
    call: Callable[[], Answer],
    right: tuple[Tensor, Tensor],
    hidden: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[str, str]:
    """Judge a call: its answers and, where it writes, the rows that it writes.

    Args:
        call: what is judged.
        right: what it must give.
        hidden: `[B, V]`, into whose row b it writes what query b hits; zeros before.
        values: `[N, V]`, what is written.
    """
    if hidden is None or values is None:
        return judged(call(), right)
    hidden.zero_()
    verdict = judged(call(), right)
    hit = right[0] >= 0
    wanted = torch.zeros_like(hidden)
    wanted[hit] = values[right[0][hit].to(values.device)]
    if verdict[0] != "wrong" and not same_bits(hidden, wanted):
        return "wrong", "writes other rows"
    return verdict
