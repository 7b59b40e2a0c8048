"""What the parts on a GPU share: which device, how it is timed, and what it can do.

Cold: a CUDA graph of many calls, each on another of several codebooks that together are eight times
the L2 cache, so that no call finds its keys there; the time of one replay over the number of calls.
It holds the gap between two nodes of a graph, which `ceilings` gives. Warm: the same codebook in
every call. Eager: calls from Python over the same codebooks by the host's clock, launches included.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend

from .gate import Answer, judged, judged_call
from .measurements import Measurement, Progress, Settings
from .timing import Captured, Times, by_the_host, on_the_device

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
LATE = "not run: the time was over"
AT_ONCE = 20  # codebooks that eager calls go round

Call = Callable[[], Answer]


def device_of(settings: Settings) -> torch.device:
    """Return the GPU, or in a rehearsal the CPU."""
    return torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What is measured together: `part` is `lookup`, `adapt_` or `pruned`.

    A compiled peer is measured alone: compiling takes seconds.
    """

    part: str
    dtype: torch.dtype
    dim: int
    keys: int
    batch: int
    compiled: bool = False
    data: str = "isotropic"

    @property
    def codebook(self) -> tuple[Any, ...]:
        """What shapes have in common that are measured on the same codebooks."""
        return self.part, self.data, self.dtype, self.dim, self.keys

    @property
    def key_bytes(self) -> int:
        """What one pass over the keys reads."""
        return self.keys * self.dim * self.dtype.itemsize


Columns = dict[str, Any]


def each(
    shapes: Sequence[Shape],
    settings: Settings,
    progress: Progress,
    make: Callable[[Shape, torch.device], Any],
    measure: Callable[[Shape, Any, Columns, torch.device], Iterator[Measurement]],
) -> Iterator[Measurement]:
    """Measure shapes in order, those next to each other on the codebooks that they share.

    What would begin too late, or does not fit, is said to be absent. `make(shape, device)` makes
    codebooks, `measure(shape, codebooks, columns, device)` measures a shape on them.
    """
    device, done = device_of(settings), 0
    for _, group in itertools.groupby(shapes, key=lambda shape: shape.codebook):
        books = None
        for shape in group:
            about = {"part": shape.part, "device": settings.device, "data": shape.data}
            about |= {"dtype": NAMES[shape.dtype], "keys": shape.keys, "width": shape.dim}
            columns: Columns = {**about, "batch": shape.batch}
            try:
                if time.monotonic() > settings.until:
                    raise TimeoutError(LATE)
                books = books or make(shape, device)
                yield from measure(shape, books, columns, device)
            except (TimeoutError, MemoryError) as why:
                name = "torch.compile" if shape.compiled else "all"
                yield Measurement(**columns, name=name, answers="absent", note=str(why))
            progress(done := done + 1, len(shapes))
        del books
        release(device)


def ours(device: torch.device) -> tuple[Backend, ...]:
    """Return the implementations that must answer on a device."""
    if device.type == "cuda":
        return "triton", "cuda"
    return ("cpu" if grace_kernels.build_info()["cpu"]["available"] else "reference",)


def how_many(device: torch.device, each: int) -> int:
    """Return how many of something of `each` bytes are eight times the L2 cache; off a GPU, 2."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 60 << 20
    return max(1, math.ceil(8 * cache / each))


def room_for(device: torch.device, needed: int) -> None:
    """Raise MemoryError where half of the free memory is less than is needed."""
    if device.type == "cuda" and needed > 0.5 * torch.cuda.mem_get_info(device)[0]:
        raise MemoryError(f"left out: {needed / 1e9:.0f} GB do not fit beside what peers need")


def release(device: torch.device) -> None:
    """Return cached memory to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


Contestants = dict[str, tuple[str, Callable[[], list[Call]]]]
"""By name: the kind, and what makes the calls, one for each codebook."""


