"""Replaying a history, or a part of it, beside the codebook, and putting the outcome in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import replay
from .records import Edit, Entry
from .rehearsal import Rehearsal
from .storage import Storage


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
        self.apart = Rehearsal(_queries(storage, left), storage.settings)
        self._own = {edit.id: number for number, edit in enumerate(left)}
        made = [self.apart.enter(edit) for edit in left]
        for edit in made:
            if edit.id in self.imports:
                self.apart.place_import(edit, storage.imported.radii[edit.id].item())
        for edit in made:
            if edit.id not in self.imports:
                self.apart.ask(edit)
                replay.again(self.apart, self.apart.edit(edit.id))

    @property
    def keeps_imports(self) -> bool:
        """Whether every imported edit of the part is live, with an entry of its own."""
        return all(
            edit.live and self.apart.live_entry(edit.slot).owner == edit.id
            for edit in map(self.apart.edit, self.imports)
        )

    def put_in_place(self, storage: Storage) -> None:
        """Let the codebook hold what was decided; entries with the same keys keep their slots.

        What comes out as it was is not written. Those that were left out are not live afterwards;
        their records are the caller's.
        """
        before = [storage.edit(id) for id in self.ids]
        owned = {edit.slot for edit in before if edit.live}
        held = {self._key_of(storage, slot): slot for slot in sorted(owned)}
        keys = {slot: self._own.get(storage.live_entry(slot).owner) for slot in owned}
        entries = {s: e for s, e in self.apart.entry_records.items() if e is not None}
        target: dict[int, int] = {}
        for slot, entry in entries.items():
            place = held.get(self.apart.name_of(self.apart.query_of(self.apart.edit(entry.owner))))
            if place is not None:
                target[slot] = place
        values = self._values(storage, before, entries, target)
        changed = [edit for edit in before if self._changes(edit, target)]

        for edit in changed:
            if edit.live and edit.id not in self.imports:
                storage.end_life(edit)
        for slot in sorted(owned - set(target.values())):
            storage.free(slot)
        places = sorted(target.values())
        radii = dict(zip(places, storage.slots.radii[places].tolist(), strict=True))
        for slot, entry in sorted(entries.items()):
            key = self.apart.query_of(self.apart.edit(entry.owner))
            radius = self.apart.slots.radius(slot)
            if slot not in target:
                target[slot] = storage.place_entry(entry, key, values[slot], radius)
                continue
            place = target[slot]
            if slot in values or storage.entry(place) != entry:
                storage.put_entry(place, entry, values.get(slot))
            if keys[place] != slot:  # an equal query, whose zeros may have other signs
                storage.slots.write_key(place, key)
            if radii[place] != radius:
                storage.slots.write_radius(place, radius)
        for edit in changed:
            if edit.id in self.apart.edit_records:
                self._put_edit(storage, edit, target)

    def _key_of(self, storage: Storage, slot: int) -> bytes | None:
        """Return by what the rehearsal knows the key of an entry that is there already."""
        number = self._own.get(storage.live_entry(slot).owner)
        if number is None:  # its edit is left out
            return self.apart.find(storage.slots.keys[slot].cpu())
        return self.apart.name(number)

    def _decided(self, decided: Edit, target: dict[int, int]) -> tuple[int, float]:
        """Return the slot that answers an edit, as decided, and its distance.

        A slot of -1 is one that is still to be found for an entry, or none.
        """
        slot, distance = self.apart.queries.answer(decided.query_index)
        return target.get(slot, -1) if decided.live else -1, distance

    def _changes(self, before: Edit, target: dict[int, int]) -> bool:
        """Say whether an edit comes out differently, or was left out."""
        if before.id not in self.apart.edit_records:
            return True
        decided = self.apart.edit(before.id)
        if _outcome(decided) != _outcome(before):
            return True
        if self._decided(decided, target)[0] != before.slot:
            return True
        # Else the distance is as it was too: its query and the key are.
        return before.query_index >= 0 and self.apart.number_of(decided) != self._own[before.id]

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
        slot, distance = self._decided(decided, target)
        edit = decided.but(slot=slot, query_index=before.query_index)
        if before.query_index < 0:
            storage.put_edit(edit)
            return
        query = self.apart.query_of(decided)
        storage.queries.write(edit.query_index, query)
        if edit.live:
            storage.make_live(edit, query, slot, distance)
        else:
            storage.put_edit(edit)


def _outcome(edit: Edit) -> tuple[Any, ...]:
    """Return what making an edit again may change of its record, but for its slot."""
    return edit.state, edit.superseded_by, edit.value_id, edit.verified


def _queries(storage: Storage, edits: list[Edit]) -> Tensor:
    """Return the queries `[N, D]` of edits, on the host."""
    stored = storage.queries.vectors
    rows = stored.new_empty(len(edits), stored.shape[1])
    numbers = [number for number, edit in enumerate(edits) if edit.query_index >= 0]
    rows[numbers] = stored[[edits[number].query_index for number in numbers]]
    for number, edit in enumerate(edits):
        if edit.query_index < 0:
            rows[number] = storage.query_of(edit).cpu()
    return rows
