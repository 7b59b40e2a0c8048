"""Times of lookups through a sketch beside those without, on one set of codebooks.

The keys are normal in coordinates whose variances fall off as those of real activations do (see
benchmarks/activations.py), turned by a random rotation; the queries are drawn likewise and every
radius is a quarter of the median distance of a query from its nearest key. In the worst case
the keys have no structure and the radii cover everything, so that a sketch only costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch

from .bench import BF16, FP32, NAMES, K, M, Peer, _column, release, right_answer
from .correct import usable
from .journal import ContextLost, Row, Skipped, Wrong
from .place import Place, Tensors, gpu_figures

EXPONENT = -1.88  # of the eigenvalues of activations, by their rank
DISTANT = 4.0  # the nearest key, in radii
HALF, WORST = 0.5, 1.15  # wanted: of the time without a sketch


@dataclass(frozen=True)
class Sketched:
    """A codebook, its sketch and queries; what `bench._column` calls a shelf."""

    keys: Tensor
    radii: Tensor
    query: Tensor
    sketch: Sketch


@dataclass(frozen=True)
class Shape:
    """One measurement."""

    dtype: torch.dtype
    dim: int
    keys: int
    batch: int
    worst: bool = False

    @property
    def name(self) -> str:
        """The row's name."""
        what = "pruned, worst case," if self.worst else "pruned"
        return f"{what} {NAMES[self.dtype]} D={self.dim} N={self.keys} B={self.batch}"


def shapes(place: Place) -> list[Shape]:
    """Return what is measured, in order."""
    if not place.gpu:
        return [Shape(FP32, 96, 3000, 1), Shape(BF16, 400, 3000, 8, worst=True)]
    books = [(4096, 100 * K), (768, 100 * K)] + [(4096, M), (768, M)] * (not place.quick)
    found = [Shape(BF16, dim, n, batch) for dim, n in books[:2] for batch in (1, 8)]
    found += [Shape(BF16, dim, n, batch, True) for dim, n in books[:2] for batch in (1, 8)]
    return found + [Shape(BF16, dim, n, batch) for dim, n in books[2:] for batch in (1, 8)]


def rows(place: Place) -> list[Row]:
    """Return the rows of stage `bench` that have sketches."""
    stock = Stock(place)
    return [Row(s.name, partial(measure, place, stock, s), limit=120) for s in shapes(place)]


def among(found: list[Row], place: Place) -> list[Row]:
    """Return the rows of stage `bench` with those of sketches behind the first lookups."""
    at = next(n for n, row in enumerate(found) if n and not row.name.startswith("lookup"))
    return [*found[:at], *rows(place), *found[at:]]


