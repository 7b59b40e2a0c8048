"""Part pruned on a GPU: `lookup` through a sketch beside one without, and where it cannot help.

The packaged model need not be there, so the keys are normal in coordinates whose variances fall off
as those of real activations do, turned by a random rotation. The queries are drawn likewise, and
every radius is a quarter of the median distance of a query from its nearest key. In the worst case
the keys have no structure and the radii cover everything, so that a sketch only costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch

from . import gpu
from .gate import Answer, right_answers
from .gpu import Columns, Shape
from .measurements import Measurement, Progress, Settings
from .pruned import MILLION, SURVIVORS

EXPONENT = -1.88  # of the eigenvalues of activations, by their rank
DISTANT = 4.0  # the nearest key, in radii
SPECTRUM, COVERED = "spectrum of activations", "isotropic, all cover"


@dataclass(frozen=True)
class Sketched:
    """A codebook on a GPU, its sketch and queries that miss, or that all of it covers."""

    keys: Tensor
    radii: Tensor
    query: Tensor
    sketch: Sketch


def shapes(settings: Settings) -> list[Shape]:
    """Return what is measured, in order."""
    if settings.device != "cuda":
        return [
            Shape("pruned", gpu.FP32, 96, 3000, 1, data=SPECTRUM),
            Shape("pruned", gpu.BF16, 400, 3000, 8, data=COVERED),
        ]
    sizes = [(4096, 100_000), (768, 100_000)]
    found = [(data, *size) for data in (SPECTRUM, COVERED) for size in sizes]
    found += settings.pick([(SPECTRUM, 4096, MILLION), (SPECTRUM, 768, MILLION)], [])
    return [Shape("pruned", gpu.BF16, d, n, b, data=data) for data, d, n in found for b in (1, 8)]


def run(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure every backend with a sketch and without."""
    return gpu.each(shapes(settings), settings, progress, sketched, _with_and_without)


def sketched(shape: Shape, device: torch.device) -> list[Sketched]:
    """Return codebooks whose keys, and whose sketches, are together eight times the L2 cache.

    So many sketches are copies of few, each with its own radii: the slots that survive are few
    enough for their keys to be shared.
    """
    n, codes = shape.keys, 74 * shape.keys
    books = gpu.how_many(device, shape.key_bytes)
    copies = max(books, gpu.how_many(device, codes))
    gpu.room_for(device, books * shape.key_bytes + copies * codes)
    generator = torch.Generator(device).manual_seed(n)
    made = [_drawn(shape, generator) for _ in range(books)]
    for at in range(books, copies):
        book = made[at % books]
        made.append(Sketched(book.keys, book.radii.clone(), book.query, book.sketch.resized(n)))
    return made


def _drawn(shape: Shape, generator: torch.Generator) -> Sketched:
    device, n, dim = generator.device, shape.keys, shape.dim
    like = shape.data == SPECTRUM
    variance = torch.arange(1, dim + 1, device=device) ** (EXPONENT if like else 0.0)
    turn = torch.linalg.qr(torch.randn(dim, dim, device=device, generator=generator)).Q
    turn = variance.sqrt()[:, None] * turn

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, dim, device=device, generator=generator) @ turn

    keys = torch.empty(n, dim, dtype=shape.dtype, device=device)
    for part in keys.split(max(1, (1 << 28) // dim)):
        part.copy_(drawn(len(part)))
    query = drawn(8).to(shape.dtype)
    distance = grace_kernels.nearest(query, keys, torch.zeros(n, device=device))[1]
    radius = float(distance.median()) / DISTANT if like else math.inf
    radii = torch.full((n,), radius, device=device)
    return Sketched(keys, radii, query, Sketch.fit(keys, radii))


def _with_and_without(
    shape: Shape, books: list[Sketched], about: Columns, device: torch.device
) -> Iterator[Measurement]:
    share = 100 * books[0].sketch.nbytes / books[0].keys.nbytes
    yield Measurement(**about, name="sketch, share of the keys", unit="%", median=share)
    count, batch = torch.tensor(shape.keys, device=device), shape.batch
    right = [
        right_answers(b.query[:batch], b.keys, b.radii, operations=("lookup",))["lookup"]
        for b in books[:2]
    ]

    def call(backend: Any, with_sketch: bool, book: Sketched) -> Answer:
        arguments = book.query[:batch], book.keys, book.radii, count
        sketch = book.sketch if with_sketch else None
        return grace_kernels.lookup(*arguments, sketch=sketch, backend=backend)

    for backend in gpu.ours(device):
        for name, with_sketch in ((f"{backend}, sketch", True), (backend, False)):
            ask = partial(call, backend, with_sketch)
            calls = [partial(ask, book) for book in books]
            books[0].sketch.counters.zero_()
            yield from gpu.measured(about, {name: ("ours", lambda c=calls: c)}, right, device)
            counts = books[0].sketch.counts()
            if counts["pairs"]:
                scored, scanned = (100 * counts[k] / counts["pairs"] for k in ("scored", "scanned"))
                told = {"name": f"{backend}, {SURVIVORS}", "unit": "%", "median": scored + scanned}
                note = f"scored {scored:.3g} %, scanned {scanned:.3g} %"
                yield Measurement(**about, **told, note=note)
