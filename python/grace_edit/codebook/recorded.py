"""What is recorded of entries and edits, as it is read."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from .hits import Hits
from .lookups import Lookups
from .queries import Queries
from .records import Edit, EditResult, Entry, Imported, Label
from .tables import Table
from .tensors import digest


class Recorded(Lookups):
    """The part of a `Storage` that says what its records mean; for its attributes see there.

    Of what was imported and never touched there is no record: it is made up as it is asked for.
    """

    queries: Queries
    imported: Imported
    hits: Hits
    entry_records: Table[Entry]
    edit_records: Table[Edit]
    retired_values: dict[int, Tensor]
    by_prompt: dict[Label, int]
    by_query: dict[bytes, int]

    def entry(self, slot: int) -> Entry | None:
        """Return the entry of a slot, None where there is none."""
        if slot in self.entry_records:
            return self.entry_records[slot]
        if 0 <= slot < len(self.imported.labels):
            return Entry(self.imported.labels[slot], slot, slot, (slot,))
        return None

    def live_entry(self, slot: int) -> Entry:
        """Return the entry of a slot that is known to hold one."""
        entry = self.entry(slot)
        assert entry is not None, slot
        return entry

    def live_entries(self) -> list[Entry]:
        """Return the entries of all live slots."""
        each = map(self.entry, range(self.slots.in_use))
        return [entry for entry in each if entry is not None]

    def is_imported(self, slot: int) -> bool:
        """Say whether a slot belongs to an imported edit that was not deleted."""
        if slot >= len(self.imported.labels):
            return False
        edit = self.edit_records.get(slot, self)
        return edit is self or (isinstance(edit, Edit) and edit.state != "deleted")

    def knows(self, id: int) -> bool:
        """Say whether an edit with this id is in the history."""
        if id in self.edit_records:
            return self.edit_records[id] is not None
        return 0 <= id < len(self.imported.labels)

    def edit(self, id: int) -> Edit:
        """Return an edit of the history.

        Raises:
            KeyError: there is none with this id, or it was purged.
        """
        try:
            edit = self.edit_records.get(id)
            if edit is not None:
                return edit
            imported = id not in self.edit_records and 0 <= id < len(self.imported.labels)
        except TypeError:  # no number
            imported = False
        if not imported:
            raise KeyError(f"id must be that of an edit in the history, got {id!r}")
        radius = self.imported.radii[id].item()
        result = EditResult(id, "import", id, -1, math.inf, None, radius, proven=False)
        return Edit(id, self.imported.labels[id], None, -1, id, id, None, result)

    def history(self) -> list[Edit]:
        """Return every edit that was not purged, by id."""
        with self.lock:
            ids = sorted({*range(len(self.imported.labels)), *self.edit_records})
            return [self.edit(id) for id in ids if self.edit_records.get(id, self) is not None]

    def live_ids(self) -> list[int]:
        """Return the ids of the live edits, without their parts, ascending."""
        with self.lock:
            imported = [i for i in range(len(self.imported.labels)) if i not in self.edit_records]
            known = (edit for edit in self.edit_records.values() if edit is not None)
            return sorted(imported + [e.id for e in known if e.live and e.part_of is None])

    def group(self, id: int) -> list[Edit]:
        """Return a whole edit and its parts, whose ids follow its own."""
        with self.lock:
            found = [self.edit(id)]
            part = self.edit_records.get(id + 1)
            while part is not None and part.part_of == id:
                found.append(part)
                part = self.edit_records.get(id + len(found))
            return found

    def owned_slots(self, ids: Iterable[int]) -> list[int]:
        """Return the slots whose keys are the queries of these live edits and their parts."""
        edits = [edit for id in ids for edit in self.group(id)]
        # While several are superseded, the entry that answered one may have gone with another.
        entries = ((e.id, e.slot, self.entry(e.slot)) for e in edits if e.live)
        return [slot for id, slot, entry in entries if entry is not None and entry.owner == id]

    def query_of(self, edit: Edit) -> Tensor:
        """Return the stored query `[D]` of an edit of the history, of the host or a slot's key."""
        if edit.query_index < 0:
            return self.slots.keys[edit.id]
        return self.queries.vectors[edit.query_index]

    def earlier_edit(self, prompt: Label | None, query: Tensor) -> int | None:
        """Return the live edit, imported ones apart, with this prompt, or else with this query."""
        earlier = None if prompt is None else self.by_prompt.get(prompt)
        return self.by_query.get(self.name_of(query)) if earlier is None else earlier

    def name_of(self, query: Tensor) -> bytes:
        """Return by what `by_query` knows a query `[D]`."""
        return digest(query)

    def value_of(self, edit: Edit) -> Tensor:
        """Return the value `[V]` that answers an edit, or last did."""
        if edit.value_id in self.retired_values:
            return self.retired_values[edit.value_id]
        # An imported value sits in the slot of its own number until it is overwritten.
        for slot in (edit.slot, edit.value_id):
            entry = self.entry(slot)
            if entry is not None and entry.value_id == edit.value_id:
                return self.slots.values[slot]
        raise KeyError(f"value {edit.value_id} of edit {edit.id} is not stored")

    def gather_hits(self) -> None:
        """Note what the entries answered so far with their edits, before a slot changes hands."""
        self.hits.gather(self._owner_of, self._members_of)

    def _members_of(self, slot: int) -> set[int]:
        entry = self.entry(slot)
        return set() if entry is None else {self._whole(member) for member in entry.members}

    def _owner_of(self, slot: int) -> int | None:
        entry = self.entry(slot)
        return None if entry is None else self._whole(entry.owner)

    def _whole(self, id: int) -> int:
        edit = self.edit_records.get(id)  # none: an imported one, or about to be made
        return id if edit is None else edit.whole
