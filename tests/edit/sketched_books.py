"""Small codebooks with a sketch, and lookups by what the sketch says alone.

A sketch that has become wrong shows in these on any machine, whether its kernels are built or not.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, bits
from grace_edit import Codebook
from grace_edit.codebook import sketch_upkeep as sketching
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.reference import squared_distances

WORTH = 40  # slots; more than a sketch lists as outliers, so that its bound of radii counts


def make_small_ones_worth_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= WORTH)


def since_fit(book: Codebook) -> sketching.SinceFit:
    return book.storage.slots.sketch_upkeep.since_fit


def pruned(book: Codebook, query: Tensor) -> tuple[Tensor, Tensor, int]:
    """Look queries up among the keys that the sketch cannot exclude; count those as well."""
    sketch, rows = book.sketch, book.storage.slots.in_use
    assert sketch is not None
    covered = min(int(sketch.covered), rows)
    bounds = torch.full((len(query), rows), -math.inf, dtype=torch.float64)
    bounds[:, :covered] = sketch.lower_bounds(query)[:, :covered]
    distance = squared_distances(query, book.keys[:rows]).double().sqrt().float()
    outliers = [row for row in sketch.outliers.tolist() if 0 <= row < rows]
    within = distance[:, outliers].masked_fill(
        ~(distance[:, outliers] <= book.radii[outliers]), math.inf
    )
    hit = within.amin(dim=1) if outliers else torch.full((len(query),), math.inf)
    most = torch.maximum(sketch.radius_bound, torch.where(hit < math.inf, hit, -math.inf)).double()
    left = bounds <= (most * (1 + 2.0**-22) + 2.0**-74)[:, None]
    left[:, outliers] = True
    left &= book.radii[:rows] != -math.inf
    least = distance.masked_fill(~left, math.inf)
    index = least.argmin(dim=1) if rows else torch.zeros(len(query)).long()
    reach = least.amin(dim=1) if rows else hit
    answered = (reach < math.inf) & (reach <= book.radii[index])
    found = torch.where(answered, index, -1), torch.where(answered, reach, math.inf)
    return *found, int(left.sum())


def queries_near(book: Codebook, number: int, seed: int) -> Tensor:
    """Return queries at some of the keys, close to others and just anywhere."""
    draw = torch.Generator().manual_seed(seed)
    live = (book.radii != -math.inf).nonzero()[:, 0]
    dim = book.keys.shape[1]
    free = 2 * torch.randn(number, dim, generator=draw)
    if len(live):
        at = live[torch.randint(len(live), (number,), generator=draw)]
        away = torch.tensor([0.0, 0.1, 0.5])[torch.randint(3, (number,), generator=draw)]
        near = book.keys[at].float() + away[:, None] * torch.randn(number, dim, generator=draw)
        free[::2], free[1::4] = near[::2], near[1::4]
    return free.to(book.keys.dtype)


def agree(book: Codebook, seed: int = 0) -> int:
    """Compare lookups with, without and by the sketch, to the bit; count the keys left to read."""
    query = queries_near(book, 12, seed)
    plain = grace_kernels.lookup(query, book.keys, book.radii, book.count)
    assert [bits(t) for t in book.lookup(query)] == [bits(t) for t in plain]
    if book.sketch is None:
        return 0
    *found, read = pruned(book, query)
    assert [bits(t) for t in found] == [bits(t) for t in plain]
    if since_fit(book).slots and book.storage.slots.sketch_upkeep.up_to_date:
        assert book.sketch.faults(book.keys, book.radii) == []
    else:
        assert not book.sketch.active
    return read


def spread_out(count: int, dim: int = 16, seed: int = 0, **how: Any) -> Codebook:
    """Return imported entries in a space with one long direction, radius 0.5."""
    draw = torch.Generator().manual_seed(seed)
    keys = 2 * torch.rand(count, dim, generator=draw) - 1
    keys[:, 0] *= 30
    labels = [[i] for i in range(count)]
    values = torch.randn(count, VALUE_DIM, generator=draw)
    return Codebook.from_tensors(keys, values, torch.full((count,), 0.5), labels, **how)


def add(book: Codebook, count: int, scale: float = 1.0) -> None:
    """Insert entries of the kind that `spread_out` imports."""
    draw = torch.Generator().manual_seed(1 + book.storage.next_id)
    for _ in range(count):
        key = 2 * torch.rand(book.keys.shape[1], generator=draw) - 1
        key[0] *= 30
        book.insert(key * scale, [book.storage.next_id], torch.zeros(VALUE_DIM))


def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that will hold the slots of every fit."""
    seen: list[int] = []
    real = Sketch.refit

    def refit(self: Sketch, keys: Tensor, radii: Tensor, count: Any = None, **how: Any) -> None:
        seen.append(count)
        real(self, keys, radii, count, **how)

    monkeypatch.setattr(Sketch, "refit", refit)
    return seen


def counted(book: Codebook, *numbers: int) -> None:
    """Let lookups have counted queries, pairs, pairs scored and pairs scanned."""
    assert book.sketch is not None
    book.sketch.counters.copy_(torch.tensor(numbers))


def busy(capacity: int = 256) -> Codebook:
    """Return a codebook that was edited since its sketch was fitted."""
    book = spread_out(100, capacity=capacity)
    add(book, 5)
    add(book, 1, scale=100.0)
    book.delete(book.ids[3])
    book.delete(book.ids[-2])
    return book
