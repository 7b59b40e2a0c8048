"""What the commands and the demo show a person: tables, figures, a bar. Needs rich."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


def plain(text: Any) -> str:
    """Return text for one table cell: what would move the cursor or colour it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def number(value: float | None) -> str:
    """Return a figure with four digits; a dash for what is absent or not finite."""
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "–"


def screen(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that shows text as it is, markup included."""
    stream = sys.stderr if stderr else sys.stdout
    fixed = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=stream, width=fixed, markup=False, emoji=False, highlight=False)


def facts(rows: dict[str, Any]) -> Table:
    """Return a table of names and what they are, without lines."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, plain(value))
    return table


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table of `columns` with a cell per column in every row, shown as it is."""
    made = Table(*columns)
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
    return made


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr inside a `with` block; nothing at all where that is no terminal.

    Args:
        what: is going on.
        total: steps to go; None: not known.

    Yields:
        A function to call after each step.
    """
    console = screen(stderr=True)
    if not (sys.stderr.isatty() and console.is_interactive):
        yield lambda: None
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn()]
    if total is not None:
        columns += [MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
