"""How often each entry answered, and when it last did: noted per slot on the device, gathered per
edit on the host.

When is a time of the wall clock, not a number of lookups: an operator thinks in days, several
processes may serve the same edits one after the other, and a time means the same in all of them. It
is read once per forward that asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def now() -> int:
    """Return the wall clock, in whole seconds since 1970."""
    return int(time.time())


class Hits:
    """Counters, off until `start`.

    A slot's counter belongs to the entry that is in it: whoever changes what slots hold calls
    `gather` first, under the lock that lookups take.

    Attributes:
        gathered: hits by id of the edit, as of the last `gather`; an edit's entries are those whose
            keys are its queries. None: nothing is counted.
        used: by id of the edit, when the entries that answer it last answered somebody, as of the
            last `gather`.
        made: by id of the edit, when it was made; one that is not there was made before counting
            `started`.
        total: hits gathered since counting was switched on in this process.

    Edits that are gone may still be in there: a change that is taken back brings them back.
    """

    def __init__(self) -> None:
        self.gathered: dict[int, int] | None = None
        self.used: dict[int, int] = {}
        self.made: dict[int, int] = {}
        self.started = 0
        self.total = 0
        self._counters: Tensor | None = None  # a slot each, and one more for what misses
        self._times: Tensor | None = None

    @property
    def on(self) -> bool:
        """Whether hits are counted."""
        return self.gathered is not None

    def start(self) -> None:
        """Count from now on."""
        self.gathered, self.started = {}, now()

    def go_on(
        self,
        gathered: dict[int, int],
        used: dict[int, int],
        made: dict[int, int],
        started: int | None,
    ) -> None:
        """Count from what was counted before; `started` None: that was not noted then."""
        self.gathered, self.used, self.made = dict(gathered), dict(used), dict(made)
        self.started = now() if started is None else started

    def stop(self) -> None:
        """Count no more, and forget what was counted."""
        self.gathered = self._counters = self._times = None
        self.used, self.made = {}, {}

    def note_made(self, id: int) -> None:
        """Note that an edit was made now, if hits are counted."""
        if self.on:
            self.made[id] = now()

    def count(self, index: Tensor, capacity: int) -> None:
        """Count answers `index [B]` (-1: a miss) among so many slots; waits for no device.

        Not while a CUDA graph is captured: its counters could be replaced before it is replayed.
        """
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        counters, times = self._counters, self._times
        if counters is None or len(counters) != capacity + 1 or counters.device != index.device:
            with torch.inference_mode(False):
                counters = torch.zeros(capacity + 1, dtype=torch.int64, device=index.device)
                times = torch.zeros_like(counters)
            self._counters, self._times = counters, times
        assert times is not None
        at = torch.where(index >= 0, index, capacity)
        counters.index_add_(0, at, torch.ones_like(at))
        times.index_fill_(0, at, now())

    def gather(
        self, edit_of: Callable[[int], int | None], members_of: Callable[[int], Iterable[int]]
    ) -> None:
        """Add what the slots counted to the hits of their edits, and start them at zero.

        Args:
            edit_of: from a slot to the id of its edit, None: it holds no entry.
            members_of: to the ids of all edits that it answers.
        """
        if self.gathered is None or self._counters is None or self._times is None:
            return
        slots = self._counters[:-1].nonzero()[:, 0]
        counted = zip(
            slots.tolist(), self._counters[slots].tolist(), self._times[slots].tolist(), strict=True
        )
        for slot, hits, last in counted:
            id = edit_of(slot)
            if id is None:
                continue
            self.total += hits
            self.gathered[id] = self.gathered.get(id, 0) + hits
            for member in members_of(slot):
                self.used[member] = max(last, self.used.get(member, 0))
        self._counters.zero_()