class Stock:
    """The codebooks of one kind, kept while rows of that kind follow each other."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.made: tuple[Any, ...] | None = None
        self.shelves: list[Sketched] = []

    def shelves_for(self, shape: Shape) -> list[Sketched]:
        """Return codebooks whose keys, and whose sketches, are together eight times the L2 cache.

        So many sketches are copies of few, each with its own radii: the rows that survive are few
        enough for their keys to be shared.
        """
        key = (shape.dtype, shape.dim, shape.keys, shape.worst)
        if self.made == key:
            return self.shelves
        self.made, self.shelves = None, []
        release(self.place)
        books = copies = 2
        if self.place.gpu:
            wanted = 8 * gpu_figures(self.place.device)["L2 bytes"]
            each = shape.keys * shape.dim * shape.dtype.itemsize
            books = max(1, math.ceil(wanted / each))
            copies = max(books, math.ceil(wanted / (74 * shape.keys)))
            free = torch.cuda.mem_get_info(self.place.device)[0]
            if books * each + copies * 74 * shape.keys > 0.5 * free:
                raise Skipped(f"{books} codebooks and {copies} sketches do not fit")
        generator = torch.Generator(self.place.device).manual_seed(self.place.seed + shape.keys)
        made = [self._book(shape, generator) for _ in range(books)]
        for n in range(copies):
            book = made[n % books]
            sketch = book.sketch if n < books else book.sketch.resized(shape.keys)
            radii = book.radii if n < books else book.radii.clone()
            self.shelves.append(Sketched(book.keys, radii, book.query, sketch))
        self.made = key
        return self.shelves

    def _book(self, shape: Shape, generator: torch.Generator) -> Sketched:
        device, dim = self.place.device, shape.dim
        variance = torch.arange(1, dim + 1, device=device) ** (0.0 if shape.worst else EXPONENT)
        turn = torch.linalg.qr(torch.randn(dim, dim, device=device, generator=generator)).Q
        turn = variance.sqrt()[:, None] * turn

        def drawn(rows: int) -> Tensor:
            return torch.randn(rows, dim, device=device, generator=generator) @ turn

        keys = torch.empty(shape.keys, dim, dtype=shape.dtype, device=device)
        for part in keys.split(max(1, (1 << 28) // dim)):
            part.copy_(drawn(len(part)))
        query = drawn(8).to(shape.dtype)
        distance = grace_kernels.nearest(query, keys, torch.zeros(len(keys), device=device))[1]
        radius = torch.where(torch.tensor(shape.worst), math.inf, distance.cpu().median() / DISTANT)
        radii = radius.to(device).expand(len(keys)).clone()
        return Sketched(keys, radii, query, Sketch.fit(keys, radii))


def columns(place: Place, shape: Shape) -> dict[str, tuple[Peer, bool]]:
    """Return what is timed: every backend with a sketch and without; all have to be right."""
    count = torch.tensor(shape.keys, device=place.device)

    def lookup(backend: Any, pruned: bool, shelf: Any) -> Tensors:
        sketch = shelf.sketch if pruned else None
        book = (shelf.query, shelf.keys, shelf.radii, count)
        return grace_kernels.lookup(*book, sketch=sketch, backend=backend)

    return {
        f"{backend}{' pruned' if pruned else ''}": (partial(lookup, backend, pruned), True)
        for backend in usable(place)
        for pruned in (True, False)
    }


def measure(place: Place, stock: Stock, shape: Shape) -> dict[str, Any]:
    """Check, then time, the columns of one shape, and add the ratios of pruned to brute."""
    result: dict[str, Any] = {
        "op": "pruned",
        "dtype": NAMES[shape.dtype],
        "D": shape.dim,
        "N": shape.keys,
        "B": shape.batch,
        "worst": shape.worst,
        "wanted": WORST if shape.worst else HALF,
    }
    shelves = [
        Sketched(s.keys, s.radii, s.query[: shape.batch], s.sketch)
        for s in stock.shelves_for(shape)
    ]
    right = [right_answer(shelf) for shelf in shelves[:2]]
    sketch = shelves[0].sketch
    result["codebooks"], result["hits"] = len(shelves), int((right[0][0] >= 0).sum())
    result["sketch share"] = sketch.nbytes / shelves[0].keys.nbytes
    result["pruned columns"] = timed = {}
    with torch.no_grad():
        for name, (call, exact) in columns(place, shape).items():
            sketch.counters.zero_()
            try:
                timed[name] = _column(place, call, exact, shelves, right)
            except ContextLost as error:
                timed[name] = {"error": str(error)[:300]}
                raise ContextLost(f"{name}: {error}", result) from error
            except Exception as error:
                timed[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                place.settle()  # raises where the device is beyond use
            counts = sketch.counts()
            if counts["pairs"]:
                timed[name]["scored"] = counts["scored"] / counts["pairs"]
                timed[name]["scanned"] = counts["scanned"] / counts["pairs"]
    for backend in place.backends:
        pair = [
            timed.setdefault(name, {"error": "must answer here, and does not"})
            for name in (f"{backend} pruned", backend)
        ]
        if all("cold" in column for column in pair):
            pair[0]["of brute"] = pair[0]["cold"]["us"] / pair[1]["cold"]["us"]
    wrong = [
        f"{name}: {column.get('error') or column['verdict']}"
        for name, column in timed.items()
        if column.get("verdict") != "right"
    ]
    if wrong:
        raise Wrong("; ".join(wrong), result)
    return result


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the section of the report about these rows."""
    if not found:
        return []
    lines = [
        "## Through a sketch",
        "",
        "µs per call, median, caches cold for keys and sketches alike, by graph replay. Scored: "
        "pairs of a query and a key that the sketch leaves. The worst case: keys without any "
        f"structure, all within reach. Wanted: {HALF:g} of the time without a sketch, "
        f"{WORST:g} in the worst case.",
        "",
        "| keys | D | N | B | backend | with | without | ratio | warm with | warm without | scored "
        "| scanned | sketch |",
        "|---" * 13 + "|",
    ]
    for row in found:
        for name, column in row["pruned columns"].items():
            backend, _, pruned = name.partition(" ")
            if not pruned:
                continue
            other = row["pruned columns"].get(backend, {})
            ratio = column.get("of brute")
            cells = [
                f"{'worst case ' if row['worst'] else ''}{row['dtype']}",
                *(str(row[key]) for key in ("D", "N", "B")),
                backend,
                *(_us(c, "cold") for c in (column, other)),
                "–"
                if ratio is None
                else f"{ratio:.3g}{'' if ratio <= row['wanted'] else ' MISSED'}",
                *(_us(c, "warm") for c in (column, other)),
                *(
                    f"{100 * column[k]:.3g} %" if k in column else "–"
                    for k in ("scored", "scanned")
                ),
                f"{100 * row['sketch share']:.1f} %",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _us(column: dict[str, Any], kind: str) -> str:
    if kind not in column:
        return "failed" if "error" in column else "–"
    return f"{column[kind]['us']:.4g}"
