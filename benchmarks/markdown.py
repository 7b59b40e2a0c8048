"""Tables of Markdown and how figures stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], body: Iterable[Sequence[str]], said: str = "") -> list[str]:
    """Return a table of Markdown, with what is said above it, nothing without a row."""
    rows = [f"| {' | '.join(cells)} |" for cells in body]
    if not rows:
        return []
    above = [said, ""] if said else []
    return [*above, f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]


def figure(value: float | None) -> str:
    """Return a time with three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(value: float | None) -> str:
    """Return a ratio with one decimal, or two below 1."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 99.5 else f"{value:,.0f}"
