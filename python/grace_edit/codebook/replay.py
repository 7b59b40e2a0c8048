"""Replaying a history: the decisions over all its edits, taken again in order without a model.

What a codebook is follows from the edits it was fed. So without one of them it is what replaying
the others gives: entries shrink, grow, vanish and come back as if that one had never been made.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import planning, retention
from .records import Edit, Entry, Proposal
from .storage import Storage
from .tensors import digest


def everything(storage: Storage) -> None:
    """Take every decision of the history again, in order, with the stored queries.

    Entries are made in slots in the order of their making, as in a new codebook, so that exact ties
    between them fall as they would there. Then each goes back to the slot it had, if it had one.
    Its value is the one that answers its edit now.
    """
    slots = storage.slots
    edits = (edit for edit in storage.edit_records.values() if edit is not None)
    imported = len(storage.imported.labels)
    made = [edit for edit in edits if edit.state != "deleted" and edit.id >= imported]
    made.sort(key=lambda edit: edit.id)
    layout = _clear(storage)
    for edit in made:
        storage.put_edit(replace(edit, state="live", slot=-1, superseded_by=None))
    before = slots.in_use
    slots.trim()  # a lookup need not pass slots that are still to be filled
    for edit in made:
        again(storage, storage.edit(edit.id))
    slots.extend(before)
    _return_to(storage, layout)
    slots.clear_free()
    slots.trim()


def _clear(storage: Storage) -> dict[int | bytes, int]:
    """Go back to the imported entries alone; return which slot each other entry had.

    The slots keep their contents for now, and their values are retired.
    """
    slots, imported = storage.slots, storage.imported
    layout: dict[int | bytes, int] = {}
    for slot, entry in list(storage.entry_records.items()):
        if entry is None:
            continue
        storage.retire_value(slot)
        if not storage.is_imported(slot):
            layout[name(storage, slot)] = slot
            storage.vacate(slot)

    changed = {*storage.edit_records, *storage.entry_records}
    for id in sorted(i for i in changed if i < len(imported.labels)):
        if storage.is_imported(id):
            _restore_import(storage, id)
    moved = slots.radii[: len(imported.labels)].cpu() != imported.radii
    for slot in moved.nonzero()[:, 0].tolist():
        if storage.is_imported(slot):
            slots.write_radius(slot, imported.radii[slot].item())
    storage.clear_live()
    return layout


def _restore_import(storage: Storage, id: int) -> None:
    """Make an imported edit live in its own slot again, with the value that answers it now."""
    edit = storage.edit(id)
    if storage.entry(id) is None:
        storage.slots.extend(id + 1)
        storage.slots.take(id)
    if edit.query_index >= 0:  # its slot was freed, and perhaps used by another
        storage.slots.write_key(id, storage.query_of(edit))
        storage.queries.erase(edit.query_index)
    edit = replace(edit, state="live", slot=id, superseded_by=None, query_index=-1)
    entry = Entry(edit.label, edit.value_id, id, (id,))
    storage.put_entry(id, entry, storage.value_of(edit))
    storage.put_edit(edit)


def again(storage: Storage, edit: Edit) -> None:
    """Make an edit again, as the codebook is now."""
    query = storage.query_of(edit)

    def propose(own_entry: bool) -> Proposal:
        return planning.decide(
            storage, query, edit.label, edit.prompt, own_entry, edit.radius, edit.part_of
        )

    proposal = propose(False)
    if proposal.case in ("expand", "absorb"):
        shared = storage.live_entry(proposal.slot).value_id
        if edit.verified is None or shared in edit.verified:
            edit = replace(edit, value_id=shared)
        else:
            proposal = propose(True)
    new_value = proposal.case not in ("expand", "absorb")
    value = storage.value_of(edit) if new_value else None
    retention.carry_out(storage, proposal, edit, value, None)


class _Tied(Exception):
    """In their old slots the entries would answer a query differently, for an exact tie."""


def _return_to(storage: Storage, layout: dict[int | bytes, int]) -> None:
    """Move the entries back to the slots they had; leave all as they are if a tie forbids it."""
    records = storage.entry_records
    made = sorted(s for s, entry in records.items() if entry and not storage.is_imported(s))
    target = {slot: layout[key] for slot in made if (key := name(storage, slot)) in layout}
    taken = set(target.values())
    others = (s for s in range(storage.slots.in_use) if not storage.is_imported(s))
    free = (slot for slot in others if slot not in taken)
    for slot in made:
        if slot not in target:
            target[slot] = next(free)
    order = [target[slot] for slot in made]
    try:
        with storage.transaction():
            _move(storage, {slot: to for slot, to in target.items() if slot != to})
            # Where the order of the slots is kept, so is the lowest slot of every tie.
            if order != sorted(order) and not storage.settings.paper:
                queries, slots = storage.queries.answered()
                found = storage.lookup(queries.to(storage.slots.device))[0]
                if not torch.equal(found.cpu(), slots):
                    raise _Tied
    except _Tied:
        pass


def _move(storage: Storage, target: dict[int, int]) -> None:
    """Move entries, with all that belongs to them, from each slot to the one it is mapped to."""
    slots, queries = storage.slots, storage.queries
    moved = []
    for slot, to in target.items():
        key, value = slots.keys[slot].clone(), slots.values[slot].clone()
        moved.append((to, storage.live_entry(slot), key, value, slots.radii[slot].item()))
    for slot in target:
        storage.vacate(slot)
    for to, entry, key, value, radius in moved:
        storage.place_entry(entry, key, value, radius, slot=to)
        for member in entry.members:
            edit = storage.edit(member)
            storage.put_edit(replace(edit, slot=to))
            answered_by, distance = queries.answer(edit.query_index)
            if answered_by >= 0:
                queries.set_answer(edit.query_index, to, distance)


def name(storage: Storage, slot: int) -> int | bytes:
    """Return what an entry is known by across a replay: its key, which the paper's may share."""
    if storage.settings.paper:
        return storage.live_entry(slot).owner
    return digest(storage.slots.keys[slot])
