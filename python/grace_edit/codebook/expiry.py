"""Which edits have answered nobody for long, and letting go of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from numbers import Real

from . import deletion
from .hits import now
from .storage import Storage


def last_hits(storage: Storage) -> dict[int, int | None] | None:
    """Return when each live edit last answered; see `Codebook.last_hit`. `lock` must be held."""
    storage.gather_hits()
    if not storage.hits.on:
        return None
    return {id: _used(storage, id) for id in storage.live_ids()}


def _used(storage: Storage, id: int) -> int | None:
    # An entry that it came to share, or was given, may have answered before.
    entries = (storage.live_entry(edit.slot) for edit in storage.group(id))
    owners = {storage.edit(entry.owner).whole for entry in entries}
    times = [storage.hits.used[each] for each in {id, *owners} if each in storage.hits.used]
    return max(times, default=None)


def expire(
    storage: Storage, unused_for: float, keep: Collection[int] = (), *, dry_run: bool = False
) -> list[int]:
    """Delete the edits that answered nobody for long; see `Codebook.expire`, its errors too."""
    if not (isinstance(unused_for, Real) and unused_for >= 0):
        raise ValueError(f"unused_for must be at least 0 seconds, got {unused_for!r}")
    with storage.changing:
        for id in keep:
            storage.edit(id)  # raises
        with storage.lock:
            ids = _unused(storage, now() - unused_for, set(keep))
        if not dry_run:
            deletion.delete(storage, ids, False)
        return ids


def _unused(storage: Storage, before: float, keep: set[int]) -> list[int]:
    if not storage.hits.on:
        raise ValueError(
            "cannot tell which edits are unused, as hits are not counted: set count_hits to True "
            "and let the edits serve for a while"
        )
    storage.gather_hits()
    made, started = storage.hits.made, storage.hits.started
    superseded = defaultdict(list)
    for id in storage.past:
        by = storage.edit(id).superseded_by
        if by is not None:
            superseded[by].append(id)
    ids = []
    for id in storage.live_ids():
        # One that has just been made was not yet asked.
        last = max(made.get(id, started), _used(storage, id) or started)
        if last <= before and id not in keep:
            ids.append(id)
    for id in ids:  # which grows: what an edit took the place of goes with it
        ids += [other for other in superseded[id] if other not in keep]
    return sorted(ids)
