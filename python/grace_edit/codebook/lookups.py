"""What a storage is asked: which entry answers a query, and which are near it."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from .labels import Labels
from .records import Label
from .settings import Settings
from .transactions import Transactions


class Lookups(Transactions):
    """The part of a `Storage` that looks queries up, each time under its `lock`."""

    settings: Settings
    labels: Labels

    def nearest(self, query: Tensor, without: Collection[int] = ()) -> tuple[int, float]:
        """Return slot and distance of the entry nearest to `[D]`; see `Slots.nearest`.

        Args:
            without: slots whose entries are left out.
        """
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest(query, self._radii(without))

    def _radii(self, without: Collection[int]) -> Tensor | None:
        """Return the radii `[in_use]`, -inf for the slots that are left out; None: as they are."""
        if not without:
            return None
        radii = self.slots.radii[: self.slots.in_use].clone()
        radii[list(without)] = -math.inf
        return radii

    def _ready_sketch(self) -> None:
        # Of what this change has written so far; only on a CPU does it spare a scan.
        if self.slots.device.type == "cpu":
            self.slots.tell_sketch()

    def distance_to_other_label(
        self, query: Tensor, label: Label, without: Collection[int] = ()
    ) -> float:
        """Return the distance from `[D]` to the nearest entry of another label; +inf for none.

        Args:
            without: slots whose entries are left out.
        """
        number = self.labels.known(self.settings.label_key(label))
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest_of_other_label(query, number, self._radii(without))

    def own_copy(self, query: Tensor) -> Tensor:
        """Return a query `[D]` that stays as it is, whatever is written."""
        return query.detach().clone()

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries that answer `[B, D]`, as in serving."""
        with self.lock:
            return self.slots.lookup(query)
