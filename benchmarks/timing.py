"""How times are taken: on a CPU everything in turn, with warm caches or cold ones; on a GPU by
replays of a graph.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
MOST = 25  # rounds
FEW = 3  # rounds of what takes too long for more
_GROUP = 1e-3  # seconds; shorter calls are made several times in a round
_AGAIN = 0.3  # seconds; calls up to this are made once untimed before they are timed
_SHORT = 0.01  # seconds; up to this three times: one pass leaves a last-level cache half warm
_LONG = 1.0  # seconds; a call that takes this long is made once before the rounds, not twice
_PAUSE = 0.005  # seconds; lets the threads of the one before stop spinning


@dataclass(frozen=True)
class Times:
    """Seconds per call: median, 20th and 80th percentile, and how many were timed."""

    median: float
    p20: float
    p80: float
    calls: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        """Return the summary of what was measured."""
        ordered = sorted(seconds)
        fifth = len(ordered) // 5
        return Times(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], len(ordered))

    def columns(self, unit: str = "ms", per_call: float = 1.0) -> dict[str, Any]:
        """Return the columns of a measurement.

        Args:
            unit: `s`, `ms` or `us`, or a rate such as `tokens/s`.
            per_call: how much of what a rate counts is done in a call.
        """
        times = (self.median, self.p20, self.p80)
        if unit.endswith("/s"):
            median, p80, p20 = (per_call / t for t in times)
        else:
            scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
            median, p20, p80 = (scale * t for t in times)
        return {"unit": unit, "median": median, "p20": p20, "p80": p80}


def interleaved(
    timed: Mapping[str, Call | Sequence[Call]],
    seconds: float,
    *,
    most: int = MOST,
    flush: Call | None = None,
) -> dict[str, Times]:
    """Time everything in turn, round by round, until the time is used up.

    What would take more than its share of the time runs in the first three rounds alone. What has
    to be built or compiled should have been called before.

    Args:
        timed: by name what to call, or several calls that take turns.
        seconds: for all of it; at least three rounds are made however long they take.
        most: rounds at most.
        flush: empties the caches. With it each timed call comes after one of these, without it
            after untimed calls of the same thing: three, one from 0.01 s and none from 0.3 s on.
    """
    calls = {name: [c] if callable(c) else list(c) for name, c in timed.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    once: dict[str, float] = {}
    with torch.inference_mode(), _without_collections():
        for name, functions in calls.items():
            once[name] = _clock(functions[0])
            if once[name] < _LONG:
                once[name] = _clock(functions[0])
        share = seconds / (FEW * max(1, len(calls)))
        end = time.perf_counter() + seconds
        for round_ in range(most):
            if round_ >= FEW and time.perf_counter() > end:
                break
            for name, functions in calls.items():
                if round_ >= FEW and once[name] > share:
                    continue
                _round(functions, taken[name], once[name], flush)
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def _round(calls: list[Call], taken: list[float], once: float, flush: Call | None) -> None:
    """Time one contestant's turn of one round."""
    if flush is not None:
        flush()
        time.sleep(_PAUSE)
        taken.append(_clock(calls[len(taken) % len(calls)]))
        return
    time.sleep(_PAUSE)
    for _ in range(3 if once < _SHORT else int(once < _AGAIN)):
        calls[len(taken) % len(calls)]()
    for _ in range(min(20, max(1, round(_GROUP / max(once, 1e-9))))):
        taken.append(_clock(calls[len(taken) % len(calls)]))


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage meanwhile: that takes time, and may free memory of the device."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Captured:
    """A function's work as a CUDA graph; on a CPU the function, called again.

    Args:
        function: takes nothing, returns tensors. Runs `warm` times before the capture, on another
            stream, so that nothing is compiled, loaded or looked up during it.
        device: where its tensors are.
        keep: keep the graph itself beside the executable one, for whoever looks at its nodes.

    Attributes:
        outputs: what the function returned; each replay writes these tensors anew.
    """

    def __init__(
        self,
        function: Callable[[], Sequence[Tensor]],
        device: torch.device,
        *,
        keep: bool = False,
        warm: int = 3,
    ) -> None:
        self.function, self.graph = function, None
        if device.type != "cuda":
            self.outputs = function()
            return
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(warm):
                function()
        stream.wait_stream(side)
        torch.cuda.synchronize()
        graph: Any = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        gc.collect()
        try:
            with _without_collections(), torch.cuda.graph(graph):
                self.outputs = function()
        except Exception:
            torch.cuda.set_stream(stream)  # torch leaves its own as the current one
            raise
        if keep:
            graph.instantiate()
        torch.cuda.synchronize()
        self.graph = graph

    def replay(self) -> None:
        """Do the work again, on the current stream."""
        if self.graph is not None:
            self.graph.replay()
            return
        for old, new in zip(self.outputs, self.function(), strict=True):
            old.copy_(new)


def on_the_device(work: Call, calls: int, device: torch.device, seconds: float = 0.04) -> Times:
    """Time `work`, which makes `calls` calls, several times back to back; return times per call.

    On a GPU between events, queued without waiting: the host runs ahead, so that what is timed is
    the device alone.
    """
    if device.type != "cuda":
        return by_the_host(work, calls, device, seconds)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        first.record()
        work()
        last.record()
        last.synchronize()
    once = max(1e-6, first.elapsed_time(last) / 1e3)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_repeats(seconds / once) + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return Times.of([a.elapsed_time(b) / 1e3 / calls for a, b in itertools.pairwise(marks)])


def _repeats(wanted: float) -> int:
    return int(min(30, max(5, wanted)))


def by_the_host(work: Call, calls: int, device: torch.device, seconds: float = 0.03) -> Times:
    """Time `work`, of `calls` calls, by the host's clock, the device idle at both ends."""

    def once() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < FEW or (time.perf_counter() < end and len(taken) < 30):
        taken.append(_clock(once) / calls)
    return Times.of(taken)


def last_level_cache() -> int:
    """Return the bytes of the largest cache of the first core; 32 MiB where nothing tells."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
        if text.rstrip("KMG").isdigit():
            sizes.append(int(text.rstrip("KMG")) << unit)
    return max(sizes)


class Flush:
    """Empties the caches: reads a buffer twice the size of the last-level cache, with all threads.

    At most 1 GiB, which is less than twice where that cache is larger than 512 MiB.

    A read and not a write: written lines would have to leave while the next call is timed.
    """

    def __init__(self) -> None:
        size = min(1 << 30, 2 * last_level_cache())
        self.buffer = torch.ones(size // 4, dtype=torch.int32)

    def __call__(self) -> None:
        """Read it all."""
        self.buffer.amax()

    def bandwidth(self, seconds: float = 1.0) -> float:
        """Return bytes per second of reading the buffer, which no cache holds, the best way."""
        times = interleaved(reads(self.buffer), seconds)
        return self.buffer.nbytes / min(t.median for t in times.values())


def reads(tensor: Tensor) -> dict[str, Call]:
    """Return ways to read all bytes of a contiguous tensor; which is the fastest differs."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat = flat[: len(flat) // 8 * 8]
    return {
        "sum of int64": lambda: flat.view(torch.int64).sum(),
        "sum of float32": lambda: flat.view(torch.float32).sum(),
        "maximum of int32": lambda: flat.view(torch.int32).amax(),
    }


def memory() -> int | None:
    """Return the bytes of memory that are free, None where nothing tells."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
