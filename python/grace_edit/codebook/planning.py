"""Deciding what an edit would do to a codebook; nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import policy as rules
from .records import Decision, Label, Proposal
from .storage import Storage


def propose(
    storage: Storage,
    query: Tensor,
    label: Sequence[int] | Tensor,
    prompt: Sequence[int] | None,
    own_entry: bool,
) -> Proposal:
    """Propose an edit; see `Codebook.propose`."""
    settings, slots = storage.settings, storage.slots
    query = check_query(query, slots.keys)
    ids = check_ids("label", label)
    prompt_ids = None if prompt is None else check_ids("prompt", prompt)

    replaced: set[int] = set()
    if not settings.paper:
        earlier = storage.earlier_edit(prompt_ids, query)
        if earlier is not None:
            replaced.add(earlier)
            query = storage.query_of(storage.edit(earlier))

    slot, distance = slots.nearest(query)
    entry = storage.entry(slot)
    radius = None if entry is None else slots.radii[slot].item()
    same = entry is not None and settings.label_key(entry.label) == settings.label_key(ids)
    if settings.paper:
        decision = rules.decide_paper(distance, radius, same, radius=settings.radius)
    else:
        if entry is not None and distance == 0.0:
            replaced.add(entry.owner)
            query = storage.query_of(storage.edit(entry.owner))
        if settings.nearest:
            decision = rules.decide_nearest(
                distance, radius, same, radius=settings.radius, drift=settings.drift
            )
        else:
            decision = rules.decide(
                distance,
                radius,
                same,
                radius=settings.radius,
                drift=settings.drift,
                max_radius=settings.max_radius,
            )
        if own_entry:
            decision = _decide_own(storage, decision, query, ids, distance, radius)

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
        version=storage.version,
    )


def _decide_own(
    storage: Storage,
    decision: Decision,
    query: Tensor,
    label: Label,
    distance: float,
    neighbour_radius: float | None,
) -> Decision:
    """Turn a decision into one that gives the edit an entry of its own."""
    if decision.case == "split" or (storage.settings.nearest and decision.case == "add"):
        return decision
    if distance == 0.0:
        return replace(decision, case="update")
    away = storage.distance_to_other_label(query, label)
    radius = rules.own_radius(away, radius=storage.settings.radius)
    return Decision("add", neighbour_radius, radius, fragile=radius < storage.settings.drift)


def check_query(query: Tensor, keys: Tensor) -> Tensor:
    """Return a query that can be looked up among `keys`, or raise by the name of `query`."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {type(query).__name__}")
    dim = keys.shape[1]
    if query.shape != (dim,):
        raise ValueError(f"query must have shape [{dim}], got {list(query.shape)}")
    if query.dtype != keys.dtype:
        raise ValueError(f"query must have the keys' dtype {keys.dtype}, got {query.dtype}")
    if not torch.isfinite(query).all():
        raise ValueError("query must be finite, got NaN or infinity")
    return query.detach()


def check_value(value: Tensor, values: Tensor) -> Tensor:
    """Return a value as it is stored among `values`, or raise by the name of `value`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"value must be a tensor, got {type(value).__name__}")
    dim = values.shape[1]
    if value.shape != (dim,):
        raise ValueError(f"value must have shape [{dim}], got {list(value.shape)}")
    value = value.detach().to(values.dtype)
    if not torch.isfinite(value).all():
        raise ValueError(f"value must be finite in {value.dtype}, got NaN or infinity")
    return value


def check_ids(name: str, ids: Sequence[int] | Tensor) -> Label:
    """Return ids as plain numbers, or raise by `name`."""
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    checked = tuple(int(i) for i in ids)
    if not checked:
        raise ValueError(f"{name} must hold at least one id, got none")
    if any(i != j for i, j in zip(checked, ids, strict=True)):
        raise ValueError(f"{name} must hold whole numbers, got {list(ids)}")
    return checked
