"""Checking a codebook against everything it promises; for tests and for a doubtful moment."""

from __future__ import annotations

import math
from collections import Counter

import torch

from . import sketch_upkeep
from .storage import Storage
from .tensors import digest, same_bits


def check(storage: Storage) -> None:
    """Verify every invariant of a codebook; see `Codebook.check`."""
    _slots(storage)
    _edits(storage)
    _tables(storage)
    _sketch(storage)
    if storage.settings.nearest:
        _own_entries(storage)
    if not storage.settings.paper:
        _answers(storage)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _slots(storage: Storage) -> None:
    slots = storage.slots
    count, free = slots.in_use, slots.free
    told = int(slots.count)
    _require(told == count, f"count is {told} where {count} slots are in use")
    _require(count <= slots.capacity, "more slots in use than allocated")
    live = {slot for slot in range(count) if storage.entry(slot) is not None}
    _require(live | free == set(range(count)), "a slot is neither live nor free")
    _require(not live & free, "a live slot is among the free ones")
    beyond = [slot for slot, entry in storage.entry_records.items() if entry and slot >= count]
    _require(not beyond, "entry beyond count")
    _require(count == 0 or count - 1 in live, "the last slot in use is dead")
    dead = torch.tensor([slot not in live for slot in range(slots.capacity)], device=slots.device)
    _require(bool(((slots.radii == -math.inf) == dead).all()), "radius -inf and dead disagree")
    holds = bool(slots.keys[dead].any() or slots.values[dead].any())
    _require(not holds, "a dead slot holds data")
    numbers = slots.label_ids.tolist()
    owners = []
    for slot in sorted(live):
        entry = storage.live_entry(slot)
        _require(numbers[slot] == storage.label_number(entry.label), "label number")
        _require(bool(entry.members), f"slot {slot} answers for no edit")
        for member in entry.members:
            edit = storage.edit(member)
            here = edit.live and edit.slot == slot
            _require(here, f"member {member} of slot {slot} is elsewhere")
            same = edit.value_id == entry.value_id
            _require(same, f"edit {member} has another value than slot {slot}")
            known = edit.verified is None or edit.value_id in edit.verified
            _require(known, f"the value of slot {slot} was not verified for edit {member}")
        _require(list(entry.members) == sorted(entry.members), "members are not in order")
        owners.append(storage.query_of(storage.edit(entry.owner)).cpu())
    if owners:
        keys = slots.keys[~dead].cpu()
        _require(same_bits(torch.stack(owners), keys), "a key is not its edit's query")


def _sketch(storage: Storage) -> None:
    slots, sketch = storage.slots, storage.slots.sketch
    upkeep, since = slots.sketch_upkeep, slots.sketch_upkeep.since_fit
    wanted = sketch_upkeep.worthwhile(slots.capacity)
    _require((sketch is not None) == wanted, "a sketch is missing, or there is one too many")
    if sketch is None:
        return
    used = sketch.rows if sketch.active else 0
    _require(int(sketch.covered) == used, f"the sketch covers {int(sketch.covered)} slots")
    if not since.slots:
        _require(not sketch.active, "a sketch is in use that was not fitted")
        return
    _require(upkeep.up_to_date, "the sketch was not told of every change")
    _require(sketch.active != since.hopeless, "the sketch is in use where it is hopeless, or not")
    _require(sketch.rows >= slots.in_use, f"the sketch ends at slot {sketch.rows}")
    wrong = sketch.faults(slots.keys, slots.radii)
    _require(not wrong, f"the sketch is wrong about slots {wrong[:8]}")


