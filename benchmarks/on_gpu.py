"""What the page says of a run on a GPU (or of a rehearsal), by the names that `gpu.py` gives."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import figure, table, times
from .rows import OPERATORS, Row, case, contestants, ratio, select

_CACHES = {
    "cold": "Replays of a graph, cold caches.",
    "warm": "Replays of a graph, warm caches.",
    "eager": "Called from Python, cold caches.",
}


def _mine(rows: Sequence[Row], cache: str) -> list[Row]:
    """Return our timed rows that are not a CPU's."""
    mine = select(rows, kind="ours", cache=cache)
    return [row for row in mine if row.device != "cpu" and row.median is not None]


def _words(row: Row) -> tuple[str, ...]:
    return f"{row.keys:,} × {row.width}", str(row.batch), row.dtype


def beside_peers(rows: Sequence[Row]) -> list[str]:
    """Return the ratios to every peer of each of our backends, by its name, and to the roof."""
    lines = []
    for cache, said in _CACHES.items():
        mine = [row for row in _mine(rows, cache) if row.part in OPERATORS]
        beside = [
            {r.name: r for r in contestants(rows, row, "peer") if r.dtype == row.dtype}
            for row in mine
        ]
        names = list(dict.fromkeys(name for peers in beside for name in peers))
        body = [
            (f"`{row.part}`", *_words(row), _named(row), figure(row.median), _roof(rows, row),
             *(_times(row, peers.get(name)) for name in names))
            for row, peers in zip(mine, beside, strict=True)
        ]  # fmt: skip
        head = ("", "keys, width", "B", "type", "ours", "µs", "of the roof", *names)
        if body:
            lines += [f"{said} Times faster than each peer.", "", *table(head, body), ""]
    return lines[:-1]


def _named(row: Row) -> str:
    return f"{row.name} (wrong)" if row.answers == "wrong" else row.name


def _times(mine: Row, peer: Row | None) -> str:
    if peer is None or peer.median is None:
        return "–"
    told = times(ratio(mine, peer))
    return f"wrong ({told})" if peer.answers == "wrong" else told


def _roof(rows: Sequence[Row], mine: Row) -> str:
    bounds = [b for b in contestants(rows, mine, "bound") if b.dtype == mine.dtype]
    return f"{100 * ratio(mine, bounds[0]):.0f} %" if bounds else "–"


def through_sketches(rows: Sequence[Row]) -> list[str]:
    """Return how many times faster each backend is through a sketch than without one."""
    lines = []
    for cache, said in _CACHES.items():
        mine = [row for row in _mine(rows, cache) if row.part == "pruned"]
        without = {(case(row), row.dtype, row.name): row for row in mine}
        body = []
        for row in mine:
            other = without.get((case(row), row.dtype, row.name.removesuffix(", sketch")))
            if other is not None and other is not row:
                told = (figure(row.median), times(ratio(row, other)))
                body.append((*_words(row), row.data, _named(row), *told))
        made = table(("keys, width", "B", "type", "data", "ours", "µs", "without"), body)
        if made:
            lines += [f"`lookup`. {said} Times faster than without a sketch.", "", *made, ""]
    return lines[:-1]
