"""Stage `bench`: how long a call takes on the device with cold caches, and from the host.

Cold: a CUDA graph of many calls, each on another of several codebooks that together are eight times
the L2 cache, so that no call finds its keys there; the time of one replay over the number of calls.
It holds the gap between two nodes of a graph, which `ceilings` records. Warm: the same codebook in
every call. Eager: calls from Python over the same codebooks by the host's clock, launches included.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import testing

from . import peers
from .correct import usable
from .journal import ContextLost, Row, Skipped, Wrong
from .peers import Peer, Shelf
from .place import Captured, Place, Tensors, clocks, gpu_figures, time_eager, time_replays

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
K, M = 1000, 1_000_000
# The most telling shapes first: a budget that ends leaves out the last.
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
COMPILED = "torch.compile"
OURS = ("triton", "cuda")


@dataclass(frozen=True)
class Shape:
    """One measurement: `op` is `lookup` or `adapt_`; a compiled peer is a row of its own."""

    op: str
    dtype: torch.dtype
    dim: int
    keys: int
    batch: int
    compiled: bool = False

    @property
    def name(self) -> str:
        """The row's name."""
        what = f"{self.op} {NAMES[self.dtype]} D={self.dim} N={self.keys} B={self.batch}"
        return f"{COMPILED} {what}" if self.compiled else what

    @property
    def key_bytes(self) -> int:
        """What one pass over the keys reads."""
        return self.keys * self.dim * self.dtype.itemsize


def shapes(place: Place) -> list[Shape]:
    """Return what is measured, in order."""
    if not place.gpu:
        small = ((FP32, 64, 300), (BF16, 48, 200))
        found = [Shape("lookup", *book, batch) for book in small for batch in (1, 8)]
        return [*found, Shape("adapt_", *small[0], 8), Shape("lookup", *small[0], 1, True)]
    batches = (1, 64) if place.quick else (1, 8, 64, 512)
    head = HEAD[:3] if place.quick else HEAD
    found = [Shape("lookup", *book, batch) for book in head for batch in batches]
    found += [Shape("adapt_", *book, batch) for book in WRITES for batch in (1, 64)]
    found += [Shape("lookup", *book, batch, True) for book in head for batch in (1, 64)]
    if place.quick:
        return found
    found += [Shape("lookup", *book, batch) for book in REST for batch in batches]
    found += [Shape("lookup", *book, batch) for book in OTHERS for batch in (1, 8, 64)]
    found += [Shape("lookup", *book, batch, True) for book in REST[:4] for batch in (1, 64)]
    found += [Shape("lookup", *book, batch, True) for book in head for batch in (8, 512)]
    return found


def rows(place: Place) -> list[Row]:
    """Return the rows of this stage."""
    stock = Stock(place)
    found = [Row("ceilings", partial(ceilings, place), again=lambda: True)]
    for shape in shapes(place):
        found.append(Row(shape.name, partial(measure, place, stock, shape), limit=120))
    return found


def ceilings(place: Place) -> dict[str, Any]:
    """Measure what the device can do: copy, read, multiply, and start a kernel of a graph."""
    n = place.pick(1 << 30, 1 << 30, 1 << 22)
    source = torch.randint(-100, 100, (n,), dtype=torch.int8, device=place.device)
    target = torch.empty_like(source)
    copy = time_replays(place, partial(target.copy_, source), 1)
    result: dict[str, Any] = {
        "copy bytes per second": 2 * n / (copy["us"] * 1e-6),
        "clocks": clocks() if place.gpu else {},
    }
    del source, target
    n = place.pick(1 << 29, 1 << 29, 1 << 20)  # 2 GiB, which no cache holds
    source = torch.zeros(n, device=place.device)
    reads = [time_replays(place, partial(read, source), 1) for read in (torch.sum, torch.amax)]
    result["read bytes per second"] = 4 * n / (min(took["us"] for took in reads) * 1e-6)
    del source
    size = place.pick(8192, 8192, 256)
    for name, dtype, precision in (
        ("bf16", BF16, "highest"),
        ("fp32", FP32, "highest"),
        ("tf32", FP32, "high"),  # what a kernel may use of the tensor cores on fp32 keys
    ):
        a = torch.randn(size, size, device=place.device).to(dtype)
        b = torch.randn(size, size, device=place.device).to(dtype)
        torch.set_float32_matmul_precision(precision)
        took = time_replays(place, partial(torch.mm, a, b), 1, 0.1)
        torch.set_float32_matmul_precision("highest")
        result[f"{name} operations per second"] = 2 * size**3 / (took["us"] * 1e-6)
    result["clocks after a product"] = clocks() if place.gpu else {}
    tiny = torch.zeros(8, device=place.device)
    chain = Captured(place, lambda: tuple(tiny.add_(1) for _ in range(200)))
    result["kernel in a graph us"] = time_replays(place, chain.replay, 200)["us"]
    return result


