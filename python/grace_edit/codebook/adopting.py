"""Letting a codebook that is served hold what another one holds, in the tensors that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from .records import CapacityError
from .storage import Storage

_ROWS = ("keys", "values", "radii")


def adopt(storage: Storage, new: Storage) -> set[int]:
    """Let `storage` hold what `new` does, which is not to be used any more.

    A single step to lookups. Rows that are equal already are not written; within the capacity the
    tensors stay where they are. What was done before cannot be undone. `version` goes up.

    Returns:
        The slots of which a key, a value or a radius was written.

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
    with storage.changing, storage.lock:
        storage.gather_hits()
        if theirs.capacity != slots.capacity:
            if not slots.frozen:
                slots.warn_of_new_memory(theirs.capacity)
            slots.put_back("capacity", None, theirs.capacity)
        written: set[int] = set()
        count = min(max(slots.in_use, theirs.in_use), slots.capacity, theirs.capacity)
        for name in _ROWS:
            own, other = getattr(slots, name), getattr(theirs, name)
            rows = other[:count].to(slots.device)
            for slot in _different(own[:count], rows):
                slots.put_back(name, slot, rows[slot])
                written.add(slot)
        for slot in range(max(slots.in_use, theirs.in_use)):
            slots.put_back("free", slot, slot in theirs.free)
        slots.put_back("in_use", None, theirs.in_use)
        storage.settings, storage.imported = new.settings, new.imported
        storage.queries = new.queries.of(storage.journal)
        for name in ("edit_records", "entry_records", "retired_values", "by_prompt", "by_query"):
            setattr(storage, name, getattr(new, name))
        storage.past, storage.live_edits = new.past, new.live_edits
        storage.next_id = max(storage.next_id, new.next_id)
        storage.next_value_id = max(storage.next_value_id, new.next_value_id)
        for slot in range(count):
            entry = storage.entry(slot)
            number = -1 if entry is None else storage.label_number(entry.label)
            slots.put_back("label_ids", slot, number)
        storage.version = max(storage.version + 1, new.version)
        storage.taken = new.taken
        storage.journal.forget("a snapshot was followed")
        slots.maintain_sketch()
    return written


def _different(a: Tensor, b: Tensor) -> list[int]:
    if not len(a):
        return []
    x, y = (t.reshape(len(t), -1).contiguous().view(torch.uint8) for t in (a, b))
    return [int(slot) for slot in (x != y).any(1).nonzero()[:, 0].tolist()]
