"""Deleting edits, as if they had never been made.

What is left is what replaying the remaining history gives. Only edits that the deleted one can have
touched could come out differently, so only these are replayed, apart from the rest.
"""

from __future__ import annotations

from dataclasses import replace

from . import past, replay
from .records import TieError
from .replay_part import Part
from .storage import Storage
from .touched import touched


def delete(storage: Storage, id: int, purge: bool) -> None:
    """Delete an edit; see `Codebook.delete`. Lookups wait for what is written alone."""
    edit = storage.edit(id)
    if edit.part_of is not None:
        raise KeyError(f"id must be that of a whole edit, got {id}, a key of edit {edit.part_of}")
    if edit.state == "deleted" and not purge:
        raise KeyError(f"id must be that of an edit not yet deleted, got {id}")
    part = _decided_apart(storage, id) if edit.state != "deleted" else None
    with storage.change():
        if edit.state != "deleted":
            _take_out(storage, id, part)
        if purge:
            for each in storage.group(id):
                storage.purge(each)
        past.end_change(storage)


def _decided_apart(storage: Storage, id: int) -> Part | None:
    """Take the decisions about what an edit can touch again, without it; nothing changes.

    None: everything has to be replayed. Many edits are touched; or two entries are equally near to
    a query, so that it depends on all slots which of them answers; or an imported edit that was
    superseded may come back, whose slot may belong to another edit.
    """
    ids = touched(storage, id)
    if ids is None:
        return None
    gone = {each.id for each in storage.group(id)}
    imports = len(storage.imported.labels)
    if any(i < imports and not storage.edit(i).live for i in ids - gone):
        return None
    try:
        part = Part(storage, ids, gone)
    except TieError:
        return None
    return part if part.keeps_imports else None


def _take_out(storage: Storage, id: int, part: Part | None) -> None:
    edit = storage.edit(id)
    if edit.query_index < 0:  # the key of an imported edit is the only place of its query
        index = storage.queries.add(storage.slots.keys[id], id)
        storage.put_entry(id, storage.live_entry(id))
        storage.put_edit(replace(edit, query_index=index))
    if part is not None:
        part.put_in_place(storage)
    for each in storage.group(id):
        gone = replace(each, state="deleted", slot=-1, value_id=-1, superseded_by=None)
        storage.put_edit(gone)
    if part is None:
        replay.everything(storage)
    storage.slots.trim()
