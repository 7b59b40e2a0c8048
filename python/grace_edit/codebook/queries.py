"""The queries that edits were made with, and what answers each of them now."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grace_kernels import nearest

from .journal import Journal
from .records import TieError
from .tensors import resized, same_bits

_TENSORS = ("vectors", "owners", "slots", "distances")
_LEAST = 1e-15  # for what a number must exceed to have no other one next to it


class Queries:
    """Stored queries, on the host; one per edit that was not imported, at its `query_index`.

    Attributes:
        count: how many there are; the tensors may have room for more.
        vectors: `[Q, D]`, the queries.
        owners: `[Q]` int64, ids of their edits; -1 for a free place.
        slots, distances: `[Q]` int64 and float32, the entry that answers each query and how far
            its key is; slot -1 at -inf where the edit is not live, so that no key is ever nearer.
        untied: `draw` raises TieError where the lower slot would decide.
    """

    def __init__(self, key_dim: int, dtype: torch.dtype, journal: Journal) -> None:
        self.count = 0
        self.vectors = torch.zeros(0, key_dim, dtype=dtype)
        self.owners = torch.zeros(0, dtype=torch.int64)
        self.slots = torch.zeros(0, dtype=torch.int64)
        self.distances = torch.zeros(0)
        self.untied = False
        self._free: set[int] = set()
        self._journal = journal

    @property
    def free(self) -> frozenset[int]:
        """The places that hold no query any more and are used again."""
        return frozenset(self._free)

    def held(self, table: str, key: Any) -> Any:
        """Return what a place holds; see `journal.Part`."""
        if table == "vectors":
            query = self.vectors[key]
            return query.clone() if query.view(torch.uint8).any() else None  # None: zeros
        if table == "answers":
            return self.answer(key)
        if table == "free":
            return key in self._free
        return self.count if table == "count" else self.owners[key].item()

    def put_back(self, table: str, key: Any, old: Any) -> None:
        """Let a place hold what it held; see `journal.Part`."""
        if table == "vectors":
            self.vectors[key] = 0 if old is None else old
        elif table == "answers":
            self.slots[key], self.distances[key] = old
        elif table == "count":
            self.count = old
        elif table == "free":
            (self._free.add if old else self._free.discard)(key)
        else:
            self.owners[key] = old

    def add(self, query: Tensor, edit_id: int) -> int:
        """Store the query of an edit, which nothing answers yet; return its index."""
        if self._free:
            index = min(self._free)
            self._journal.note(self, "free", index)
            self._free.discard(index)
        else:
            index = self.count
            self.reserve(index + 1)
            self._journal.note(self, "count")
            self.count = index + 1
        self.write(index, query)
        self._own(index, edit_id)
        self.clear_answer(index)
        return index

    def of(self, journal: Journal) -> Queries:
        """Return these queries, whose changes another journal takes note of from now on."""
        self._journal = journal
        return self

    def reserve(self, rows: int) -> None:
        """Have room for so many."""
        if rows > len(self.owners):
            for name in _TENSORS:
                setattr(self, name, resized(getattr(self, name), max(64, 2 * rows), 0))

    def fill(self, vectors: Tensor, owners: list[int], slots: list[int], distances: Tensor) -> None:
        """Let there be these alone, without a note in the journal."""
        tensors = {
            "vectors": vectors.clone(),
            "owners": torch.tensor(owners, dtype=torch.int64),
            "slots": torch.tensor(slots, dtype=torch.int64),
            "distances": distances.clone(),
        }
        # All made before the first is replaced.
        vars(self).update(tensors, count=len(owners), _free=set())

    def write(self, index: int, query: Tensor) -> None:
        """Store another query `[D]`, of any device, in the place of one."""
        query = query.to(self.vectors.device)
        if not same_bits(self.vectors[index], query):
            self._journal.note(self, "vectors", index)
            self.vectors[index] = query

    def erase(self, index: int) -> None:
        """Forget a query and whose it was; its place is free then."""
        self.write(index, torch.zeros_like(self.vectors[index]))
        self._own(index, -1)
        self.clear_answer(index)
        self._journal.note(self, "free", index)
        self._free.add(index)

    def _own(self, index: int, edit_id: int) -> None:
        self._journal.note(self, "owners", index)
        self.owners[index] = edit_id

    def answer(self, index: int) -> tuple[int, float]:
        """Return the slot that answers a query and the distance of its key."""
        return int(self.slots[index]), self.distances[index].item()

    def set_answer(self, index: int, slot: int, distance: float) -> None:
        """Note what answers a query now."""
        self._journal.note(self, "answers", index)
        self.slots[index], self.distances[index] = slot, distance

    def clear_answer(self, index: int) -> None:
        """Note that nothing answers a query: its edit is not live."""
        self.set_answer(index, -1, -math.inf)

    def answered(self) -> tuple[Tensor, Tensor]:
        """Return the queries `[N, D]` of the live edits and the slots `[N]` that answer them."""
        live = (self.slots[: self.count] >= 0).nonzero()[:, 0]
        return self.vectors[live], self.slots[live]

    def draw(self, key: Tensor, slot: int) -> list[int]:
        """Note that a new key `[D]` in `slot` answers each query to which it is the nearest.

        Of two keys at the same distance the one in the lower slot is. Returns the edits concerned.
        """
        key = key.cpu()
        rows = self._could_draw(key)
        if not len(rows):
            return []
        one = torch.full((1,), math.inf)
        distance = nearest(self.vectors[rows], key[None], one)[1]
        held, was = self.slots[rows], self.distances[rows]
        equal = (distance == was) & (slot != held)
        if self.untied and equal.any():
            raise TieError
        drawn = ((distance < was) | (equal & (slot < held))).nonzero()[:, 0]
        indexes = rows[drawn].tolist()
        for index, apart in zip(indexes, distance[drawn].tolist(), strict=True):
            self.set_answer(index, slot, apart)
        return self.owners[rows[drawn]].tolist()

    def _could_draw(self, key: Tensor) -> Tensor:
        """Return the indexes of the queries that a key `[D]` could be as near to as their answer.

        Most have a key of their own, at distance 0. Another key is there as well only if it equals
        them where it is largest: numbers above 1e-15 that differ, differ by more than 3e-23, whose
        square is not rounded to 0.
        """
        answered = self.distances[: self.count]
        place = int(key.abs().argmax())
        if key[place].abs() <= _LEAST:
            return (answered >= 0).nonzero()[:, 0]
        equal = self.vectors[: self.count, place] == key[place]
        return ((answered > 0) | (equal & (answered == 0))).nonzero()[:, 0]
