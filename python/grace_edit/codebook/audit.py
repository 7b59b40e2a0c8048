"""Checking a codebook against everything it promises; for tests and for a doubtful moment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from . import sketch_upkeep as sketching
from .policy import PAPER
from .storage import digest, same_bits

if TYPE_CHECKING:
    from .codebook import Codebook


def check(book: Codebook) -> None:
    """Verify every invariant of a codebook; see `Codebook.check`."""
    _rows(book)
    _edits(book)
    _sketch(book)
    if book.policy != PAPER:
        _answers(book)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _rows(book: Codebook) -> None:
    count = book._row_count
    _require(int(book.count) == count, f"count is {int(book.count)} where {count} rows are in use")
    _require(count <= book.capacity, "more rows in use than allocated")
    live = {slot for slot in range(count) if book._entry(slot) is not None}
    _require(live | set(book._holes) == set(range(count)), "a row is neither live nor a hole")
    _require(not live & set(book._holes), "a live row is among the holes")
    _require(not any(e for s, e in book._entries.items() if s >= count), "entry beyond count")
    _require(count == 0 or count - 1 in live, "the last row in use is dead")
    dead = torch.tensor([slot not in live for slot in range(book.capacity)], device=book.device)
    _require(bool(((book.radii == -math.inf) == dead).all()), "radius -inf and dead disagree")
    _require(not book.keys[dead].any() and not book.values[dead].any(), "a dead row holds data")
    numbers = book._label_ids.tolist()
    owners = []
    for slot in sorted(live):
        entry = book._entry(slot)
        assert entry is not None
        _require(numbers[slot] == book._label_numbers[book._label_key(entry.label)], "label number")
        _require(bool(entry.members), f"row {slot} answers for no edit")
        for member in entry.members:
            edit = book._edit(member)
            _require(edit.live and edit.slot == slot, f"member {member} of row {slot} is elsewhere")
            _require(edit.stamp == entry.stamp, f"edit {member} has another value than row {slot}")
            known = edit.verified is None or edit.stamp in edit.verified
            _require(known, f"the value of row {slot} was not verified for edit {member}")
        _require(list(entry.members) == sorted(entry.members), "members are not in order")
        owners.append(book._stored_query(book._edit(entry.owner)).cpu())
    if owners:
        keys = book.keys[~dead].cpu()
        _require(same_bits(torch.stack(owners), keys), "a key is not its edit's query")


def _sketch(book: Codebook) -> None:
    sketch, upkeep = book.sketch, book._upkeep
    wanted = sketching.worthwhile(book.capacity)
    _require((sketch is not None) == wanted, "a sketch is missing, or there is one too many")
    if sketch is None:
        return
    used = sketch.rows if sketch.active else 0
    _require(int(sketch.covered) == used, f"the sketch covers {int(sketch.covered)} rows")
    if not upkeep.rows:
        _require(not sketch.active, "a sketch is in use that was not fitted")
        return
    _require(not any(upkeep.stale.values()), "the sketch was not told of every change")
    _require(sketch.active != upkeep.hopeless, "the sketch is in use where it is hopeless, or not")
    _require(sketch.rows >= book._row_count, f"the sketch ends at row {sketch.rows}")
    wrong = sketch.faults(book.keys, book.radii)
    _require(not wrong, f"the sketch is wrong about rows {wrong[:8]}")


def _edits(book: Codebook) -> None:
    live = [edit for edit in book.history if edit.live]
    _require(book.ids == [edit.id for edit in live], "ids are not those of the live edits")
    _require(book.edits == len(live), "wrong number of live edits")
    _require(max((e.id for e in book.history), default=-1) < book._next_id, "an id will be reused")
    for edit in live:
        entry = book._entry(edit.slot)
        _require(entry is not None and edit.id in entry.members, f"edit {edit.id} is no member")
    held = {entry.stamp for entry in map(book._entry, range(book._row_count)) if entry}
    wanted = {edit.stamp for edit in book.history if edit.state != "deleted"} - held
    _require(set(book._pool) == wanted, "the values kept are not those that edits refer to")
    owners = book._query_owner.tolist()
    rows = [edit.row for edit in book.history if edit.row >= 0]
    _require(len(rows) == len(set(rows)), "two edits share a stored query")
    for edit in book.history:
        if edit.row >= 0:
            _require(owners[edit.row] == edit.id, "a stored query has lost its edit")
    if book.policy != PAPER:
        stored = [edit for edit in live if edit.row >= 0]
        by_query = {digest(book._stored_query(edit)): edit.id for edit in stored}
        _require(len(by_query) == len(stored), "two live edits have equal queries")
        _require(book._by_query == by_query, "the index of queries is wrong")
        by_prompt = {edit.prompt: edit.id for edit in stored if edit.prompt is not None}
        _require(book._by_prompt == by_prompt, "the index of prompts is wrong")


def _answers(book: Codebook) -> None:
    live = [edit for edit in book.history if edit.live]
    slots, distances = book._answer_slot.tolist(), book._answer_distance.tolist()
    for start in range(0, len(live), 1024):
        part = live[start : start + 1024]
        queries = torch.stack([book._stored_query(edit).cpu() for edit in part])
        index, distance = book.lookup(queries.to(book.device))
        for edit, slot, d in zip(part, index.tolist(), distance.tolist(), strict=True):
            _require(slot >= 0, f"no entry answers edit {edit.id}")
            entry = book._entry(slot)
            _require(
                entry is not None and entry.label == edit.label,
                f"edit {edit.id} is answered under another label",
            )
            _require(slot == edit.slot, f"edit {edit.id} is answered by another row")
            if edit.row >= 0:
                noted = slots[edit.row], distances[edit.row]
                _require(noted == (slot, d), f"the answer of edit {edit.id} is not as noted")
