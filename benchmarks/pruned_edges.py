"""Where a sketch pays and where it cannot: parts of pruned_lookup.py, and how it measures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activations import Resampler
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.testing import same_bits

WORST = 1.15  # of the time without a sketch
CLEARLY = 0.8  # of the time without a sketch, from the break-even size on
Timed = dict[str, list[Callable[[], Any]]]


def measure(timed: Timed, rounds: int, often: int = 1) -> dict[str, dict[str, float]]:
    """Time each once per round, in turn; the first one `often` times, with all it is given."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    first = next(iter(timed))
    with torch.inference_mode():
        for functions in timed.values():
            functions[0]()
        for round_ in range(rounds):
            for name, functions in timed.items():
                time.sleep(0.005)  # lets the threads of the one before stop spinning
                times = often if name == first else 1
                for turn in range(round_ * times, (round_ + 1) * times):
                    function = functions[turn % len(functions)]
                    start = time.perf_counter()
                    function()
                    seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, times in seconds.items():
        times.sort()
        result[name] = {
            "ms": 1e3 * statistics.median(times),
            "p20": 1e3 * times[len(times) // 5],
            "p80": 1e3 * times[len(times) * 4 // 5],
            "best": 1e3 * times[0],
        }
    return result


def calls(function: Callable[[Tensor], Any], groups: list[Tensor]) -> list[Callable[[], Any]]:
    return [lambda some=some: function(some) for some in groups]


def ways(keys: Tensor, radii: Tensor, sketch: Sketch, groups: list[Tensor]) -> Timed:
    """Return lookups of each group of queries, with the sketch and without."""
    return {
        "pruned": calls(
            lambda some: grace_kernels.lookup(some, keys, radii, sketch=sketch), groups
        ),
        "brute": calls(lambda some: grace_kernels.lookup(some, keys, radii), groups),
    }


def worst(like: Tensor, asked: Tensor, rounds: int) -> list[dict]:
    """Measure what cannot be pruned: on these keys and on others without any structure.

    Radii that cover everything; radii just below the nearest distance, with which no query hits and
    the bounds say little; and a far entry that covers everything but must give way to nearer ones.
    """
    n, dim = like.shape
    rows = []
    flat = torch.empty_like(like)
    generator = torch.Generator().manual_seed(5)
    for some in flat.split(8192):
        some.copy_(torch.randn(some.shape, generator=generator))
    noise = torch.randn(len(asked), dim, generator=generator).bfloat16()
    for name, keys, query in (("activations", like, asked), ("normal", flat, noise)):
        least = min(
            float(grace_kernels.nearest(some, keys, torch.zeros(n))[1].amin())
            for some in query[:16].split(8)
        )
        far = torch.full((n,), 0.1 * least)
        far[torch.randperm(n, generator=generator)[:200]] = 1e4
        for what, radii in (
            ("all cover", torch.full((n,), 1e4)),
            ("just short", torch.full((n,), 0.999 * least)),
            ("200 cover", far),
        ):
            sketch = Sketch.fit(keys, radii)
            for batch in (1, 8):
                timed = ways(keys, radii, sketch, list(query[:16].split(batch)))
                for mine, other in zip(timed["pruned"], timed["brute"], strict=True):
                    if not all(map(same_bits, mine(), other())):
                        raise SystemExit("a sketch changes an answer; nothing was measured")
                sketch.counters.zero_()
                times = measure(timed, rounds)
                counts = sketch.counts()
                ratio = times["pruned"]["ms"] / times["brute"]["ms"]
                best = times["pruned"]["best"] / times["brute"]["best"]
                looked = (counts["scored"] + counts["scanned"]) / counts["pairs"]
                print(
                    f"  {name:11} {what:10} {batch} queries: {ratio:5.2f} x the time without "
                    f"({times['pruned']['ms']:.2f} for {times['brute']['ms']:.2f} ms, "
                    f"{best:.2f} x by the best of each), {100 * looked:5.1f} % looked at, "
                    f"wanted {WORST:g}" + ("" if ratio <= WORST else ": MISSED"),
                    flush=True,
                )
                rows.append({"keys": n, "width": dim, "batch": batch, "data": name, "radii": what})
                rows[-1] |= {"times": times, "ratio": ratio, "looked at": looked}
    return rows


def even(real: tuple[Tensor, Tensor], dims: tuple[int, ...], rounds: int, most: int) -> list[dict]:
    """Measure small codebooks; return and print the size from which a sketch clearly pays."""
    sizes = [size for size in (512 << step for step in range(8)) if size <= most]
    rows = []
    print(f"\ntime with a sketch over time without, 1 query, radius 1, by number of keys {sizes}")
    for dim in dims:
        generator = torch.Generator().manual_seed(dim)
        like = Resampler(*real, dim, generator)
        every, query = like.draw(real[0], sizes[-1]), like.draw(real[1], 32)
        for dtype in (torch.bfloat16, torch.float32):
            ratios = []
            for size in sizes:
                keys, radii = every[:size].to(dtype), torch.ones(size)
                sketch = Sketch.fit(keys, radii)
                timed = ways(keys, radii, sketch, list(query.to(dtype).split(1)))
                times = measure(timed, rounds * 4, often=2)
                ratios.append(times["pruned"]["ms"] / times["brute"]["ms"])
            pays = [all(r <= CLEARLY for r in ratios[i:]) for i in range(len(sizes))]
            start = sizes[pays.index(True)] if True in pays else None
            name = str(dtype).removeprefix("torch.")
            print(
                f"  {dim:5} {name:9} {' '.join(f'{r:5.2f}' for r in ratios)}   clearly pays from "
                f"{start if start else f'more than {sizes[-1]}'}",
                flush=True,
            )
            rows.append({"width": dim, "dtype": name, "sizes": sizes, "ratios": ratios})
            rows[-1]["pays from"] = start
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """Draw survivors and time against the radius."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for dim in sorted({row["width"] for row in rows}):
        mine = [row for row in rows if row["width"] == dim]
        x = [row["radius"] for row in mine]
        shares = [row["survivors"] + row["scanned"] for row in mine]
        looked = [100 * share if share else math.nan for share in shares]
        left.semilogy(x, looked, "o-", label=f"width {dim}")
        colour = left.lines[-1].get_color()
        for name, style in (("pruned", "o-"), ("brute", "s--")):
            label = f"width {dim}, {'with' if name == 'pruned' else 'without'} a sketch"
            y = [row["times"][name]["ms"] for row in mine]
            right.semilogy(x, y, style, color=colour, label=label)
    left.set_ylabel("keys scored or scanned, % of all")
    right.set_ylabel("ms per lookup, median")
    for axes in (left, right):
        axes.set_xlabel("radius of every entry")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    figure.suptitle("100,000 bfloat16 keys like activations, one query from another sentence")
    figure.savefig(file, dpi=120)
