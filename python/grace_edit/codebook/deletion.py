"""Deleting edits, as if they had never been made.

What is left is what replaying the remaining history gives. Only edits that the deleted one can have
touched could come out differently, so only these are replayed, apart from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import past, replay
from .records import Edit, TieError
from .replay_part import Part
from .storage import Storage
from .touched import touched


def delete(storage: Storage, ids: Sequence[int], purge: bool) -> None:
    """Delete edits; see `Codebook.delete_all`, its errors too.

    Lookups wait for what is written alone.
    """
    ids = [storage.edit(id).id for id in ids]  # raises
    ids = list(dict.fromkeys(ids))
    for id in ids:
        edit = storage.edit(id)
        if edit.part_of is not None:
            raise KeyError(
                f"id must be that of a whole edit, got {id}, a key of edit {edit.part_of}"
            )
        if edit.state == "deleted" and not purge:
            raise KeyError(f"id must be that of an edit not yet deleted, got {id}")
    if not ids:
        return
    there = [id for id in ids if storage.edit(id).state != "deleted"]
    part = _decided_apart(storage, there) if there else None
    with storage.change():
        if there:
            _take_out(storage, there, part)
        if purge:
            for edit in _keys(storage, ids):
                storage.purge(edit)
        past.end_change(storage)


def _keys(storage: Storage, ids: Sequence[int]) -> list[Edit]:
    return [edit for id in ids for edit in storage.group(id)]


def _decided_apart(storage: Storage, ids: Sequence[int]) -> Part | None:
    """Take the decisions about what edits can touch again, without them; nothing changes.

    None: everything has to be replayed in its slots. Two entries are equally near to a query, so
    that these decide which of them answers; or many edits are touched beside imported ones; or an
    imported edit that was superseded may come back, whose slot may belong to another edit.
    """
    gone = {edit.id for edit in _keys(storage, ids)}
    imports = len(storage.imported.labels)
    concerned = touched(storage, *ids)
    if concerned is None:
        if imports or storage.settings.paper:
            return None
        records = (edit for edit in storage.edit_records.values() if edit is not None)
        concerned = gone | {edit.id for edit in records if edit.state != "deleted"}
    if any(i < imports and not storage.edit(i).live for i in concerned - gone):
        return None
    try:
        part = Part(storage, concerned, gone)
    except TieError:
        return None
    return part if part.keeps_imports else None


def _take_out(storage: Storage, ids: Sequence[int], part: Part | None) -> None:
    for id in ids:
        if storage.edit(id).query_index < 0:  # an imported edit's key is its query's only place
            index = storage.queries.add(storage.slots.keys[id], id)
            storage.put_entry(id, storage.live_entry(id))
            storage.put_edit(replace(storage.edit(id), query_index=index))
    if part is not None:
        part.put_in_place(storage)
    for edit in _keys(storage, ids):
        gone = replace(edit, state="deleted", slot=-1, value_id=-1, superseded_by=None)
        storage.put_edit(gone)
    if part is None:
        replay.everything(storage)
    storage.slots.trim()
