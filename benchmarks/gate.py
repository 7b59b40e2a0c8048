"""The gate before the clock: what the right answers are, and whether a contestant gives them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits

_PIECE = 1 << 25  # elements of keys that are widened at a time


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
    query: Tensor, keys: Tensor, radii: Tensor, slot: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what `nearest` and `lookup` must give, on the CPU: the reference decides among few.

    Args:
        query: `[B, D]`.
        keys: `[N, D]`.
        radii: `[N]`.
        slot: what `nearest_few` gave for these keys, for other radii perhaps.
    """
    if slot is None:
        slot = nearest_few(query, keys)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("nearest", "lookup"):
        operation = getattr(grace_kernels, name)
        index = torch.full((len(query),), -1)
        distance = torch.full((len(query),), math.inf)
        for b, near in enumerate(slot):
            at, d = operation(
                query[b : b + 1], keys[near].to(query.dtype), radii[near], backend="reference"
            )
            if int(at) >= 0:
                index[b], distance[b] = near[int(at)], d[0]
        found[name] = index, distance
    return found


def judged(got: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor]) -> tuple[str, str]:
    """Return `exact`, `rounded` or `wrong`, and what there is to say."""
    index, distance = got
    off = int((index != right[0]).sum())
    if off:
        return "wrong", f"{off} of {len(index)} indices wrong"
    if distance is None:
        return "rounded", "gives no distance"
    if same_bits(distance, right[1]):
        return "exact", ""
    hit = right[0] >= 0
    error = ((distance - right[1])[hit].abs() / right[1][hit].clamp(min=1e-30)).max()
    return "rounded", f"distances off by up to {float(error):.1g} of themselves"
