"""Streams of edits, and pictures of a codebook's state to compare."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from grace_edit.codebook.codebook import Codebook
from torch import Tensor

VALUE_DIM = 2
ISLAND_DIM = 5


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, so that -0 and 0 differ and NaN equals itself."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(book: Codebook) -> dict[str, Any]:
    """Return everything a codebook holds to the bit, `version` and the numbering apart."""
    storage = book.storage
    slots, queries = storage.slots, storage.queries
    asked = queries.count
    return {
        "capacity": book.capacity,
        "keys": bits(book.keys),
        "values": bits(book.values),
        "radii": bits(book.radii),
        "count": int(book.count),
        "label_ids": bits(slots.label_ids),
        "queries": (bits(queries.vectors[:asked]), bits(queries.owners[:asked])),
        "answers": (bits(queries.slots[:asked]), bits(queries.distances[:asked])),
        "history": book.history,
        "ids": book.ids,
        "labels": book.labels,
        "members": [book.members(slot) for slot in range(int(book.count))],
        "records": (dict(storage.entry_records), dict(storage.edit_records)),
        "free": (slots.free, book.edits),
        "index": (storage.by_prompt.copy(), storage.by_query.copy()),
        "retired": {id: bits(value) for id, value in storage.retired_values.items()},
    }


def entries(book: Codebook, names: dict[int, int] | None = None) -> list[Any]:
    """Return key, radius, label and members of every entry, in an order of their own."""
    return sorted(
        (
            bits(book.keys[slot]),
            bits(book.radii[slot]),
            label,
            tuple(sorted(names[m] if names else m for m in book.members(slot))),
        )
        for slot, label in enumerate(book.labels)
        if label is not None
    )


def fed_anew(book: Codebook) -> tuple[Codebook, dict[int, int]]:
    """Feed a new codebook the history of one, with the stored queries; map new ids to old."""
    fresh = Codebook(
        book.keys.shape[1],
        book.values.shape[1],
        radius=book.radius,
        policy=book.policy,
        drift=book.drift,
        max_radius=book.max_radius,
        dtype=book.keys.dtype,
    )
    names = {}
    value = torch.zeros(VALUE_DIM)
    for edit in book.history:
        if edit.state == "deleted":
            continue
        query = book.query_of(edit.id)
        result = fresh.insert(query, edit.label, value, edit.prompt, radius=edit.radius)
        assert result.id is not None
        names[result.id] = edit.id
        for part in book.parts(edit.id):
            further: Any = {"radius": part.radius, "part_of": result.id}
            fresh.insert(book.query_of(part.id), part.label, value, part.prompt, **further)
    return fresh, names


def insert_several(book: Codebook, stream: Stream, *, radii: bool = True) -> int:
    """Make an edit of one to four keys out of a stream, some with a radius; return its id."""
    query, label, value, prompt = stream.next()
    radius = stream.random.choice([None, None, 0.2, 0.7]) if radii else None
    with book.transaction():
        id = book.insert(query, label, value, prompt, radius=radius).id
        assert id is not None
        for _ in range(stream.random.choice([0, 0, 1, 2, 3])):
            query, _, other, prompt = stream.next()
            other = stream.random.choice([value, other])
            radius = None if radius is None else stream.random.choice([0.1, 0.5])
            # A query or prompt that the edit has already is refused.
            with contextlib.suppress(ValueError):
                book.insert(query, label, other, prompt, radius=radius, part_of=id)
    return id


class Stream:
    """Random edits that conflict: few dimensions, few labels, some queries and prompts twice."""

    def __init__(self, seed: int, *, dim: int = 3, spread: float = 1.5, labels: int = 3) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.dim, self.spread, self.labels = dim, spread, labels
        self.queries: list[Tensor] = []

    def next(self, repeats: float = 0.15) -> tuple[Tensor, list[int], Tensor, list[int] | None]:
        """Return query, label, value and prompt of the next edit."""
        query = torch.randn(self.dim, generator=self.torch) * self.spread
        if self.queries and self.random.random() < repeats:
            query = self.random.choice(self.queries)
        self.queries.append(query)
        prompt = None
        if self.random.random() < 0.5 and repeats:
            prompt = [self.random.randrange(100), self.random.randrange(2)]
        label = [self.random.randrange(self.labels)]
        return query, label, torch.randn(VALUE_DIM, generator=self.torch), prompt


class Islands:
    """Edits that conflict with those around one of many centres, far from each other or not."""

    def __init__(self, seed: int, *, apart: float = 9.0, centres: int = 12) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(centres, ISLAND_DIM, generator=self.torch) * apart
        self.queries: list[list[Tensor]] = [[] for _ in range(centres)]

    def query(self, island: int | None = None) -> Tensor:
        """Return a new query or an old one, by an island or any."""
        island = self.random.randrange(len(self.centres)) if island is None else island
        old = self.queries[island]
        if old and self.random.random() < 0.15:
            return self.random.choice(old)
        near = torch.randn(ISLAND_DIM, generator=self.torch) * self.random.choice([0.1, 0.4, 0.8])
        query: Tensor = self.centres[island] + near
        old.append(query)
        return query

    def insert(self, book: Codebook) -> int:
        """Make an edit of one to three keys, some of an old prompt; return its id."""
        island = self.random.randrange(len(self.centres))
        label = [self.random.randrange(3)]
        value = torch.randn(VALUE_DIM, generator=self.torch)
        radius = self.random.choice([None, None, None, 0.3])
        prompt = [island, self.random.randrange(4)] if self.random.random() < 0.4 else None
        with book.transaction():
            id = book.insert(self.query(island), label, value, prompt, radius=radius).id
            for _ in range(self.random.choice([0, 0, 0, 1, 2])):
                # A query that the edit has already is refused.
                with contextlib.suppress(ValueError):
                    further = self.query(island)
                    book.insert(further, label, value, None, radius=radius, part_of=id)
        assert id is not None
        return id
