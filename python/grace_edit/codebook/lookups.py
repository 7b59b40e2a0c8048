"""What a storage is asked: which entry answers a query, and which are near it."""

from __future__ import annotations

from torch import Tensor

from .labels import Labels
from .records import Label
from .settings import Settings
from .transactions import Transactions


class Lookups(Transactions):
    """The part of a `Storage` that looks queries up, each time under its `lock`."""

    settings: Settings
    labels: Labels

    def nearest(self, query: Tensor, radii: Tensor | None = None) -> tuple[int, float]:
        """Return slot and distance of the entry nearest to `[D]`; see `Slots.nearest`."""
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest(query, radii)

    def _ready_sketch(self) -> None:
        # Of what this change has written so far; only on a CPU does it spare a scan.
        if self.slots.device.type == "cpu":
            self.slots.tell_sketch()

    def distance_to_other_label(
        self, query: Tensor, label: Label, radii: Tensor | None = None
    ) -> float:
        """Return the distance from `[D]` to the nearest entry of another label; +inf for none.

        `radii` `[in_use]` are read instead of the codebook's; -inf leaves an entry out.
        """
        number = self.labels.known(self.settings.label_key(label))
        with self.lock:
            self._ready_sketch()
            return self.slots.nearest_of_other_label(query, number, radii)

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries that answer `[B, D]`, as in serving."""
        with self.lock:
            return self.slots.lookup(query)
