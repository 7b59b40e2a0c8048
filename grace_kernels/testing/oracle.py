"""An independent oracle and bitwise comparison.

The oracle shares no code with the reference: it is plain Python arithmetic (IEEE fp64), one pair at
a time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .inputs import INF


def oracle_squared_distance(query: list[float], key: list[float]) -> float:
    """Return the canonical s of one pair, a float32 value; NaN where an element is NaN."""
    lanes = [0.0] * 32
    for i, (x, k) in enumerate(zip(query, key, strict=True)):
        difference = x - k
        lanes[i // 8 % 32] += difference * difference
    for step in (16, 8, 4, 2, 1):
        for lane in range(step):
            lanes[lane] += lanes[lane + step]
    with np.errstate(over="ignore"):
        return float(np.float32(lanes[0]))


def oracle(
    query: Tensor, keys: Tensor, radii: Tensor, count: int | None, *, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Return what `lookup` (`bounded`) or `nearest` must return, by brute force in Python."""
    rows = keys.double().tolist()
    radius = radii.double().tolist()
    index, distance = [], []
    for x in query.double().tolist():
        best, slot = INF, -1
        for n in range(len(rows) if count is None else count):
            if radius[n] == -INF:
                continue
            s = oracle_squared_distance(x, rows[n])
            s = INF if math.isnan(s) else s
            if slot < 0 or s < best:
                best, slot = s, n
        d = float(np.float32(math.sqrt(best)))
        hit = slot >= 0 and not any(math.isnan(v) for v in x)
        if bounded:
            hit = hit and d <= radius[slot]
        index.append(slot if hit else -1)
        distance.append(d if hit else INF)
    return torch.tensor(index, dtype=torch.int64), torch.tensor(distance, dtype=torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
