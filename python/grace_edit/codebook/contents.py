"""What a codebook holds, for those who read it, and what of it is to be kept."""

from __future__ import annotations

from threading import RLock
from typing import Any

import torch
from torch import Tensor

from grace_kernels import Sketch

from . import planning
from .records import Edit, Label
from .storage import Storage

_MOST_HIT = 5  # named in `describe_hits`


class Contents:
    """The part of a `Codebook` that decides and changes no edit."""

    storage: Storage

    @property
    def keys(self) -> Tensor:
        """`[C, D]`, a key per slot."""
        return self.storage.slots.keys

    @property
    def values(self) -> Tensor:
        """`[C, V]`, a value per slot."""
        return self.storage.slots.values

    @property
    def radii(self) -> Tensor:
        """`[C]` float32, a radius per slot; -inf: dead."""
        return self.storage.slots.radii

    @property
    def count(self) -> Tensor:
        """Number of slots in use, an int64 scalar beside the keys."""
        return self.storage.slots.count

    @property
    def sketch(self) -> Sketch | None:
        """The sketch of the keys, None where the capacity is too small for one."""
        return self.storage.slots.sketch

    @property
    def capacity(self) -> int:
        """Number of slots allocated."""
        return self.storage.slots.capacity

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.storage.slots.device

    @property
    def frozen(self) -> bool:
        """Whether growing is refused, so that captured graphs keep their memory."""
        return self.storage.slots.frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self.storage.slots.frozen = value

    @property
    def undo_limit(self) -> int:
        """How many steps of undo are kept, the latest; 100 unless set. Older ones are let go.

        A step holds what the change left different: a few vectors for an edit, and for a delete
        what its replay ended with another content of.
        """
        return self.storage.journal.limit

    @undo_limit.setter
    def undo_limit(self, steps: int) -> None:
        with self.lock:
            self.storage.journal.limit = steps

    @property
    def history_limit(self) -> int | None:
        """How many deleted and superseded edits are kept, the latest by id; None: all.

        What is beyond it is forgotten at the end of every change, see `compact`; undoing the change
        brings that back too. None unless set, and not saved.
        """
        return self.storage.history_limit

    @history_limit.setter
    def history_limit(self, edits: int | None) -> None:
        if edits is not None and (type(edits) is not int or edits < 0):
            raise ValueError(
                f"history_limit must be None or a whole number of at least 0, got {edits!r}"
            )
        with self.lock:
            self.storage.history_limit = edits

    @property
    def lock(self) -> RLock:
        """Held while slots change; to be held while they are read in another thread.

        Whoever holds it must not begin a change: another thread's may be waiting for it.
        """
        return self.storage.lock

    @property
    def version(self) -> int:
        """A number that goes up with every change, undoing included."""
        return self.storage.version

    @property
    def policy(self) -> str:
        """The policy that decides."""
        return self.storage.settings.policy

    @property
    def radius(self) -> float:
        """The radius of a new entry."""
        return self.storage.settings.radius

    @property
    def drift(self) -> float:
        """How far the query of one prompt moves between batches."""
        return self.storage.settings.drift

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of `torch.autocast` that `drift` allows for; None: of none."""
        return self.storage.settings.autocast

    @property
    def max_radius(self) -> float:
        """The radius to which an entry may grow."""
        return self.storage.settings.max_radius

    def __repr__(self) -> str:
        kind, version = type(self).__name__, f"version {self.storage.version}"
        return f"{kind}({self.edits} edits, {self.entries} entries, {version})"

    @property
    def entries(self) -> int:
        """Number of live entries."""
        return self.storage.slots.live

    @property
    def edits(self) -> int:
        """Number of live edits; one of several keys counts once."""
        return self.storage.live_edits

    @property
    def ids(self) -> list[int]:
        """The ids of the live edits, ascending."""
        return self.storage.live_ids()

    @property
    def history(self) -> list[Edit]:
        """Every edit that was not purged or forgotten, whatever its state, by id."""
        return [edit for edit in self.storage.history() if edit.part_of is None]

    @property
    def live_keys(self) -> list[Edit]:
        """The live edits, each followed by its parts: everything that a prompt may be asked for."""
        return [edit for edit in self.storage.history() if edit.live]

    @property
    def labels(self) -> list[Label | None]:
        """The label of each slot in use; None for a dead one."""
        with self.lock:
            entries = map(self.storage.entry, range(self.storage.slots.in_use))
            return [None if entry is None else entry.label for entry in entries]

    @property
    def count_hits(self) -> bool:
        """Whether it is counted how often each entry answers; False unless set.

        Counted where a request is answered: once per prompt, not per generated token; not in
        compiled models and captured graphs; `explain` and `verify` only look. On a GPU nothing
        waits for it. When each last answered is noted too, see `last_hit`. What was counted is
        saved with the codebook and lost when this is set to False. It is no part of `undo`.
        """
        return self.storage.hits.on

    @count_hits.setter
    def count_hits(self, on: bool) -> None:
        with self.lock:
            if on and not self.count_hits:
                self.storage.hits.start()
            elif not on:
                self.storage.hits.stop()

    @property
    def hits(self) -> dict[int, int] | None:
        """How often each live edit's entries answered, by id ascending; None: not counted.

        Edits that share an entry share its hits. Waits for the device.
        """
        with self.lock:
            storage = self.storage
            storage.gather_hits()
            if storage.hits.gathered is None:
                return None
            found = {}
            for id in storage.live_ids():
                entries = (storage.live_entry(edit.slot) for edit in storage.group(id))
                owners = {storage.edit(entry.owner).whole for entry in entries}
                found[id] = sum(storage.hits.gathered.get(owner, 0) for owner in owners)
            return found

    def describe_hits(self) -> dict[str, Any] | None:
        """Return `hits` in short: `never` used, how many edits; `most` used, `[id, hits]` of five.

        `total`: answers of live entries. None: not counted.
        """
        hits = self.hits
        if hits is None:
            return None
        with self.lock:
            owners = {self.edit(x.owner).whole for x in self.storage.live_entries()}
            gathered = self.storage.hits.gathered or {}
            total = sum(gathered.get(owner, 0) for owner in owners)
        most = sorted(hits.items(), key=lambda item: (-item[1], item[0]))[:_MOST_HIT]
        never = sum(count == 0 for count in hits.values())
        return {"total": total, "never": never, "most": [[id, n] for id, n in most if n]}

    def count_answers(self, index: Tensor) -> None:
        """Count answers `index [B]` (-1: a miss), if hits are counted; `lock` must be held."""
        if self.storage.hits.on:
            self.storage.hits.count(index, self.capacity)

    def edit(self, id: int) -> Edit:
        """Return the edit of the history with this id.

        Raises:
            KeyError: there is none, or it was purged.
        """
        return self.storage.edit(id)

    def parts(self, id: int) -> list[Edit]:
        """Return the further keys of an edit, one for each paraphrase.

        Raises:
            KeyError: there is no edit with this id, or it was purged.
        """
        return self.storage.group(id)[1:]

    def query_of(self, id: int) -> Tensor:
        """Return a copy, `[D]` on the host, of the stored query of an edit of the history.

        Raises:
            KeyError: the id is unknown.
        """
        with self.lock:
            query = self.storage.query_of(self.storage.edit(id))
            return query.detach().cpu().clone()

    def members(self, slot: int) -> tuple[int, ...]:
        """Return the ids of the edits that a slot answers for, ascending; none for a dead one."""
        entry = self.storage.entry(slot)
        if entry is None:
            return ()
        return tuple(sorted({self.storage.edit(member).whole for member in entry.members}))

    def edit_of_slot(self, slot: int) -> Edit:
        """Return the edit, or the part of one, whose query is the key of a live slot.

        Raises:
            KeyError: the slot is dead or not in use.
        """
        with self.lock:
            entry = self.storage.entry(slot)
            if entry is None:
                raise KeyError(f"slot must hold a live entry, got {slot}")
            return self.storage.edit(entry.owner)

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entry that answers each query: `[B, D]` -> (`[B]` int64, `[B]` float32).

        A miss is index -1 and distance +inf. See `grace_kernels.lookup`.
        """
        return self.storage.lookup(query)

    def nearest_two(self, query: Tensor) -> list[tuple[int, float]]:
        """Return slot and distance of the nearest entry to `[D]` and of the runner-up.

        Whatever their radii; fewer than two where there are fewer entries.
        """
        with self.lock:
            return self.storage.slots.nearest_two(planning.check_query(query, self.keys))

    def describe_sketch(self) -> dict[str, Any] | None:
        """Return the state of the sketch for a person, None where there is none.

        `rows`: slots in use that lookups use it for; `active`; `bytes`; of `queries` since the fit,
        the shares of pairs that were `scored` one by one and `scanned` as without a sketch, None
        before the first.
        """
        return self.storage.slots.sketch_upkeep.describe(self.storage.slots.in_use)
