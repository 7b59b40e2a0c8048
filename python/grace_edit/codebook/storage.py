"""The codebook's storage: slots, stored queries and records, and changes that can be taken back.

Nothing is decided here. Each method that writes does one thing that those who decide need (give a
slot an entry, make an edit live, ...) and notes in the journal what it overwrites. A transaction
that ends with an exception is rolled back to the bit; one that ends well becomes a step of undo.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .hits import Hits
from .labels import Labels
from .queries import Queries
from .recorded import Recorded
from .records import Edit, Entry, Imported, Label
from .settings import Settings
from .slots import Slots
from .tables import Table
from .tensors import digest


class Absent:
    """What the journal notes for a record that was not there; the class itself survives a copy."""


_NUMBERS = ("live_edits", "purged", "taken", "version")


class Storage(Recorded):
    """Everything a codebook holds. Read what is public here; write by the methods.

    Writing needs an open `transaction`, and the `lock` where other threads read; only filling an
    empty codebook (`fill` here, in `slots` and in `queries`) needs neither. Where both locks are
    taken, `changing` is taken first.

    Attributes:
        settings, slots, queries, imported, labels, hits: see their classes.
        entry_records: by slot, of each entry about which there is more to say than "as imported";
            None: an imported slot that is dead.
        edit_records: by id, of each edit about which there is more to say; None: it was purged.
        retired_values: `[V]` on the host by value id: values that the history needs and no slot
            holds.
        by_prompt, by_query: ids of live edits that were not imported, by prompt and by `digest`.
        past: the ids of whole edits that are not live and not forgotten, as keys.
        history_limit: how many of these are kept, None: all; see `past.forget`.
        live_edits: how many there are, parts not counted.
        next_id, next_value_id: never go down; neither is used twice.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        capacity: int,
        dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device | str,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.slots = Slots(key_dim, value_dim, capacity, dtype, value_dtype, device, self.journal)
        self.queries = Queries(key_dim, dtype, self.journal)
        self.imported = Imported()
        self.hits = Hits()
        self.labels = Labels()
        self.entry_records: Table[Entry] = Table()
        self.edit_records: Table[Edit] = Table()
        self.retired_values: dict[int, Tensor] = {}
        self.by_prompt: dict[Label, int] = {}
        self.by_query: dict[bytes, int] = {}
        self.past: dict[int, bool] = {}
        self.history_limit: int | None = None
        self.live_edits = 0
        self.next_id = 0
        self.next_value_id = 0

    def held(self, table: str, key: Any) -> Any:
        """Return what a place holds; see `journal.Part`."""
        return getattr(self, table) if table in _NUMBERS else getattr(self, table).get(key, Absent)

    def put_back(self, table: str, key: Any, old: Any) -> None:
        """Let a place hold what it held; see `journal.Part`."""
        if table in _NUMBERS:
            setattr(self, table, old)
        elif old is Absent:
            getattr(self, table).pop(key, None)
        else:
            getattr(self, table)[key] = old

    def _put(self, table: str, key: Any, record: Any) -> None:
        self.journal.note(self, table, key)
        getattr(self, table)[key] = record

    def _drop(self, table: str, key: Any) -> None:
        self.journal.note(self, table, key)
        getattr(self, table).pop(key, None)

    def end_change(self) -> None:
        """Do what ends every change: drop values nobody needs, count it, maintain the sketch."""
        self._drop_values()
        self.drop_labels()
        self.version = self.next_version()
        self._changed = True
        self.slots.maintain_sketch()

    def fill(
        self,
        imported: Imported,
        edits: dict[int, Edit | None],
        entries: dict[int, Entry | None],
        retired_values: dict[int, Tensor],
    ) -> None:
        """Let these be the records of an empty codebook whose slots and queries were filled."""
        self.imported, self.retired_values = imported, retired_values
        self.edit_records, self.entry_records = Table(edits), Table(entries)
        count = len(imported.labels)
        self.live_edits = count - sum(id < count for id in edits)
        for edit in edits.values():
            if edit is not None and not edit.live and edit.part_of is None:
                self.past[edit.id] = True
            if edit is None or not edit.live:
                continue
            self.live_edits += edit.part_of is None
            if edit.query_index >= 0:
                self.by_query[digest(self.query_of(edit))] = edit.id
                if edit.prompt is not None:
                    self.by_prompt[edit.prompt] = edit.id
        labels: dict[int, Label | None] = dict(enumerate(imported.labels))
        labels |= {slot: None if entry is None else entry.label for slot, entry in entries.items()}
        each = map(labels.get, range(self.slots.in_use))
        self.slots.fill_labels([-1 if x is None else self.label_number(x) for x in each])

    def succeed(self, old: Storage) -> None:
        """Go on in the place of another storage, with its locks, which others wait for."""
        if old.hits.on:
            old.gather_hits()
            hits = old.hits
            self.hits.go_on(hits.gathered or {}, hits.used, hits.made, hits.started)
            self.hits.total = hits.total
        self.journal.limit, self.history_limit = old.journal.limit, old.history_limit
        self.watcher = old.watcher
        self.lock, self.changing = old.lock, old.changing

    def take_records(self, other: Storage) -> None:
        """Hold the settings, queries and records of another one, which is not to be used any more.

        For who writes its slots here as well, and holds both locks.
        """
        self.settings, self.imported, self.labels = other.settings, other.imported, other.labels
        self.queries = other.queries.of(self.journal)
        for name in ("edit_records", "entry_records", "retired_values", "by_prompt", "by_query"):
            setattr(self, name, getattr(other, name))
        self.past, self.live_edits = other.past, other.live_edits
        self.next_id = max(self.next_id, other.next_id)
        self.next_value_id = max(self.next_value_id, other.next_value_id)

    def place_entry(
        self, entry: Entry, key: Tensor, value: Tensor, radius: float, slot: int | None = None
    ) -> int:
        """Put an entry into a free slot, the lowest unless one is named; return which.

        Raises:
            CapacityError: the codebook is frozen and full.
        """
        slot = self.slots.take(slot)
        self.slots.write_key(slot, key)
        self.slots.write_value(slot, value)
        self.put_entry(slot, entry)
        self.slots.write_radius(slot, radius)  # last: it makes the slot live
        return slot

    def put_entry(self, slot: int, entry: Entry, value: Tensor | None = None) -> None:
        """Change the entry of a slot, together with its value if one is given."""
        if value is not None:
            self.retire_value(slot)
            self.slots.write_value(slot, value)
        self.slots.write_label(slot, self.label_number(entry.label))
        self._put("entry_records", slot, entry)

    def vacate(self, slot: int) -> None:
        """Take the entry out of a slot, which is free then; key and value stay for now."""
        self.slots.release(slot)
        if slot < len(self.imported.labels):
            self._put("entry_records", slot, None)
        else:
            self._drop("entry_records", slot)

    def put_edit(self, edit: Edit) -> None:
        """Make or change the record of an edit."""
        self._put("edit_records", edit.id, edit)
        if edit.part_of is None and edit.live == (edit.id in self.past):
            if edit.live:
                self._drop("past", edit.id)
            else:
                self._put("past", edit.id, True)

    def make_live(self, edit: Edit, query: Tensor, slot: int, distance: float) -> None:
        """Let an edit be live, with this stored query and what answers it."""
        self.queries.set_answer(edit.query_index, slot, distance)
        if edit.prompt is not None:
            self._put("by_prompt", edit.prompt, edit.id)
        self._put("by_query", self.name_of(query), edit.id)
        self.put_edit(edit.but(slot=slot))
        self._put_number("live_edits", self.live_edits + (edit.part_of is None))

    def supersede(self, id: int, by: int) -> None:
        """Let a live edit be superseded by another: no entry answers for it any more."""
        edit = self.edit(id)
        self.leave_entry(edit)
        self.put_edit(replace(edit, state="superseded", slot=-1, superseded_by=by))
        self.end_life(edit)

    def free(self, slot: int) -> None:
        """Take the entry out of a slot for good: it holds zeros then."""
        if self.is_imported(slot) and self.edit(slot).query_index < 0:
            # This key is the only place of the query of an edit that may come back.
            index = self.queries.add(self.slots.keys[slot], slot)
            self.put_edit(replace(self.edit(slot), query_index=index))
        self.retire_value(slot)
        self.vacate(slot)
        self.slots.clear(slot)

    def end_life(self, edit: Edit) -> None:
        """Note that an edit that was live is not; its record and its entry are the caller's."""
        if edit.query_index >= 0:
            self.queries.clear_answer(edit.query_index)
        if edit.prompt is not None and self.by_prompt.get(edit.prompt) == edit.id:
            self._drop("by_prompt", edit.prompt)
        query = self.name_of(self.query_of(edit))
        if self.by_query.get(query) == edit.id:
            self._drop("by_query", query)
        self._put_number("live_edits", self.live_edits - (edit.part_of is None))

    def leave_entry(self, edit: Edit) -> None:
        """Take an edit out of the members of the entry that answers it."""
        entry = self.entry(edit.slot)
        if entry is not None and edit.id in entry.members:
            members = tuple(id for id in entry.members if id != edit.id)
            self._put("entry_records", edit.slot, replace(entry, members=members))

    def join_entry(self, edit: Edit, slot: int) -> None:
        """Add an edit to the members of an entry."""
        entry = self.live_entry(slot)
        members = tuple(sorted({*entry.members, edit.id}))
        self._put("entry_records", slot, replace(entry, members=members))

    def clear_live(self) -> None:
        """Forget which edits are live, imported ones apart, and what answers them."""
        for index in range(self.queries.count):
            self.queries.clear_answer(index)
        for table in ("by_prompt", "by_query"):
            for key in list(getattr(self, table)):
                self._drop(table, key)
        imported = len(self.imported.labels)
        gone = sum(id < imported and not self.is_imported(id) for id in self.edit_records)
        self._put_number("live_edits", imported - gone)

    def erase(self, edit: Edit) -> None:
        """Erase the record of an edit that is not live, and its query."""
        if edit.query_index >= 0:
            self.queries.erase(edit.query_index)
        if edit.id in self.past:
            self._drop("past", edit.id)
        if edit.id < len(self.imported.labels):
            self._put("edit_records", edit.id, None)  # or it would be as imported
        else:
            self._drop("edit_records", edit.id)

    def purge(self, edit: Edit) -> None:
        """Erase a deleted edit and its query; the end of the transaction ends the undo there."""
        self.erase(edit)
        self._put_number("purged", True)

    def _put_number(self, name: str, number: int) -> None:
        self.journal.note(self, name)
        setattr(self, name, number)

    def retire_value(self, slot: int) -> None:
        """Keep the value of a slot that is about to lose it; `end_change` drops it if unneeded."""
        entry = self.entry(slot)
        if entry is not None and entry.value_id not in self.retired_values:
            self._put("retired_values", entry.value_id, self.slots.values[slot].cpu().clone())

    def _drop_values(self) -> None:
        """Drop the retired values that no edit refers to or that a slot holds."""
        if not self.retired_values:
            return
        held, wanted = self.entry_records.values_used, self.edit_records.values_used
        for id in list(self.retired_values):
            untouched = id < len(self.imported.labels) and id not in self.entry_records
            if id not in wanted or id in held or untouched:
                self._drop("retired_values", id)

    def label_number(self, label: Label) -> int:
        """Return the number that stands for a label on the device while a slot holds it."""
        return self.labels.number(self.settings.label_key(label))

    def drop_labels(self) -> None:
        """Let labels that no slot holds, and none will by undoing, lose their numbers."""
        if self.labels.are_many:
            held = set(self.slots.label_ids[: self.slots.in_use].tolist())
            self.labels.keep(held.union(self.journal.noted("label_ids")))
