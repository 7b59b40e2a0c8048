"""Captured calls stay right while the codebook changes under them; two streams, two threads.

Off a GPU, where nothing is captured, the calls themselves are made in place of the replays, which
shows that the tests see what they are there for.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch, testing

from .problems import CPU, Place, Tensors
from .test_problems import ON_A_CPU, clustered

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Captured  # noqa: E402

pytestmark = pytest.mark.too_long_interpreted
KINDS = {
    0: "kernel",
    1: "memcpy",
    2: "memset",
    3: "host",
    4: "graph",
    5: "empty",
    6: "wait event",
    7: "record event",
    10: "allocation",
    11: "free",
    13: "conditional",
}


def nodes_of(captured: Captured) -> dict[str, int]:
    """Return how many nodes of each kind a graph has that was kept.

    By the driver's C interface: libcuda is in every process that uses a GPU, and a cudaGraph_t is a
    CUgraph.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        function = getattr(driver, name)
        function.restype = ctypes.c_int
        status = function(*arguments)
        assert status == 0, f"{name} returned {status}"

    graph: Any = captured.graph
    whole, number = ctypes.c_void_p(int(graph.raw_cuda_graph())), ctypes.c_size_t(0)
    call("cuGraphGetNodes", whole, None, ctypes.byref(number))
    nodes = (ctypes.c_void_p * max(1, number.value))()
    if number.value:
        call("cuGraphGetNodes", whole, nodes, ctypes.byref(number))
    found: Counter[str] = Counter()
    for node in nodes[: number.value]:
        kind = ctypes.c_int(-1)
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        found[KINDS.get(kind.value, f"kind {kind.value}")] += 1
    return dict(found)


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

    def adapt(self, backend: Any, sketch: Sketch | None = None) -> Tensors:
        """Make the fused call; it writes to `hidden`."""
        rows = self.query_row, self.first_row, self.last_row
        codebook = self.keys, self.radii, self.values, self.count
        how: dict[str, Any] = {"sketch": sketch, "backend": backend}
        return grace_kernels.adapt_(self.hidden, self.query, *rows, *codebook, **how)

    def on_cpu(self) -> Book:
        """Return a copy on the CPU."""
        return Book(**{name: tensor.cpu().clone() for name, tensor in vars(self).items()})


