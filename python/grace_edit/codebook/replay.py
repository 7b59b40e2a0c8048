"""Deleting edits: the decisions over the remaining ones, taken again without a model.

What a codebook is follows from the edits it was fed, in order. So without one of them it is what
replaying the others gives: entries shrink, grow, vanish and come back as if the deleted edit had
never been made. Works on the private parts of the codebook, inside its journal.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import sketch_upkeep as sketching
from .policy import PAPER
from .records import Edit, Entry
from .storage import digest

if TYPE_CHECKING:
    from .codebook import Codebook


def delete(book: Codebook, id: int, purge: bool) -> None:
    """Delete an edit; see `Codebook.delete`."""
    edit = book._edit(id)
    if edit.state == "deleted" and not purge:
        raise KeyError(f"id must be that of an edit not yet deleted, got {id}")
    with book.transaction():
        if edit.state != "deleted":
            if edit.row < 0:  # the key of an imported edit is the only place of its query
                row = book._new_query_row(book.keys[id], id)
                edit = replace(edit, row=row)
                book._put("_entries", id, book._entry(id))
            gone = replace(edit, state="deleted", slot=-1, stamp=-1, superseded_by=None)
            book._put("_edits", id, gone)
            _replay(book)
            edit = gone
        if purge:
            book._write("_queries", edit.row, torch.zeros_like(book._queries[edit.row]))
            book._write("_query_owner", edit.row, -1)
            book._put("_edits", id, None)
            book._set_number("_purged", 1)
        book._prune_pool()
        book._bump()
        sketching.settle(book)


def _replay(book: Codebook) -> None:
    """Take every decision of the history again, in order, with the stored queries.

    Entries are made in rows in the order of their making, as in a new codebook, so that exact ties
    between them fall as they would there. Then each goes back to the row it had, if it had one. Its
    value is the one that answers its edit now.
    """
    history = sorted(
        (e for e in book._edits.values() if e and e.state != "deleted" and e.row >= 0),
        key=lambda edit: edit.id,
    )
    layout = _clear(book)
    for edit in history:
        book._put("_edits", edit.id, replace(edit, state="live", slot=-1, superseded_by=None))
    rows = book._row_count
    _cut(book)  # a lookup need not pass rows that are still to be filled
    for edit in history:
        _again(book, book._edit(edit.id))
    for slot in range(book._row_count, rows):
        book._put("_holes", slot, None)
    book._set_number("_row_count", max(rows, book._row_count))
    _settle(book, layout)
    for hole in book._holes:
        book._write("keys", hole, torch.zeros_like(book.keys[hole]))
        book._write("values", hole, torch.zeros_like(book.values[hole]))
    _cut(book)


def _cut(book: Codebook) -> None:
    """Let the rows in use end with a live one."""
    for hole in sorted(book._holes, reverse=True):
        if hole != book._row_count - 1:
            break
        book._put("_holes", hole)
        book._set_number("_row_count", hole)


class _Tied(Exception):
    """In their old rows the entries would answer a query differently, for an exact tie."""


def _settle(book: Codebook, layout: dict[int | bytes, int]) -> None:
    """Move the entries back to the rows they had; leave all as they are if a tie forbids it."""
    made = sorted(s for s, e in book._entries.items() if e and not _is_imported(book, s))
    target = {slot: layout[name] for slot in made if (name := _name(book, slot)) in layout}
    taken = set(target.values())
    free = (s for s in range(book._row_count) if s not in taken and not _is_imported(book, s))
    for slot in made:
        if slot not in target:
            target[slot] = next(free)
    order = [target[slot] for slot in made]
    try:
        with book.transaction():
            _move(book, {slot: to for slot, to in target.items() if slot != to})
            # Where the order of the rows is kept, so is the lowest row of every tie.
            if order != sorted(order) and book.policy != PAPER:
                live = (book._answer_slot[: book._query_count] >= 0).nonzero()[:, 0]
                queries = book._queries[live].to(book.device)
                if not torch.equal(book.lookup(queries)[0].cpu(), book._answer_slot[live]):
                    raise _Tied
    except _Tied:
        pass


def _move(book: Codebook, target: dict[int, int]) -> None:
    moved = []
    for slot, to in target.items():
        entry = book._entry(slot)
        assert entry is not None
        key, value, radius = book.keys[slot], book.values[slot], book.radii[slot].item()
        moved.append((to, entry, key.clone(), value.clone(), radius))
    for slot in target:
        _vacate(book, slot)
    for to, entry, key, value, radius in moved:
        book._put("_holes", to)
        book._write("keys", to, key)
        book._write("values", to, value)
        book._write("radii", to, radius)
        book._write_entry(to, entry, None, book._label_number(entry.label))
        for member in entry.members:
            edit = book._edit(member)
            book._put("_edits", member, replace(edit, slot=to))
            if book._answer_slot[edit.row] >= 0:
                book._write_answer(edit.row, to, book._answer_distance[edit.row].item())


def _vacate(book: Codebook, slot: int) -> None:
    """Make a row a hole; what it holds stays for now."""
    book._write("radii", slot, -math.inf)
    book._write("_label_ids", slot, -1)
    if slot < len(book._imported_labels):
        book._put("_entries", slot, None)
    else:
        book._put("_entries", slot)
    book._put("_holes", slot, None)


def _name(book: Codebook, slot: int) -> int | bytes:
    """Return what an entry is known by across a replay: its key, which the paper's may share."""
    entry = book._entry(slot)
    assert entry is not None
    return entry.owner if book.policy == PAPER else digest(book.keys[slot])


