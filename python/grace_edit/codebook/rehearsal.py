"""A storage in which a history is made again quickly, to see what comes of it.

Decisions and repairs are those of any storage. What is different is how it finds the entries that
are near a query: how far all queries are from each other is known beforehand, roughly, from
products of matrices, with a bound of what they are off. The few keys that may be the nearest are
then compared exactly. Nothing is written down to be taken back, and values are numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_kernels import nearest

from .comparing import Bounds, Names
from .journal import Journal
from .queries import Queries
from .records import Edit, Entry, Label, TieError
from .settings import Settings
from .slots import Slots
from .storage import Storage

_NEARLY = 1.0 + 2.0**-20  # squares that their rounding, or that of the root, may make equal


class Rehearsal(Storage):
    """Edits whose queries are given, made one after the other as `replay.again` makes them.

    The slot of an entry is the number of the query that is its key; so slots say nothing of which
    of two entries at the same distance answers.

    Args:
        queries: `[N, D]` finite, on the host, in the order in which they will be asked.
        settings: as the codebook's.

    Raises:
        TieError: two entries are at exactly the same distance from a query, here or in any method;
            or the queries are too large to be compared in float32.
    """

    def __init__(self, queries: Tensor, settings: Settings) -> None:
        super().__init__(queries.shape[1], 1, 1, queries.dtype, torch.float32, "cpu", settings)
        self.journal = _Unnoted()
        queries = queries.contiguous()
        self._names = Names(queries)
        self._bounds = Bounds(queries, self._names.each)
        each = list(queries)
        self.slots = self._own_slots = _Slots(each, self.journal)
        self.queries = self._own_queries = _Queries(queries, each, self._bounds, self.journal)
        self._no_value = torch.zeros(1)

    def enter(self, edit: Edit) -> Edit:
        """Take in the edit of the next query, which is not live yet; return its record."""
        edit = edit.but(state="live", slot=-1, superseded_by=None, query_index=self.queries.count)
        self.queries.count += 1
        self._own_queries.owners_of.append(edit.id)
        self.put_edit(edit)
        return edit

    def place_import(self, edit: Edit, radius: float) -> None:
        """Give an edit that was imported the entry that it had then."""
        query = self.query_of(edit)
        slot = self.place_entry(
            Entry(edit.label, edit.value_id, edit.id, (edit.id,)), query, self._no_value, radius
        )
        self.queries.set_answer(edit.query_index, slot, 0.0)
        self.put_edit(edit.but(slot=slot))

    def ask(self, edit: Edit) -> None:
        """Be ready for what the making of an edit will look up."""
        self._bounds.reach(edit.query_index)

    def query_of(self, edit: Edit) -> Tensor:
        """Return the query `[D]` of an edit."""
        return self._own_queries.vector(edit.query_index)

    def number_of(self, edit: Edit) -> int:
        """Return the number of the query of an edit: its own, or one that it took over."""
        return self._own_queries.at[edit.query_index]

    def own_copy(self, query: Tensor) -> Tensor:
        """Return the query itself, which nobody writes."""
        return query

    def name_of(self, query: Tensor) -> bytes:
        """Return what equal queries share."""
        return self._names.each[_number(query)]

    def name(self, number: int) -> bytes:
        """Return the name of the query of this number."""
        return self._names.each[number]

    def find(self, query: Tensor) -> bytes | None:
        """Return the name of a query `[D]` from elsewhere; None: none here equals it."""
        return self._names.find(query)

    def value_of(self, edit: Edit) -> Tensor:
        """Return no more than a stand-in: only the number of a value matters."""
        return self._no_value

    def retire_value(self, slot: int) -> None:
        """Do nothing: values are kept elsewhere."""

    def place_entry(
        self, entry: Entry, key: Tensor, value: Tensor, radius: float, slot: int | None = None
    ) -> int:
        """Put an entry into the slot of the query that is its key; return which."""
        slot = _number(key)
        self.put_entry(slot, entry)
        self._own_slots.open(slot, radius)
        return slot

    def put_entry(self, slot: int, entry: Entry, value: Tensor | None = None) -> None:
        """Change the entry of a slot."""
        self._own_slots.labels[slot] = self.label_number(entry.label)
        self.entry_records[slot] = entry

    def free(self, slot: int) -> None:
        """Take the entry out of a slot."""
        self._own_slots.open(slot, -math.inf)
        del self.entry_records[slot]

    def nearest(self, query: Tensor, without: Collection[int] = ()) -> tuple[int, float]:
        """Return slot and distance of the nearest entry; -1 and +inf if there is none."""
        found, distances = self._nearest(query, self._own_slots.hidden(without))
        if not len(found):
            return -1, math.inf
        at = int(distances.argmin())
        if len(found) > 1 and int((distances == distances[at]).sum()) > 1:
            raise TieError
        return int(found[at]), float(distances[at])

    def distance_to_other_label(
        self, query: Tensor, label: Label, without: Collection[int] = ()
    ) -> float:
        """Return the distance to the nearest entry of another label; +inf for none."""
        slots = self._own_slots
        same = slots.labels == self.labels.known(self.settings.label_key(label))
        hidden = np.where(same, np.float32(math.inf), slots.hidden(without))
        distances = self._nearest(query, hidden)[1]
        return float(distances.min()) if len(distances) else math.inf

    def _nearest(self, query: Tensor, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots that may be nearest to a query, and their distances.

        Args:
            hidden: `[N]` float32, inf for each slot that is left out, otherwise 0.
        """
        least, slack = self._bounds.of(_number(query))
        seen = len(least)
        within = (least + (hidden[:seen] + self._bounds.slack[:seen])).min() + slack
        if math.isinf(within):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        within = max(within, 0.0) * _NEARLY
        found = np.flatnonzero(least + hidden[:seen] <= within)
        return found, self._own_queries.apart(query, found)


