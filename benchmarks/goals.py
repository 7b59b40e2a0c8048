"""What was to be reached, as ratios between rows of one run, and whether it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .rows import RIGHT, Row, best_peer, case, contestants, ratio, select

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


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Return all goals; one that was not measured has a total of 0."""
    return [_judged(text, list(find(rows)), most) for text, find, most in _GOALS]


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
    rows: Sequence[Row], part: str, *, cache: str = "warm", dtype: str | None = None
) -> list[tuple[Row, Row]]:
    """Return for every case of an operator the fastest of ours and of the right peers.

    Args:
        rows: of one run.
        part: `nearest`, `lookup` or `adapt_`; the peers stand in `nearest`.
        cache: warm or cold.
        dtype: of the keys, ours and the peers'; None: each in its best.
    """
    mine: dict[tuple[object, ...], Row] = {}
    for row in select(rows, part=part, kind="ours", cache=cache):
        if row.answers not in RIGHT or dtype not in (None, row.dtype):
            continue
        if case(row) not in mine or ratio(row, mine[case(row)]) > 1:
            mine[case(row)] = row
    pairs = [(row, best_peer(rows, row, part="nearest", dtype=dtype)) for row in mine.values()]
    return [(row, peer) for row, peer in pairs if peer is not None]


def where(row: Row) -> str:
    """Return the case of a row in words."""
    what = [f"{row.keys:,} × {row.width}", f"B = {row.batch}", row.data]
    if row.part == "pruned" and row.radius is not None:
        what.append(f"ε = {row.radius:g}")
    return ", ".join(what)


def _brute(batch: int, wanted: float, dtype: str | None = None) -> Callable[[Sequence[Row]], Found]:
    def find(rows: Sequence[Row]) -> Found:
        for part in ("nearest", "lookup"):
            for mine, peer in ours_and_best(rows, part, dtype=dtype):
                if mine.batch == batch and mine.keys in (10_000, 100_000) and mine.device == "cpu":
                    told = f"{part}, {where(mine)}, {mine.dtype} keys; {peer.name} {peer.dtype}"
                    yield told, ratio(mine, peer), wanted

    return find


def shares(rows: Sequence[Row], part: str = "nearest") -> list[tuple[Row, float]]:
    """Return the share of the speed of merely reading the keys, with cold caches, one query."""
    found = []
    for row in select(rows, part=part, kind="ours", cache="cold", batch=1, device="cpu"):
        bounds = [b for b in contestants(rows, row, "bound", "nearest") if b.dtype == row.dtype]
        if bounds:
            found.append((row, ratio(row, bounds[0])))
    return found


def _bandwidth(rows: Sequence[Row]) -> Found:
    for row, share in shares(rows):
        if (row.keys or 0) >= 100_000:
            yield f"{where(row)}, {row.dtype} keys", share, 0.8


def pruned(rows: Sequence[Row], name: str, million: bool = False) -> list[tuple[Row, Row]]:
    """Return lookups through a sketch and the row of that name beside each."""
    found = []
    for row in select(rows, part="pruned", name="lookup, sketch", data="activations"):
        beside = [r for r in rows if r.part == "pruned" and case(r) == case(row) and r.name == name]
        if row.counts and beside and beside[0].counts and (row.keys == 1_000_000) == million:
            found.append((row, beside[0]))
    return found


def _faiss(batch: int, wanted: float) -> Callable[[Sequence[Row]], Found]:
    def find(rows: Sequence[Row]) -> Found:
        for row, other in pruned(rows, "faiss IndexFlatL2"):
            if row.batch == batch and row.keys == 100_000:
                yield where(row), ratio(row, other), wanted

    return find


def _read(batch: int) -> Callable[[Sequence[Row]], Found]:
    def find(rows: Sequence[Row]) -> Found:
        for row, other in pruned(rows, "read the keys"):
            if row.batch == batch and row.keys == 100_000:
                wanted = 6.0 if (row.width or 0) < 4096 else 25.0
                yield where(row), ratio(row, other), wanted if batch == 1 else wanted / 2

    return find


