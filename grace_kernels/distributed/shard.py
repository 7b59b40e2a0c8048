"""The rows of a codebook that one rank holds, and what it finds among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..api import lookup, nearest
from ..sketch import Sketch


class Shard:
    """Keys, values and radii of one rank's slots, in rising order of slots.

    Rows that no entry was written to are dead. There is always one row at least, so that a rank
    without slots needs no case of its own.

    Attributes:
        keys: `[rows, D]`.
        values: `[rows, V]`.
        radii: `[rows]` float32, -inf where there is no entry.
        count: int64 scalar on the device, the rows in use.
        sketch: of the keys and `reaches`, or None.
        reaches: `[rows]` float32 beside a sketch: -inf where there is no entry, elsewhere one
            number that is no less than any radius of the whole codebook.
    """

    def __init__(
        self,
        rows: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows = max(rows, 1)
        self.keys = torch.zeros(rows, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(rows, value_dim, dtype=value_dtype, device=device)
        self.radii = torch.full((rows,), -math.inf, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.sketch: Sketch | None = None
        self.reaches: Tensor | None = None
        self._reach = -math.inf

    def nearest(self, query: Tensor) -> Tensor:
        """Return the row `[B]` of the live key nearest to each of `[B, D]`, -1: there is none."""
        return nearest(query, self.keys, self.radii, self.count)[0]

    def nearest_within_reach(self, query: Tensor) -> Tensor:
        """Return for `[B, D]` that row where it can matter to a lookup; else -1 or that row.

        A hit lies within its own radius, and so does whatever is nearer: both within the largest
        radius there is on any rank. Not within their own radii, as `lookup` would have it: an entry
        whose radius does not cover a query stands in the way of a farther one on another rank.
        """
        if self.sketch is None or self.reaches is None:
            return self.nearest(query)
        return lookup(query, self.keys, self.reaches, self.count, sketch=self.sketch)[0]

    def write(
        self, rows: list[int], keys: Tensor | None, values: Tensor | None, radii: Tensor | None
    ) -> None:
        """Write `[n, D]`, `[n, V]`, `[n]` into n rows; None: those stay as they are.

        An interruption leaves the sketch out of use.
        """
        at = torch.tensor(rows, dtype=torch.int64, device=self.keys.device)
        with self._sketch_out_of_use() as sketch:
            for held, given in ((self.keys, keys), (self.values, values), (self.radii, radii)):
                if given is not None:
                    held[at] = given.to(held.device)
            if sketch is None or self.reaches is None:
                return
            self.reaches[at] = self._reaches_of(self.radii[at])
            for first, last in _runs(sorted(rows)):
                if keys is not None:
                    sketch.extend(self.keys, min(first, sketch.rows), last)
                if radii is not None:
                    sketch.update_radii_(self.reaches, first, last)

    def set_count(self, count: int) -> None:
        """Let the first `count` rows be those in use, in place."""
        self.count.fill_(count)

    def set_reach(self, reach: float) -> None:
        """Let `reach` be no less than any radius of the whole codebook."""
        self._reach = reach
        with self._sketch_out_of_use() as sketch:
            if sketch is not None and self.reaches is not None:
                self.reaches.copy_(self._reaches_of(self.radii))
                sketch.update_radii_(self.reaches, 0, len(self.reaches))

    def _reaches_of(self, radii: Tensor) -> Tensor:
        return torch.where(radii == -math.inf, -math.inf, self._reach)

    @contextmanager
    def _sketch_out_of_use(self) -> Iterator[Sketch | None]:
        active = self.sketch is not None and self.sketch.active
        if self.sketch is not None:
            self.sketch.active = False
        yield self.sketch
        if self.sketch is not None:
            self.sketch.active = active

    def fit_sketch(self, count: int) -> None:
        """Make a sketch of the first `count` rows as they are now; `set_reach` came before."""
        self.sketch = None
        self.reaches = self._reaches_of(self.radii)
        self.sketch = Sketch.fit(self.keys, self.reaches, count)

    def grow(self, rows: int) -> None:
        """Take new memory for `rows` rows in all; what is there stays."""
        more = rows - len(self.keys)
        if more <= 0:
            return
        dead = self.radii.new_full((more,), -math.inf)
        keys = torch.cat([self.keys, self.keys.new_zeros(more, self.keys.shape[1])])
        values = torch.cat([self.values, self.values.new_zeros(more, self.values.shape[1])])
        sketch = None if self.sketch is None else self.sketch.resized(rows)
        reaches = None if self.reaches is None else torch.cat([self.reaches, dead])
        radii = torch.cat([self.radii, dead])
        self.keys, self.values, self.radii = keys, values, radii
        self.sketch, self.reaches = sketch, reaches


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Return the ranges `(first, last)` that make up ascending `rows`."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[start], rows[end - 1] + 1
            start = end
