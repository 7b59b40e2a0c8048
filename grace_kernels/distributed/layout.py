"""Which rank holds which slot: blocks of neighbouring slots are dealt out in turn.

The owner of a slot follows from its number alone, so there is no table to keep or to send, every
rank knows it without asking, and it is the same after a crash. Slots that come into use later go to
all ranks in turn, and no rank ever has more than a block of slots more than another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Slots = TypeVar("Slots", int, Tensor)  # one slot, or int64 of any shape


@dataclass(frozen=True)
class Layout:
    """Deal blocks of `block` slots out to `world` ranks.

    Args:
        world: number of ranks.
        block: neighbouring slots that one rank holds before the next rank's turn.

    Raises:
        ValueError: either is less than 1.
    """

    world: int
    block: int

    def __post_init__(self) -> None:
        for name in ("world", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def owner(self, slot: Slots) -> Slots:
        """Return the rank that holds a slot."""
        return slot // self.block % self.world

    def row(self, slot: Slots) -> Slots:
        """Return the row in which its owner holds a slot."""
        return slot // (self.block * self.world) * self.block + slot % self.block

    def slot(self, row: Slots, rank: int) -> Slots:
        """Return the slot that `rank` holds in a row; it rises with the row."""
        return (row // self.block * self.world + rank) * self.block + row % self.block

    def rows(self, count: int, rank: int) -> int:
        """Return how many of the first `count` slots `rank` holds, which are its first rows."""
        turn = self.block * self.world
        rest = count % turn - rank * self.block
        return count // turn * self.block + min(max(rest, 0), self.block)

    def blocks(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield owner, first row, first slot and last slot + 1 of the blocks of `count` slots."""
        for first in range(0, count, self.block):
            yield self.owner(first), self.row(first), first, min(first + self.block, count)
