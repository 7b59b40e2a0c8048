"""One int64 per query and rank, of which the least decides: nearest key, lowest slot, hit or not.

    bit  62..32   s, the canonical squared distance: the bits of a float32 that is not negative rise
                  with its value
    bit  31..1    the slot
    bit  0        1 where the entry's radius does not cover the query

Not the distance but its square: the root of two neighbouring float32 is often the same, and the
slot must decide between equal squares alone. The last bit decides nothing, as no two ranks hold one
slot; it is what only the owner of the radius knows, brought along.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 1 << 31  # numbered by 31 bits
NONE = (1 << 63) - 1  # the ballot of a rank that has nobody to name


def distance_of(s: Tensor) -> Tensor:
    """Return the canonical distance, `[B]` float32, of a canonical squared distance."""
    return s.double().sqrt().float()


def cast(s: Tensor, slot: Tensor, hit: Tensor, named: Tensor) -> Tensor:
    """Return ballots `[B]` int64.

    Args:
        s: `[B]` float32, not negative, not NaN.
        slot: `[B]` int64 in `[0, SLOTS)`.
        hit: `[B]` bool, the radius of the slot's entry covers the query.
        named: `[B]` bool, there is a slot at all.
    """
    ballot = (s.view(torch.int32).long() << 32) | (slot << 1) | (~hit).long()
    return torch.where(named, ballot, NONE)


def read(ballot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return slot (-1: none), distance (+inf where none) and hit of the least ballots `[B]`."""
    none = ballot == NONE
    slot = ((ballot & 0xFFFFFFFF) >> 1).masked_fill(none, -1)
    s = (ballot >> 32).int().view(torch.float32).masked_fill(none, torch.inf)
    return slot, distance_of(s), (ballot & 1) == 0