class Stock:
    """The codebooks of one shape, kept while rows of that shape follow each other."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.made: tuple[Any, ...] | None = None
        self.shelves: list[Shelf] = []

    def shelves_for(self, shape: Shape) -> list[Shelf]:
        """Return codebooks that together are eight times the L2 cache (one, if it is)."""
        key = (shape.dtype, shape.dim, shape.keys, shape.op == "adapt_")
        if self.made == key:
            return self.shelves
        self.drop()
        place = self.place
        number, need = 3, 0
        if place.gpu:
            figures = gpu_figures(place.device)
            number = max(1, math.ceil(8 * figures["L2 bytes"] / max(1, shape.key_bytes)))
            need = number * shape.key_bytes
            free = torch.cuda.mem_get_info(place.device)[0]
            if need > 0.5 * free:
                raise Skipped(f"{need / 1e9:.0f} GB of keys do not fit beside what peers need")
        generator = torch.Generator(place.device).manual_seed(place.seed + shape.keys)
        for _ in range(number):
            keys = torch.empty(shape.keys, shape.dim, dtype=shape.dtype, device=place.device)
            keys.normal_(generator=generator)
            radii = torch.full((shape.keys,), math.sqrt(2 * shape.dim) / 3, device=place.device)
            width = shape.dim if shape.op == "adapt_" else 1
            values = torch.zeros(shape.keys, width, dtype=shape.dtype, device=place.device)
            values.normal_(generator=generator)
            self.shelves.append(Shelf.of(keys, radii, keys[:0], values))
        self.made = key
        return self.shelves

    def drop(self) -> None:
        """Give the memory back."""
        self.made = None
        self.shelves = []
        release(self.place)


def release(place: Place) -> None:
    """Return cached memory to the device."""
    if place.gpu:
        gc.collect()
        torch.cuda.empty_cache()


def with_queries(shelf: Shelf, batch: int, seed: int) -> Shelf:
    """Return the codebook with random queries, every second one near a key."""
    device, dim = shelf.keys.device, shelf.keys.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    query = torch.randn(batch, dim, device=device, generator=generator)
    at = torch.randint(len(shelf.keys), (batch,), device=device, generator=generator)
    query[::2] = shelf.keys[at[::2]].float() + 0.1 * query[::2]
    return Shelf(shelf.keys, shelf.radii, shelf.norms, query.to(shelf.keys.dtype), shelf.values)


def right_answer(shelf: Shelf) -> Tensors:
    """Return what a lookup must give, on the CPU.

    The four nearest keys of each query come from a float64 product on the device, whose error is a
    billion times smaller than the gaps of random data; the canonical distance decides among them.
    """
    n, dim = shelf.keys.shape
    query = shelf.query.double()
    scores, slots = [], []
    for start in range(0, n, max(1, (1 << 27) // dim)):
        part = shelf.keys[start : start + max(1, (1 << 27) // dim)].double()
        least = (part.square().sum(dim=1) - 2 * (query @ part.T)).topk(min(4, len(part)), 1, False)
        scores.append(least.values)
        slots.append(least.indices + start)
    best = torch.cat(scores, dim=1).topk(min(4, n), 1, False).indices
    slot = torch.cat(slots, dim=1).gather(1, best).sort(dim=1).values  # ties: the lowest
    keys = shelf.keys[slot].cpu()
    radii, slot, queries = shelf.radii[slot].cpu(), slot.cpu(), shelf.query.cpu()
    index = torch.full((len(slot),), -1)
    distance = torch.full((len(slot),), math.inf)
    for b in range(len(slot)):
        at, d = grace_kernels.lookup(queries[b : b + 1], keys[b], radii[b])
        if int(at) >= 0:
            index[b], distance[b] = slot[b, int(at)], d[0]
    return index, distance


def verdict(got: Tensors, right: Tensors, exact: bool) -> str:
    """Return "right", or what is wrong. A peer's distance may round otherwise, its index not."""
    index, distance = (t.cpu() for t in got)
    off = int((index != right[0]).sum())
    if off:
        return f"{off} of {len(index)} indices wrong"
    if exact:
        return "right" if testing.same_bits(distance, right[1]) else "distances differ in bits"
    if torch.allclose(distance, right[1], rtol=1e-5, atol=0.0):
        return "right"
    hit = right[0] >= 0
    return (
        f"right indices, distances off by up to {float((distance - right[1])[hit].abs().max()):.2g}"
    )