def make_book(
    device: torch.device, capacity: int, dim: int, batch: int, width: int, *, seed: int, used: int
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
    return Book(**{name: tensor.to(device) for name, tensor in tensors.items()})


def test_the_nodes_of_a_graph_are_counted_right(place: Place) -> None:
    if not place.gpu:
        pytest.skip("there are no graphs without a GPU")
    x, y = torch.ones(8, device=place.device), torch.ones(8, device=place.device)
    two = Captured(lambda: (x.add_(1), y.mul_(2)), place.device, keep=True)
    assert nodes_of(two) == {"kernel": 2}
    mixed = Captured(lambda: (x.copy_(y), y.mul_(2)), place.device, keep=True)
    assert sum(nodes_of(mixed).values()) == 2


@pytest.mark.parametrize(
    "operation", ["lookup", "nearest", "adapt_", "pruned lookup", "pruned adapt_"]
)
def test_a_captured_call_is_one_kernel_node_and_nothing_else(operation: str, place: Place) -> None:
    if not place.gpu:
        pytest.skip("there are no graphs without a GPU")
    apart = "coordinates" if "pruned" in operation else "apart"
    for batch, used in ((1, 1000), (8, 1000), (64, 1000), (512, 1000), (1, 20_000), (8, 0)):
        book = make_book(place.device, max(1000, used), 768, batch, 768, seed=1, used=used)
        arguments = book.query, book.keys, book.radii, book.count
        sketch = Sketch.fit(book.keys, book.radii, used) if "pruned" in operation else None
        how: dict[str, Any] = {"backend": place.backend}
        if operation.endswith("adapt_"):
            call = partial(book.adapt, place.backend, sketch)
        elif operation == "nearest":
            call = partial(grace_kernels.nearest, *arguments, **how)
        else:
            call = partial(grace_kernels.lookup, *arguments, sketch=sketch, **how)
        captured = Captured(call, place.device, keep=True)
        forms = place.forms.split(",")
        two = apart in forms and (apart == "apart" or batch <= 64)
        if "warpgroups" in forms and torch.cuda.get_device_capability() == (9, 0):
            two |= apart == "apart" and batch > 64
        assert nodes_of(captured) == {"kernel": 2 if two else 1}, (batch, used)
        captured.replay()
        torch.cuda.synchronize()


def test_edits_between_replays_of_a_graph_take_effect(place: Place) -> None:
    assert edited_between_replays(place, place.pick(1000, 40)) > 20


def edited_between_replays(place: Place, edits: int) -> int:
    """Capture once; change the codebook in place and replay, all compared; return the hits."""
    book = make_book(place.device, edits + 40, 256, 8, 128, seed=2, used=0)
    base = book.hidden.clone()
    captured = Captured(partial(book.adapt, place.backend), place.device)
    cpu, generator = book.on_cpu(), torch.Generator().manual_seed(0)
    used = hits = 0
    for edit in range(edits):
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
            else:
                target.radii[slot] = radius if choice == 8 else -torch.inf
            if slot == used:
                target.count.fill_(used + 1)
        used = max(used, slot + 1)
        book.hidden.copy_(base)
        replay_on_poison(captured)
        cpu.hidden.copy_(base.cpu())
        right = cpu.adapt(place.truth)
        hits += int((right[0] >= 0).sum())
        for mine, want in zip((*captured.outputs, book.hidden), (*right, cpu.hidden), strict=True):
            assert testing.same_bits(mine.cpu(), want), f"stale after edit {edit} of slot {slot}"
    return hits


def replay_on_poison(captured: Captured) -> None:
    """Replay a lookup's graph, its outputs poisoned before."""
    for out, poison in zip(captured.outputs, (-7, float("nan")), strict=True):
        out.fill_(poison)
    captured.replay()


def test_a_graph_sees_what_a_sketch_is_told_between_replays(place: Place) -> None:
    hits, rows = told_between_replays(place, place.pick(300, 40))
    assert hits > 20
    assert rows > 210


def told_between_replays(place: Place, edits: int) -> tuple[int, int]:
    """Capture once; tell the sketch of changes in place and replay; return hits and its rows."""
    capacity, dim = 200 + edits, 96
    query, keys = clustered(capacity, dim, torch.bfloat16)
    radii = torch.ones(capacity)
    there = [t.to(place.device) for t in (query[:8], keys, radii)]
    count = torch.tensor(200, device=place.device)
    sketch = Sketch.fit(there[1], there[2], 200)
    how: dict[str, Any] = {"sketch": sketch, "backend": place.backend}
    captured = Captured(partial(grace_kernels.lookup, *there, count, **how), place.device)
    generator, hits = torch.Generator().manual_seed(0), 0
    for edit in range(edits):
        used = int(count)
        slot = used if edit % 3 else int(torch.randint(used, (), generator=generator))
        # Every other one beyond the radii that the sketch was fitted with, which were all 1.
        away = (0.02, 0.15)[edit % 2]
        near = query[edit % 8].float() + away * torch.randn(dim, generator=generator)
        keys[slot] = near.to(keys.dtype)
        radii[slot] = (-torch.inf, 0.1, 0.5, 2.0, 30.0)[edit % 5]
        for target, source in ((there[1], keys), (there[2], radii)):
            target[slot].copy_(source[slot])
        sketch.update_radii_(there[2], slot, slot + 1)
        sketch.extend(there[1], slot, slot + 1)
        rows = max(used, slot + 1)
        count.fill_(rows)
        replay_on_poison(captured)
        right = grace_kernels.lookup(query[:8], keys, radii, rows, backend=place.truth)
        hits += int((right[0] >= 0).sum())
        for mine, want in zip(captured.outputs, right, strict=True):
            assert testing.same_bits(mine.cpu(), want), f"stale after edit {edit}, slot {slot}"
    return hits, sketch.rows


class Watched:
    """A captured call that checks itself on the device, with another input at every replay.

    The graph takes input number `step % variants`, makes the call, counts in `wrong` where a bit
    differs from what is expected, and poisons what the call wrote, so that the next replay cannot
    pass on what this one left. Nothing is read by the host in between.
    """

    def __init__(self, place: Place, seed: int, capacity: int = 4096) -> None:
        capacity = place.pick(capacity, 60)
        self.place, self.variants = place, 16
        self.book = book = make_book(
            place.device, capacity, 256, 8, 128, seed=seed, used=capacity - 3
        )
        cpu, base = book.on_cpu(), book.hidden.cpu().clone()
        generator = torch.Generator().manual_seed(seed + 1)
        made: list[Tensors] = []
        for _ in range(self.variants):
            cpu.query.copy_(torch.randn(8, 256, generator=generator))
            at = torch.randint(capacity - 3, (8,), generator=generator)
            near = cpu.keys[at].float() + 0.02 * torch.randn(8, 256, generator=generator)
            cpu.query[1::2] = near[1::2].bfloat16()
            cpu.hidden.copy_(base)
            index, distance = cpu.adapt(place.truth)
            made.append((cpu.query.clone(), index, distance, cpu.hidden.clone()))
        stacked = [torch.stack(one).to(place.device) for one in zip(*made, strict=True)]
        self.queries, self.indices, self.distances, self.hiddens = stacked
        self.hits = int((self.indices >= 0).sum())
        self.base = base.to(place.device)
        self.step, self.wrong = (
            torch.zeros(1, dtype=torch.int64, device=place.device) for _ in range(2)
        )
        self.captured = Captured(self.once, place.device)
        self.step.zero_()
        self.wrong.zero_()

    def once(self) -> Tensors:
        """Make the call with the next input, and compare."""
        book, which = self.book, self.step % self.variants
        book.query.copy_(self.queries.index_select(0, which)[0])
        book.hidden.copy_(self.base)
        index, distance = book.adapt(self.place.backend)
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
        """Replay once; without a GPU, call once."""
        if self.captured.graph is not None:
            self.captured.graph.replay()
        else:
            self.once()

    def check(self, replays: int) -> None:
        """Assert that so many replays ran and were right."""
        assert int(self.step) == replays
        assert int(self.wrong) == 0, f"{int(self.wrong)} of {replays} replays gave other bits"


def _equal_bits(a: Tensor, b: Tensor) -> Tensor:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return (a.view(kind) == b.view(kind)).all()


def test_every_one_of_a_hundred_thousand_replays_is_right(place: Place) -> None:
    watched = Watched(place, seed=3)
    assert watched.hits > 0
    total = place.pick(100_000, 40)
    for done in range(total):
        watched.replay()
        if done % 2000 == 1999:
            watched.check(done + 1)
    watched.check(total)


def test_two_graphs_on_two_streams_do_not_disturb_each_other(place: Place) -> None:
    pair = [Watched(place, seed=10 + n, capacity=(4096, 3000)[n]) for n in range(2)]
    total = place.pick(10_000, 20)
    streams: list[Any] = [None, None]
    if place.gpu:
        streams = [torch.cuda.Stream() for _ in pair]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
    for _ in range(total):
        for watched, stream in zip(pair, streams, strict=True):
            with torch.cuda.stream(stream):
                watched.replay()
    if place.gpu:
        torch.cuda.synchronize()
    for watched in pair:
        watched.check(total)


def test_two_threads_on_two_streams_do_not_disturb_each_other(place: Place) -> None:
    pair = [Watched(place, seed=20 + n) for n in range(2)]
    total = place.pick(2000, 10)
    failed: list[str] = []

    def work(watched: Watched) -> None:
        try:
            stream = torch.cuda.Stream() if place.gpu else None
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(total):
                    watched.once()  # no graph: the calls are made one by one
            if stream is not None:
                stream.synchronize()
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}")

    if place.gpu:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(watched,)) for watched in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    if place.gpu:
        torch.cuda.synchronize()
    for watched in pair:
        watched.check(total)


