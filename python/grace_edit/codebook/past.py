"""Edits of the past, deleted and superseded ones, and forgetting the oldest of them.

They are what makes a codebook grow that has a steady number of live edits: a superseded edit keeps
its query and its value, to come back when the edit that superseded it is deleted.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .records import Edit
from .storage import Storage
from .tables import Table
from .tensors import resized


def end_change(storage: Storage) -> None:
    """End a change: forget what is beyond the limit of the history, then as the storage does."""
    if storage.history_limit is not None:
        forget(storage, storage.history_limit)
    storage.end_change()


def forget(storage: Storage, keep: int) -> int:
    """Erase the oldest edits of the past, by id, but for `keep`; return how many these were.

    Nothing that answers changes. Within a transaction; what undoing it needs stays in the journal.
    """
    beyond = len(storage.past) - keep
    if beyond <= 0:
        return 0
    for id in sorted(storage.past)[:beyond]:
        for edit in storage.group(id):
            storage.erase(edit)
    return beyond


def compact(storage: Storage, keep: int) -> int:
    """Forget edits as `Codebook.compact` says, which calls `pack` then; return how many."""
    with storage.transaction():
        forgotten = forget(storage, keep)
        storage.end_change()
    return forgotten


def pack(storage: Storage) -> None:
    """Move what is stored together; no place is what it was, so nothing may be undone."""
    held = {entry.value_id for entry in storage.entry_records.values() if entry is not None}
    held |= {*range(len(storage.imported.labels)), *storage.retired_values}
    records: dict[int, Edit | None] = {}
    asked: list[Edit] = []
    for id, edit in sorted(storage.edit_records.items()):
        if edit is not None:
            # Values that are gone prove nothing any more.
            verified = None if edit.verified is None else edit.verified & held
            index = edit.query_index
            if index >= 0:
                asked.append(edit)
                index = len(asked) - 1
            edit = replace(edit, verified=verified, query_index=index)
        records[id] = edit
    at = torch.tensor([edit.query_index for edit in asked], dtype=torch.int64)
    queries = storage.queries
    slots, distances = queries.slots[at].tolist(), queries.distances[at]
    vectors = resized(queries.vectors[at], len(at), 0)
    packed, owners = Table(records), [edit.id for edit in asked]
    storage.journal.forget("the codebook was compacted")
    queries.fill(vectors, owners, slots, distances)
    storage.edit_records = packed
