"""Two codebooks of one model: what tells them apart, and the edits of one made in the other.

No model is needed: stored queries, labels and values decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from grace_kernels import nearest

from . import planning
from .codebook import Codebook
from .records import Edit, EditResult, Label, Proposal
from .storage import Storage
from .tensors import digest, same_bits

Prefer = Literal["first", "last", "error"]
PREFERENCES = ("first", "last", "error")

_FIGURES = ("loss_start", "loss_end", "steps", "probability", "proven")


@dataclass(frozen=True)
class Conflict:
    """Live edits of two codebooks that ask the same, by prompt or by key, for other targets.

    Args:
        first: of the codebook that was merged into, or one that had come from the other before.
        second: of the other codebook.
    """

    first: Edit
    second: Edit


class MergeConflict(ValueError):
    """The codebooks contradict each other, and nobody said which is to win; nothing changed."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        super().__init__(
            f"the codebooks must not contradict each other, got {len(conflicts)} conflicts"
        )
        self.conflicts = conflicts


@dataclass
class Merged:
    """What became of the live edits of the other codebook, each by its id there.

    Args:
        ids: those they have now; several where a key was answered by an edit here at first, and
            that edit was then superseded.
        same: those that were there already, with the ids of the edits that have their prompts, or
            keys, and their target.
        conflicts: those that contradicted; who won is what was asked for.
    """

    ids: dict[int, tuple[int, ...]] = field(default_factory=dict)
    same: dict[int, tuple[int, ...]] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """How the live edits of two codebooks differ.

    Args:
        only_first, only_second: those whose prompt (key, where a prompt is not known) the other
            has no edit of.
        differ: pairs of edits of one prompt that differ, with in what: `"target"`, `"value"` (to
            the bit), `"prompts"` (paraphrases) or `"negatives"`.
        same: how many pairs do not.
    """

    only_first: list[Edit]
    only_second: list[Edit]
    differ: list[tuple[Edit, Edit, tuple[str, ...]]]
    same: int


def diff(first: Codebook, second: Codebook) -> Difference:
    """Compare the live edits of two codebooks, each by its own prompt."""
    a, b = first.storage, second.storage
    prompts: dict[Label, Edit] = {}
    keys: dict[bytes, Edit] = {}
    for edit in _live(a):
        if edit.prompt is not None:
            prompts.setdefault(edit.prompt, edit)
        keys.setdefault(digest(a.query_of(edit)), edit)
    met: set[int] = set()
    only: list[Edit] = []
    differ: list[tuple[Edit, Edit, tuple[str, ...]]] = []
    same = 0
    for edit in _live(b):
        found = None if edit.prompt is None else prompts.get(edit.prompt)
        if found is None:
            found = keys.get(digest(b.query_of(edit)))
            # One query may stand for two prompts only where one of them is not known.
            if found is not None and None not in (found.prompt, edit.prompt):
                found = None
        if found is None:
            only.append(edit)
            continue
        met.add(found.id)
        what = _differences(a, found, b, edit)
        if what:
            differ.append((found, edit, what))
        same += not what
    return Difference([edit for edit in _live(a) if edit.id not in met], only, differ, same)


def _live(storage: Storage) -> list[Edit]:
    return [edit for edit in storage.history() if edit.live and edit.part_of is None]


def _differences(a: Storage, first: Edit, b: Storage, second: Edit) -> tuple[str, ...]:
    groups = a.group(first.id), b.group(second.id)
    asked = [{edit.prompt for edit in group if edit.prompt is not None} for group in groups]
    values = a.value_of(first), b.value_of(second)
    found = {
        "target": first.label != second.label,
        "value": values[0].dtype != values[1].dtype
        or not same_bits(values[0].cpu(), values[1].cpu()),
        "prompts": len(groups[0]) != len(groups[1]) or asked[0] != asked[1],
        "negatives": set(first.negatives) != set(second.negatives),
    }
    return tuple(name for name, differs in found.items() if differs)


