"""Stage `graphs`: captured calls stay right while the codebook changes under them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend, Sketch, testing

from . import nodes, served
from .correct import usable
from .journal import ROOT, CutOff, Row, Wrong
from .place import Captured, Place, Tensors


def rows(place: Place) -> list[Row]:
    """Return the rows of this stage, the most telling first."""
    found = []
    if place.gpu:
        found.append(Row("nodes are counted right", partial(_counter, place)))
        found += [
            Row(f"one kernel node, {backend}", partial(_one_node, place, backend))
            for backend in place.backends
        ]
    for name, check in (
        ("edits between replays", _edits),
        ("replays compared", _replays),
        ("two graphs on two streams", _two_graphs),
        ("two threads on two streams", _two_threads),
    ):
        found += [
            Row(f"{name}, {backend}", partial(check, place, backend), limit=120)
            for backend in place.backends
        ]
    if place.gpu:
        found.append(Row("first call within a capture, cuda", _first_call, limit=100))
    if place.gpu or not place.quick:
        found += [
            Row(f"a served model, replace={kind}", partial(served.row, place, kind), limit=240)
            for kind in ("last", "all")
        ]
    return found


@dataclass
class Book:
    """A codebook with room, as a server holds it: tensors that stay where they are."""

    keys: Tensor
    radii: Tensor
    values: Tensor
    count: Tensor
    query: Tensor
    hidden: Tensor
    query_row: Tensor
    first_row: Tensor
    last_row: Tensor

    def adapt(self, backend: Backend, sketch: Sketch | None = None) -> Tensors:
        """Make the fused call; it writes to `hidden`."""
        return grace_kernels.adapt_(
            self.hidden,
            self.query,
            self.query_row,
            self.first_row,
            self.last_row,
            self.keys,
            self.radii,
            self.values,
            self.count,
            sketch=sketch,
            backend=backend,
        )

    def on_cpu(self) -> Book:
        """Return a copy on the CPU."""
        return Book(**{name: tensor.cpu().clone() for name, tensor in vars(self).items()})


def make_book(
    place: Place, capacity: int, dim: int, batch: int, width: int, *, seed: int, used: int
) -> Book:
    """Return a codebook of `used` random entries and queries, every second of which hits one."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(capacity, dim, generator=generator).bfloat16()
    query = torch.randn(batch, dim, generator=generator)
    at = torch.randint(max(1, used), (batch,), generator=generator)
    query[::2] = keys[at[::2]].float() + 0.02 * query[::2]
    tensors = {
        "keys": keys,
        "radii": torch.full((capacity,), dim**0.5 / 3),
        "values": torch.randn(capacity, width, generator=generator).bfloat16(),
        "count": torch.tensor(used),
        "query": query.bfloat16(),
        "hidden": torch.randn(3 * batch, width, generator=generator).bfloat16(),
        "query_row": torch.arange(batch),
        "first_row": 3 * torch.arange(batch),
        "last_row": 3 * torch.arange(batch) + 2,
    }
    return Book(**{name: tensor.to(place.device) for name, tensor in tensors.items()})


def _needs(place: Place, backend: Backend) -> None:
    if backend not in usable(place):
        raise Wrong(f"{backend} must answer here, and does not (see stage correct)")


def _counter(place: Place) -> dict[str, Any]:
    """Prove the counter on graphs whose nodes are known."""
    x, y = torch.ones(8, device=place.device), torch.ones(8, device=place.device)

    def kernels() -> Tensors:
        return (x.add_(1), y.mul_(2))

    def with_copy() -> Tensors:
        return (x.copy_(y), y.mul_(2))

    two = nodes.count(Captured(place, kernels, keep=True).graph)
    mixed = nodes.count(Captured(place, with_copy, keep=True).graph)
    if two != {"kernel": 2} or sum(mixed.values()) != 2:
        raise Wrong(f"2 kernels are counted as {two}, a copy and a kernel as {mixed}")
    return {"two kernels": str(two), "a copy and a kernel": str(mixed)}