def _edits(storage: Storage) -> None:
    history, queries = storage.history(), storage.queries
    live = [edit for edit in history if edit.live]
    whole = [edit.id for edit in live if edit.part_of is None]
    _require(storage.live_ids() == whole, "ids are not those of live edits")
    _require(storage.live_edits == len(whole), "wrong number of live edits")
    for edit in history:
        if edit.part_of is not None:
            of = storage.edit(edit.part_of)
            same = (of.state, of.superseded_by, of.label)
            _require(edit in storage.group(of.id), f"edit {edit.id} does not follow {of.id}")
            _require(
                (edit.state, edit.superseded_by, edit.label) == same,
                f"edit {of.id} and its part {edit.id} have gone different ways",
            )
    last = max((edit.id for edit in history), default=-1)
    _require(last < storage.next_id, "an id will be reused")
    for edit in live:
        entry = storage.entry(edit.slot)
        _require(entry is not None and edit.id in entry.members, f"edit {edit.id} is no member")
    entries = map(storage.entry, range(storage.slots.in_use))
    held = {entry.value_id for entry in entries if entry}
    wanted = {edit.value_id for edit in history if edit.state != "deleted"} - held
    retired = set(storage.retired_values)
    _require(retired == wanted, "the retired values are not those that edits refer to")
    owners = queries.owners.tolist()
    asked = [edit for edit in history if edit.query_index >= 0]
    indexes = {edit.query_index for edit in asked}
    _require(len(indexes) == len(asked), "two edits share a stored query")
    for edit in asked:
        _require(owners[edit.query_index] == edit.id, "a stored query has lost its edit")
    unused = set(range(queries.count)) - indexes
    _require(queries.free == unused, "a place for a query is lost, or given twice")
    _require(not queries.vectors[sorted(unused)].any(), "a free place holds a query")
    gone = {edit.id for edit in history if not edit.live and edit.part_of is None}
    _require(set(storage.past) == gone, "the past is not the edits that are not live")
    if not storage.settings.paper:
        stored = [edit for edit in asked if edit.live]
        by_query = {digest(storage.query_of(edit)): edit.id for edit in stored}
        _require(len(by_query) == len(stored), "two live edits have equal queries")
        _require(storage.by_query == by_query, "the index of queries is wrong")
        by_prompt = {edit.prompt: edit.id for edit in stored if edit.prompt is not None}
        _require(storage.by_prompt == by_prompt, "the index of prompts is wrong")


def _tables(storage: Storage) -> None:
    for table in (storage.edit_records, storage.entry_records):
        used = Counter(record.value_id for record in table.values() if record is not None)
        _require(table.values_used == used, "the uses of values are miscounted")
    given = [edit.radius or 0.0 for edit in storage.history()]
    _require(storage.edit_records.widest >= max(given, default=0.0), "a radius is forgotten")


def _own_entries(storage: Storage) -> None:
    for slot in range(storage.slots.in_use):
        entry = storage.entry(slot)
        if entry is None:
            continue
        _require(entry.members == (entry.owner,), f"slot {slot} answers for other edits")
        owner = storage.edit(entry.owner)
        radius = storage.settings.radius if owner.radius is None else owner.radius
        if owner.query_index < 0:
            radius = storage.imported.radii[slot].item()
        held = storage.slots.radii[slot].item()
        _require(held == radius, f"slot {slot} has not its edit's radius")


def _answers(storage: Storage) -> None:
    live = [edit for edit in storage.history() if edit.live]
    for start in range(0, len(live), 1024):
        part = live[start : start + 1024]
        queries = torch.stack([storage.query_of(edit).cpu() for edit in part])
        index, distance = storage.lookup(queries.to(storage.slots.device))
        for edit, slot, d in zip(part, index.tolist(), distance.tolist(), strict=True):
            _require(slot >= 0, f"no entry answers edit {edit.id}")
            entry = storage.entry(slot)
            _require(
                entry is not None and entry.label == edit.label,
                f"edit {edit.id} is answered under another label",
            )
            _require(slot == edit.slot, f"edit {edit.id} is answered by another slot")
            if edit.query_index >= 0:
                noted = storage.queries.answer(edit.query_index)
                _require(noted == (slot, d), f"the answer of edit {edit.id} is not as noted")
