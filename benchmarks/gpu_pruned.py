"""Part pruned on a GPU: `lookup` through a sketch beside one without, and where it cannot help.

The packaged model need not be there, so the keys are normal in coordinates whose variances fall off
as those of real activations do, turned by a random rotation. The queries are drawn likewise, and
every radius is a quarter of the median distance of a query from its nearest key. In the worst case
the keys have no structure and the radii cover everything, so that a sketch only costs.
"""

from __future__ import annotations

import itertools
import math
import time
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


def shapes(settings: Settings) -> list[tuple[str, torch.dtype, int, int, int]]:
    """Return data, type, keys, width and batch of what is measured, in order."""
    if settings.device != "cuda":
        return [(SPECTRUM, gpu.FP32, 3000, 96, 1), (COVERED, gpu.BF16, 3000, 400, 8)]
    sizes = [(100_000, 4096), (100_000, 768)]
    found = [(data, *size) for data in (SPECTRUM, COVERED) for size in sizes]
    found += settings.pick([(SPECTRUM, MILLION, 4096), (SPECTRUM, MILLION, 768)], [])
    return [(data, gpu.BF16, n, dim, batch) for data, n, dim in found for batch in (1, 8)]


def run(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure every backend with a sketch and without."""
    device, every = gpu.device_of(settings), shapes(settings)
    for done, ((data, dtype, n, dim), group) in enumerate(
        itertools.groupby(every, key=lambda shape: shape[:-1])
    ):
        progress(2 * done, len(every))
        about = {"part": "pruned", "device": settings.device, "data": data}
        about |= {"dtype": gpu.NAMES[dtype], "keys": n, "width": dim}
        try:
            if time.monotonic() > settings.until:
                raise TimeoutError(gpu.LATE)
            books = sketched(data, dtype, n, dim, device)
        except (TimeoutError, MemoryError) as why:
            yield Measurement(**about, name="all", answers="absent", note=str(why))
            continue
        share = 100 * books[0].sketch.nbytes / books[0].keys.nbytes
        told = {"name": "sketch, share of the keys", "unit": "%", "median": share}
        yield Measurement(**about, **told)
        for *_, batch in group:
            yield from _with_and_without(books, {**about, "batch": batch}, device)
        del books
        gpu.release(device)


def sketched(
    data: str, dtype: torch.dtype, n: int, dim: int, device: torch.device
) -> list[Sketched]:
    """Return codebooks whose keys, and whose sketches, are together eight times the L2 cache.

    So many sketches are copies of few, each with its own radii: the slots that survive are few
    enough for their keys to be shared.
    """
    each, codes = n * dim * dtype.itemsize, 74 * n
    books = gpu.how_many(device, each)
    copies = max(books, gpu.how_many(device, codes))
    gpu.room_for(device, books * each + copies * codes)
    generator = torch.Generator(device).manual_seed(n)
    made = [_drawn(data, dtype, n, dim, generator) for _ in range(books)]
    for at in range(books, copies):
        book = made[at % books]
        made.append(Sketched(book.keys, book.radii.clone(), book.query, book.sketch.resized(n)))
    return made


def _drawn(data: str, dtype: torch.dtype, n: int, dim: int, generator: torch.Generator) -> Sketched:
    device = generator.device
    variance = torch.arange(1, dim + 1, device=device) ** (EXPONENT if data == SPECTRUM else 0.0)
    turn = torch.linalg.qr(torch.randn(dim, dim, device=device, generator=generator)).Q
    turn = variance.sqrt()[:, None] * turn

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, dim, device=device, generator=generator) @ turn

    keys = torch.empty(n, dim, dtype=dtype, device=device)
    for part in keys.split(max(1, (1 << 28) // dim)):
        part.copy_(drawn(len(part)))
    query = drawn(8).to(dtype)
    distance = grace_kernels.nearest(query, keys, torch.zeros(n, device=device))[1]
    radius = float(distance.median()) / DISTANT if data == SPECTRUM else math.inf
    radii = torch.full((n,), radius, device=device)
    return Sketched(keys, radii, query, Sketch.fit(keys, radii))


def _with_and_without(
    books: list[Sketched], about: dict[str, Any], device: torch.device
) -> Iterator[Measurement]:
    count, batch = torch.tensor(len(books[0].keys), device=device), about["batch"]
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
            contestant: gpu.Contestants = {
                name: ("ours", lambda a=ask: [partial(a, b) for b in books])
            }
            books[0].sketch.counters.zero_()
            yield from gpu.measured(about, contestant, right, device)
            counts = books[0].sketch.counts()
            if counts["pairs"]:
                scored, scanned = (100 * counts[k] / counts["pairs"] for k in ("scored", "scanned"))
                told = {"name": f"{backend}, {SURVIVORS}", "unit": "%", "median": scored + scanned}
                note = f"scored {scored:.3g} %, scanned {scanned:.3g} %"
                yield Measurement(**about, **told, note=note)
