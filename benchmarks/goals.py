"""What was to be reached, as ratios between measurements of one run, and whether it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .measurements import (
    OPERATORS,
    RIGHT,
    Measured,
    Measurement,
    best_peer,
    case,
    contestants,
    ratio,
    select,
)

SKETCH = ", sketch"
Found = Iterable[tuple[str, float, float]]
"""Where, what was reached and what was wanted."""


@dataclass(frozen=True)
class Goal:
    """A goal and what became of it: met in how many cases, and the case that is farthest off."""

    text: str
    met: int
    total: int
    worst: float | None
    where: str


def goals(measured: Measured) -> list[Goal]:
    """Return the goals of the device; one that was not measured has a total of 0."""
    on_cpu = all(one.device == "cpu" for one in measured)
    every = _GOALS if on_cpu else _GPU_GOALS
    return [_judged(text, list(find(measured)), most) for text, find, most in every]


def _judged(text: str, found: Sequence[tuple[str, float, float]], most: bool) -> Goal:
    """Judge cases; `most`: what is wanted is an upper limit."""
    if not found:
        return Goal(text, 0, 0, None, "")

    def margin(entry: tuple[str, float, float]) -> float:
        if most:
            return entry[2] / entry[1] if entry[1] else math.inf
        return entry[1] / entry[2]

    worst = min(found, key=margin)
    met = sum(margin(entry) >= 1 for entry in found)
    return Goal(text, met, len(found), worst[1], worst[0])


def ours_and_best(
    measured: Measured, part: str, *, cache: str = "warm", dtype: str | None = None
) -> list[tuple[Measurement, Measurement]]:
    """Return for every case of an operator the fastest of ours and of the right peers.

    Args:
        measured: of one run.
        part: `nearest`, `lookup` or `adapt_`; the peers stand in `nearest`.
        cache: warm or cold.
        dtype: of the keys, ours and the peers'; None: each in its best.
    """
    mine: dict[tuple[object, ...], Measurement] = {}
    for one in select(measured, part=part, kind="ours", cache=cache):
        if one.answers not in RIGHT or dtype not in (None, one.dtype):
            continue
        if case(one) not in mine or ratio(one, mine[case(one)]) > 1:
            mine[case(one)] = one
    pairs = [(one, best_peer(measured, one, part="nearest", dtype=dtype)) for one in mine.values()]
    return [(one, peer) for one, peer in pairs if peer is not None]


def where(one: Measurement) -> str:
    """Return the case of a one in words."""
    what = [f"{one.keys:,} × {one.width}", f"B = {one.batch}", one.data]
    if one.part == "pruned" and one.radius is not None:
        what.append(f"ε = {one.radius:g}")
    return ", ".join(what)


def _brute(batch: int, wanted: float, dtype: str | None = None) -> Callable[[Measured], Found]:
    def find(measured: Measured) -> Found:
        for part in ("nearest", "lookup"):
            for mine, peer in ours_and_best(measured, part, dtype=dtype):
                if mine.batch == batch and mine.keys in (10_000, 100_000) and mine.device == "cpu":
                    told = f"{part}, {where(mine)}, {mine.dtype} keys; {peer.name} {peer.dtype}"
                    yield told, ratio(mine, peer), wanted

    return find


def shares(measured: Measured, part: str = "nearest") -> list[tuple[Measurement, float]]:
    """Return the share of the speed of merely reading the keys, with cold caches, one query."""
    found = []
    for one in select(measured, part=part, kind="ours", cache="cold", batch=1, device="cpu"):
        bounds = [b for b in contestants(measured, one, "bound", "nearest") if b.dtype == one.dtype]
        if bounds:
            found.append((one, ratio(one, bounds[0])))
    return found


def _bandwidth(measured: Measured) -> Found:
    for one, share in shares(measured):
        if (one.keys or 0) >= 100_000:
            yield f"{where(one)}, {one.dtype} keys", share, 0.8


def pruned(
    measured: Measured, name: str, million: bool = False
) -> list[tuple[Measurement, Measurement]]:
    """Return lookups through a sketch and the measurement of that name beside each."""
    found = []
    for one in select(measured, part="pruned", name="lookup, sketch", data="activations"):
        beside = [
            r for r in measured if r.part == "pruned" and case(r) == case(one) and r.name == name
        ]
        if one.counts and beside and beside[0].counts and (one.keys == 1_000_000) == million:
            found.append((one, beside[0]))
    return found


def _sketched(
    name: str, batch: int, narrow: float, wide: float, million: bool = False
) -> Callable[[Measured], Found]:
    """Find lookups through a sketch beside `name`; 4096 is wide."""

    def find(measured: Measured) -> Found:
        for one, other in pruned(measured, name, million):
            if one.batch == batch and (million or one.keys == 100_000):
                yield where(one), ratio(one, other), narrow if (one.width or 0) < 4096 else wide

    return find


def worst_cases(measured: Measured) -> list[tuple[Measurement, float]]:
    """Return the time with a sketch over that without, where nothing can be pruned."""
    found = []
    for one in select(measured, part="pruned", name="lookup, sketch"):
        for other in select(measured, part="pruned", name="lookup"):
            if case(other) == case(one) and one.data.endswith((" cover", " short")):
                found.append((one, ratio(other, one)))
    return found


def _worst(measured: Measured) -> Found:
    for one, times in worst_cases(measured):
        yield where(one), times, 1.15


def _at_most(name: str, limit: float, **which: int) -> Callable[[Measured], Found]:
    """Find figures of sketches, of wide keys."""

    def find(measured: Measured) -> Found:
        for one in select(measured, part="pruned", name=name, **which):
            if one.median is not None and (one.width or 0) >= 768:
                yield f"{one.keys:,} × {one.width}", one.median, limit

    return find


def lookup_shares(measured: Measured) -> list[tuple[Measurement, float]]:
    """Return the lookups timed inside prefills, each with its share of an unedited prefill."""
    found = []
    for one in select(measured, part="model", unit="ms"):
        prefill = one.data.removeprefix("lookup in a ")
        whole = select(measured, part="model", data=prefill, keys=one.keys, name="unedited")
        if prefill != one.data and whole:
            found.append((one, 1 / ratio(one, whole[0])))
    return found


def _prefill(measured: Measured) -> Found:
    for one, share in lookup_shares(measured):
        if one.keys == 100_000 and one.name in ("edited", "edited, a hit"):
            yield f"{one.name}, {one.keys:,} entries", 100 * share, 2.0


def _steps(measured: Measured) -> Found:
    for one in select(measured, part="model", unit="grace operators", kind="ours"):
        if one.median is not None:
            yield f"{one.name}, {one.keys:,} entries", one.median, 0.0


_FAISS, _READ = "faiss IndexFlatL2", "read the keys"
_GOALS: tuple[tuple[str, Callable[[Measured], Found], bool], ...] = (
    ("brute force, 1 query: at least 2 times the best right peer", _brute(1, 2.0), False),
    ("brute force, 8 queries: at least 3 times", _brute(8, 3.0), False),
    ("brute force, 64 queries: at least once", _brute(64, 1.0), False),
    ("1 query, all with float32 keys: at least 2 times", _brute(1, 2.0, "fp32"), False),
    ("8 queries, all with float32 keys: at least 3 times", _brute(8, 3.0, "fp32"), False),
    ("64 queries, all with float32 keys: at least once", _brute(64, 1.0, "fp32"), False),
    ("1 query, cold, 100,000 keys: at least 0.8 of the speed of reading", _bandwidth, False),
    ("sketch, 1 query: at least 20 times faiss IndexFlatL2", _sketched(_FAISS, 1, 20, 20), False),
    ("sketch, 8 queries: at least 10 times faiss IndexFlatL2", _sketched(_FAISS, 8, 10, 10), False),
    (
        "sketch, 1 query: at least 6 (768) or 25 (4096) times reading the keys",
        _sketched(_READ, 1, 6, 25),
        False,
    ),
    (
        "sketch, 8 queries: at least 3 (768) or 12.5 (4096) times reading",
        _sketched(_READ, 8, 3, 12.5),
        False,
    ),
    (
        "sketch, a million keys of 4096: at least 30 times reading them",
        _sketched(_READ, 1, 30, 30, million=True),
        False,
    ),
    ("sketch where it proves nothing: at most 1.15 of the time without", _worst, True),
    ("sketch: at most 10 % of the keys' bytes", _at_most("sketch, share of the keys", 10), True),
    (
        "fitting a sketch of 100,000 × 4096: at most 60 s",
        _at_most("fit", 60, keys=100_000, width=4096),
        True,
    ),
    ("a decode step of an edited model: no operator of this package", _steps, True),
    ("a lookup in a prefill of 128 tokens, 100,000 entries: at most 2 % of it", _prefill, True),
)


Named = dict[str, Measurement]


def on_a_gpu(measured: Measured, cache: str = "cold") -> list[tuple[Named, Named]]:
    """Return ours and the peers, by name, of every case of `lookup` and `adapt_` on a GPU."""
    every: dict[tuple[object, ...], tuple[Named, Named]] = {}
    for one in measured:
        if one.device != "cpu" and one.part in OPERATORS and one.cache == cache:
            ours, peers = every.setdefault((one.part, one.dtype, case(one)), ({}, {}))
            (ours if one.kind == "ours" else peers)[one.name] = one
    return [(ours, peers) for ours, peers in every.values() if ours]


def best(found: Named) -> Measurement | None:
    """Return the fastest that is right."""
    right = [one for one in found.values() if one.counts]
    return min(right, key=lambda one: one.median or math.inf, default=None)


def families(found: Named) -> Named:
    """Return the peers, of several ways to ask one (`cuBLAS …`) the best."""
    product = {name: one for name, one in found.items() if name.startswith("cuBLAS")}
    fastest = best(product) or next(iter(product.values()), None)
    rest = {name: one for name, one in found.items() if name not in product}
    return rest if fastest is None else {"cuBLAS": fastest, **rest}


def roof(measured: Measured, one: Measurement, how: str = "read") -> float | None:
    """Return the microseconds that a call on a GPU takes at least; None where nothing tells.

    The longer of moving the bytes once, at the rate of a pass that only reads, as a lookup mostly
    does, or of a copy, and of the multiplications, at the rate of a product; all of the same run.
    """
    rates = {(b.name, b.dtype): b.median for b in select(measured, part="ceilings")}
    memory = rates.get((how, ""))
    product = rates.get(("product", "tf32" if one.dtype == "fp32" else "bf16"))
    if not memory or not product:
        return None
    n, d, b, size = one.keys or 0, one.width or 0, one.batch or 0, 4 if one.dtype == "fp32" else 2
    moved = n * d * size + 4 * n + b * d * size + 12 * b
    if one.part == "adapt_":
        moved += 2 * b * d * size
    return max(1e-3 * moved / memory, 2e-6 * b * n * d / product)


def beside_sketches(
    measured: Measured, cache: str = "cold"
) -> list[tuple[Measurement, Measurement]]:
    """Return lookups on a GPU through a sketch, each with the one without."""
    mine = [
        one
        for one in select(measured, part="pruned", cache=cache)
        if one.device != "cpu" and one.counts
    ]
    plain = {(case(one), one.dtype, one.name): one for one in mine}
    pairs = [
        (one, plain.get((case(one), one.dtype, one.name.removesuffix(SKETCH))))
        for one in mine
        if one.name.endswith(SKETCH)
    ]
    return [(one, other) for one, other in pairs if other is not None]


def key_bytes(one: Measurement) -> int:
    """Return what one pass over the keys reads."""
    return (one.keys or 0) * (one.width or 0) * (4 if one.dtype == "fp32" else 2)


def _over(
    wanted: float,
    megabytes: tuple[float, float] = (0, math.inf),
    name: str = "",
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
) -> Callable[[Measured], Found]:
    """Find the time of a peer, or of the best right one, over ours, for some sizes of keys."""

    def find(measured: Measured) -> Found:
        for ours, peers in on_a_gpu(measured):
            mine, peer = best(ours), peers.get(name) if name else best(peers)
            if mine is None or peer is None or peer.median is None or mine.dtype not in dtypes:
                continue
            if megabytes[0] < key_bytes(mine) / 1e6 <= megabytes[1]:
                told = f"{mine.part}, {where(mine)}, {mine.dtype}; {peer.name}"
                yield told, ratio(mine, peer), wanted

    return find


def _roofs(measured: Measured) -> Found:
    for ours, _ in on_a_gpu(measured):
        mine = best(ours)
        least = None if mine is None else roof(measured, mine, "copy")
        if mine and mine.median and least and key_bytes(mine) >= 4e8 and (mine.batch or 0) <= 8:
            yield f"{mine.part}, {where(mine)}, {mine.dtype}", least / mine.median, 0.9


def _with_sketches(worst: bool, wanted: float) -> Callable[[Measured], Found]:
    def find(measured: Measured) -> Found:
        for one, other in beside_sketches(measured):
            if one.data.endswith(" cover") == worst:
                yield f"{one.name}, {where(one)}", 1 / ratio(one, other), wanted

    return find


def _batches(measured: Measured) -> Found:
    for one in select(measured, part="edits", name="GraceEditor.edit"):
        for batch in select(measured, part="edits", name="GraceEditor.edit_batch"):
            if one.counts and batch.counts and case(one) == case(batch):
                yield f"{batch.batch} edits, {batch.data}", ratio(batch, one), 15.0


_NARROW = ("bf16", "fp16")
_GPU_GOALS: tuple[tuple[str, Callable[[Measured], Found], bool], ...] = (
    ("keys up to 20 MB: at least 2 times the best right peer", _over(2.0, (0, 20)), False),
    ("20 to 250 MB: at least 1.2 times", _over(1.2, (20, 250)), False),
    ("beyond: at least 1.05 times", _over(1.05, (250, math.inf)), False),
    ("at least 10 times cdist, 16-bit keys", _over(10.0, name="cdist", dtypes=_NARROW), False),
    ("at least 5 times cdist, float32 keys", _over(5.0, name="cdist", dtypes=("fp32",)), False),
    ("up to 8 queries, 400 MB or more: at least 0.9 of the copy bandwidth", _roofs, False),
    ("sketch: at most 0.5 of the time without", _with_sketches(False, 0.5), True),
    ("edit_batch: at least 15 times the edits per second of edit", _batches, False),
    (
        "sketch in the worst case: at most 1.15 of the time without",
        _with_sketches(True, 1.15),
        True,
    ),
)
