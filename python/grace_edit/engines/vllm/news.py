"""What the engine core tells the workers with each step; pickled where they are processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...codebook.codebook import Codebook


@dataclass
class Changed:
    """Entries of a codebook that are other than the workers know them.

    Args:
        count: slots in use.
        slots: `[N]` int64, which ones changed; of those beyond the count it is told for later.
        keys, values, radii: `[N, D]`, `[N, V]`, `[N]`, what they hold now.
    """

    count: int
    slots: Tensor
    keys: Tensor
    values: Tensor
    radii: Tensor


@dataclass
class News:
    """What goes with one step.

    Args:
        version: of the codebook.
        values: the value `[V]` that answers a request, by its id, sent when it is first scheduled.
        finished: ids of requests that are over.
        changed: entries, to be written before the step; `query="last"` alone, None: none.
    """

    version: int
    values: dict[str, Tensor] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()
    changed: Changed | None = None


def entries_of(book: Codebook, slots: Iterable[int]) -> Changed:
    """Return what slots of a codebook on the CPU hold now, in memory of its own."""
    at = torch.tensor(sorted(slots), dtype=torch.int64)
    return Changed(book.storage.slots.in_use, at, book.keys[at], book.values[at], book.radii[at])
