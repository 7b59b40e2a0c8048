"""Which entry answers a prompt, and how near it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..adaptor.precision import check_fits
from ..adaptor.text_queries import TextQueries
from ..families import Family, target_of


@dataclass(frozen=True)
class TextReason:
    """Why a prompt is near an edit's prompt or far from it.

    Args:
        span: the piece of the prompt that came nearest, or the first where there is no entry.
        subject: its words that name the subject.
        edit_span: the piece of the nearest edit's prompt; None where there is none or no entry.
        meaning, lexical: the two terms of the square of their distance: what is asked, and of whom.
        decides: the larger term's name, which keeps the prompts apart; None at distance 0.
        shared, unshared: words that name the subject in both, and in one of them alone.
    """

    span: str
    subject: list[str]
    edit_span: str | None = None
    meaning: float | None = None
    lexical: float | None = None
    decides: str | None = None
    shared: list[str] | None = None
    unshared: list[str] | None = None


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
        runner_up: the second nearest entry as `{"edit_id", "slot", "distance", "radius", "label",
            "key"}`, None if there is none.
        key: which prompt of the edit the entry is for: 0 its own, n the one that
            `codebook.parts(edit_id)[n - 1]` holds, a paraphrase.
        text: under `query="text"`, why the nearest entry is near or far; else None.
    """

    hit: bool
    edit_id: int | None
    slot: int
    distance: float
    radius: float
    label: str
    runner_up: dict[str, Any] | None
    text: TextReason | None = None
    key: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def explain(family: Family, prompt: list[int]) -> Explanation:
    """Say what the codebook of the attached model says to a prompt."""
    book = family.adaptor.codebook
    if family.adaptor.text is not None:
        return _explain_text(family, family.adaptor.text, prompt)
    seen = family.capture([prompt])
    check_fits(book, seen.queries, seen.outputs)
    queries = seen.queries.to(book.keys.dtype)  # under autocast another one
    with book.lock:  # all of it says the same of the same entries
        found = [_entry(family, slot, d) for slot, d in book.nearest_two(queries[0])]
        if not found:
            return Explanation(False, None, -1, float("inf"), float("nan"), "", None)
        hit = int(book.lookup(queries)[0]) >= 0
    return Explanation(hit, **found[0], runner_up=found[1] if len(found) > 1 else None)


def _explain_text(family: Family, text: TextQueries, prompt: list[int]) -> Explanation:
    book = family.adaptor.codebook
    rows = text.rows(prompt)  # an encoder is slow, and lookups wait for the lock
    with book.lock:
        hit = int(family.adaptor.answer([prompt], served=False).index) >= 0
        # Of equally near rows the first comes first, as in serving.
        near = [(d, s) for row in rows for s, d in book.nearest_two(row)]
        slots = list(dict.fromkeys(slot for _, slot in sorted(near, key=lambda pair: pair[0])))
        nearest = {slot: min(d for d, s in near if s == slot) for slot in slots}
        found = [_entry(family, slot, nearest[slot]) for slot in slots[:2]]
        other = book.edit_of_slot(found[0]["slot"]).prompt if found else None
    if not found:
        first = text.keys.read(text.text(prompt))[0]
        reason = TextReason(first.span, first.subject_words)
        return Explanation(False, None, -1, float("inf"), float("nan"), "", None, reason)
    reason = _reason(text, prompt, other)
    return Explanation(hit, **found[0], runner_up=found[1] if len(found) > 1 else None, text=reason)


def _reason(text: TextQueries, prompt: list[int], other: Sequence[int] | None) -> TextReason:
    if other is None:
        first = text.keys.read(text.text(prompt))[0]
        return TextReason(first.span, first.subject_words)
    compared = text.keys.compare(text.text(prompt), text.text(other))
    decides = None
    if compared.meaning or compared.lexical:
        decides = "meaning" if compared.meaning > compared.lexical else "lexical"
    return TextReason(
        compared.mine.span,
        compared.mine.subject_words,
        compared.other.span,
        compared.meaning,
        compared.lexical,
        decides,
        compared.shared,
        compared.unshared,
    )


def _entry(family: Family, slot: int, distance: float) -> dict[str, Any]:
    book = family.adaptor.codebook
    edit = book.edit_of_slot(slot)
    return {
        "edit_id": edit.whole,
        "slot": slot,
        "distance": distance,
        "radius": float(book.radii[slot]),
        "label": family.show(target_of(edit.label)),
        "key": edit.id - edit.whole,
    }