def columns(place: Place, shape: Shape, shelves: list[Shelf]) -> dict[str, tuple[Peer, bool]]:
    """Return what is timed, by name, and whether it has to be right to the bit."""
    if shape.compiled:
        compiler = "inductor" if place.gpu else "eager"
        return {COMPILED: (peers.compiled(shape.batch, compiler), False)}
    count = torch.tensor(shape.keys, device=place.device)
    rows = torch.arange(shape.batch, device=place.device)
    ends = rows + 1
    width = shelves[0].values.shape[1]
    hidden = torch.zeros(shape.batch, width, dtype=shape.dtype, device=place.device)

    def lookup(backend: Any, shelf: Shelf) -> Tensors:
        return grace_kernels.lookup(shelf.query, shelf.keys, shelf.radii, count, backend=backend)

    def adapt(backend: Any, shelf: Shelf) -> Tensors:
        book = (shelf.keys, shelf.radii, shelf.values, count)
        return grace_kernels.adapt_(hidden, shelf.query, rows, rows, ends, *book, backend=backend)

    ours = adapt if shape.op == "adapt_" else lookup
    found: dict[str, tuple[Peer, bool]] = {
        backend: (partial(ours, backend), True) for backend in usable(place)
    }
    for name, peer in {**peers.PEERS, **peers.installed()}.items():
        if shape.op == "adapt_":
            peer = peers.writing(peer, hidden, rows)
        found[name] = (peer, False)
    return found


def measure(place: Place, stock: Stock, shape: Shape) -> dict[str, Any]:
    """Check, then time, every column of one shape; a column that fails does not stop the others."""
    result: dict[str, Any] = {
        "op": shape.op,
        "dtype": NAMES[shape.dtype],
        "D": shape.dim,
        "N": shape.keys,
        "B": shape.batch,
        "key bytes": shape.key_bytes,
    }
    shelves = [
        with_queries(shelf, shape.batch, place.seed + n)
        for n, shelf in enumerate(stock.shelves_for(shape))
    ]
    right = [right_answer(shelf) for shelf in shelves[:2]]
    result["codebooks"] = len(shelves)
    result["hits"] = int((right[0][0] >= 0).sum())
    result["columns"] = timed = {}
    with torch.no_grad():
        for name, (call, exact) in columns(place, shape, shelves).items():
            try:
                timed[name] = _column(place, call, exact, shelves, right)
            except ContextLost as error:
                timed[name] = {"error": str(error)[:300]}
                raise ContextLost(f"{name}: {error}", result) from error
            except torch.OutOfMemoryError as error:
                timed[name] = {"error": f"out of memory: {str(error).splitlines()[0][:120]}"}
            except Exception as error:
                timed[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                place.settle()  # raises where the device is beyond use
            if shape.key_bytes > 1 << 30:
                release(place)
    if not shape.compiled:
        for name in place.backends:
            timed.setdefault(name, {"error": "must answer here, and does not"})
    wrong = [
        f"{name}: {timed[name].get('error') or timed[name]['verdict']}"
        for name in timed
        if name in (*OURS, *place.backends) and timed[name].get("verdict") != "right"
    ]
    if wrong:
        raise Wrong("; ".join(wrong), result)
    return result


def _column(
    place: Place, call: Peer, exact: bool, shelves: list[Shelf], right: list[Tensors]
) -> dict[str, Any]:
    told = [verdict(call(shelf), want, exact) for shelf, want in zip(shelves, right, strict=False)]
    found: dict[str, Any] = {"verdict": next((t for t in told if t != "right"), "right")}
    if exact and found["verdict"] != "right":
        return found  # ours is not worth timing where it is wrong; a peer is shown as such
    found["eager"] = time_eager(place, _each(call, shelves[:20]), len(shelves[:20]))
    # Long enough for the start of a graph not to count.
    repeat = min(50, max(1, math.ceil(500 / (found["eager"]["us"] * len(shelves)))))
    if not place.gpu:
        repeat = 1
    order = list(itertools.chain.from_iterable([shelves] * repeat))
    cold = Captured(place, lambda: _all(call, order), warm=1)
    found["cold"] = time_replays(place, cold.replay, len(order))
    outputs = [cold.outputs[2 * n : 2 * n + 2] for n in range(len(right))]
    after = [verdict((o[0], o[1]), want, exact) for o, want in zip(outputs, right, strict=True)]
    if after != told[: len(after)]:
        found["verdict"] = f"replayed: {'; '.join(after)}"
    del cold, outputs
    if exact:
        warm = Captured(place, lambda: _all(call, [shelves[0]] * 20), warm=1)
        found["warm"] = time_replays(place, warm.replay, 20)
    return found


def _each(call: Peer, shelves: list[Shelf]) -> Callable[[], None]:
    def run() -> None:
        for shelf in shelves:
            call(shelf)

    return run


def _all(call: Peer, shelves: list[Shelf]) -> Tensors:
    outputs: list[Tensor] = []
    for shelf in shelves:
        outputs += call(shelf)
    return tuple(outputs)
