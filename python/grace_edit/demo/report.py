"""What part 2 of the demo prints and writes: tables, sentences, a file of every answer."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..terminal import number, table
from .corrections import NEAR, WORDINGS

WIDEST = 44
"""Characters of an answer in a table."""
NAMES = {
    "cloze": "begun in other words",
    "question": "as a question",
    "chat": "as a question in the chat template",
    "neighbour": "the same question about another subject",
    "same subject": "another question about the same subject",
}


def tables(figures: dict[str, Any], shown: int) -> Iterator[Table]:
    """Return a table with a line per error, and one of everything asked around the first few."""
    rows = figures["rows"]
    yield table(
        ("edited prompt", "before", "after", "right in other words", "left alone"),
        (_error(edit, rows) for edit in rows if edit["role"] == "edit"),
    )
    yield table(
        ("asked", "prompt", "before", "after", ""),
        (
            (
                NAMES[row["role"]],
                row["prompt"],
                _short(row["before"]),
                "as before" if row["unchanged"] else _short(row["after"]),
                _verdict(row),
            )
            for row in rows
            if row["role"] != "edit" and row["fact"] <= shown
        ),
    )


def _error(edit: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    around = [row for row in rows if row["fact"] == edit["fact"]]
    wordings = [row for row in around if row["role"] in WORDINGS]
    others = [row for row in around if row["role"] in NEAR]
    return (
        edit["prompt"],
        _short(edit["before"]),
        _short(edit["after"]),
        f"{sum(row['right_before'] for row in wordings)} → "
        f"{sum(row['right_after'] for row in wordings)} of {len(wordings)}",
        f"{sum(row['unchanged'] for row in others)} of {len(others)}",
    )


def _short(answer: str) -> str:
    line = answer.split("\n", 1)[0].strip() or "(nothing)"
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"


def _verdict(row: dict[str, Any]) -> str:
    far = f"{number(row['distance'] / row['radius'])} radii"
    if row["role"] in NEAR:
        return f"answered by an edit, {far}" if row["fired"] else f"left alone, {far}"
    right = "right" if row["right_after"] else "not right"
    return f"{right}, {far}"


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """Say in a few sentences how it went."""
    counts, errors = figures["counts"], figures["errors"]
    edit = counts["edit"]
    seconds = number(figures["seconds_per_edit"])
    yield (
        f"{figures['accepted']} of {errors} edits accepted, {seconds} s each; asked as edited: "
        f"{edit['right_before']} right before, {edit['right_after']} after"
    )
    wordings = (
        f"{NAMES[role]} {counts[role]['right_before']} → {counts[role]['right_after']} of "
        f"{counts[role]['prompts']}"
        for role in WORDINGS
    )
    yield f"right in other words, written before any was tried: {'; '.join(wordings)}"
    for role in NEAR:
        one = counts[role]
        yield (
            f"{NAMES[role]}: {one['unchanged']} of {one['prompts']} answered as before, "
            f"{one['fired']} answered by an edit"
        )
    yield f"all edits undone: {figures['undone']} of {errors} answered as before the first"


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a line for every prompt: answers before and after, and how near an edit is."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
