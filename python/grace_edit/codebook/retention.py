"""Carrying proposals out, and keeping every live edit answered while that is done.

The invariant of the default policy: the query of every live edit hits an entry of its label. A new
key can draw queries away from their entries and a smaller radius can uncover them, so after each
change the edits concerned are looked at and those that lost their label get an entry of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from . import past
from . import policy as rules
from .records import Edit, EditResult, Entry, Proposal
from .storage import Storage
from .tensors import same_bits

Answers = Callable[[Edit, int], bool]  # whether the value in a slot gives an edit its target


def commit(
    storage: Storage, proposal: Proposal, value: Tensor | None, answers: Answers | None
) -> EditResult:
    """Make the edit that was proposed, within a transaction; see `Codebook.commit`."""
    value_id = storage.next_value_id
    if value is None:
        value_id = storage.live_entry(proposal.slot).value_id
    elif proposal.part_of is not None:
        whole = storage.edit(proposal.part_of)
        if same_bits(storage.value_of(whole).cpu(), value.cpu()):
            value_id = whole.value_id  # known to answer the one, it is known to answer the other
    result = EditResult(
        id=storage.next_id,
        case=proposal.case,
        slot=None,
        neighbour=proposal.neighbour,
        distance=proposal.distance,
        radius_before=proposal.radius_before,
        radius_after=proposal.radius_after,
        proven=False,  # as far as is known here
    )
    new = Edit(
        id=storage.next_id,
        label=proposal.label,
        prompt=proposal.prompt,
        query_index=storage.queries.add(proposal.query, storage.next_id),
        slot=-1,
        value_id=value_id,
        verified=None if answers is None else frozenset({value_id}),
        result=result,
        part_of=proposal.part_of,
        radius=proposal.radius,
        negatives=proposal.negatives,
    )
    fragile = carry_out(storage, proposal, new, value, answers) or proposal.fragile
    new = storage.edit(new.id)
    result = replace(result, slot=new.slot, fragile=fragile)
    storage.put_edit(replace(new, result=result))
    storage.slots.trim()
    past.end_change(storage)
    storage.next_id += 1
    storage.next_value_id += value_id == storage.next_value_id
    return result


def carry_out(
    storage: Storage,
    proposal: Proposal,
    edit: Edit,
    value: Tensor | None,
    answers: Answers | None,
) -> bool:
    """Do what a proposal says for `edit`, then repair what that has done to other edits.

    Args:
        edit: its query is stored, its value named; nothing answers it yet.
        value: of the new entry, or in place of an entry's; None leaves that.
        answers: see `Codebook.commit`.

    Returns:
        Whether an entry smaller than the drift was made in the repair.
    """
    affected = _apply(storage, proposal, edit, value)
    return repair(storage, affected, answers, edit.whole)


def _apply(storage: Storage, proposal: Proposal, edit: Edit, value: Tensor | None) -> set[int]:
    """Do what a proposal says; return the live edits that may have lost their answer."""
    affected: set[int] = set()
    orphans: set[int] = set()
    for earlier in proposal.supersedes:
        orphans.update(_supersede(storage, earlier, edit.whole, proposal.slot))
    if proposal.radius_after is not None and proposal.radius_after != proposal.radius_before:
        storage.slots.write_radius(proposal.neighbour, proposal.radius_after)
        affected.update(_uncovered(storage, proposal.neighbour))

    slot, distance = proposal.slot, proposal.distance
    if proposal.new_radius is not None:
        assert value is not None
        entry = Entry(edit.label, edit.value_id, edit.id, (edit.id,))
        slot = storage.place_entry(entry, proposal.query, value, proposal.new_radius)
        distance = 0.0
        affected.update(_drawn(storage, slot))
    else:
        entry = storage.live_entry(slot)
        owns = distance == 0.0 and not storage.settings.paper
        changed = replace(
            entry,
            value_id=edit.value_id,
            owner=edit.id if owns else entry.owner,
            members=tuple(sorted({*entry.members, edit.id})),
            label=edit.label if proposal.case == "update" else entry.label,
        )
        storage.put_entry(slot, changed, value)
        if value is not None and proposal.case == "update":
            affected.update(proposal.members)
        elif value is not None:  # trained together
            for member in proposal.members:
                accept(storage, storage.edit(member), slot, edit.value_id)
    storage.queries.write(edit.query_index, proposal.query)
    storage.make_live(edit, proposal.query, slot, distance)
    return affected | _adopt(storage, orphans)


def _supersede(storage: Storage, id: int, by: int, kept: int = -1) -> set[int]:
    """Let an edit with its parts be superseded, and free the entries whose keys are theirs.

    Args:
        id, by: whole edits.
        kept: slot of an entry that stays, as the new edit takes it over.

    Returns:
        The edits that were answered by a freed entry.
    """
    going = [slot for slot in storage.owned_slots([id]) if slot != kept]
    for edit in storage.group(id):
        storage.supersede(edit.id, by)
    orphans: set[int] = set()
    for slot in going:
        orphans.update(storage.live_entry(slot).members)
        storage.free(slot)
    return orphans


def _adopt(storage: Storage, orphans: Iterable[int]) -> set[int]:
    """Note what is nearest to the edits whose entry is gone; return those that are live."""
    live = {id for id in orphans if storage.edit(id).live}
    for id in live:
        edit = replace(storage.edit(id), slot=-1)
        storage.put_edit(edit)
        slot, distance = storage.nearest(storage.query_of(edit))
        storage.queries.set_answer(edit.query_index, slot, distance)
    return live


def accept(storage: Storage, edit: Edit, slot: int, value_id: int) -> None:
    """Let the entry in `slot` answer an edit: its value, `value_id`, is known to."""
    if slot != edit.slot:
        storage.leave_entry(edit)
        storage.join_entry(edit, slot)
    verified = None if edit.verified is None else edit.verified | {value_id}
    if (edit.slot, edit.value_id, edit.verified) != (slot, value_id, verified):
        storage.put_edit(replace(edit, slot=slot, value_id=value_id, verified=verified))


def _drawn(storage: Storage, slot: int) -> list[int]:
    """Note that a new key answers the edits it is nearest to; return their ids.

    Only the default policy keeps track. An edit whose query is a key is at distance 0 from it, so
    no other key draws it; imported edits, which are all of that kind, need no stored query here.
    """
    if storage.settings.paper:
        return []
    return storage.queries.draw(storage.slots.key(slot), slot)


def _uncovered(storage: Storage, slot: int) -> list[int]:
    """Return the members of an entry that its radius no longer covers."""
    entry = storage.entry(slot)
    if storage.settings.paper or entry is None:
        return []
    indexes = [(member, storage.edit(member).query_index) for member in entry.members]
    radius = storage.slots.radius(slot)
    return [m for m, at in indexes if at >= 0 and storage.queries.answer(at)[1] > radius]


def repair(storage: Storage, affected: Iterable[int], answers: Answers | None, by: int) -> bool:
    """Give each affected edit that has lost its label an entry of its own.

    In order of id, again and again until nothing changes. It ends: an edit with its own entry is
    never lost again. Returns whether an entry smaller than the drift was made.
    """
    pending, last, fragile = set(affected), -1, False
    while pending:
        id = min((i for i in pending if i > last), default=min(pending))
        pending.discard(id)
        last = id
        edit = storage.edit(id)
        if not edit.live or edit.query_index < 0:
            continue
        slot, distance = storage.queries.answer(edit.query_index)
        entry = storage.live_entry(slot)
        covered = distance <= storage.slots.radius(slot)
        keeps_label = covered and entry.label == edit.label
        if keeps_label and _trusts(edit, slot, entry.value_id, answers):
            accept(storage, edit, slot, entry.value_id)
            continue
        if distance == 0.0:
            # Queries that differ by so little that their distance is 0: no entry can tell them
            # apart, the later edit has replaced the earlier one.
            pending.update(_adopt(storage, _supersede(storage, edit.whole, by)))
            continue
        radius = _own_entry(storage, edit)
        pending.update(_drawn(storage, storage.edit(id).slot))
        fragile = fragile or radius < storage.settings.drift
    return fragile


def _own_entry(storage: Storage, edit: Edit) -> float:
    """Give an edit an entry of its own, with the value that answered it; return the radius."""
    query = storage.query_of(edit)
    away = storage.distance_to_other_label(query, edit.label)
    given = storage.settings.radius if edit.radius is None else edit.radius
    radius = rules.own_radius(away, radius=given)
    entry = Entry(edit.label, edit.value_id, edit.id, (edit.id,))
    slot = storage.place_entry(entry, query, storage.value_of(edit), radius)
    storage.leave_entry(edit)
    storage.put_edit(replace(edit, slot=slot))
    storage.queries.set_answer(edit.query_index, slot, 0.0)
    return radius


def _trusts(edit: Edit, slot: int, value_id: int, answers: Answers | None) -> bool:
    """Say whether the value in `slot`, of the edit's label, is known to answer the edit."""
    if edit.verified is None or value_id in edit.verified:
        return True
    return answers is not None and bool(answers(edit, slot))
