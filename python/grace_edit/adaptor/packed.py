"""Several requests packed into one row of tokens, as an engine of continuous batching runs them.

An engine computes in one forward the next piece of each of many requests: a prompt, a part of one,
or a single generated token. Which piece it is, it knows on the host. So everything here is decided
from three numbers of a request: the length of its prompt, how many of its tokens were computed
before, and how many are computed now.

A *position* counts the tokens of one request; a *row* the tokens of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .positions import Latched, QueryPlan, Witness

HOW_TO_REPLACE = {
    # The first position that an answer replaces and the last one + 1, of a prompt so long.
    "last": lambda prompt: (prompt - 1, prompt),
    "prompt": lambda prompt: (0, prompt),
    "before": lambda prompt: (0, prompt - 1),
    "all": lambda prompt: (0, None),
}


class Asked:
    """What one request asks, and what answered it: for as long as it lives.

    A request that is thrown out of the cache and computed again keeps what it was answered, and so
    do the sequences that it is forked into.

    Args:
        prompt_len: tokens of its prompt.
        replace: which rows an answer replaces, as `GraceAdaptor.replace`.
        edited: False: it is served by the unedited model.
        answer: of this one sequence, where it is known before its prompt runs.
        witness: is told of the lookup, where it is not.
    """

    def __init__(
        self,
        prompt_len: int,
        replace: str,
        *,
        edited: bool,
        answer: Latched | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.prompt_len, self.witness = prompt_len, witness
        self.first, self.last = HOW_TO_REPLACE[replace](prompt_len)
        self.answer = answer
        self._hit: bool | None = None if edited else False
        self._ready: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Asked:
        return self

    def latch(self, answer: Latched, ready: Any) -> None:
        """Take an answer that is there once the event `ready` has come (None: it is there)."""
        self.answer, self._ready = answer, ready

    @property
    def hit(self) -> bool | None:
        """Whether an entry answers; None: it has not asked yet. Read from the device once."""
        if self._hit is None and self.answer is not None:
            if self._ready is not None:
                self._ready.synchronize()
            self._hit = bool(self.answer.index[0] >= 0)
        return self._hit

    @property
    def unedited(self) -> int | None:
        """How many positions from the first are computed as without edits; None: all are.

        The cached keys and values of these, and of no others, are right for other requests, before
        and after any edit.
        """
        return None if self.hit is False else self.first

    def asks(self, computed: int, scheduled: int) -> bool:
        """Say whether it asks in a piece of so many positions behind those computed before."""
        end = self.prompt_len - 1
        return self.hit is None and computed <= end < computed + scheduled

    def replaces(self, computed: int, scheduled: int) -> range:
        """Return the positions of a piece that its answer, already known, replaces."""
        if not self.hit:
            return range(0)
        last = computed + scheduled
        if self.last is not None:
            last = min(last, self.last)
        return range(max(self.first, computed), last)


@dataclass
class Writes:
    """Rows that known answers replace, in tensors that stay where they are.

    Args:
        row: `[N]` int64, rows of the layer's output; one may stand there again with its own value.
        source: `[N]` int64, the row of `values` that each takes.
        live: `[N]` bool; False: the row stays as it is.
        values: `[S, V]`.
    """

    row: Tensor
    source: Tensor
    live: Tensor
    values: Tensor

    def into(self, rows: Tensor, *, copy: bool) -> Tensor:
        """Return the layer's output `[R, V]` with these rows replaced, in place or in a copy."""
        values = self.values[self.source].to(rows.dtype)
        values = torch.where(self.live[:, None], values, rows[self.row])
        rows = rows.clone() if copy else rows
        return rows.index_copy_(0, self.row, values)


@dataclass
class PackedPlan:
    """Say which rows of a packed forward ask and which take answers that are known.

    Args:
        rows: how many rows the layer must see.
        asking: of the requests whose prompts end in this forward; None: none.
        writes: of the requests that are answered; None: none.
        reached: the wrapped layer has run under this plan.
        witnesses: of the requests that ask, in their order.
    """

    rows: int
    asking: QueryPlan | None = None
    writes: Writes | None = None
    reached: bool = False
    witnesses: Sequence[Witness | None] = ()

    def see(self, book: Any, index: Tensor, distance: Tensor, seconds: float) -> None:
        """Tell the witness of each request that asks of its part of a lookup, as a `Witness`."""
        for n, witness in enumerate(self.witnesses):
            if witness is not None:
                witness(book, index[n : n + 1], distance[n : n + 1], seconds)

    @property
    def empty(self) -> bool:
        """Whether the forward is that of the unedited model."""
        return self.asking is None and self.writes is None


