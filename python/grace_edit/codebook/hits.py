"""How often each entry answered: counted per slot on the device, gathered per edit on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Hits:
    """Counters, off until `start`.

    A slot's counter belongs to the entry that is in it: whoever changes what slots hold calls
    `gather` first, under the lock that lookups take.

    Attributes:
        gathered: hits by id of the edit, as of the last `gather`; an edit's entries are those whose
            keys are its queries. None: nothing is counted.
    """

    def __init__(self) -> None:
        self.gathered: dict[int, int] | None = None
        self._counters: Tensor | None = None

    @property
    def on(self) -> bool:
        """Whether hits are counted."""
        return self.gathered is not None

    def start(self, gathered: dict[int, int] | None = None) -> None:
        """Count from now on, from these hits on."""
        self.gathered = dict(gathered or {})

    def stop(self) -> None:
        """Count no more, and forget what was counted."""
        self.gathered = self._counters = None

    def count(self, index: Tensor, capacity: int) -> None:
        """Count answers `index [B]` (-1: a miss) among so many slots; waits for no device.

        Not while a CUDA graph is captured: its counters could be replaced before it is replayed.
        """
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        counters = self._counters
        if counters is None or len(counters) != capacity or counters.device != index.device:
            with torch.inference_mode(False):
                counters = torch.zeros(capacity, dtype=torch.int64, device=index.device)
            self._counters = counters
        counters.index_add_(0, index.clamp(min=0), (index >= 0).to(torch.int64))

    def gather(self, edit_of: Callable[[int], int | None]) -> None:
        """Add what the slots counted to the hits of their edits, and start them at zero.

        Args:
            edit_of: from a slot to the id of its edit, None: it holds no entry.
        """
        if self.gathered is None or self._counters is None:
            return
        slots = self._counters.nonzero()[:, 0]
        for slot, hits in zip(slots.tolist(), self._counters[slots].tolist(), strict=True):
            id = edit_of(slot)
            if id is not None:
                self.gathered[id] = self.gathered.get(id, 0) + hits
        self._counters.zero_()
