"""Which entry answers a prompt, and how near it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..adaptor.adaptor import check_fits
from ..families import Family, target_of


@dataclass(frozen=True)
class Explanation:
    """What the codebook says to one prompt.

    Args:
        hit: an entry answers.
        edit_id: the edit that made the nearest entry, None in an empty codebook.
        slot: its slot, −1 in an empty codebook.
        distance: from the prompt's query to its key (+inf in an empty codebook).
        radius: its deferral radius (NaN in an empty codebook).
        label: its label as text.
        runner_up: the second nearest entry as `{"edit_id", "slot", "distance", "radius", "label"}`,
            None if there is none.
    """

    hit: bool
    edit_id: int | None
    slot: int
    distance: float
    radius: float
    label: str
    runner_up: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def explain(family: Family, prompt: list[int]) -> Explanation:
    """Say what the codebook of the attached model says to a prompt."""
    book = family.adaptor.codebook
    seen = family.capture([prompt])
    check_fits(book, seen.queries, seen.outputs)
    with book.lock:  # all of it says the same of the same entries
        found = [_entry(family, slot, d) for slot, d in book.nearest_two(seen.queries[0])]
        if not found:
            return Explanation(False, None, -1, float("inf"), float("nan"), "", None)
        hit = int(book.lookup(seen.queries)[0]) >= 0
    return Explanation(hit, **found[0], runner_up=found[1] if len(found) > 1 else None)


def _entry(family: Family, slot: int, distance: float) -> dict[str, Any]:
    book = family.adaptor.codebook
    edit = book.edit_of_slot(slot)
    return {
        "edit_id": edit.id,
        "slot": slot,
        "distance": distance,
        "radius": float(book.radii[slot]),
        "label": family.show(target_of(edit.label)),
    }