def _one_node(place: Place, backend: Backend) -> dict[str, Any]:
    """A captured call is one kernel node and nothing else: no copy, no memset, no second launch."""
    _needs(place, backend)
    result, wrong = {}, []
    for batch, used in ((1, 1000), (8, 1000), (64, 1000), (512, 1000), (1, 20_000), (8, 0)):
        book = make_book(place, max(1000, used), 768, batch, 768, seed=1, used=used)
        lookup_args = (book.query, book.keys, book.radii, book.count)
        sketch = Sketch.fit(book.keys, book.radii, used)
        calls: dict[str, Callable[[], Tensors]] = {
            "lookup": partial(grace_kernels.lookup, *lookup_args, backend=backend),
            "nearest": partial(grace_kernels.nearest, *lookup_args, backend=backend),
            "adapt_": partial(book.adapt, backend),
            "pruned lookup": partial(
                grace_kernels.lookup, *lookup_args, sketch=sketch, backend=backend
            ),
            "pruned adapt_": partial(book.adapt, backend, sketch),
        }
        for name, call in calls.items():
            captured = Captured(place, call, keep=True)
            found = nodes.count(captured.graph)
            what = f"{name}, {batch} queries, {used} keys"
            result[what] = ", ".join(f"{n} {kind}" for kind, n in sorted(found.items()))
            if found != {"kernel": 1}:
                wrong.append(f"{what}: {result[what]}")
            captured.replay()
            torch.cuda.synchronize()
    if wrong:
        raise Wrong("; ".join(wrong), result)
    return result


def _edits(place: Place, backend: Backend) -> dict[str, Any]:
    """Capture once; then change the codebook in place and replay, the answers checked each time."""
    _needs(place, backend)
    edits = place.pick(1000, 200, 25)
    book = make_book(place, edits + 40, 256, 8, 128, seed=2, used=0)
    base = book.hidden.clone()
    captured = Captured(place, partial(book.adapt, backend))
    cpu = book.on_cpu()
    generator = torch.Generator().manual_seed(place.seed)
    used, hits, kinds = 0, 0, {"added": 0, "moved": 0, "radius": 0, "killed": 0}
    for edit in range(edits):
        if place.remaining() <= 1:
            raise CutOff(f"the budget ended after {edit} of {edits} edits, all right")
        choice = int(torch.randint(10, (), generator=generator)) if used else 0
        slot = used if choice < 7 else int(torch.randint(used, (), generator=generator))
        b = int(torch.randint(8, (), generator=generator))
        near = cpu.query[b].float() + 0.02 * torch.randn(256, generator=generator)
        value = torch.randn(128, generator=generator).bfloat16()
        radius = 16.0 / 3 * float(torch.rand((), generator=generator))
        for target in (cpu, book):
            if choice < 8:  # a new entry, or an old one near another query
                target.keys[slot] = near.bfloat16().to(target.keys.device)
                target.values[slot] = value.to(target.keys.device)
                target.radii[slot] = radius
            elif choice == 8:
                target.radii[slot] = radius
            else:
                target.radii[slot] = float("-inf")
            if slot == used:
                target.count.fill_(used + 1)
        kinds[{8: "radius", 9: "killed"}.get(choice, "moved" if slot < used else "added")] += 1
        used = max(used, slot + 1)
        book.hidden.copy_(base)
        for out, poison in zip(captured.outputs, (-7, float("nan")), strict=True):
            out.fill_(poison)
        captured.replay()
        cpu.hidden.copy_(base.cpu())
        right = cpu.adapt(place.truth)
        hits += int((right[0] >= 0).sum())
        for name, mine, want in (
            ("index", captured.outputs[0], right[0]),
            ("distance", captured.outputs[1], right[1]),
            ("rows", book.hidden, cpu.hidden),
        ):
            if not testing.same_bits(mine.cpu(), want):
                raise Wrong(f"after edit {edit} (slot {slot}, {used} in use) the {name} is stale")
    return {"edits": edits, "hits": hits, **kinds}


