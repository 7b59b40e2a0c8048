"""Replaying a part of a history beside the codebook, and putting what comes of it in its place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import replay
from .records import Edit, Entry
from .storage import Storage
from .tensors import digest

_CAPACITY = 64


class Part:
    """Edits that act on no others, decided again without some of them.

    Making it changes nothing in the codebook. Values are not needed for that: their numbers are.

    Args:
        storage: the codebook's.
        ids: all that acts on each other, imported edits in their own slots among them.
        gone: those of `ids` that are left out.

    Raises:
        TieError: which of two entries answers depends on their slots, so on the other edits too.
    """

    def __init__(self, storage: Storage, ids: set[int], gone: set[int]) -> None:
        self.ids = sorted(ids)
        left = [storage.edit(id) for id in self.ids if id not in gone]
        left = [edit for edit in left if edit.state != "deleted"]
        self.imports = {edit.id for edit in left if edit.query_index < 0}
        slots = storage.slots
        sizes = (slots.keys.shape[1], 1, _CAPACITY)
        self.apart = Storage(*sizes, slots.keys.dtype, torch.float32, "cpu", storage.settings)
        self.apart.slots.untied = self.apart.queries.untied = True
        no_value = torch.zeros(1)
        self.apart.retired_values = {edit.value_id: no_value for edit in left}
        with self.apart.transaction():
            made = [self._enter(edit, storage.query_of(edit).cpu()) for edit in left]
            for edit in made:
                if edit.id in self.imports:
                    radius = storage.imported.radii[edit.id].item()
                    entry = Entry(edit.label, edit.value_id, edit.id, (edit.id,))
                    query = self.apart.query_of(edit)
                    slot = self.apart.place_entry(entry, query, no_value, radius)
                    self.apart.queries.set_answer(edit.query_index, slot, 0.0)
                    self.apart.put_edit(replace(edit, slot=slot))
            for edit in made:
                if edit.id not in self.imports:
                    replay.again(self.apart, self.apart.edit(edit.id))

    def _enter(self, edit: Edit, query: Tensor) -> Edit:
        index = self.apart.queries.add(query, edit.id)
        edit = replace(edit, state="live", slot=-1, superseded_by=None, query_index=index)
        self.apart.put_edit(edit)
        return edit

    @property
    def keeps_imports(self) -> bool:
        """Whether every imported edit of the part is live, with an entry of its own."""
        return all(
            edit.live and self.apart.live_entry(edit.slot).owner == edit.id
            for edit in map(self.apart.edit, self.imports)
        )

    def put_in_place(self, storage: Storage) -> None:
        """Let the codebook hold what was decided; entries with the same keys keep their slots.

        Those that were left out are not live afterwards; their records are the caller's.
        """
        before = [storage.edit(id) for id in self.ids]
        owned = {edit.slot for edit in before if edit.live}
        held = {replay.name(storage, slot): slot for slot in sorted(owned)}
        entries = {s: e for s, e in self.apart.entry_records.items() if e is not None}
        target: dict[int, int] = {}
        for slot in entries:
            place = held.get(digest(self.apart.slots.keys[slot]))
            if place is not None:
                target[slot] = place
        values = self._values(storage, before, entries, target)

        for edit in before:
            if edit.live and edit.id not in self.imports:
                storage.end_life(edit)
        for slot in sorted(owned - set(target.values())):
            storage.free(slot)
        for slot, entry in sorted(entries.items()):
            key, radius = self.apart.slots.keys[slot], self.apart.slots.radii[slot].item()
            if slot in target:
                if slot in values or storage.entry(target[slot]) != entry:
                    storage.put_entry(target[slot], entry, values.get(slot))
                storage.slots.write_key(target[slot], key)
                storage.slots.write_radius(target[slot], radius)
            else:
                target[slot] = storage.place_entry(entry, key, values[slot], radius)
        for edit in before:
            if edit.id in self.apart.edit_records:
                self._put_edit(storage, edit, target)

    def _values(
        self,
        storage: Storage,
        before: list[Edit],
        entries: dict[int, Entry],
        target: dict[int, int],
    ) -> dict[int, Tensor]:
        """Return the values of the entries that need another one than their slot holds."""
        # One that is live says where its value is; of the others it was kept.
        with_value = {edit.value_id: edit for edit in sorted(before, key=lambda edit: edit.live)}
        values = {}
        for slot, entry in entries.items():
            place = target.get(slot)
            if place is None or storage.live_entry(place).value_id != entry.value_id:
                values[slot] = storage.value_of(with_value[entry.value_id]).clone()
        return values

    def _put_edit(self, storage: Storage, before: Edit, target: dict[int, int]) -> None:
        decided = self.apart.edit(before.id)
        query = self.apart.query_of(decided)
        slot, distance = self.apart.queries.answer(decided.query_index)
        slot = target[slot] if decided.live else -1
        edit = replace(decided, slot=slot, query_index=before.query_index)
        if before.query_index < 0:
            if edit != before:
                storage.put_edit(edit)
            return
        storage.queries.write(edit.query_index, query)
        if edit.live:
            storage.make_live(edit, query, slot, distance)
        else:
            storage.put_edit(edit)