def _again(book: Codebook, edit: Edit) -> None:
    query = book._stored_query(edit)
    plan = book.propose(query, edit.label, edit.prompt)
    value, stamp = None, edit.stamp
    if plan.case in ("expand", "absorb"):
        entry = book._entry(plan.slot)
        assert entry is not None
        if edit.verified is None or entry.stamp in edit.verified:
            stamp = entry.stamp
        else:
            plan = book.propose(query, edit.label, edit.prompt, own_entry=True)
    if stamp == edit.stamp and plan.case not in ("expand", "absorb"):
        value = book._value_of(edit)
    affected = book._apply(plan, replace(edit, stamp=stamp), value)
    book._repair(affected, None, edit.id)


def _clear(book: Codebook) -> dict[int | bytes, int]:
    """Go back to the imported rows alone; return which row each other entry had.

    The rows keep their contents for now, and their values go to the pool.
    """
    layout: dict[int | bytes, int] = {}
    for slot, entry in list(book._entries.items()):
        if entry is None:
            continue
        book._retire_value(slot)
        if _is_imported(book, slot):
            continue
        layout[_name(book, slot)] = slot
        _vacate(book, slot)

    imported = len(book._imported_labels)
    live = imported
    for id in sorted(i for i in {*book._edits, *book._entries} if i < imported):
        if _is_imported(book, id):
            _restore_import(book, id)
        else:
            live -= 1
    moved = book.radii[:imported].cpu() != book._imported_radii
    for slot in moved.nonzero()[:, 0].tolist():
        if _is_imported(book, slot):
            book._write("radii", slot, book._imported_radii[slot].item())

    for row in range(book._query_count):
        book._write_answer(row, -1, -math.inf)
    for table in ("_by_prompt", "_by_query"):
        for key in list(getattr(book, table)):
            book._put(table, key)
    book._set_number("_live_edits", live)
    return layout


def _is_imported(book: Codebook, slot: int) -> bool:
    """Say whether a row belongs to an imported edit that is still in the history."""
    if slot >= len(book._imported_labels):
        return False
    edit = book._edits.get(slot, True)
    return edit is True or (isinstance(edit, Edit) and edit.state != "deleted")


def _restore_import(book: Codebook, id: int) -> None:
    """Make an imported edit live in its own row again, with the value that answers it now."""
    edit = replace(book._edit(id), state="live", slot=id, superseded_by=None)
    entry = Entry(edit.label, edit.stamp, id, (id,))
    book._write_entry(id, entry, book._value_of(edit), book._label_number(edit.label))
    book._put("_edits", id, edit)
