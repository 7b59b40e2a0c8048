"""Which edits have answered nobody for long, and letting go of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from . import deletion
from .hits import now
from .storage import Storage


def last_hits(storage: Storage) -> dict[int, int | None] | None:
    """Return when each live edit last answered; see `Codebook.last_hit`. `lock` must be held."""
    storage.gather_hits()
    gathered, since = storage.hits.gathered, storage.hits.since
    if gathered is None:
        return None
    found = {}
    for id in storage.live_ids():
        times = [since.get(owner, storage.hits.started) for owner in _owners(storage, id)
                 if gathered.get(owner)]  # fmt: skip
        found[id] = max(times, default=None)
    return found


def expire(
    storage: Storage, unused_for: float, keep: Collection[int] = (), *, dry_run: bool = False
) -> list[int]:
    """Delete the edits that answered nobody for long; see `Codebook.expire`."""
    if not unused_for >= 0:
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
    since, started = storage.hits.since, storage.hits.started
    superseded = defaultdict(list)
    for id in storage.past:
        by = storage.edit(id).superseded_by
        if by is not None:
            superseded[by].append(id)
    ids = []
    for id in storage.live_ids():
        # An edit whose entry answered others was used with them; one that has just been made, or
        # taken over an entry, was not yet asked.
        owners = {id, *_owners(storage, id)}
        if max(since.get(owner, started) for owner in owners) <= before and id not in keep:
            ids.append(id)
    for id in ids:  # which grows: what an edit took the place of goes with it
        ids += [other for other in superseded[id] if other not in keep]
    return sorted(ids)


def _owners(storage: Storage, id: int) -> set[int]:
    """Return the edits whose keys the entries have that answer an edit."""
    entries = (storage.live_entry(edit.slot) for edit in storage.group(id))
    return {storage.edit(entry.owner).whole for entry in entries}
