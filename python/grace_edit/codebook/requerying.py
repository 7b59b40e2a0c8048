"""Giving edits other queries, as if they had been made with these from the beginning.

Where something below a layer changes, its prompts reach it with other inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from . import past, planning, replay
from .records import Label
from .storage import Storage


def requery(storage: Storage, queries: Mapping[int, tuple[Tensor, float | None]]) -> None:
    """Give edits other queries and radii; see `Codebook.requery`, its errors too."""
    checked = {
        id: (planning.check_query(query, storage.slots.keys), planning.check_radius(radius))
        for id, (query, radius) in queries.items()
    }
    with storage.change():
        same = _by_prompt(storage)
        for id, (query, radius) in checked.items():
            edit = storage.edit(id)
            if edit.query_index < 0 or edit.prompt is None:
                raise KeyError(f"id must be that of an edit with a prompt, got {id}")
            for each in {id, *same[edit.prompt]}:
                storage.queries.write(storage.edit(each).query_index, query)
            storage.put_edit(replace(storage.edit(id), radius=radius))
        replay.everything(storage)
        past.end_change(storage)


def _by_prompt(storage: Storage) -> dict[Label, list[int]]:
    """Return the edits that a replay takes again by their prompts.

    One that was superseded by an edit of its own prompt has lent that its query.
    """
    found: dict[Label, list[int]] = defaultdict(list)
    for edit in storage.edit_records.values():
        if edit is None or edit.prompt is None or edit.query_index < 0 or edit.state == "deleted":
            continue
        found[edit.prompt].append(edit.id)
    return found
