"""Deciding what an edit would do to a codebook; nothing changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grace_kernels import nearest

from . import policy as rules
from .records import Decision, Label, Proposal
from .settings import Settings
from .storage import Storage


def propose(
    storage: Storage,
    query: Tensor,
    label: Sequence[int] | Tensor,
    prompt: Sequence[int] | None,
    own_entry: bool,
    radius: float | None = None,
    part_of: int | None = None,
    negatives: Sequence[Sequence[int]] = (),
) -> Proposal:
    """Propose an edit; see `Codebook.propose`."""
    return decide(
        storage,
        check_query(query, storage.slots.keys),
        check_ids("label", label),
        None if prompt is None else check_ids("prompt", prompt),
        own_entry,
        radius,
        part_of,
        tuple(check_ids("negatives", negative) for negative in negatives),
    )


def decide(
    storage: Storage,
    query: Tensor,
    label: Label,
    prompt: Label | None,
    own_entry: bool,
    radius: float | None = None,
    part_of: int | None = None,
    negatives: tuple[Label, ...] = (),
) -> Proposal:
    """Propose an edit whose query, label, prompt and negatives are known to be right."""
    settings = storage.settings
    given = radius
    new_radius = settings.radius if given is None else given

    replaced: set[int] = set()  # edits, without their parts
    if not settings.paper:
        earlier = storage.earlier_edit(prompt, query)
        if earlier is not None:
            replaced.add(storage.edit(earlier).whole)
            query = storage.query_of(storage.edit(earlier))

    slot, distance = storage.nearest(query)
    going: list[int] = []
    if distance > 0.0 and replaced and (going := storage.owned_slots(replaced)):
        # The entries of what is superseded go with it, unless the edit takes one over.
        slot, distance = storage.nearest(query, going)
    entry = storage.entry(slot)
    radius = None if entry is None else storage.slots.radius(slot)
    same = entry is not None and settings.label_key(entry.label) == settings.label_key(label)
    if settings.paper:
        decision = rules.decide_paper(distance, radius, same, radius=new_radius)
    else:
        if entry is not None and distance == 0.0:
            replaced.add(storage.edit(entry.owner).whole)
            query = storage.query_of(storage.edit(entry.owner))
        if settings.nearest:
            decision = rules.decide_nearest(
                distance, radius, same, radius=new_radius, drift=settings.drift
            )
        else:
            limit = None if entry is None else storage.edit(entry.owner).radius
            decision = rules.decide(
                distance,
                radius,
                same,
                radius=new_radius,
                drift=settings.drift,
                max_radius=settings.max_radius if limit is None else limit,
            )
        if own_entry or (given is not None and not settings.nearest):
            away = storage.distance_to_other_label(query, label, going)
            decision = _decide_own(settings, decision, distance, away, radius, given)

    members: tuple[int, ...] = ()
    if entry is not None and decision.new_radius is None:
        if decision.case == "update" and not same:
            replaced.update(storage.edit(m).whole for m in entry.members)
        members = tuple(m for m in entry.members if storage.edit(m).whole not in replaced)
    return Proposal(
        query=storage.own_copy(query),
        label=label,
        prompt=prompt,
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
        radius=given,
        part_of=part_of,
        negatives=negatives,
    )


def check_part(storage: Storage, proposal: Proposal) -> None:
    """Raise ValueError unless a proposal is that of a further key of the edit made last."""
    assert proposal.part_of is not None
    if storage.settings.paper:
        raise ValueError("part_of must be None with the policy paper, whose edits have one key")
    group = storage.group(proposal.part_of)
    whole = group[0]
    if not whole.live or whole.id + len(group) != storage.next_id:
        raise ValueError(f"part_of must be the edit made last, got {proposal.part_of}")
    if proposal.label != whole.label:
        raise ValueError(f"label must be that of edit {whole.id}, {whole.label}")
    if proposal.prompt is not None and proposal.prompt in [edit.prompt for edit in group]:
        raise ValueError(f"prompt must differ from those of edit {whole.id}, got one of them")
    queries = torch.stack([storage.query_of(edit).cpu() for edit in group])
    if nearest(proposal.query.cpu()[None], queries, torch.zeros(len(group)))[1].item() == 0.0:
        raise ValueError(f"query must differ from those of edit {whole.id}, got one of them")


def _decide_own(
    settings: Settings,
    decision: Decision,
    distance: float,
    away: float,
    neighbour_radius: float | None,
    given: float | None,
) -> Decision:
    """Turn a decision into one that gives the edit an entry of its own."""
    if distance == 0.0:
        kept = decision.neighbour_radius
        if given is not None and kept is not None:
            kept = min(kept, given)
        return replace(decision, case="update", neighbour_radius=kept)
    if decision.case == "split" or settings.nearest:
        return decision
    radius = rules.own_radius(away, radius=settings.radius if given is None else given)
    return Decision("add", neighbour_radius, radius, fragile=radius < settings.drift)


def check_radius(radius: float | None) -> float | None:
    """Return a radius for a new entry as fp32, or raise by the name of `radius`."""
    if radius is None:
        return None
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and not negative, got {radius}")
    return rules.fp32(radius)


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
