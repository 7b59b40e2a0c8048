"""Which edits the deletion of one can touch: those that are near it, and those near these.

Edits act on each other in few ways: by the same prompt, as keys of one edit, and by distance. An
edit can meet the entry of another one, be drawn away by its key, or end half way to it, only within
T(a, b) = max(r_a, r_b) + max(c_a, c_b), where r is the radius of a new entry of the edit and c the
largest that entry can have, at any time and in any order: r, or what covers the farthest edit of
the same label for which it may grow. Linked are two edits within T of each other. Everything that
is linked with the deleted edit, over however many links, is touched, and nothing else: replayed
with or without the rest, its decisions are the same.

Why it is enough: an edit whose nearest entry is farther than T gets an entry of its own and leaves
that one alone, as if there were none. A new key k that draws the query q from the entry j of q's
label is nearer to q than j is, so nearer than c_q. Other labels count for the radius of an entry of
its own within twice r.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from grace_kernels import nearest

from .records import Edit, Label
from .storage import Storage

_CHUNK = 1 << 22  # elements widened at a time
_PIECE = 1 << 18  # elements that are compared while they are in a cache
_FEW = 64  # edits that are replayed without asking whether these are most
_PASSES = 8  # edits that are compared with all queries in a pass each
_PER_PASS = 32  # edits that are made again, by products, in the time of a pass over as many
_SLACK = 1.0 + 1e-6  # for distances that were not computed or rounded as the canonical one is
_TINY = 1e-22  # no canonical distance above 0 is smaller


def touched(storage: Storage, *ids: int) -> set[int] | None:
    """Return the ids of whole edits and of all that their deletion can touch, parts included.

    Nothing changes. Costs a pass over the stored queries for each edit that is linked or may be.

    Returns:
        The ids; None where they may be most of all, so that it pays to replay everything.
    """
    if storage.settings.paper:  # whose radii may grow without bounds
        return None
    return _Links(storage).all_of([edit for id in ids for edit in storage.group(id)])


class _Links:
    """The edits that a replay would take again, with what links them.

    More may be linked here than acts on each other, never less.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.imports = len(storage.imported.labels)
        self.most = max(_FEW, (len(storage.by_query) + 1) // 2)
        self.far = max(storage.settings.radius, storage.edit_records.widest)
        if self.imports:
            self.far = max(self.far, storage.imported.radii.max().item())
        self.grown = max(self.far, storage.settings.max_radius)
        # A chain of edits is not followed for longer than making all again takes. Beside imported
        # ones that takes longer by far, and where only equal keys meet no chain is long.
        endless = self.imports or storage.settings.nearest
        self.looks = math.inf if endless else _FEW + len(storage.by_query) // _PER_PASS
        self._around: dict[int, tuple[list[Edit], list[float]]] = {}
        self._largest: dict[int, float] = {}

    def all_of(self, group: list[Edit]) -> set[int] | None:
        """Return the ids of what is linked with a group of keys, over however many links."""
        if not math.isfinite(self.far + self.grown):
            return None
        found = {edit.id for edit in group}
        front = list(found)
        while front:
            if len(found) > self.most or len(self._around) > self.looks:
                return None
            near = set(self._by_name(front)) | self._by_distance(front, found)
            near |= self._among_imports(front, found)
            front = [id for id in near if id not in found]
            found.update(front)
        return found

    def _by_name(self, front: Iterable[int]) -> Iterable[int]:
        """Yield the keys of the same edits, and the edits of the same prompts."""
        live = self.storage.by_prompt
        for id in front:
            edit = self.storage.edit(id)
            yield from (each.id for each in self.storage.group(edit.whole))
            if edit.prompt is not None:
                yield from self._superseded[edit.prompt]
                if edit.prompt in live:
                    yield live[edit.prompt]

    @cached_property
    def _superseded(self) -> dict[Label, list[int]]:
        """The superseded edits of each prompt."""
        found: dict[Label, list[int]] = defaultdict(list)
        for whole in self.storage.past:
            for edit in self.storage.group(whole):
                if edit.prompt is not None and edit.state == "superseded" and edit.query_index >= 0:
                    found[edit.prompt].append(edit.id)
        return found

    def _by_distance(self, front: list[int], found: set[int]) -> set[int]:
        """Return the edits with a stored query that are linked with one of `front`."""
        self._look_around(front)
        near: set[int] = set()
        unsure: list[tuple[int, int, float]] = []
        for id in front:
            for edit, distance in zip(*self._around[id], strict=True):
                if edit.id in found or edit.id in near:
                    continue
                # First as if the other entry could not grow, which needs no look around it.
                if self._are_linked(id, edit.id, distance, self._radius(edit.id)):
                    near.add(edit.id)
                else:
                    unsure.append((id, edit.id, distance))
            if len(near) > self.most:
                return near
        if not self.storage.settings.nearest:
            self._look_around({other for _, other, _ in unsure if other not in near})
            for id, other, distance in unsure:
                if other not in near and self._are_linked(id, other, distance, self._cap(other)):
                    near.add(other)
        return near

    def _are_linked(self, a: int, b: int, distance: float, cap: float) -> bool:
        """Say whether two edits are within T, the second one's entry growing up to `cap`."""
        if self.storage.settings.nearest:  # only equal keys meet
            return distance <= _TINY
        within = max(self._radius(a), self._radius(b)) + max(self._cap(a), cap)
        return distance <= within * _SLACK + _TINY

    def _radius(self, id: int) -> float:
        """Return the radius of a new entry of an edit."""
        edit = self.storage.edit(id)
        if edit.query_index < 0 or edit.state == "deleted":
            return self.far
        if id < self.imports:
            return self.storage.imported.radii[id].item()
        return self.storage.settings.radius if edit.radius is None else edit.radius

    def _cap(self, id: int) -> float:
        """Return the largest radius that the entry of an edit can get under the edit's label."""
        known = self._largest.get(id)
        if known is None:
            known = self._largest[id] = self._find_cap(id)
        return known

    def _find_cap(self, id: int) -> float:
        own = self.storage.edit(id)
        if self.imports or own.query_index < 0 or own.state == "deleted":
            return self.grown
        settings, cap = self.storage.settings, self._radius(id)
        for edit, distance in zip(*self._around[id], strict=True):
            reach = distance * _SLACK + settings.drift
            # A hair more than what may be reached, so that no rounding leaves one out.
            if edit.label == own.label and reach <= settings.max_radius * _SLACK * _SLACK:
                cap = max(cap, reach * _SLACK)
        return cap

    def _look_around(self, ids: Iterable[int]) -> None:
        """Note which edits of the history, with a query, are so near that they may be linked."""
        new = [id for id in ids if id not in self._around]
        if len(new) > _PASSES:
            self._compare_many(new)
            return
        one = torch.full((1,), math.inf)
        for id in new:
            self._around[id] = [], []
            query = self.storage.query_of(self.storage.edit(id)).cpu()
            rows = self._roughly_within(query, self._limit(id))
            if len(rows):
                stored = self.storage.queries.vectors[rows]
                self._note(id, rows, nearest(stored, query[None], one)[1])

    def _roughly_within(self, query: Tensor, limit: float) -> Tensor:
        """Return the rows of the stored queries within `limit` of one `[D]`, and some beyond.

        In float32, as the canonical distance of every row would take many times as long.
        """
        stored, dim = self.storage.queries, len(query)
        # Each term and each addition is off by 2**-24 of itself at most, and no term is negative.
        bound = limit * (1.0 + (dim + 8) * 2.0**-24)
        query, step, found = query.float(), max(1, _PIECE // dim), []
        for start in range(0, stored.count, step):
            rows = stored.vectors[start : min(start + step, stored.count)].float()
            apart = (rows - query).square_().sum(1).sqrt_()
            found.append((apart <= bound).nonzero()[:, 0] + start)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def _compare_many(self, ids: Sequence[int]) -> None:
        """Do as `_look_around` in products of matrices: a distance is the least it may be."""
        stored, edits = self.storage.queries, map(self.storage.edit, ids)
        asked = torch.stack([self.storage.query_of(edit).cpu().double() for edit in edits])
        limit = torch.tensor([self._limit(id) for id in ids], dtype=torch.float64)[:, None]
        step = max(1, _CHUNK // asked.shape[1])
        for id in ids:
            self._around[id] = [], []
        for start in range(0, stored.count, step):
            rows = stored.vectors[start : min(start + step, stored.count)].double()
            lengths = asked.square().sum(1)[:, None] + rows.square().sum(1)
            margin = lengths * (4.0 * (asked.shape[1] + 8) * 2.0**-53)
            squares = lengths - 2.0 * (asked @ rows.T)
            least = (squares - margin).clamp(min=0.0).sqrt()
            for id, mine, within in zip(ids, least, least <= limit, strict=True):
                near = within.nonzero()[:, 0]
                self._note(id, near + start, mine[near])

    def _limit(self, id: int) -> float:
        """Return beyond what distance nothing is linked with an edit."""
        if self.storage.settings.nearest:
            return _TINY
        return (max(self.far, self._radius(id)) + self.grown) * _SLACK + _TINY

    def _note(self, id: int, rows: Tensor, distances: Tensor) -> None:
        """Note what is around an edit, by the rows of the stored queries."""
        edits, far = self._around[id]
        owners = self.storage.queries.owners[rows].tolist()
        for owner, distance in zip(owners, distances.tolist(), strict=True):
            edit = None if owner < 0 else self.storage.edit(owner)
            if edit is not None and edit.state != "deleted":
                edits.append(edit)
                far.append(distance)

    def _among_imports(self, front: list[int], found: set[int]) -> set[int]:
        """Return the imported edits whose keys are in their slots, within T of one of `front`."""
        near: set[int] = set()
        if not self.imports:
            return near
        storage, slots = self.storage, self.storage.slots
        radii = torch.zeros(self.imports, device=slots.device)
        records = storage.edit_records.items()
        elsewhere = [id for id, edit in records if edit is None or edit.query_index >= 0]
        radii[[id for id in (*elsewhere, *found) if id < self.imports]] = -math.inf
        asked = torch.stack([storage.query_of(storage.edit(id)).to(slots.device) for id in front])
        limit = 0.0 if storage.settings.nearest else self.far + self.grown
        keys = slots.keys[: self.imports]
        while True:
            index, distance = nearest(asked, keys, radii)
            hits = set(index[distance <= limit * _SLACK].tolist()) - {-1}
            if not hits:
                return near
            near |= hits
            radii[list(hits)] = -math.inf
            if len(near) > self.most:
                return near
