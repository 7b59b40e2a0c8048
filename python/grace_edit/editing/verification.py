"""Running stored prompts again: do the edits still fire, are the targets still produced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import grace_kernels

from ..adaptor.precision import check_fits
from ..codebook.codebook import Codebook
from ..codebook.records import Edit
from ..families import Family, target_of
from ..families.base import in_pieces
from ..progress import bar


@dataclass(frozen=True)
class Misfire:
    """An edit that does not answer its own prompt, or a paraphrase, in some execution mode.

    Args:
        edit_id: the edit.
        mode: `"alone"`, `"batched"` (with other edits' prompts) or `"padded"` (beside a longer
            one).
        distance: from its query, run that way, to the key of the entry that should answer.
        radius: of that entry.
    """

    edit_id: int
    mode: str
    distance: float
    radius: float


def find_misfires(family: Family, edits: Sequence[Edit], progress: bool) -> list[Misfire]:
    """Return the edits that miss, per mode; every edit must have a stored prompt."""
    if family.adaptor.text is not None:
        return _unanswered(family, edits)
    missing, book = [], family.adaptor.codebook
    pieces = [edits[piece] for piece in in_pieces([len(e.prompt or ()) for e in edits])]
    for piece in bar(pieces, "verifying", progress):
        for mode, seen in _in_modes(family, [list(e.prompt or ()) for e in piece]):
            queries = seen.to(book.keys.dtype)  # under autocast another one
            ask = lambda q=queries: book.lookup(q)[0]  # noqa: E731
            missing += _misses(book, piece, mode, queries, ask)
    return missing


def _unanswered(family: Family, edits: Sequence[Edit]) -> list[Misfire]:
    """Return the edits that miss under `query="text"`: alone, as in any batch and padding."""
    if not edits:
        return []
    adaptor = family.adaptor
    prompts = [list(edit.prompt or ()) for edit in edits]
    check_fits(adaptor.codebook, None, family.capture(prompts[:1]).outputs)
    return _misses(
        adaptor.codebook,
        edits,
        "alone",
        family.queries(prompts),
        lambda: adaptor.answer(prompts, served=False).index,
    )


def find_unproven(family: Family, edits: Sequence[Edit], progress: bool) -> list[int]:
    """Return the ids of the edits whose target the model, as it serves, does not produce."""
    unproven = {
        edit.whole
        for edit in bar(edits, "proving", progress)
        if not family.produces([list(edit.prompt or ())], [target_of(edit.label)], None)[0]
    }
    return sorted(unproven)


def _in_modes(family: Family, prompts: list[list[int]]) -> Iterator[tuple[str, Tensor]]:
    alone = [family.capture([ids]) for ids in prompts]
    check_fits(family.adaptor.codebook, alone[0].queries, alone[0].outputs)
    yield "alone", torch.cat([seen.queries for seen in alone])
    yield "batched", family.capture(prompts).queries
    # Prompts of one length would not be padded by each other: a longer one comes along.
    longest = max(prompts, key=len)
    filler = (longest * 2 + longest[:1] * 8)[: min(len(longest) + 8, family.longest)]
    padded = family.capture([*prompts, filler], left=family.pads_left)
    yield "padded", padded.queries[: len(prompts)]


def _misses(
    book: Codebook,
    edits: Sequence[Edit],
    mode: str,
    queries: Tensor,
    ask: Callable[[], Tensor],
) -> list[Misfire]:
    with book.lock:  # other threads may edit in the meantime
        answered = ask().tolist()
        found = []
        for asked, slot, query in zip(edits, answered, queries, strict=True):
            edit = _now(book, asked.id)
            if edit is None:
                continue
            if slot >= 0 and (
                edit.whole in book.members(slot) or book.edit_of_slot(slot).label == edit.label
            ):
                continue
            own = slice(edit.slot, edit.slot + 1)
            _, distance = grace_kernels.nearest(query[None], book.keys[own], book.radii[own])
            found.append(Misfire(edit.whole, mode, float(distance), float(book.radii[edit.slot])))
    return found


def _now(book: Codebook, id: int) -> Edit | None:
    try:
        edit = book.edit(id)
    except KeyError:
        return None
    return edit if edit.live else None