class Watched:
    """A captured call that checks itself on the device, with another input at every replay.

    The graph takes input number `step % variants`, makes the call, counts in `wrong` where a bit
    differs from what is expected, and poisons what the call wrote, so that the next replay cannot
    pass on what this one left. Nothing is read by the host in between.
    """

    def __init__(self, place: Place, backend: Backend, seed: int, capacity: int = 4096) -> None:
        capacity = capacity if place.gpu else 60
        self.variants = 16
        self.book = book = make_book(place, capacity, 256, 8, 128, seed=seed, used=capacity - 3)
        cpu = book.on_cpu()
        generator = torch.Generator().manual_seed(seed + 1)
        queries, indices, distances, hiddens = [], [], [], []
        base = cpu.hidden.clone()
        for _ in range(self.variants):
            cpu.query.copy_(torch.randn(8, 256, generator=generator))
            at = torch.randint(capacity - 3, (8,), generator=generator)
            near = cpu.keys[at].float() + 0.02 * torch.randn(8, 256, generator=generator)
            cpu.query[1::2] = near[1::2].bfloat16()
            cpu.hidden.copy_(base)
            index, distance = cpu.adapt(place.truth)
            queries.append(cpu.query.clone())
            indices.append(index)
            distances.append(distance)
            hiddens.append(cpu.hidden.clone())
        stacked = [torch.stack(s).to(place.device) for s in (queries, indices, distances, hiddens)]
        self.hits = sum(int((index >= 0).sum()) for index in indices)
        self.queries, self.indices, self.distances, self.hiddens = stacked
        self.base = base.to(place.device)
        self.backend = backend
        self.step = torch.zeros(1, dtype=torch.int64, device=place.device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=place.device)
        self.captured = Captured(place, self._once)
        self.step.zero_()
        self.wrong.zero_()

    def _once(self) -> Tensors:
        book = self.book
        which = self.step % self.variants
        book.query.copy_(self.queries.index_select(0, which)[0])
        book.hidden.copy_(self.base)
        index, distance = book.adapt(self.backend)
        right = (
            (index == self.indices.index_select(0, which)[0]).all()
            & _equal_bits(distance, self.distances.index_select(0, which)[0])
            & _equal_bits(book.hidden, self.hiddens.index_select(0, which)[0])
        )
        self.wrong.add_((~right).to(torch.int64))
        self.step.add_(1)
        index.fill_(-7)
        distance.fill_(float("nan"))
        return index, distance

    def replay(self) -> None:
        """Replay once; in a rehearsal, call once."""
        if self.captured.graph is not None:
            self.captured.graph.replay()
        else:
            self._once()

    def verdict(self, replays: int) -> None:
        """Raise `Wrong` unless that many replays ran and were right."""
        if int(self.step) != replays:
            raise Wrong(f"{replays} replays must have run, {int(self.step)} did")
        if int(self.wrong):
            raise Wrong(f"{int(self.wrong)} of {replays} replays gave other bits")


def _equal_bits(a: Tensor, b: Tensor) -> Tensor:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return (a.view(kind) == b.view(kind)).all()


def _replays(place: Place, backend: Backend) -> dict[str, Any]:
    """Replay one graph 100,000 times, every output compared on the device."""
    _needs(place, backend)
    total = place.pick(100_000, 10_000, 40)
    watched = Watched(place, backend, seed=3)
    done = 0
    while done < total:
        for _ in range(min(2000, total - done)):
            watched.replay()
            done += 1
        watched.verdict(done)
        if place.remaining() <= 1 and done < total:
            raise CutOff(f"the budget ended after {done} of {total} replays, all right")
    return {"replays": done, "hits in 16 inputs": watched.hits}


def _two_graphs(place: Place, backend: Backend) -> dict[str, Any]:
    """Two graphs on two streams at once, each with a codebook of its own."""
    _needs(place, backend)
    total = place.pick(10_000, 2_000, 20)
    pair = [Watched(place, backend, seed=10 + n, capacity=(4096, 3000)[n]) for n in range(2)]
    if not place.gpu:
        for _ in range(total):
            for watched in pair:
                watched.replay()
    else:
        streams = [torch.cuda.Stream() for _ in pair]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(total):
            for watched, stream in zip(pair, streams, strict=True):
                with torch.cuda.stream(stream):
                    watched.replay()
        torch.cuda.synchronize()
    for watched in pair:
        watched.verdict(total)
    return {"replays of each": total}


def _two_threads(place: Place, backend: Backend) -> dict[str, Any]:
    """Two threads call without a graph, each on a stream of its own, at once."""
    _needs(place, backend)
    total = place.pick(2_000, 500, 10)
    pair = [Watched(place, backend, seed=20 + n) for n in range(2)]
    for watched in pair:
        del watched.captured  # and with it the graph: the calls are made one by one
    failed: list[str] = []

    def work(watched: Watched) -> None:
        try:
            if not place.gpu:
                for _ in range(total):
                    watched._once()
                return
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(total):
                    watched._once()
            stream.synchronize()
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}")

    place.settle()
    threads = [threading.Thread(target=work, args=(watched,)) for watched in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place.settle()
    if failed:
        raise Wrong("; ".join(failed))
    for watched in pair:
        watched.verdict(total)
    return {"calls of each": total}


_FIRST = """
import torch, grace_kernels
torch.zeros(1, device="cuda")
keys = torch.randn(100, 64, device="cuda")
radii = torch.ones(100, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    index, distance = grace_kernels.lookup(keys[7:8], keys, radii, backend="cuda")
graph.replay()
print("answer", index.item(), distance.item())
print("eager", grace_kernels.lookup(keys[9:10], keys, radii, backend="cuda")[0].item())
"""


def _first_call() -> dict[str, Any]:
    """The compiled kernel's first call of a process may be a captured one."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    if done.stdout.split() != ["answer", "7", "0.0", "eager", "9"]:
        raise Wrong(f"7 at 0.0, then 9 must answer: {done.stdout} {done.stderr[-800:]}")
    return {"answers": "right"}
