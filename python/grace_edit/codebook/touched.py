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
from collections.abc import Iterable

import torch
from torch import Tensor

from grace_kernels import nearest

from .records import Edit, Label
from .storage import Storage

_CHUNK = 1 << 22  # elements widened at a time
_FEW = 64  # edits that are replayed without asking whether these are most
_SLACK = 1.0 + 1e-6  # for distances computed in fp64 in another order than the canonical one
_TINY = 1e-22  # no canonical distance above 0 is smaller


def touched(storage: Storage, id: int) -> set[int] | None:
    """Return the ids of a whole edit and of all that its deletion can touch, parts included.

    Nothing changes. Costs a pass over the stored queries for each link farther away.

    Returns:
        The ids; None where they may be most of all, so that it pays to replay everything.
    """
    if storage.settings.paper:  # whose radii may grow without bounds
        return None
    return _Links(storage).all_of(storage.group(id))


class _Links:
    """The edits that a replay would take again, with what links them."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.imports = len(storage.imported.labels)
        self.prompts: dict[Label, list[int]] = defaultdict(list)
        self.labels: dict[Label, list[int]] = defaultdict(list)
        indexes: list[int] = []
        ids: list[int] = []
        radii: list[float] = []
        settings = storage.settings
        for edit in storage.edit_records.values():
            if edit is None or edit.query_index < 0 or edit.state == "deleted":
                continue
            if edit.prompt is not None:
                self.prompts[edit.prompt].append(edit.id)
            self.labels[edit.label].append(len(ids))
            indexes.append(edit.query_index)
            ids.append(edit.id)
            if edit.id < self.imports:
                radii.append(storage.imported.radii[edit.id].item())
            else:
                radii.append(settings.radius if edit.radius is None else edit.radius)
        self.ids = ids
        self.row = {id: row for row, id in enumerate(ids)}
        self.at = torch.tensor(indexes, dtype=torch.int64)
        self.radii = torch.tensor(radii, dtype=torch.float64)
        self.most = max(_FEW, (len(ids) + 1) // 2)
        self.far = max([settings.radius, *radii])
        if self.imports:
            self.far = max(self.far, storage.imported.radii.max().item())
        self.grown = max(self.far, settings.max_radius)
        self._largest: dict[int, float] = {}

    def all_of(self, group: list[Edit]) -> set[int] | None:
        """Return the ids of what is linked with a group of keys, over however many links."""
        if not math.isfinite(self.far + self.grown):
            return None
        found = {edit.id for edit in group}
        front = list(found)
        while front:
            if len(found) > self.most:
                return None
            near = set(self._by_name(front)) | self._by_distance(front, found)
            near |= self._among_imports(front, found)
            front = [id for id in near if id not in found]
            found.update(front)
        return found

    def _by_name(self, front: Iterable[int]) -> Iterable[int]:
        """Yield the keys of the same edits, and the edits of the same prompts."""
        for id in front:
            edit = self.storage.edit(id)
            yield from (each.id for each in self.storage.group(edit.whole))
            if edit.prompt is not None:
                yield from self.prompts[edit.prompt]

    def _by_distance(self, front: list[int], found: set[int]) -> set[int]:
        """Return the edits with a stored query that are linked with one of `front`."""
        near: set[int] = set()
        if self.storage.settings.nearest:
            limit = torch.zeros(len(front), dtype=torch.float64)
        else:
            limit = torch.tensor([self._radius(id) for id in front], dtype=torch.float64)
            limit = torch.clamp(limit, min=self.far) + self.grown
        asked = self._queries(front)
        for start, rows in self._chunks():
            for column, row in _within(asked, rows, limit).tolist():
                id = self.ids[start + row]
                if id in found or id in near:
                    continue
                apart = _distance(asked[column], rows[row])
                if apart <= self._linked_within(front[column], id) * _SLACK + _TINY:
                    near.add(id)
        return near

    def _linked_within(self, a: int, b: int) -> float:
        """Return T of two edits."""
        if self.storage.settings.nearest:  # only equal keys meet
            return 0.0
        return max(self._radius(a), self._radius(b)) + max(self._cap(a), self._cap(b))

    def _radius(self, id: int) -> float:
        row = self.row.get(id)
        return self.far if row is None else self.radii[row].item()

    def _cap(self, id: int) -> float:
        """Return the largest radius that the entry of an edit can get under the edit's label."""
        known = self._largest.get(id)
        if known is None:
            known = self._largest[id] = self._find_cap(id)
        return known

    def _find_cap(self, id: int) -> float:
        if self.imports or id not in self.row:
            return self.grown
        settings, own = self.storage.settings, self._radius(id)
        rows = torch.tensor(self.labels[self.storage.edit(id).label])
        query = self._queries([id])[0]
        step = max(1, _CHUNK // len(query))
        for start in range(0, len(rows), step):
            vectors = self.storage.queries.vectors[self.at[rows[start : start + step]]]
            reach = (vectors.double() - query).square().sum(1).sqrt() * _SLACK + settings.drift
            # A hair more than what may be reached, so that no rounding leaves one out.
            reach = reach[reach <= settings.max_radius * _SLACK * _SLACK]
            own = max(own, reach.max().item() * _SLACK if len(reach) else 0.0)
        return own

    def _queries(self, ids: Iterable[int]) -> Tensor:
        """Return the stored queries of edits as `[N, D]`, float64 on the host."""
        edits = map(self.storage.edit, ids)
        return torch.stack([self.storage.query_of(edit).cpu().double() for edit in edits])

    def _chunks(self) -> Iterable[tuple[int, Tensor]]:
        vectors = self.storage.queries.vectors
        step = max(1, _CHUNK // vectors.shape[1])
        for start in range(0, len(self.at), step):
            yield start, vectors[self.at[start : start + step]].double()

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


def _within(asked: Tensor, rows: Tensor, limit: Tensor) -> Tensor:
    """Return pairs of rows of `[F, D]` and `[N, D]` within `limit [F]`, and some beyond."""
    lengths = asked.square().sum(1)[:, None] + rows.square().sum(1)
    squares = lengths - 2.0 * (asked @ rows.T)
    margin = lengths * (4.0 * (asked.shape[1] + 8) * 2.0**-53)
    bound = (limit * _SLACK + _TINY).square()[:, None]
    return (squares <= bound + margin).nonzero()


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().sum().sqrt().item()
