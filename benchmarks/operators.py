"""Parts nearest, lookup and adapt_ on a CPU: over sizes, types and data, beside their peers.

The peers stand in part `nearest`. A peer's lookup would have to test a radius besides, its adapt_
to write values, so that comparing them with the peers' bare search is in the peers' favour.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels

from . import peers
from .activations import Resampler, real_activations
from .gate import Answer, judged, judged_call, right_answers
from .measurements import Measurement, Progress, Settings
from .peers import COLD, ON_CPU, Book, Peer
from .timing import Flush, Times, interleaved, memory, reads

RADIUS = 1.0  # of activations, the editor's default; of normal data a third of the typical distance
_MILLION = 1_000_000


@dataclass(frozen=True)
class Case:
    """A codebook with keys of both types, queries, and what they are like."""

    data: str
    book: Book
    query: Tensor

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that all its measurements have in common."""
        n, dim = self.book.keys.shape
        return {"data": self.data, "keys": n, "width": dim, "batch": len(self.query)}

    def of(self, dtype: str) -> tuple[Tensor, Tensor]:
        """Return queries and keys of a type."""
        if dtype == "fp32":
            return self.query, self.book.wide
        return self.query.bfloat16(), self.book.keys


def sizes(settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of keys, the widths and the batches."""
    return settings.pick(
        ((1000, 10_000, 100_000), (768, 4096), (1, 8, 64)), ((1000, 10_000), (768,), (1, 8))
    )


def run(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure every case."""
    found: list[Measurement] = []
    counts, widths, batches = sizes(settings)
    left_out = {p: "left out of a quick run" for p in ON_CPU if p.name in peers.COMPILING}
    total, done = (len(widths) + 1) * len(counts) * len(batches), 0
    flush = Flush()
    for data, wide in keys_and_queries(settings, widths, max(counts)):
        keys, query = wide
        narrow = keys.bfloat16()
        for n in counts:
            radii = radii_of(data, n, keys.shape[1])
            book = Book(narrow[:n], radii, settings.threads, given=keys[:n])
            slow: dict[Peer, str] = settings.pick({}, left_out).copy()
            for batch in batches:
                case = Case(data, book, query(batch, n))
                seconds = settings.budget * settings.pick(2 + 4 * n / 100_000, 0.8)
                found += measure(case, seconds, slow)
                if batch == 1:
                    found += measure(case, seconds, slow, flush)
                progress(done := done + 1, total)
        del keys, narrow, wide, book, case
    if not settings.quick and (memory() or 0) > 14e9:
        found += million(settings)
    return found


def radii_of(data: str, n: int, dim: int) -> Tensor:
    """Return radii `[n]` that are sane for the data."""
    return torch.full((n,), RADIUS if data == "activations" else math.sqrt(2 * dim) / 3)


def keys_and_queries(
    settings: Settings, widths: tuple[int, ...], n: int
) -> Iterator[tuple[str, tuple[Tensor, Callable[[int, int], Tensor]]]]:
    """Yield data by name: keys `[n, D]` exact in bfloat16, and a function that gives queries.

    Of those every other one lies near one of the first keys; the others are new. Isotropic keys
    have the first width alone where there are keys like activations.
    """
    real = real_activations(settings)
    for data in ("isotropic", *(("activations",) if real is not None else ())):
        for dim in widths[:1] if real is not None and data == "isotropic" else widths:
            generator = torch.Generator().manual_seed(n + dim)
            if real is not None and data == "activations":
                like = Resampler(*real, dim, generator)
                keys = torch.empty(n, dim)
                for _ in like.drawn(real[0], keys):
                    pass
                others, step = like.draw(real[1], 64), 0.5 / math.sqrt(dim)
            else:
                keys = torch.randn(n, dim, generator=generator)
                others, step = torch.randn(64, dim, generator=generator), 0.1
            for part in keys.split(1 << 13):
                part.copy_(part.bfloat16())

            def query(batch: int, among: int, keys=keys, others=others, step=step) -> Tensor:  # type: ignore
                source = torch.Generator().manual_seed(batch)
                rows = others[:batch].clone()
                near = torch.randint(among, (batch,), generator=source)
                noise = torch.randn(batch, rows.shape[1], generator=source)
                rows[1::2] = (keys[near] + step * noise)[1::2]
                return rows.bfloat16().float()

            yield data, (keys, query)


def ours(case: Case) -> dict[tuple[str, str], tuple[Callable[[], Any], Tensor | None]]:
    """Return our operators by part and type of the keys, and the rows that `adapt_` writes to."""
    found: dict[tuple[str, str], tuple[Callable[[], Any], Tensor | None]] = {}
    rows = torch.arange(len(case.query))
    for dtype in ("fp32", "bf16"):
        book = *case.of(dtype), case.book.radii
        hidden = torch.zeros_like(book[0])
        found["nearest", dtype] = partial(grace_kernels.nearest, *book), None
        found["lookup", dtype] = partial(grace_kernels.lookup, *book), None
        write = partial(grace_kernels.adapt_, hidden, book[0], rows, rows, rows + 1, *book[1:])
        found["adapt_", dtype] = partial(write, book[1]), hidden
    return found


def measure(
    case: Case, seconds: float, slow: dict[Peer, str], flush: Flush | None = None
) -> list[Measurement]:
    """Check, then time, every contestant of one case.

    Args:
        case: what is asked.
        seconds: for the timing.
        slow: peers that are left out, and why; those that turn out slow are added.
        flush: empties the caches before every call; fewer contestants are measured so.
    """
    columns = {**case.columns, "cache": "warm" if flush is None else "cold"}
    right = right_answers(case.query, case.book.keys, case.book.radii)
    timed: dict[tuple[str, ...], Callable[[], Any]] = {}
    verdicts: dict[tuple[str, ...], tuple[str, str]] = {}
    took: dict[Peer, float] = {}
    least = math.inf  # of the right peers
    found: list[Measurement] = []
    for (part, dtype), (call, hidden) in ours(case).items():
        if flush is not None and part == "adapt_":
            continue
        name = (part, "ours", part, dtype, "")
        wanted = right["nearest" if part == "nearest" else "lookup"]
        verdicts[name] = judged_call(call, wanted, hidden, case.of(dtype)[1])
        timed[name] = call
    for peer in ON_CPU:
        if flush is not None and peer.name not in COLD:
            continue
        if peer.way == "keys @ one query" and len(case.query) > peers.FEW:
            continue
        name = ("nearest", "peer", peer.name, peer.dtype, peer.way)
        changed = peer.changes and len(case.query) > peers.FEW
        why = None if changed else slow.get(peer)
        if why is None:
            try:
                call = peer.asks(case.book, case.of(peer.dtype)[0])
                verdicts[name], took[peer] = _first(call, right["nearest"])
                if verdicts[name][0] != "wrong":
                    least = min(least, took[peer])
                timed[name] = call
                continue
            except Exception as error:
                why = absence(peer, error)
        if not peer.way:
            who = {"kind": "peer", "name": peer.name, "dtype": peer.dtype}
            found.append(Measurement("nearest", **who, **columns, answers="absent", note=why))
    for peer, seconds_ in took.items():
        if seconds_ > max(peers.SLOW, peers.FAR * least):
            slow[peer] = f"left out: took {seconds_:.1f} s at B = {len(case.query)}"
    for dtype in ("fp32", "bf16"):
        for way, call in reads(case.of(dtype)[1]).items():
            timed["nearest", "bound", "read the keys", dtype, way] = call
    peers.limit_threads(case.book.threads)
    times = interleaved(timed, seconds, flush=flush)
    return found + list(_measurements(times, verdicts, columns, case))


def _first(call: Callable[[], Answer], right: tuple[Tensor, Tensor]) -> tuple[Any, float]:
    """Return the verdict on a peer's answer, and the seconds of a call that is not the first."""
    with torch.inference_mode():  # as it will be timed: torch.compile compiles anew for another
        start = time.perf_counter()
        verdict = judged(call(), right)
        took = time.perf_counter() - start
        if took > peers.SLOW:  # perhaps it was compiled
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
    return verdict, took


def absence(peer: Peer, error: Exception) -> str:
    """Return why a peer is not there."""
    if isinstance(error, ImportError):
        try:
            importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            return f"not installed: pip install {peer.package}"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"


def _measurements(
    times: dict[Any, Times],
    verdicts: dict[Any, tuple[str, str]],
    columns: dict[str, Any],
    case: Case,
) -> Iterator[Measurement]:
    """Yield one per contestant; of several ways of one, the fastest right one."""
    for key in dict.fromkeys(name[:4] for name in times):
        ways = {name: times[name] for name in times if name[:4] == key}
        right = {n: t for n, t in ways.items() if verdicts.get(n, ("",))[0] != "wrong"} or ways
        name = min(right, key=lambda n: right[n].median)
        part, kind, called, dtype, way = name
        answers, note = verdicts.get(name, ("", ""))
        radius = float(case.book.radii[0]) if part != "nearest" else None
        about = {"kind": kind, "name": called, "dtype": dtype, "answers": answers}
        about |= {"radius": radius, "note": "; ".join(filter(None, (way, note)))}
        yield Measurement(part, **about, **columns, **times[name].columns("ms"))


def million(settings: Settings) -> list[Measurement]:
    """Measure one query among a million bfloat16 keys of width 768."""
    keys = torch.empty(_MILLION, 768, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    for part in keys.split(1 << 15):
        part.copy_(torch.randn(part.shape, generator=generator))
    query = torch.randn(1, 768, generator=generator)
    radii = radii_of("isotropic", _MILLION, 768)
    book = Book(keys, radii, settings.threads, given=keys.float())
    case = Case("isotropic", book, query.bfloat16().float())
    return measure(case, 15 * settings.budget, dict.fromkeys(_too_big(), "left out: memory"))


def _too_big() -> list[Peer]:
    """Return the peers that would copy a million keys, or take minutes."""
    return [p for p in ON_CPU if p.name not in ("torch product", "usearch exact", "torch.compile")]
