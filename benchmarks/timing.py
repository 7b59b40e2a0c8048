"""How times are taken: everything in turn, in one process, with warm caches or cold ones."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
_SHORT = (
    0.01  # seconds; calls up to this three times, as one pass leaves a last-level cache half warm
)
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
        """Return the columns of a row.

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
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode():
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
    finally:
        if enabled:
            gc.enable()
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

    def __init__(self, size: int | None = None) -> None:
        """Take the size in bytes; None: twice the last-level cache, at most 1 GiB."""
        if size is None:
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


def fastest(times: Mapping[str, Times], prefix: str) -> str:
    """Return the name with this prefix that has the smallest median."""
    names = [name for name in times if name.startswith(prefix)]
    return min(names, key=lambda name: times[name].median, default="")


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of some ratios, NaN of none."""
    if not values:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


def memory() -> int | None:
    """Return the bytes of memory that are free, None where nothing tells."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
