"""Measure lookups on a CPU against their peers: one run, interleaved, medians, checked first.

Peers, all in float32 and with the same number of threads:

* torch mm: |k|^2 - 2 k.q by matrix product with cached norms, min, then what lies within the
  rounding error of the minimum again by direct differences in float64, without which the product
  does not give the nearest key. The fastest of three ways to write the product, per shape.
* faiss: IndexFlatL2, k = 1.
* cdist: torch.cdist(keys, queries).min(0), the published code's way.

On such data `nearest` reads nearly every key to its end. `lookup` may stop within a key once
that is farther than the largest radius (here a third of the typical distance between two keys),
which a peer has no way to know.

Usage: python benchmarks/cpu_lookup.py [--threads N] [--batch 1 8] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grace_kernels

try:
    import faiss
except ImportError:
    faiss = None

SHAPES = ((100_000, 768), (20_000, 4096))
NEEDED = {"best": 2.0, "cdist": 20.0}
OURS = ("nearest fp32", "nearest bf16", "lookup fp32", "lookup bf16")
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "keys @ queries": lambda k, q: k @ q.T,
    "queries @ keys": lambda k, q: (q @ k.T).T,
    "keys @ one query": lambda k, q: (k @ q[0])[:, None],
}


def by_product(keys: Tensor, norms: Tensor, query: Tensor, product: Callable) -> Tensor:
    """Return the index of the nearest key of each query, correct, by way of a matrix product."""
    scores = norms[:, None] - 2 * product(keys, query)
    least, index = scores.min(dim=0)
    # c.f. gamma_D: the error of the product and of the norms, generously
    slack = 4e-7 * math.sqrt(keys.shape[1]) * (least.abs() + 3 * query.square().sum(1))
    slot, column = (scores <= least + slack).nonzero(as_tuple=True)
    if len(slot) == len(index):
        return index
    exact = (keys[slot].double() - query[column].double()).square().sum(dim=1)
    for b in range(len(query)):
        here = column == b
        index[b] = slot[here][exact[here].argmin()]
    return index


def problem(n: int, dim: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, queries (every other one near a key) and radii; all representable in bf16."""
    generator = torch.Generator().manual_seed(n + batch)
    keys = torch.randn(n, dim, generator=generator).bfloat16().float()
    query = torch.randn(batch, dim, generator=generator)
    near = torch.randint(n, (batch,), generator=generator)
    query[::2] = keys[near[::2]] + 0.1 * query[::2]
    radii = torch.full((n,), math.sqrt(2 * dim) / 3)
    return keys, query.bfloat16().float(), radii


def candidates(
    keys: Tensor, query: Tensor, radii: Tensor
) -> tuple[dict[str, Callable[[], Any]], Tensor]:
    """Return what is timed, by name, each giving indices, and the right indices of `nearest`."""
    half_keys, half_query = keys.bfloat16(), query.bfloat16()
    norms = keys.square().sum(dim=1)
    timed: dict[str, Callable[[], Any]] = {
        "nearest fp32": lambda: grace_kernels.nearest(query, keys, radii)[0],
        "nearest bf16": lambda: grace_kernels.nearest(half_query, half_keys, radii)[0],
        "lookup fp32": lambda: grace_kernels.lookup(query, keys, radii)[0],
        "lookup bf16": lambda: grace_kernels.lookup(half_query, half_keys, radii)[0],
    }
    for name, product in PRODUCTS.items():
        if name != "keys @ one query" or len(query) == 1:
            timed[f"torch {name}"] = lambda product=product: by_product(keys, norms, query, product)
    if faiss is not None:
        index = faiss.IndexFlatL2(keys.shape[1])
        index.add(keys.numpy())
        timed["faiss"] = lambda: torch.from_numpy(index.search(query.numpy(), 1)[1][:, 0])
    timed["cdist"] = lambda: torch.cdist(keys, query).min(dim=0).indices

    right, distance = grace_kernels.nearest(query, keys, radii, backend="reference")
    hit = grace_kernels.lookup(query, keys, radii, backend="reference")[0]
    for name, function in timed.items():
        expected = hit if name.startswith("lookup") else right
        if function().tolist() != expected.tolist():
            raise SystemExit(f"{name} gives a wrong index; nothing was measured")
    bits = grace_kernels.nearest(query, keys, radii)[1].view(torch.int32)
    if not torch.equal(bits, distance.view(torch.int32)):
        raise SystemExit("nearest gives a wrong distance; nothing was measured")
    return timed, right


def measure(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Time everything once per round, in turn; cdist, which takes seconds, in three rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds):
        for name, function in timed.items():
            if name == "cdist" and round_ >= 3:
                continue
            time.sleep(0.005)  # lets the threads of the one before stop spinning
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
        }
    return result


def environment(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "threads": threads,
        "isa": grace_kernels.build_info()["cpu"].get("isa", "reference"),
        "torch": torch.__version__,
        "faiss": None if faiss is None else faiss.__version__,
        "load average": [round(load, 1) for load in os.getloadavg()],
    }


def main() -> None:
    """Measure, print the table of ratios, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(arguments.threads)
    about = environment(arguments.threads)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    if faiss is None:
        print("faiss: not installed, not measured (pip install faiss-cpu)")

    rows = []
    for n, dim in SHAPES:
        for batch in arguments.batch:
            keys, query, radii = problem(n, dim, batch)
            timed, _ = candidates(keys, query, radii)
            with torch.inference_mode():
                times = measure(timed, arguments.rounds)
            rows.append({"keys": n, "width": dim, "batch": batch, "times": times})
            report(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


def report(row: dict[str, Any]) -> None:
    """Print one shape: milliseconds, and each peer's time over ours."""
    times = row["times"]
    products = [name for name in times if name.startswith("torch ")]
    best_product = min(products, key=lambda name: times[name]["ms"])
    peers = [best_product, *(name for name in ("faiss", "cdist") if name in times)]
    print(f"\n{row['keys']} keys x {row['width']}, {row['batch']} queries: median ms (p20..p80)")
    for name in (*OURS, *peers):
        t = times[name]
        print(f"  {name:24} {t['ms']:9.2f}  ({t['p20']:.2f}..{t['p80']:.2f})")
    print(f"  {'times faster than':24} {'torch mm':>9} {'faiss':>9} {'cdist':>9} {'the best':>9}")
    for name in OURS:
        ratio = {peer: times[peer]["ms"] / times[name]["ms"] for peer in peers}
        best = min(value for peer, value in ratio.items() if peer != "cdist")
        faiss_ratio = f"{ratio['faiss']:9.1f}" if "faiss" in ratio else f"{'-':>9}"
        fair = best >= NEEDED["best"] and ratio["cdist"] >= NEEDED["cdist"]
        print(
            f"  {name:24} {ratio[best_product]:9.1f} {faiss_ratio} {ratio['cdist']:9.1f} "
            f"{best:9.1f}{'' if fair else '   below 2x the best or 20x cdist'}"
        )


if __name__ == "__main__":
    main()