def merge(
    into: Codebook,
    other: Codebook,
    prefer: Prefer = "error",
    advance: Callable[[], None] = lambda: None,
) -> Merged:
    """Make the live edits of another codebook in this one, in order, by its own decisions.

    The edits here keep their ids and their history; of the other only live edits come, as new ones,
    with their stored queries and values. A key of an edit whose prompt, or key, has an edit of the
    same target here already is left out: that edit answers. An edit that was made with a model is
    answered only by the value that it came with, or one of the same bits, so it gets an entry of
    its own where the decision would have been to share. Entries that were given as tensors keep
    their radius unless a decision makes it smaller.

    Args:
        into: the first codebook. All or nothing, and one step of its undo.
        other: the second; it is only read.
        prefer: which edits win where two ask the same for other targets: those of the "first", of
            the "last" (they supersede, as an edit made later does), or "error".
        advance: called after each edit of `other`.

    Returns:
        What became of each edit of `other`. Every live edit of both is live afterwards, is in
        `same`, or is in `conflicts`.

    Raises:
        ValueError: the codebooks differ in policy, widths, dtypes or radii.
        MergeConflict: with "error"; it names all conflicts.
        CapacityError: `into` is frozen and full.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {PREFERENCES}, got {prefer!r}")
    check_alike(into, other)
    merged = Merged()
    with other.lock:
        edits = _live(other.storage)
    with into.transaction(), _remembering(into.storage):
        merging = _Merging(into, other, prefer, merged)
        for edit in edits:
            merging.take(edit)
            advance()
        merging.take_lost()
        if merged.conflicts and prefer == "error":
            raise MergeConflict(merged.conflicts)
    return merged


@contextmanager
def _remembering(storage: Storage) -> Iterator[None]:
    """Forget no edit that is superseded inside a `with` block: conflicts are to name them."""
    limit, storage.history_limit = storage.history_limit, None
    try:
        yield
    finally:
        storage.history_limit = limit


def check_alike(first: Codebook, second: Codebook) -> None:
    """Raise ValueError unless the edits of one codebook can be made in the other."""
    for name, found in _kind(second).items():
        wanted = _kind(first)[name]
        if found != wanted:
            raise ValueError(f"{name} of both codebooks must be the same, got {wanted} and {found}")


def _kind(book: Codebook) -> dict[str, object]:
    return {
        "policy": book.policy,
        "key_dim": book.keys.shape[1],
        "value_dim": book.values.shape[1],
        "dtype": book.keys.dtype,
        "value_dtype": book.values.dtype,
        "radius": book.radius,
        "max_radius": book.max_radius,
    }


class _Contradicts(Exception):
    """An edit would take an answer from one that it must leave alone."""


@dataclass
class _Merging:
    """A merge under way, inside a transaction of `into`."""

    into: Codebook
    other: Codebook
    prefer: Prefer
    merged: Merged

    def take(self, edit: Edit) -> None:
        """Make an edit of the other codebook, with all its keys, or note why it is not made."""
        keys: list[Edit] = []
        agreeing: set[int] = set()
        against: set[int] = set()
        for key in self.other.storage.group(edit.id):
            same, different = self._met(key)
            agreeing |= same
            against |= different
            if not same:
                keys.append(key)
        if against:
            self._note(against, edit)
            if self.prefer != "last":
                return
        if keys:
            further: set[int] = set()
            try:
                with self.into.transaction():
                    id, superseded = self._make(edit, keys)
                    further = superseded - against
                    if further and self.prefer != "last":
                        raise _Contradicts
            except _Contradicts:
                self._note(further, edit)
                return
            self._note(further, edit)
            self.merged.ids[edit.id] = (*self.merged.ids.get(edit.id, ()), id)
        if agreeing:
            self.merged.same[edit.id] = tuple(sorted(agreeing))

    def take_lost(self) -> None:
        """Make what was left out for an edit that was superseded later."""
        others = {edit.id: edit for edit in _live(self.other.storage)}
        while lost := [
            id for id, agreeing in self.merged.same.items() if not self._serve(agreeing)
        ]:
            for id in lost:
                del self.merged.same[id]
                self.take(others[id])

    def _serve(self, ids: Iterable[int]) -> bool:
        return all(self.into.edit(id).live for id in ids)

    def _note(self, ids: Iterable[int], edit: Edit) -> None:
        pairs = [Conflict(self.into.edit(id), edit) for id in sorted(ids)]
        self.merged.conflicts.extend(pairs)

    def _met(self, key: Edit) -> tuple[set[int], set[int]]:
        """Return the whole edits here with this prompt or key: of the same target, of another."""
        storage, query = self.into.storage, self._query(key)
        met = set()
        earlier = storage.earlier_edit(key.prompt, query)
        if earlier is not None:
            met.add(earlier)
        by_query = storage.earlier_edit(None, query)
        if by_query is not None:
            met.add(by_query)
        slot, distance = storage.nearest(query)
        entry = storage.entry(slot)
        if entry is not None and distance == 0.0:
            met |= {entry.owner} if entry.label == key.label else set(entry.members)
        same: set[int] = set()
        against: set[int] = set()
        for id in met:
            found = storage.edit(id)
            (same if found.label == key.label else against).add(found.whole)
        return same, against

    def _query(self, key: Edit) -> Tensor:
        return self.other.storage.query_of(key).detach().to(self.into.device)

    def _make(self, edit: Edit, keys: list[Edit]) -> tuple[int, set[int]]:
        """Make an edit; return its id, and the edits that it superseded."""
        storage = self.into.storage
        live = storage.live_edits
        supersedes: set[int] = set()
        whole: int | None = None
        results: list[EditResult] = []
        for key in keys:
            proposal, value = self._propose(edit, key, whole)
            if whole is not None and self._has(whole, proposal.query):
                continue  # the key of another prompt of this edit answers
            # No model can say whether another value answers: none that was verified is exchanged.
            answers = None if key.verified is None else _never
            results.append(self.into.commit(proposal, value, answers=answers))
            supersedes.update(proposal.supersedes)
            whole = results[0].id
        assert whole is not None
        if storage.live_edits != live + 1 - len(supersedes):  # the repair has superseded more
            supersedes = {one.id for one in self.into.history if one.superseded_by == whole}
        figures = {name: getattr(edit.result, name) for name in _FIGURES}
        fragile = any(result.fragile for result in results)
        self.into.record(replace(results[0], **figures, fragile=fragile, keys=len(results)))
        return whole, supersedes

    def _propose(
        self, edit: Edit, key: Edit, part_of: int | None
    ) -> tuple[Proposal, Tensor | None]:
        """Return what is to be committed for a key of an edit, and the value to do it with."""
        book = self.into
        value = self.other.storage.value_of(key).detach().to(book.device)

        def propose(own_entry: bool) -> Proposal:
            return planning.propose(
                book.storage,
                self._query(key),
                key.label,
                key.prompt,
                own_entry,
                self._radius(key),
                part_of,
                edit.negatives if part_of is None else (),
            )

        proposal = propose(False)
        if proposal.case in ("expand", "absorb") and proposal.members:
            same = same_bits(book.values[proposal.slot], value)
            if book.policy == "paper" or key.verified is None or same:
                return proposal, None
            return propose(True), value
        return proposal, value

    def _has(self, id: int, query: Tensor) -> bool:
        """Say whether an edit here has a key at distance 0 from a query."""
        storage = self.into.storage
        own = torch.stack([storage.query_of(edit).cpu() for edit in storage.group(id)])
        return nearest(query.cpu()[None], own, torch.zeros(len(own)))[1].item() == 0.0

    def _radius(self, key: Edit) -> float | None:
        """Return the radius of an edit; that of an entry that was given as a tensor is its own."""
        imported = self.other.storage.imported
        if key.id < len(imported.labels):
            return max(0.0, imported.radii[key.id].item())
        return key.radius


def _never(edit: Edit, slot: int) -> bool:
    return False