def _number(query: Tensor) -> int:
    """Return which of the queries this one is, by where it lies."""
    return query.storage_offset() // query.shape[0]


class _Unnoted(Journal):
    """Takes no note of anything."""

    def note(self, part: Any, table: str, key: Any = None) -> None:
        """Do nothing."""


class _Slots(Slots):
    """Radii and numbers of labels alone, one place for each query."""

    def __init__(self, keys: list[Tensor], journal: Journal) -> None:
        super().__init__(1, 1, 1, torch.float32, torch.float32, "cpu", journal)
        count, self._keys = len(keys), keys
        self.each_radius = [-math.inf] * count
        self.labels = np.full(count, -1, dtype=np.int64)
        self._closed = np.full(count, math.inf, dtype=np.float32)

    def open(self, slot: int, radius: float) -> None:
        """Let a slot have a radius; -inf: it holds no entry."""
        self.each_radius[slot] = radius
        self._closed[slot] = math.inf if radius == -math.inf else 0.0

    def key(self, slot: int) -> Tensor:
        """Return the key `[D]` of a slot."""
        return self._keys[slot]

    def radius(self, slot: int) -> float:
        """Return the radius of a slot; -inf: it is dead."""
        return self.each_radius[slot]

    def write_radius(self, slot: int, radius: float) -> None:
        """Write the radius of a live slot."""
        self.each_radius[slot] = radius

    def hidden(self, without: Collection[int]) -> np.ndarray:
        """Return inf for each slot without an entry, or named here, otherwise 0; to be read."""
        if not without:
            return self._closed
        hidden = self._closed.copy()
        hidden[list(without)] = math.inf
        return hidden


class _Queries(Queries):
    """Queries of which each is the same as long as it is there; an edit may get another one."""

    def __init__(
        self, vectors: Tensor, each: list[Tensor], bounds: Bounds, journal: Journal
    ) -> None:
        super().__init__(vectors.shape[1], vectors.dtype, journal)
        self._each = each
        self._all, self._bounds = vectors, bounds
        self.at = list(range(len(vectors)))
        self.owners_of: list[int] = []
        self._answers = [(-1, -math.inf)] * len(vectors)
        self._squares = np.full(len(vectors), -math.inf, dtype=np.float32)
        self._one = torch.full((1,), math.inf)
        self._owner_at: dict[int, int] = {}

    def vector(self, index: int) -> Tensor:
        """Return the query of the edit that came with this one."""
        return self._each[self.at[index]]

    def write(self, index: int, query: Tensor) -> None:
        """Let an edit have another one of the queries."""
        self.at[index] = _number(query)

    def answer(self, index: int) -> tuple[int, float]:
        """Return the slot that answers a query and the distance of its key."""
        return self._answers[self.at[index]]

    def set_answer(self, index: int, slot: int, distance: float) -> None:
        """Note what answers a query now."""
        at = self.at[index]
        self._answers[at] = slot, distance
        self._owner_at[at] = self.owners_of[index]
        self._squares[at] = distance * distance * _NEARLY if slot >= 0 else -math.inf

    def apart(self, query: Tensor, numbers: np.ndarray) -> np.ndarray:
        """Return the distances of a query to some others."""
        first = int(numbers[0])
        one = len(numbers) == 1
        others = self._all[first : first + 1] if one else self._all[torch.from_numpy(numbers)]
        return nearest(others, query[None], self._one)[1].numpy()

    def draw(self, key: Tensor, slot: int) -> list[int]:
        """Note that a new key answers each query to which it is the nearest; see `Queries`."""
        least, _ = self._bounds.of(slot)
        found = np.flatnonzero(least <= self._squares[: len(least)])
        if not len(found):
            return []
        drawn = []
        for at, distance in zip(found.tolist(), self.apart(key, found).tolist(), strict=True):
            held, was = self._answers[at]
            if distance == was and slot != held:
                raise TieError
            if distance < was:
                id = self._owner_at[at]
                drawn.append(id)
                self._answers[at] = slot, distance
                self._squares[at] = distance * distance * _NEARLY
        return drawn
