"""Measure lookups through a sketch on a CPU: ratios of one run, interleaved, checked first.

The keys are bfloat16 and have the spectrum of real activations, see activations.py, the queries
come from other sentences. Beside `lookup` with a sketch stand `lookup` without one, faiss
IndexFlatL2 (float32, equal threads) and reading the keys once, which is the fastest of some ways:
torch's sums of the bytes as int64 and as float32, their maximum as int32, and `nearest`, which
cannot do without reading every key. Every answer is compared before anything is timed.

Usage: python benchmarks/pruned_lookup.py [--quick] [--threads N] [--json FILE] [--picture FILE]
[--activations FILE] [--parts speed million worst even sweep]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from activations import Resampler, load, nearest_median, show, split
from cpu_lookup import environment, faiss
from pruned_edges import Timed, calls, draw, even, measure, ways, worst
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.testing import same_bits

RADII = (1.0, 2.0, 3.0)
SWEEP = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
ASKED = 64  # queries, half of them from other sentences, half near keys
NEEDED = {
    ("faiss", 1): lambda dim, n: 20.0 if n == 100_000 else None,
    ("read", 1): lambda dim, n: 30.0 if n == 1_000_000 else 6.0 if dim < 4096 else 25.0,
    ("read", 8): lambda dim, n: 3.0 if dim < 4096 else 12.5,
}


class Codebook:
    """Keys `[N, D]` bfloat16 like activations, their sketch, and queries that miss and that hit."""

    def __init__(self, real: tuple[Tensor, Tensor], n: int, dim: int) -> None:
        """Draw and sketch; says how long both take."""
        generator = torch.Generator().manual_seed(n + dim)
        print(f"\n{n} keys x {dim}", flush=True)
        start = time.perf_counter()
        like = Resampler(*real, dim, generator)
        self.keys = torch.empty(n, dim, dtype=torch.bfloat16)
        told = show("keys drawn")
        for done in like.drawn(real[0], self.keys):
            told(done, n)
        self.query = like.draw(real[1], ASKED, torch.bfloat16)
        near = torch.randint(n, (ASKED // 2,), generator=generator)
        noise = torch.randn(ASKED // 2, dim, generator=generator) * (0.5 / math.sqrt(dim))
        self.query[ASKED // 2 :] = self.keys[near].float() + noise
        self.radii = torch.full((n,), RADII[0])
        drawn = time.perf_counter()
        self.sketch = Sketch.fit(self.keys, self.radii, progress=show("keys sketched"))
        self.fit_seconds = time.perf_counter() - drawn
        self.share = self.sketch.nbytes / self.keys.nbytes
        some = self.keys[:: max(1, n // 10_000)].float()
        print(
            f"  drawn in {drawn - start:.0f} s, sketched in {self.fit_seconds:.1f} s; the sketch "
            f"takes {100 * self.share:.1f} % of the keys' {self.keys.nbytes / 1e9:.2f} GB; "
            f"nearest of {len(some)} keys: {nearest_median(self.query[: ASKED // 2], some):.2f}",
            flush=True,
        )

    def set_radii(self, radii: Tensor) -> None:
        """Give the entries other radii, none of them smaller than before in all."""
        self.radii.copy_(radii)
        self.sketch.update_radii_(self.radii, 0, len(radii))

    def groups(self, batch: int) -> list[Tensor]:
        """Return what is asked at a time, of queries that miss."""
        return list(self.query[: ASKED // 2].split(batch))

    def pruned(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return grace_kernels.lookup(query, self.keys, self.radii, sketch=self.sketch)

    def brute(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return grace_kernels.lookup(query, self.keys, self.radii)

    def check(self, index: Any = None) -> int:
        """Compare with brute force to the bit, with faiss where there is a hit; return the hits."""
        right = [self.brute(some) for some in self.query.split(8)]
        for batch in (1, 8):
            got = [self.pruned(some) for some in self.query.split(batch)]
            for mine, other in zip(zip(*got, strict=True), zip(*right, strict=True), strict=True):
                if not same_bits(torch.cat(mine), torch.cat(other)):
                    raise SystemExit("a sketch changes an answer; nothing was measured")
        slot = torch.cat([answer[0] for answer in right])
        hit = slot >= 0
        if index is not None:
            found = torch.from_numpy(index.search(self.query.float().numpy(), 1)[1][:, 0])
            if not torch.equal(found[hit], slot[hit]):
                raise SystemExit("faiss and lookup disagree on a hit; nothing was measured")
        return int(hit.sum())


def reads(keys: Tensor, radii: Tensor, query: Tensor) -> Timed:
    """Return ways to read all bytes of the keys."""
    flat = keys.view(-1)
    return {
        "read: sum of int64": [lambda: flat.view(torch.int64).sum()],
        "read: sum of float32": [lambda: flat.view(torch.float32).sum()],
        "read: maximum of int32": [lambda: flat.view(torch.int32).amax()],
        "read: nearest": [lambda: grace_kernels.nearest(query, keys, radii)],
    }


def counted(book: Codebook, batch: int) -> dict[str, float]:
    """Return what lookups of the missing queries look at, per lookup and as shares of all pairs."""
    book.sketch.counters.zero_()
    groups = book.groups(batch)
    for some in groups:
        book.pruned(some)
    counts = book.sketch.counts()
    n, dim = book.keys.shape
    rows = (counts["scored"] + counts["scanned"]) / len(groups)
    return {
        "survivors": counts["scored"] / counts["pairs"],
        "scanned": counts["scanned"] / counts["pairs"],
        "bytes": 70 * n + 128 * dim + 2 * dim * rows,
    }


def speed(book: Codebook, batches: tuple[int, ...], rounds: int, peers: bool) -> list[dict]:
    """Measure all radii at all batch sizes; print a table per batch size."""
    n, dim = book.keys.shape
    index = None
    if peers and faiss is not None:
        index = faiss.IndexFlatL2(dim)
        for some in book.keys.split(10_000):
            index.add(some.float().numpy())
    rows = []
    for radius in RADII:
        book.set_radii(torch.full((n,), radius))
        hits = book.check(index)
        for batch in batches:
            groups = book.groups(batch)
            timed: Timed = {"pruned": calls(book.pruned, groups)}
            timed["hits"] = calls(book.pruned, list(book.query[ASKED // 2 :].split(batch)))
            timed["brute"] = calls(book.brute, groups)
            timed |= reads(book.keys, book.radii, book.query[:1])
            if index is not None:
                whole = [some.float().numpy() for some in groups]
                timed["faiss"] = [lambda some=some: index.search(some, 1) for some in whole]
            times = measure(timed, rounds, often=8)
            way = min((w for w in times if w.startswith("read")), key=lambda w: times[w]["ms"])
            row = {"keys": n, "width": dim, "batch": batch, "radius": radius, "hits": hits}
            row |= {**counted(book, batch), "times": times, "read": way}
            row["GB/s"] = book.keys.nbytes / times[way]["ms"] / 1e6
            report(row, book.keys.nbytes)
            rows.append(row)
    return rows


def report(row: dict[str, Any], nbytes: int) -> None:
    """Print one case: what is looked at, the times, the ratios and what they miss."""
    times, batch = row["times"], row["batch"]
    print(
        f"  radius {row['radius']:g}, {batch} queries, {row['hits']} of {ASKED} hit: "
        f"{100 * row['survivors']:.4f} % of pairs scored, {100 * row['scanned']:.4f} % scanned, "
        f"at most {100 * row['bytes'] / nbytes:.1f} % of the keys' bytes"
    )
    for name in ("pruned", "hits", "brute", "faiss", row["read"]):
        if name in times:
            t = times[name]
            print(f"    {name:24} {t['ms']:9.3f} ms  ({t['p20']:.3f}..{t['p80']:.3f})")
    row["ratios"] = {}
    for peer, name in (("brute", "brute"), ("faiss", "faiss"), ("read", row["read"])):
        if name not in times:
            continue
        ratio = row["ratios"][peer] = times[name]["ms"] / times["pruned"]["ms"]
        rule = NEEDED.get((peer, batch))
        wanted = rule(row["width"], row["keys"]) if rule is not None else None
        text = f"    {ratio:6.1f} x faster than {name}"
        if name == row["read"]:
            text += f" ({row['GB/s']:.1f} GB/s)"
        if wanted is not None:
            text += f", wanted {wanted:g}" + ("" if ratio >= wanted else ": MISSED")
        print(text, flush=True)


def sweep(book: Codebook, rounds: int) -> list[dict]:
    """Measure survivors and time against the radius, at one query."""
    rows = []
    book.sketch = Sketch.fit(book.keys, torch.full_like(book.radii, SWEEP[0]))
    groups = book.groups(1)
    for radius in SWEEP:
        book.set_radii(torch.full_like(book.radii, radius))
        times = measure(ways(book.keys, book.radii, book.sketch, groups), rounds, often=8)
        rows.append({"width": book.keys.shape[1], "radius": radius, "times": times})
        rows[-1] |= counted(book, 1)
    return rows


def million(real: tuple[Tensor, Tensor], rounds: int) -> list[dict]:
    """Measure a million keys of width 4096 where there is memory for them."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if free < 12e9:
        print(f"\na million keys x 4096 need 12 GB of memory, {free / 1e9:.0f} are free: left out")
        return []
    return speed(Codebook(real, 1_000_000, 4096), (1,), max(3, rounds // 3), peers=False)


def main() -> None:
    """Measure, print, and write the figures and the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--activations", type=Path, help="kept in this file between runs")
    parts = ("speed", "million", "worst", "even", "sweep")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(arguments.threads)
    about = environment(arguments.threads)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    if faiss is None:
        print("faiss: not installed, not measured (pip install faiss-cpu)")
    quick, rounds = arguments.quick, 5 if arguments.quick else arguments.rounds
    real = split(load(arguments.activations).mean)
    figures: dict[str, Any] = {"environment": about, "quick": quick}
    figures |= {part: [] for part in parts} | {"fit": []}

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")

    for dim in (768,) if quick else (768, 4096):
        if not {"speed", "worst", "sweep"} & set(arguments.parts):
            break
        book = Codebook(real, 20_000 if quick else 100_000, dim)
        fit = {"width": dim, "seconds": book.fit_seconds, "share of the keys": book.share}
        if dim >= 4096 and book.fit_seconds > 60:
            print("  sketched in less than 60 s wanted: MISSED")
        if book.share > 0.1:
            print("  at most 10 % of the keys' bytes wanted: MISSED")
        figures["fit"].append(fit)
        if "speed" in arguments.parts:
            figures["speed"] += speed(book, (1, 8), rounds, peers=True)
        if "sweep" in arguments.parts:
            figures["sweep"] += sweep(book, rounds)
        if "worst" in arguments.parts:
            figures["worst"] += worst(book.keys, book.query[: ASKED // 2], rounds)
        del book
        keep()
    if "even" in arguments.parts:
        figures["even"] = even(real, (384, 768, 4096), rounds, 4096 if quick else 65_536)
        keep()
    if "million" in arguments.parts and not quick:
        figures["million"] = million(real, rounds)
        keep()
    if arguments.picture and figures["sweep"]:
        draw(figures["sweep"], arguments.picture)


if __name__ == "__main__":
    main()
