"""Carrying plans out, and keeping every live edit answered while that is done.

The invariant of the default policy: the query of every live edit hits an entry of its label. A new
key can draw queries away from their entries and a smaller radius can uncover them, so after each
change the edits concerned are looked at and those that lost their label get an entry of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from grace_kernels import nearest

from . import policy as rules
from .records import Edit, EditResult, Entry, Label, Proposal
from .storage import Rows, digest

Answers = Callable[[Edit, int], bool]


class Retention(Rows):
    """Rows that know the policy's invariant; planned and called by `Codebook`."""

    policy: str
    radius: float
    drift: float

    def _apply(self, plan: Proposal, edit: Edit, value: Tensor | None) -> set[int]:
        """Carry a plan out for `edit`; return the live edits that may have lost their answer."""
        affected: set[int] = set()
        for earlier in plan.supersedes:
            self._supersede(earlier, edit.id)
        if plan.radius_after is not None and plan.radius_after != plan.radius_before:
            self._write("radii", plan.neighbour, plan.radius_after)

        slot, distance = plan.slot, plan.distance
        if plan.new_radius is not None:
            if plan.case == "split":
                affected.update(self._outside(plan.neighbour))
            slot, distance = self._new_entry(edit, plan.query, value, plan.new_radius), 0.0
            affected.update(self._drawn_to(slot))
        else:
            entry = self._entry(slot)
            assert entry is not None
            changed = replace(
                entry,
                stamp=edit.stamp,
                owner=edit.id if distance == 0.0 and self.policy != rules.PAPER else entry.owner,
                members=tuple(sorted({*entry.members, edit.id})),
                label=edit.label if plan.case == "update" else entry.label,
            )
            self._write_entry(slot, changed, value, self._label_number(changed.label))
            if value is not None and plan.case == "update":
                affected.update(plan.members)
            elif value is not None:  # trained together
                for member in plan.members:
                    self._accept(self._edit(member), slot, edit.stamp)
        self._write("_queries", edit.row, plan.query)
        self._write_answer(edit.row, slot, distance)
        if edit.prompt is not None:
            self._put("_by_prompt", edit.prompt, edit.id)
        self._put("_by_query", digest(plan.query), edit.id)
        self._put("_edits", edit.id, replace(edit, slot=slot))
        self._set_number("_live_edits", self._live_edits + 1)
        return affected

    def _new_entry(self, edit: Edit, query: Tensor, value: Tensor | None, radius: float) -> int:
        assert value is not None
        slot = self._new_slot()
        self._write("keys", slot, query)
        entry = Entry(edit.label, edit.stamp, edit.id, (edit.id,))
        self._write_entry(slot, entry, value, self._label_number(edit.label))
        self._write("radii", slot, radius)  # last: it makes the row live
        return slot

    def _supersede(self, id: int, by: int) -> None:
        edit = self._edit(id)
        self._leave(edit)
        self._put("_edits", id, replace(edit, state="superseded", slot=-1, superseded_by=by))
        if edit.row >= 0:
            self._write_answer(edit.row, -1, -math.inf)
        if edit.prompt is not None and self._by_prompt.get(edit.prompt) == id:
            self._put("_by_prompt", edit.prompt)
        query = digest(self._stored_query(edit))
        if self._by_query.get(query) == id:
            self._put("_by_query", query)
        self._set_number("_live_edits", self._live_edits - 1)

    def _leave(self, edit: Edit) -> None:
        """Take an edit out of the members of the entry that answered it."""
        entry = self._entry(edit.slot)
        if entry is not None and edit.id in entry.members:
            rest = tuple(m for m in entry.members if m != edit.id)
            self._put("_entries", edit.slot, replace(entry, members=rest))

    def _accept(self, edit: Edit, slot: int, stamp: int) -> None:
        """Note that the value `stamp` in `slot` answers `edit`."""
        if slot != edit.slot:
            self._leave(edit)
            entry = self._entry(slot)
            assert entry is not None
            members = tuple(sorted({*entry.members, edit.id}))
            self._put("_entries", slot, replace(entry, members=members))
        verified = None if edit.verified is None else edit.verified | {stamp}
        if (edit.slot, edit.stamp, edit.verified) != (slot, stamp, verified):
            self._put("_edits", edit.id, replace(edit, slot=slot, stamp=stamp, verified=verified))

    # ------------------------------------------------------------------ retention

    def _drawn_to(self, slot: int) -> list[int]:
        """Note that a new key answers the edits it is nearest to; return their ids.

        Only the default policy keeps track. An edit whose query is a key is at distance 0 from it,
        so no other key draws it; imported edits, which are all of that kind, need no query here.
        """
        count = self._query_count
        if self.policy == rules.PAPER or count == 0:
            return []
        key = self.keys[slot : slot + 1].cpu()
        distance = nearest(self._queries[:count], key, torch.full((1,), math.inf))[1]
        held, was = self._answer_slot[:count], self._answer_distance[:count]
        moved = ((distance < was) | ((distance == was) & (slot < held))).nonzero()[:, 0].tolist()
        for row in moved:
            self._write_answer(row, slot, distance[row].item())
        return [int(self._query_owner[row]) for row in moved]

    def _outside(self, slot: int) -> list[int]:
        """Return the members of an entry that its radius no longer covers."""
        entry = self._entry(slot)
        if self.policy == rules.PAPER or entry is None:
            return []
        rows = [(m, self._edit(m).row) for m in entry.members]
        radius = self.radii[slot].item()
        return [m for m, row in rows if row >= 0 and self._answer_distance[row].item() > radius]

    def _repair(self, affected: Iterable[int], answers: Answers | None, by: int) -> bool:
        """Give each affected edit that has lost its label an entry of its own.

        In order of id, again and again until nothing changes. It ends: an edit with its own entry
        is never lost again. Returns whether an entry smaller than the drift was made.
        """
        pending, last, fragile = set(affected), -1, False
        while pending:
            id = min((i for i in pending if i > last), default=min(pending))
            pending.discard(id)
            last = id
            edit = self._edit(id)
            if not edit.live or edit.row < 0:
                continue
            slot = int(self._answer_slot[edit.row])
            distance = self._answer_distance[edit.row].item()
            entry = self._entry(slot)
            assert entry is not None
            keeps_label = distance <= self.radii[slot].item() and entry.label == edit.label
            if keeps_label and self._trusts(edit, slot, entry.stamp, answers):
                self._accept(edit, slot, entry.stamp)
                continue
            if distance == 0.0:
                # Queries that differ by so little that their distance is 0: no entry can tell
                # them apart, the later edit has replaced the earlier one.
                self._supersede(id, by)
                continue
            query = self._stored_query(edit)
            radius = self._own_radius(query, edit.label)
            own = self._new_entry(edit, query, self._value_of(edit), radius)
            self._leave(edit)
            self._put("_edits", id, replace(edit, slot=own))
            self._write_answer(edit.row, own, 0.0)
            pending.update(self._drawn_to(own))
            fragile = fragile or radius < self.drift
        return fragile

    def _trusts(self, edit: Edit, slot: int, stamp: int, answers: Answers | None) -> bool:
        """Say whether the value `stamp` in `slot`, of the edit's label, is known to answer it."""
        if edit.verified is None or stamp in edit.verified:
            return True
        return answers is not None and bool(answers(edit, slot))

    def _own_radius(self, query: Tensor, label: Label) -> float:
        """Return the radius of an entry of its own: at most half way to another label."""
        number = self._label_numbers.get(self._label_key(label), -1)
        radii = self.radii[: self._row_count]
        others = radii.masked_fill(self._label_ids[: self._row_count] == number, -math.inf)
        return rules.own_radius(self._nearest(query, others)[1], radius=self.radius)

    def _nearest(self, query: Tensor, radii: Tensor | None = None) -> tuple[int, float]:
        """Return slot and distance of the entry nearest to `[D]`; -1 and +inf if there is none."""
        radii = self.radii if radii is None else radii
        query = query.to(self.radii.device)[None]
        count = self._row_count
        slot, distance = nearest(query, self.keys[:count], radii[:count])
        return int(slot), distance.item()

    def _label_key(self, label: Label) -> Label | float:
        return rules.label_key(label, self.policy)

    def _label_number(self, label: Label) -> int:
        return self._label_numbers.setdefault(self._label_key(label), len(self._label_numbers))

    def _edit(self, id: int) -> Edit:
        edit = self._edits.get(id)
        if edit is not None:
            return edit
        if id in self._edits or not 0 <= id < len(self._imported_labels):
            raise KeyError(f"id must be that of an edit in the history, got {id}")
        return self._imported_edit(id)

    def _imported_edit(self, id: int) -> Edit:
        result = EditResult(id, "import", id, -1, math.inf, None, self._imported_radii[id].item())
        return Edit(id, self._imported_labels[id], None, -1, id, id, None, result)
