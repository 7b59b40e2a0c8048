"""Deleting one of many edits that are all near each other, so that all are decided again.

CPU seconds of one process, all threads together, at the beginning, in the middle and at the end of
the history; and of a replay in the slots, one lookup after the other, as it is done where entries
are at equal distances. What both leave is compared.

    python -m benchmarks.linked_deletes OUT.json [--edits 10000] [--widths 576,1408] [--labels N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from grace_edit.codebook import deletion
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import TieError
from grace_edit.codebook.touched import touched

from .edit_cost import timed


def linked(edits: int, width: int, labels: int) -> Codebook:
    """Return a codebook of edits whose queries are within two radii of each other, mostly."""
    source, chance = torch.Generator().manual_seed(0), random.Random(0)
    book = Codebook(width, 2, radius=0.6 * math.sqrt(2 * width), capacity=2 * edits)
    for _ in range(edits):
        query = torch.randn(width, generator=source)
        book.insert(query, [chance.randrange(labels)], torch.zeros(2))
    return book


def entries(book: Codebook) -> list[Any]:
    """Return owner, radius and members of every entry."""
    return sorted(
        (entry.owner, book.storage.slots.radius(slot), entry.members)
        for slot in range(int(book.count))
        if (entry := book.storage.entry(slot)) is not None
    )


def in_slots(delete: Callable[[], None]) -> None:
    """Delete by a replay, one lookup after the other."""
    with mock.patch.object(deletion, "Part", side_effect=TieError):
        delete()


def measure(edits: int, width: int, labels: int) -> dict[str, Any]:
    """Delete from one codebook, taking back what was deleted."""
    book = linked(edits, width, labels)
    middle = edits // 2
    assert touched(book.storage, middle) is None
    found: dict[str, Any] = {"edits": edits, "width": width, "labels": labels}
    found["entries"] = book.entries
    for name, id in {"first": 0, "middle": middle, "last": edits - 1}.items():
        wall = time.perf_counter()
        found[f"delete_{name}_s"] = timed(lambda i=id: book.delete(i))[0]  # type: ignore[misc]
        found[f"delete_{name}_wall_s"] = time.perf_counter() - wall
        left = entries(book)
        found["undo_s"] = timed(book.undo)[0]
        if name == "middle":
            found["replay_middle_s"] = timed(lambda: in_slots(lambda: book.delete(middle)))[0]
            found["same"] = entries(book) == left
            book.undo()
    return found


def main() -> None:
    """Measure and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--widths", default="576,1408")
    parser.add_argument("--labels", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": 1,
        "load_average_before": os.getloadavg()[0],
    }
    widths = [int(width) for width in arguments.widths.split(",")]
    told["runs"] = [measure(arguments.edits, width, arguments.labels) for width in widths]
    told["load_average_after"] = os.getloadavg()[0]
    arguments.out.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