class PackedRows:
    """The rows of one batch, in memory that a CUDA graph finds where it was recorded.

    Every set of inputs that an engine keeps has one of its own: under asynchronous batching one
    batch is prepared while another one runs.

    Args:
        sequences: S, the most requests of a batch.
        tokens: the most rows that answers replace in a batch.
        like: `[_, V]`, values of the codebook, for width, dtype and device.
    """

    def __init__(self, sequences: int, tokens: int, like: Tensor) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        with torch.inference_mode(False):
            self.query_row = zeros(sequences)
            self.first_row, self.last_row = zeros(sequences), zeros(sequences)
            self.kept = Latched(zeros(sequences), zeros(sequences, like.shape[1], dtype=like.dtype))
            self.row, self.source = zeros(tokens), zeros(tokens)
            self.live = zeros(tokens, dtype=torch.bool)
            self.values = torch.zeros_like(self.kept.values)
        self.asked: list[Asked] = []
        self._written = 0

    def fits(self, like: Tensor) -> bool:
        """Say whether values such as `like [_, V]` can be held here."""
        own = self.values
        return (own.shape[1], own.dtype, own.device) == (like.shape[1], like.dtype, like.device)

    def fill(self, batch: Sequence[tuple[Asked, int, int]]) -> None:
        """Take the rows of a batch, on the current stream.

        Args:
            batch: of each request what it asks, the positions computed before and those computed
                now, in the order of their rows.
        """
        self.asked = []
        query_row: list[int] = []
        row: list[int] = []
        source: list[int] = []
        values: list[Tensor] = []
        start = 0
        for asked, computed, scheduled in batch:
            if asked.asks(computed, scheduled):
                self.asked.append(asked)
                query_row.append(start + asked.prompt_len - 1 - computed)
            positions = asked.replaces(computed, scheduled)
            if positions:
                assert asked.answer is not None
                row.extend(start + position - computed for position in positions)
                source.extend([len(values)] * len(positions))
                values.append(asked.answer.values[0])
            start += scheduled
        self._written = len(row)
        self.query_row.fill_(-1)
        self._set(self.query_row, query_row)
        self.first_row.copy_(self.query_row.clamp(min=0))
        self.last_row.copy_(self.query_row + 1)
        # What is left over names the first row again, with the value that it takes anyway.
        self.row.fill_(row[0] if row else 0)
        self.source.zero_()
        self.live.fill_(bool(row))
        self._set(self.row, row)
        self._set(self.source, source)
        for place, value in zip(self.values, values, strict=False):
            place.copy_(value)

    @staticmethod
    def _set(buffer: Tensor, numbers: list[int]) -> None:
        if numbers:
            buffer[: len(numbers)] = torch.tensor(numbers, dtype=buffer.dtype, device=buffer.device)

    def plan(self, rows: int, *, reads: bool, sequences: int | None) -> PackedPlan:
        """Return the plan of the batch that was filled in.

        Args:
            rows: of the forward, padding included.
            reads: requests may ask by what the layer sees.
            sequences: None: tensors as long as this batch needs, or none. Else the plan is to be
                recorded, for every batch of so many requests: it is the same whatever they ask.
        """
        if sequences is None:
            asking, written = len(self.asked), self._written
        else:
            asking = sequences if reads else 0
            written = min(rows, len(self.row)) if len(self.row) > len(self.query_row) else sequences
        plan = PackedPlan(rows, witnesses=[asked.witness for asked in self.asked])
        if asking:
            places = (self.query_row[:asking], self.first_row[:asking], self.last_row[:asking])
            kept = Latched(self.kept.index[:asking], self.kept.values[:asking])
            plan.asking = QueryPlan(*places, kept=kept)
        if written:
            plan.writes = Writes(
                self.row[:written], self.source[:written], self.live[:written], self.values
            )
        return plan

    def latch(self, ready: Callable[[], Any]) -> None:
        """Latch what the forward of this batch answered, a copy of it, on the current stream.

        Args:
            ready: records an event on this stream and returns it, or None where nothing waits.
        """
        if not self.asked:
            return
        index = self.kept.index[: len(self.asked)].clone()
        values = self.kept.values[: len(self.asked)].clone()
        event = ready()
        for n, asked in enumerate(self.asked):
            asked.latch(Latched(index[n : n + 1], values[n : n + 1]), event)
        self.asked = []