def _million(rows: Sequence[Row]) -> Found:
    for row, other in pruned(rows, "read the keys", million=True):
        yield where(row), ratio(row, other), 30.0


def worst_cases(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Return the time with a sketch over that without, where nothing can be pruned."""
    found = []
    for row in select(rows, part="pruned", name="lookup, sketch"):
        for other in select(rows, part="pruned", name="lookup"):
            if case(other) == case(row) and row.data.endswith((" cover", " short")):
                found.append((row, ratio(other, row)))
    return found


def _worst(rows: Sequence[Row]) -> Found:
    for row, times in worst_cases(rows):
        yield where(row), times, 1.15


def _share_of_keys(rows: Sequence[Row]) -> Found:
    for row in select(rows, part="pruned", name="sketch, share of the keys"):
        if row.median is not None and (row.width or 0) >= 768:
            yield f"{row.keys:,} × {row.width}", row.median, 10.0


def _fit(rows: Sequence[Row]) -> Found:
    for row in select(rows, part="pruned", name="fit", keys=100_000, width=4096):
        if row.median is not None:
            yield f"{row.keys:,} × {row.width}", row.median, 60.0


def lookup_shares(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Return the lookups timed inside prefills, each with its share of an unedited prefill."""
    found = []
    for row in select(rows, part="model", unit="ms"):
        prefill = row.data.removeprefix("lookup in a ")
        whole = select(rows, part="model", data=prefill, keys=row.keys, name="unedited")
        if prefill != row.data and whole:
            found.append((row, 1 / ratio(row, whole[0])))
    return found


def _prefill(rows: Sequence[Row]) -> Found:
    for row, share in lookup_shares(rows):
        if row.keys == 100_000 and row.name in ("edited", "edited, a hit"):
            yield f"{row.name}, {row.keys:,} entries", 100 * share, 2.0


def _steps(rows: Sequence[Row]) -> Found:
    for row in select(rows, part="model", unit="grace operators", kind="ours"):
        if row.median is not None:
            yield f"{row.name}, {row.keys:,} entries", row.median, 0.0


_GOALS: tuple[tuple[str, Callable[[Sequence[Row]], Found], bool], ...] = (
    ("brute force, 1 query: at least 2 times the best right peer", _brute(1, 2.0), False),
    ("brute force, 8 queries: at least 3 times", _brute(8, 3.0), False),
    ("brute force, 64 queries: at least once", _brute(64, 1.0), False),
    ("1 query, all with float32 keys: at least 2 times", _brute(1, 2.0, "fp32"), False),
    ("8 queries, all with float32 keys: at least 3 times", _brute(8, 3.0, "fp32"), False),
    ("64 queries, all with float32 keys: at least once", _brute(64, 1.0, "fp32"), False),
    ("1 query, cold, 100,000 keys: at least 0.8 of the speed of reading", _bandwidth, False),
    ("sketch, 1 query: at least 20 times faiss IndexFlatL2", _faiss(1, 20.0), False),
    ("sketch, 8 queries: at least 10 times faiss IndexFlatL2", _faiss(8, 10.0), False),
    ("sketch, 1 query: at least 6 (768) or 25 (4096) times reading the keys", _read(1), False),
    ("sketch, 8 queries: at least 3 (768) or 12.5 (4096) times reading", _read(8), False),
    ("sketch, a million keys of 4096: at least 30 times reading them", _million, False),
    ("sketch where it proves nothing: at most 1.15 of the time without", _worst, True),
    ("sketch: at most 10 % of the keys' bytes", _share_of_keys, True),
    ("fitting a sketch of 100,000 × 4096: at most 60 s", _fit, True),
    ("a decode step of an edited model: no operator of this package", _steps, True),
    ("a lookup in a prefill of 128 tokens, 100,000 entries: at most 2 % of it", _prefill, True),
)
