"""Deciding what an edit would do to a codebook; nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import policy as rules
from .records import Decision, Label, Proposal
from .storage import digest

if TYPE_CHECKING:
    from .codebook import Codebook


def propose(
    book: Codebook,
    query: Tensor,
    label: Sequence[int] | Tensor,
    prompt: Sequence[int] | None,
    own_entry: bool,
) -> Proposal:
    """Propose an edit; see `Codebook.propose`."""
    query = check_query(book, query)
    ids = check_ids("label", label)
    prompt_ids = None if prompt is None else check_ids("prompt", prompt)
    paper = book.policy == rules.PAPER

    replaced: set[int] = set()
    if not paper:
        earlier = None if prompt_ids is None else book._by_prompt.get(prompt_ids)
        if earlier is None:
            earlier = book._by_query.get(digest(query))
        if earlier is not None:
            replaced.add(earlier)
            query = book._stored_query(book._edit(earlier))

    slot, distance = book._nearest(query)
    entry = book._entry(slot)
    radius = None if entry is None else book.radii[slot].item()
    same = entry is not None and book._label_key(entry.label) == book._label_key(ids)
    if paper:
        decision = rules.decide_paper(distance, radius, same, radius=book.radius)
    else:
        if entry is not None and distance == 0.0:
            replaced.add(entry.owner)
            query = book._stored_query(book._edit(entry.owner))
        decision = rules.decide(
            distance,
            radius,
            same,
            radius=book.radius,
            drift=book.drift,
            max_radius=book.max_radius,
        )
        if own_entry:
            decision = _decide_own(book, decision, query, ids, distance, radius)

    members: tuple[int, ...] = ()
    if entry is not None and decision.new_radius is None:
        if decision.case == "update" and not same:
            replaced.update(entry.members)
        members = tuple(m for m in entry.members if m not in replaced)
    return Proposal(
        query=query.detach().clone(),
        label=ids,
        prompt=prompt_ids,
        case=decision.case,
        slot=-1 if decision.new_radius is not None else slot,
        neighbour=slot,
        distance=distance,
        radius_before=radius,
        radius_after=decision.neighbour_radius,
        new_radius=decision.new_radius,
        members=members,
        supersedes=tuple(sorted(replaced)),
        fragile=decision.fragile,
        own_entry=own_entry,
        version=book.version,
    )


def _decide_own(
    book: Codebook,
    decision: Decision,
    query: Tensor,
    label: Label,
    distance: float,
    neighbour_radius: float | None,
) -> Decision:
    """Turn a decision into one that gives the edit an entry of its own."""
    if decision.case == "split":
        return decision
    if distance == 0.0:
        return replace(decision, case="update")
    radius = book._own_radius(query, label)
    return Decision("add", neighbour_radius, radius, fragile=radius < book.drift)


def check_query(book: Codebook, query: Tensor) -> Tensor:
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {type(query).__name__}")
    dim = book.keys.shape[1]
    if query.shape != (dim,):
        raise ValueError(f"query must have shape [{dim}], got {list(query.shape)}")
    if query.dtype != book.keys.dtype:
        raise ValueError(f"query must have the keys' dtype {book.keys.dtype}, got {query.dtype}")
    if not torch.isfinite(query).all():
        raise ValueError("query must be finite, got NaN or infinity")
    return query.detach()


def check_value(book: Codebook, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"value must be a tensor, got {type(value).__name__}")
    dim = book.values.shape[1]
    if value.shape != (dim,):
        raise ValueError(f"value must have shape [{dim}], got {list(value.shape)}")
    value = value.detach().to(book.values.dtype)
    if not torch.isfinite(value).all():
        raise ValueError(f"value must be finite in {value.dtype}, got NaN or infinity")
    return value


def check_ids(name: str, ids: Sequence[int] | Tensor) -> Label:
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    checked = tuple(int(i) for i in ids)
    if not checked:
        raise ValueError(f"{name} must hold at least one id, got none")
    if any(i != j for i, j in zip(checked, ids, strict=True)):
        raise ValueError(f"{name} must hold whole numbers, got {list(ids)}")
    return checked
