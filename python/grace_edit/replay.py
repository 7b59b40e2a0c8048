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

from .policy import PAPER
from .records import Edit, Entry
from .rows import digest

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


def _replay(book: Codebook) -> None:
    """Take every decision of the history again, in order, with the stored queries.

    An entry that comes about again keeps its row. Its value is the one that answers its edit now.
    """
    history = sorted(
        (e for e in book._edits.values() if e and e.state != "deleted" and e.row >= 0),
        key=lambda edit: edit.id,
    )
    layout = _clear(book)
    for edit in history:
        book._put("_edits", edit.id, replace(edit, state="live", slot=-1, superseded_by=None))
    book._layout, book._reserved = layout, frozenset(layout.values())
    try:
        for edit in history:
            _again(book, book._edit(edit.id))
    finally:
        book._layout, book._reserved = {}, frozenset()
    for hole in sorted(book._holes, reverse=True):
        book._write("keys", hole, torch.zeros_like(book.keys[hole]))
        book._write("values", hole, torch.zeros_like(book.values[hole]))
        if hole == book._row_count - 1:
            book._put("_holes", hole)
            book._set_number("_row_count", hole)


def _again(book: Codebook, edit: Edit) -> None:
    query = book._stored_query(edit)
    plan = book.plan(query, edit.label, edit.prompt)
    value, stamp = None, edit.stamp
    if plan.case in ("expand", "absorb"):
        entry = book._entry(plan.slot)
        assert entry is not None
        if edit.verified is None or entry.stamp in edit.verified:
            stamp = entry.stamp
        else:
            plan = book.plan(query, edit.label, edit.prompt, own_entry=True)
    if stamp == edit.stamp and plan.case not in ("expand", "absorb"):
        value = book._value_of(edit)
    affected = book._apply(plan, replace(edit, stamp=stamp), value)
    book._repair(affected, None, edit.id)


def _clear(book: Codebook) -> dict[int | bytes, int]:
    """Go back to the imported rows alone; return which row each other entry had.

    The rows keep their contents for now, and their values go to the pool.
    """
    layout: dict[int | bytes, int] = {}
    live = 0
    for slot, entry in list(book._entries.items()):
        if entry is None:
            continue
        book._retire_value(slot)
        if _is_imported(book, slot):
            continue
        layout[entry.owner if book.policy == PAPER else digest(book.keys[slot])] = slot
        book._write("radii", slot, -math.inf)
        book._write("_label_ids", slot, -1)
        if slot < len(book._imported_labels):
            book._put("_entries", slot, None)
        else:
            book._put("_entries", slot)
        book._put("_holes", slot, None)

    imported = len(book._imported_labels)
    live = imported
    for id in [i for i in book._edits if i < imported]:
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
