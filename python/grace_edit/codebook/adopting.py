"""Letting a codebook that is served hold what another one holds, in the tensors that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from .records import CapacityError
from .slots import Slots
from .storage import Storage
from .tensors import resized

_ROWS = ("keys", "values", "radii")


def adopt(storage: Storage, new: Storage) -> set[int]:
    """Let `storage` hold what `new` does, which is not to be used any more.

    A single step to lookups, which wait while rows are copied: which ones differ is found before,
    and a sketch fitted if need be. Any exception leaves `storage` as it was. Within the capacity
    the tensors stay where they are; another capacity brings its own. What was done before cannot
    be undone. `version` goes up.

    Returns:
        The slots of which a key, a value or a radius may be another one.

    Raises:
        CapacityError: it needs more slots than there are, and the codebook is frozen.
        ValueError: another dtype or width.
    """
    slots, theirs = storage.slots, new.slots
    for name in ("keys", "values"):
        own, other = getattr(slots, name), getattr(theirs, name)
        if own.dtype != other.dtype or own.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} must be {own.dtype} [C, {own.shape[1]}], got {other.dtype} "
                f"[C, {other.shape[1]}]"
            )
    if theirs.capacity > slots.capacity and slots.frozen:
        raise CapacityError(
            f"cannot follow a growth to {theirs.capacity} slots: the codebook is frozen and has "
            f"{slots.capacity}; thaw it, or attach with a larger capacity"
        )
    moves = theirs.capacity != slots.capacity and not slots.frozen
    with storage.changing:  # so what is found before the lock is taken is so when it is
        different: dict[str, tuple[Tensor, Tensor]] = {}
        if moves:
            slots.warn_of_new_memory(theirs.capacity)
            theirs.move_to(slots.device)
            written = _other_rows(slots, theirs)
        else:
            different = _different(slots, theirs)
            written = {slot for name in _ROWS for slot in different[name][0].tolist()}
        theirs.maintain_sketch()
        with storage.exchange({name: at for name, (at, _) in different.items()}):
            storage.gather_hits()
            storage.take_records(new)
            if moves:
                slots.take_memory(theirs)
            else:
                slots.overwrite(different, theirs)
            slots.maintain_sketch()
            storage.version = max(storage.version + 1, new.version)
            storage.taken = new.taken
            storage.journal.forget("a snapshot was followed")  # last: it cannot be taken back
    return written


def _other_rows(slots: Slots, theirs: Slots) -> set[int]:
    """Return the slots that one holds alone, or of which a row has other bits."""
    both = min(slots.in_use, theirs.in_use)
    found = set(range(both, max(slots.in_use, theirs.in_use)))
    for name in _ROWS:
        found.update(_unlike(getattr(slots, name)[:both], getattr(theirs, name)[:both]).tolist())
    return found


def _unlike(one: Tensor, other: Tensor) -> Tensor:
    """Return the numbers of the rows that have other bits."""
    if not len(one):
        return torch.zeros(0, dtype=torch.int64)
    bits = [rows.reshape(len(rows), -1).contiguous().view(torch.uint8) for rows in (one, other)]
    return (bits[0] != bits[1]).any(1).nonzero()[:, 0]


def _different(slots: Slots, theirs: Slots) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by table the slots that hold other bits, and what they are to hold."""
    found = {}
    count = max(slots.in_use, theirs.in_use)
    for name, rest in slots.fills.items():
        own, other = getattr(slots, name), getattr(theirs, name)
        if len(other) < count:  # it was smaller
            other = resized(other, count, rest)
        rows = other[:count].to(slots.device)
        at = _unlike(own[:count], rows)
        found[name] = (at, rows[at])
    return found