def measured(
    columns: Mapping[str, Any],
    contestants: Contestants,
    right: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    hidden: Tensor | None = None,
    values: Sequence[Tensor] = (),
) -> Iterator[Measurement]:
    """Check, then time, every contestant of one case; one that fails does not stop the others.

    `right` is what the calls for the first codebooks must give, `hidden` what a call writes to, and
    `values` what, of each codebook. Raises where the device is of no more use.
    """
    for name, (kind, make) in contestants.items():
        who = {**columns, "kind": kind, "name": name}
        try:
            with torch.no_grad():
                calls = make()
                verdict = [
                    judged_call(call, want, hidden, values[n] if values else None)
                    for n, (call, want) in enumerate(zip(calls, right, strict=False))
                ]
                times, again = clocked(calls, right, device, warm=kind == "ours")
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            yield Measurement(**who, answers="absent", note=said)
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is beyond use
        else:
            answers, note = _worst(verdict, again)
            about = {"answers": answers, "note": note}
            for cache, took in times.items():
                yield Measurement(**who, **about, cache=cache, **took.columns("us"))
        if device.type == "cuda" and torch.cuda.memory_reserved(device) > 1 << 34:
            release(device)


def _worst(
    first: Sequence[tuple[str, str]], replayed: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    worst = max(first, key=lambda told: ("exact", "rounded", "wrong").index(told[0]))
    if worst[0] != "wrong" and [told for told, _ in replayed] != [told for told, _ in first]:
        return "wrong", f"replayed: {'; '.join(' '.join(told).strip() for told in replayed)}"
    return worst


def clocked(
    calls: Sequence[Call],
    right: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    warm: bool,
) -> tuple[dict[str, Times], list[tuple[str, str]]]:
    """Return the times of one contestant by cache, and the verdicts on what the last replay gave.

    `calls`, one for each codebook, go round; `right` is what the first of them must give. `warm`:
    the first one alone is timed too.
    """
    few = calls[:AT_ONCE]
    times = {"eager": by_the_host(partial(_all, few), len(few), device)}
    # Long enough for the start of a graph not to count.
    repeat = min(50, max(1, math.ceil(5e-4 / (times["eager"].median * len(calls)))))
    order = list(calls) * (repeat if device.type == "cuda" else 1)
    graph = Captured(partial(_all, order), device, warm=1)
    for output in graph.outputs[: 2 * len(right)]:
        output.fill_(-7)
    times["cold"] = on_the_device(graph.replay, len(order), device)
    pairs = zip(graph.outputs[::2], graph.outputs[1::2], strict=True)
    verdicts = [judged(pair, want) for pair, want in zip(pairs, right, strict=False)]
    del graph
    if warm:
        graph = Captured(partial(_all, [calls[0]] * 20), device, warm=1)
        times["warm"] = on_the_device(graph.replay, 20, device)
    return times, verdicts


def _all(calls: Sequence[Call]) -> list[Tensor]:
    """Make all calls; return their outputs side by side."""
    return [output for call in calls for output in call()]


def ceilings(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure what the device can do: copy, read, multiply, and start a kernel of a graph."""
    device = device_of(settings)
    about = {"part": "ceilings", "device": settings.device, "kind": "bound", "cache": "cold"}
    for columns in _ceilings(device):
        yield Measurement(**about, **columns)


def _ceilings(device: torch.device) -> Iterator[dict[str, Any]]:
    small = device.type != "cuda"
    n = 1 << 22 if small else 1 << 30
    source = torch.randint(-100, 100, (n,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    took = on_the_device(partial(target.copy_, source), 1, device)
    yield {"name": "copy", **took.columns("GB/s", 2e-9 * n), "note": "read and written"}
    del source, target
    n = 1 << 20 if small else 1 << 29  # 2 GiB, which no cache holds
    floats = torch.zeros(n, device=device)
    ways = (torch.sum, torch.amax)
    took = min(
        (on_the_device(partial(way, floats), 1, device) for way in ways), key=lambda t: t.median
    )
    yield {"name": "read", **took.columns("GB/s", 4e-9 * n), "note": "the faster of two ways"}
    del floats
    size = 256 if small else 8192
    for name, dtype, precision in (
        ("bf16", BF16, "highest"),
        ("fp32", FP32, "highest"),
        ("tf32", FP32, "high"),  # what a kernel may use of the tensor cores on fp32 keys
    ):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        took = on_the_device(partial(torch.mm, a, b), 1, device, 0.1)
        torch.set_float32_matmul_precision(before)
        yield {"name": "product", "dtype": name, **took.columns("TFLOP/s", 2e-12 * size**3)}
    tiny = torch.zeros(8, device=device)
    chain = Captured(lambda: [tiny.add_(1) for _ in range(200)], device)
    yield {"name": "a kernel in a graph", **on_the_device(chain.replay, 200, device).columns("us")}