FIRST = """
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


def test_the_compiled_kernels_first_call_of_a_process_may_be_a_captured_one(place: Place) -> None:
    if place.backend != "cuda":
        pytest.skip("the CUDA kernels alone are there before a call")
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.stdout.split() == ["answer", "7", "0.0", "eager", "9"], done.stderr


# What follows shows, without a GPU, that these tests see what they are there for.


def test_a_graph_that_does_not_see_an_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Captured, "replay", lambda self: None)
    with pytest.raises(AssertionError, match="stale after edit 0"):
        edited_between_replays(ON_A_CPU, 3)


@pytest.mark.parametrize("output", range(3))
def test_any_output_that_goes_stale_is_found(output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt, made = Book.adapt, []

    def stale(self: Book, backend: Any, sketch: Any = None) -> Tensors:
        got = (*adapt(self, backend, sketch), self.hidden)
        if backend == ON_A_CPU.backend:
            made.append([tensor.clone() for tensor in got])
            got[output].copy_(made[0][output])  # what the first call gave
        return got[:2]

    monkeypatch.setattr(Book, "adapt", stale)
    with pytest.raises(AssertionError, match="stale after edit"):
        edited_between_replays(ON_A_CPU, 20)


def test_a_sketch_that_was_not_told_of_a_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_A_CPU.backend == "reference":
        pytest.skip("the reference does not look at sketches")
    fit, extend = Sketch.fit, Sketch.extend

    def fitted_to_all(keys: Tensor, radii: Tensor, count: int) -> Sketch:
        return fit(keys, radii, len(keys))

    def never_alone(self: Sketch, keys: Tensor, first: int, last: int) -> None:
        if last - first > 1:
            extend(self, keys, first, last)

    monkeypatch.setattr(Sketch, "fit", fitted_to_all)
    monkeypatch.setattr(Sketch, "extend", never_alone)
    with pytest.raises(AssertionError, match="stale after edit"):
        told_between_replays(ON_A_CPU, 40)


def test_a_replay_with_other_bits_or_a_missing_one_is_found() -> None:
    watched = Watched(ON_A_CPU, seed=3)
    for _ in range(20):
        watched.replay()
    watched.check(20)
    with pytest.raises(AssertionError):
        watched.check(21)
    for expected, kind in (
        (watched.distances, torch.int32),
        (watched.indices, torch.int64),
        (watched.hiddens, torch.int16),
    ):
        watched.wrong.zero_()
        watched.step.zero_()
        expected.view(kind)[5].view(-1)[3] += 1  # input 5 comes once in ten
        for _ in range(10):
            watched.replay()
        with pytest.raises(AssertionError, match="1 of 10 replays gave other bits"):
            watched.check(10)
        expected.view(kind)[5].view(-1)[3] -= 1
    assert watched.place.device == CPU
