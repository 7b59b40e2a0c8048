"""The codebook's storage: slots, stored queries and records, and changes that can be taken back.

Nothing is decided here. Each method that writes does one thing that those who decide need (give a
slot an entry, make an edit live, ...) and notes in the journal what it overwrites. A transaction
that ends with an exception is rolled back to the bit; one that ends well becomes a step of undo.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .hits import Hits
from .journal import Journal, Place
from .queries import Queries
from .records import Edit, EditResult, Entry, Label
from .settings import Settings
from .slots import Slots
from .tables import Table
from .tensors import digest


class Absent:
    """What the journal notes for a record that was not there; the class itself survives a copy."""


class Watcher(Protocol):
    """Who is told of every change, in the thread that makes it, which holds `changing` alone."""

    def commit(self, storage: Storage, changed: Sequence[Place]) -> None:
        """Take note of a change that is about to be final; what is raised takes it back."""

    def keeps(self, directory: Path) -> bool:
        """Say whether changes are kept in this directory."""

    def settled(self, storage: Storage, *, anew: bool = False) -> None:
        """Be told that the change is final.

        Args:
            anew: so is another one of which no place tells.
        """

    def taken_back(self, storage: Storage) -> None:
        """Be told that a change was taken back, perhaps after `commit`."""

    def replace(self, storage: Storage) -> None:
        """Take note that this storage is about to take over; what is raised prevents it."""


_NUMBERS = ("live_edits", "purged")
_LABELS = 1024  # numbered before any is dropped


@dataclass
class Imported:
    """Entries that were given as tensors. They cost no record until something happens to them.

    Slot i, value i and edit i belong together, with label i and, at first, radius i.
    """

    labels: list[Label] = field(default_factory=list)
    radii: Tensor = field(default_factory=lambda: torch.zeros(0))


class Storage:
    """Everything a codebook holds. Read what is public here; write by the methods.

    Writing needs an open `transaction`, and the `lock` where other threads read; only filling an
    empty codebook (`fill` here, in `slots` and in `queries`) needs neither. Where both locks are
    taken, `changing` is taken first.

    Attributes:
        settings, slots, queries, imported, journal, hits: see their classes.
        lock: held while slots change; must be held while they are read in another thread.
        changing: held by the thread that changes the codebook, from the first look on which its
            decision rests to the end of its transaction. Those who only read never take it.
        version: goes up with every change, and never down.
        entry_records: by slot, of each entry about which there is more to say than "as imported";
            None: an imported slot that is dead.
        edit_records: by id, of each edit about which there is more to say; None: it was purged.
        retired_values: `[V]` on the host by value id: values that the history needs and no slot
            holds.
        by_prompt, by_query: ids of live edits that were not imported, by prompt and by `digest`.
        past: the ids of whole edits that are not live and not forgotten, as keys.
        history_limit: how many of these are kept, None: all; see `past.forget`.
        live_edits: how many there are, parts not counted.
        purged: whether an edit was purged within the open transaction.
        taken: the highest version that somebody may have seen of a writer that died since.
        watcher: is told of every change; None: nobody. Not copied with the storage.
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
        self.settings = settings
        self.journal = Journal()
        self.slots = Slots(key_dim, value_dim, capacity, dtype, value_dtype, device, self.journal)
        self.queries = Queries(key_dim, dtype, self.journal)
        self.imported = Imported()
        self.hits = Hits()
        self.lock = threading.RLock()
        self.changing = threading.RLock()
        self.version = 0
        self.taken = 0
        self.entry_records: Table[Entry] = Table()
        self.edit_records: Table[Edit] = Table()
        self.retired_values: dict[int, Tensor] = {}
        self.by_prompt: dict[Label, int] = {}
        self.by_query: dict[bytes, int] = {}
        self.past: dict[int, bool] = {}
        self.history_limit: int | None = None
        self.live_edits = 0
        self.purged = False
        self.watcher: Watcher | None = None
        self.next_id = 0
        self.next_value_id = 0
        self._label_numbers: dict[Label | float, int] = {}
        self._next_label = 0  # never taken back either
        self._most_labels = _LABELS  # before those that nothing holds are dropped
        self._changed = False  # version went up within the open transaction

    def __getstate__(self) -> dict[str, Any]:
        own = ("lock", "changing", "watcher")
        return {k: item for k, item in vars(self).items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock(), changing=threading.RLock())
        self.watcher = None

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

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is done inside one step of undo, all of it or nothing; may be nested.

        That of another thread is waited for: what it is told is done stays done.
        """
        with self.changing:
            yield from self._transaction()

    def _transaction(self) -> Iterator[None]:
        self.journal.begin()
        try:
            yield
            with self.lock:
                self.slots.tell_sketch()
            told = self._tell_watcher()
        except BaseException:
            with self.lock:
                self.gather_hits()
                self.journal.roll_back()
                if not self.journal.is_open:
                    if self._changed:  # somebody may have seen a version in between
                        self.version = self.next_version()
                    self._changed = False
                self.slots.tell_sketch()
            if self.watcher is not None and not self.journal.is_open:
                self.watcher.taken_back(self)
            raise
        self.journal.end()
        if not self.journal.is_open:
            if self.purged:
                self.journal.forget("a purge")
            self.purged = self._changed = False
        if told and self.watcher is not None:
            self.watcher.settled(self)

    def _tell_watcher(self) -> bool:
        """Tell the watcher of the end of the outermost transaction, if it changed anything."""
        changed = None if self.watcher is None else self.journal.changed()
        if self.watcher is None or changed is None or not (changed or self._changed):
            return False
        self.watcher.commit(self, changed)
        return True

    def end_change(self) -> None:
        """Do what ends every change: drop values nobody needs, count it, maintain the sketch."""
        self._drop_values()
        self._drop_labels()
        self.version = self.next_version()
        self._changed = True
        self.slots.maintain_sketch()

    def undo(self) -> None:
        """Take the last step back; only `version`, ids and value ids go on.

        Raises:
            UndoError: there is none, or a transaction is open.
        """
        with self.changing:
            self._undo()

    def _undo(self) -> None:
        self.journal.require_step()
        capacity = self.journal.before_last(self.slots, "capacity")
        if capacity is not None and not self.slots.frozen:
            self.slots.warn_of_new_memory(capacity)
        with self.lock:
            self.gather_hits()
            redo = self.journal.undo()
            self.version = self.next_version()
            self.slots.maintain_sketch()
        if self.watcher is None:
            return
        try:
            self.watcher.commit(self, list(redo))
        except BaseException:
            with self.lock:
                self.gather_hits()
                self.journal.redo(redo)
                self.version = self.next_version()
                self.slots.maintain_sketch()
            self.watcher.taken_back(self)
            raise
        self.watcher.settled(self)

    def next_version(self) -> int:
        """Return the version of the next change, a number that nobody has seen before."""
        return max(self.version, self.taken) + 1

    def gather_hits(self) -> None:
        """Note what the entries answered so far with their edits, before a slot changes hands."""
        self.hits.gather(self._owner_of)

    def _owner_of(self, slot: int) -> int | None:
        entry = self.entry(slot)
        if entry is None:
            return None
        edit = self.edit_records.get(entry.owner)  # none: an imported one, or about to be made
        return entry.owner if edit is None else edit.whole

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

    def edit(self, id: int) -> Edit:
        """Return an edit of the history.

        Raises:
            KeyError: there is none with this id, or it was purged.
        """
        edit = self.edit_records.get(id)
        if edit is not None:
            return edit
        if id in self.edit_records or not 0 <= id < len(self.imported.labels):
            raise KeyError(f"id must be that of an edit in the history, got {id}")
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
        return self.by_query.get(digest(query)) if earlier is None else earlier

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
        self._put("by_query", digest(query), edit.id)
        self.put_edit(replace(edit, slot=slot))
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
        query = digest(self.query_of(edit))
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
        self.hits.forget(edit.id)
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
        key = self.settings.label_key(label)
        number = self._label_numbers.get(key)
        if number is None:
            number = self._label_numbers[key] = self._next_label
            self._next_label += 1
        return number

    def _drop_labels(self) -> None:
        """Let labels that no slot holds, and none will by undoing, lose their numbers."""
        if len(self._label_numbers) < self._most_labels:
            return
        held = set(self.slots.label_ids[: self.slots.in_use].tolist())
        held.update(self.journal.noted("label_ids"))
        self._label_numbers = {x: n for x, n in self._label_numbers.items() if n in held}
        self._most_labels = max(_LABELS, 2 * len(self._label_numbers))

    def nearest(self, query: Tensor, radii: Tensor | None = None) -> tuple[int, float]:
        """Return slot and distance of the entry nearest to `[D]`; see `Slots.nearest`."""
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest(query, radii)

    def _ready_sketch(self) -> None:
        # Of what this change has written so far; only on a CPU does it spare a scan.
        if self.slots.device.type == "cpu":
            self.slots.tell_sketch()

    def distance_to_other_label(
        self, query: Tensor, label: Label, radii: Tensor | None = None
    ) -> float:
        """Return the distance from `[D]` to the nearest entry of another label; +inf for none.

        `radii` `[in_use]` are read instead of the codebook's; -inf leaves an entry out.
        """
        number = self._label_numbers.get(self.settings.label_key(label), -1)
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest_of_other_label(query, number, radii)

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries that answer `[B, D]`, as in serving."""
        with self.lock:
            return self.slots.lookup(query)
