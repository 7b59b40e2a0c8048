"""Part operators on a GPU: `lookup` and `adapt_` beside their peers.

Each type, number and width of keys has codebooks of its own, enough of them for cold caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend

from . import gpu, peers
from .gate import Answer, right_answers
from .gpu import BF16, FP16, FP32, Call, Columns, Contestants, Shape
from .measurements import Measurement, Progress, Settings
from .peers import Book, Peer

K, M = 1000, 1_000_000
# The most telling shapes first: a time that ends leaves out the last.
HEAD = (
    (BF16, 4096, 100 * K),
    (BF16, 768, K),
    (BF16, 768, 100 * K),
    (BF16, 4096, 10 * K),
    (BF16, 768, 10 * K),
)
WRITES = ((BF16, 768, 10 * K), (BF16, 4096, 100 * K))
REST = (
    (BF16, 4096, M),
    (BF16, 768, M),
    (BF16, 4096, K),
    (BF16, 11008, 100 * K),
    (BF16, 11008, 10 * K),
    (BF16, 11008, K),
    (BF16, 11008, M),
)
OTHERS = ((FP32, 768, 100 * K), (FP32, 4096, 10 * K), (FP32, 768, 10 * K), (FP16, 4096, 100 * K))
SMALL = ((FP32, 64, 300), (BF16, 48, 200))  # of a rehearsal


def first_shapes(settings: Settings) -> list[Shape]:
    """Return the most telling shapes, in order."""
    if settings.device != "cuda":
        return [Shape("lookup", *book, batch) for book in SMALL for batch in (1, 8)]
    batches = settings.pick((1, 8, 64, 512), (1, 64))
    return [Shape("lookup", *b, n) for b in settings.pick(HEAD, HEAD[:3]) for n in batches]


def other_shapes(settings: Settings) -> list[Shape]:
    """Return the other shapes, in order: writes, compiled peers, and what is rarer."""
    if settings.device != "cuda":
        return [Shape("adapt_", *SMALL[0], 8), Shape("lookup", *SMALL[0], 1, True)]
    head = settings.pick(HEAD, HEAD[:3])
    found = [Shape("adapt_", *book, batch) for book in WRITES for batch in (1, 64)]
    found += [Shape("lookup", *book, batch, True) for book in head for batch in (1, 64)]
    if settings.quick:
        return found
    found += [Shape("lookup", *book, batch) for book in REST for batch in (1, 8, 64, 512)]
    found += [Shape("lookup", *book, batch) for book in OTHERS for batch in (1, 8, 64)]
    found += [Shape("lookup", *book, batch, True) for book in REST[:4] for batch in (1, 64)]
    return found + [Shape("lookup", *book, batch, True) for book in head for batch in (8, 512)]


def run(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure the most telling shapes."""
    return gpu.each(first_shapes(settings), settings, progress, codebooks, _measure)


def more(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure the other shapes."""
    return gpu.each(other_shapes(settings), settings, progress, codebooks, _measure)


def codebooks(shape: Shape, device: torch.device) -> list[tuple[Book, Tensor]]:
    """Return codebooks that together are eight times the L2 cache, with their values."""
    number = gpu.how_many(device, shape.key_bytes)
    gpu.room_for(device, number * shape.key_bytes)
    generator = torch.Generator(device).manual_seed(shape.keys)
    radii = torch.full((shape.keys,), math.sqrt(2 * shape.dim) / 3, device=device)

    def normal(width: int) -> Tensor:
        made = torch.empty(shape.keys, width, dtype=shape.dtype, device=device)
        return made.normal_(generator=generator)

    wide = shape.dim if shape.part == "adapt_" else 1
    return [(Book(normal(shape.dim), radii), normal(wide)) for _ in range(number)]


def queries(keys: Tensor, batch: int, seed: int) -> Tensor:
    """Return random queries, every second one near a key."""
    generator = torch.Generator(keys.device).manual_seed(seed)
    query = torch.randn(batch, keys.shape[1], device=keys.device, generator=generator)
    at = torch.randint(len(keys), (batch,), device=keys.device, generator=generator)
    query[::2] = keys[at[::2]].float() + 0.1 * query[::2]
    return query.to(keys.dtype)


def _measure(
    shape: Shape, books: list[tuple[Book, Tensor]], columns: Columns, device: torch.device
) -> Iterator[Measurement]:
    asked = [(book, queries(book.keys, shape.batch, n)) for n, (book, _) in enumerate(books)]
    right = [
        right_answers(query, book.keys, book.radii, operations=("lookup",))["lookup"]
        for book, query in asked[:2]
    ]
    values = [value for _, value in books]
    hidden = None
    if shape.part == "adapt_":
        hidden = torch.zeros(shape.batch, shape.dim, dtype=shape.dtype, device=device)
    contestants = {} if shape.compiled else _ours(asked, values, hidden, device)
    for peer in (peers.COMPILED,) if shape.compiled else peers.ON_GPU:
        contestants[peer.name] = "peer", partial(_peer, peer, asked, values, hidden)
    return gpu.measured(columns, contestants, right, device, hidden, values)


def _ours(
    asked: Sequence[tuple[Book, Tensor]],
    values: Sequence[Tensor],
    hidden: Tensor | None,
    device: torch.device,
) -> Contestants:
    count = torch.tensor(len(asked[0][0].keys), device=device)
    rows = torch.arange(len(asked[0][1]), device=device)

    def call(backend: Backend, book: Book, query: Tensor, value: Tensor) -> Answer:
        how: dict[str, Any] = {"count": count, "backend": backend}
        if hidden is None:
            return grace_kernels.lookup(query, book.keys, book.radii, **how)
        where = query, rows, rows, rows + 1
        return grace_kernels.adapt_(hidden, *where, book.keys, book.radii, value, **how)

    def calls(backend: Backend) -> list[Call]:
        every = zip(asked, values, strict=True)
        return [partial(call, backend, book, query, value) for (book, query), value in every]

    return {backend: ("ours", partial(calls, backend)) for backend in gpu.ours(device)}


def _peer(
    peer: Peer,
    asked: Sequence[tuple[Book, Tensor]],
    values: Sequence[Tensor],
    hidden: Tensor | None,
) -> list[Call]:
    calls = [peer.asks(book, query) for book, query in asked]
    if hidden is None:
        return calls
    return [
        partial(writing, call, value, hidden) for call, value in zip(calls, values, strict=True)
    ]


def writing(call: Call, values: Tensor, hidden: Tensor) -> Answer:
    """Do with a peer's answer what `adapt_` does: write the value of a hit to a row of `hidden`."""
    index, distance = call()
    hidden.copy_(torch.where((index >= 0)[:, None], values[index.clamp(min=0)], hidden))
    return index, distance
