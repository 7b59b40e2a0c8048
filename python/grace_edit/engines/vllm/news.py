"""What the engine core tells the workers with each step; pickled where they are processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Changed:
    """Entries of a codebook that are other than the workers know them.

    Args:
        count: slots in use.
        slots: `[N]` int64, which ones changed.
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
        changed: entries, to be written before the step; `query="last"` alone.
    """

    version: int
    values: dict[str, Tensor] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()
    changed: list[Changed] = field(default_factory=list)


def changes(
    old: tuple[Tensor, Tensor, Tensor] | None, new: tuple[Tensor, Tensor, Tensor], count: int
) -> Changed:
    """Return in which slots below `count` keys, values or radii differ.

    Args:
        old: keys, values and radii that the workers know, None: nothing.
        new: the same now, on the CPU, of the same or another capacity.
        count: slots in use now.
    """
    keys, values, radii = (one[:count] for one in new)
    known = 0 if old is None else min(count, len(old[2]))
    differ = torch.ones(count, dtype=torch.bool)
    if old is not None:
        differ[:known] = radii[:known] != old[2][:known]
        for now, then in ((keys, old[0]), (values, old[1])):
            differ[:known] |= (now[:known] != then[:known]).any(dim=1)
    slots = differ.nonzero()[:, 0]
    return Changed(count, slots, keys[slots], values[slots], radii[slots])
