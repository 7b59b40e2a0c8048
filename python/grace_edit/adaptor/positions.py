"""Which row asks and which rows are replaced: masks, padding, KV cache, packed batches.

Everything is pure and works on the attention mask alone. A *column* is a position in the whole
sequence (padding included); a *row* is an index into the layer's `[B·T, ·]` input and output, where
T is the length of the piece that this forward computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Witness = Callable[[Any, Tensor, Tensor, float], None]
"""Told of lookups, under the lock of the codebook: it, which slots answer `[B]` (-1: none), how far
they are `[B]`, and the seconds it took. Not of those in what it held before, see `moments`."""


@dataclass
class Latched:
    """The answers of a batch, known before the rows that they replace are computed.

    Args:
        index: `[B]`, the entry that answers each sequence, -1 for none.
        values: `[B, V]`, their values as they were then: an edit in between changes no answer that
            was begun.
    """

    index: Tensor
    values: Tensor


@dataclass
class QueryPlan:
    """Say which rows of a forward ask the codebook and which rows their answers replace.

    A CUDA graph reads the tensors of the plan where they were when it was recorded: there, keep one
    plan and write the rows of the next batch into it.

    Args:
        query_row: `[B]` int64, the row of the layer's input that asks for sequence b; negative:
            sequence b does not ask.
        first_row, last_row: `[B]` int64, an answer replaces rows `first_row..last_row-1` of the
            layer's output.
        pool: `[B, T]` bool or None. Given, the query of sequence b is the mean of its marked rows,
            and `query_row` only says (by its sign) whether b asks.
        latch: latch the answers for the later forwards of this generation.
        latched: do not look anything up, write the answers that were latched.
        rows: how many rows the layer must see, one per token; None: not checked.
        answers: of the sequences, where they are known (`query="text"`); nothing is looked up then.
            `query_row` only says (by its sign) which of them are written.
        kept: what the lookup found is copied into it.
    """

    query_row: Tensor
    first_row: Tensor
    last_row: Tensor
    pool: Tensor | None = None
    latch: bool = False
    latched: bool = False
    rows: int | None = None
    answers: Latched | None = None
    kept: Latched | None = None

    def to(self, device: torch.device) -> QueryPlan:
        """Return this plan with its tensors on `device`: itself if they are there."""
        if self.query_row.device == device:
            return self
        return replace(
            self,
            query_row=self.query_row.to(device),
            first_row=self.first_row.to(device),
            last_row=self.last_row.to(device),
            pool=None if self.pool is None else self.pool.to(device),
        )


@dataclass
class LatchedPlan:
    """Say that a forward computes generated tokens only, all of which take their latched answers.

    It names no rows: a compiled step that read tensors which are new at every step would have its
    CUDA graph recorded again for each.

    Args:
        sequences: how many; the layer sees as many rows of each.
    """

    sequences: int


def last_column(mask: Tensor) -> Tensor:
    """Return the last True column of each row of `mask [B, L]` as `[B]` int64, −1 where none."""
    # With a column of zeros in front the largest marked number is there for every mask.
    columns = torch.arange(mask.shape[1] + 1, device=mask.device)
    return (torch.nn.functional.pad(mask, (1, 0)) * columns).amax(dim=1) - 1


def first_column(mask: Tensor) -> Tensor:
    """Return the first True column of each row of `mask [B, L]` as `[B]` int64 (0 where none)."""
    return mask.int().argmax(dim=1)


def plan_queries(
    mask: Tensor,
    *,
    replace: str,
    prompt_len: int | Tensor | None = None,
    computed: int = 0,
    scheduled: int | None = None,
    query_column: Tensor | None = None,
    pool_mask: Tensor | None = None,
) -> QueryPlan:
    """Plan one forward over columns `computed..computed+scheduled-1` of sequences with this mask.

    Args:
        mask: `[B, L]` bool, True at tokens, False at padding, on either side.
        replace: `"last"`, `"prompt"`, `"before"` (the prompt without its query token) or `"all"`.
        prompt_len: how many leading columns are prompt, an int or `[B]`; None: all of them.
        computed: columns whose keys and values are in the cache already.
        scheduled: columns this forward computes; None: the rest.
        query_column: `[B]`, the column that asks; None: the last token of the prompt.
        pool_mask: `[B, L]` bool, the tokens whose mean is the query; None: one token asks.

    Returns:
        The plan. A sequence whose query column is outside this forward does not ask in it, so a
        prompt that arrives in pieces is looked up once, with the piece that holds its end.

    Raises:
        ValueError: another `replace`.
    """
    batch, total = mask.shape
    scheduled = total - computed if scheduled is None else scheduled
    columns = torch.arange(total, device=mask.device)
    limit = total if prompt_len is None else prompt_len
    limit = limit.unsqueeze(1) if isinstance(limit, Tensor) else limit
    in_prompt = mask & (columns < limit)
    query = last_column(in_prompt) if query_column is None else query_column.to(mask.device)
    asks = (query >= computed) & (query < computed + scheduled)

    first = first_column(mask).clamp(min=computed)
    if replace == "all":
        last = last_column(mask) + 1
    elif replace in ("last", "prompt"):
        last = query + 1
    elif replace == "before":
        last = query
    else:
        raise ValueError(f"replace must be 'last', 'prompt', 'before' or 'all', got {replace!r}")
    if replace == "last":
        first = query

    start = torch.arange(batch, device=mask.device) * scheduled - computed
    none = torch.full_like(query, -1)
    plan = QueryPlan(
        query_row=torch.where(asks, start + query, none),
        first_row=torch.where(asks, start + first, 0),
        last_row=torch.where(asks, start + torch.maximum(last, first), 0),
        rows=batch * scheduled,
    )
    if pool_mask is not None:
        marked = in_prompt & pool_mask
        # A prompt of nothing but special tokens still needs a query: pool them.
        marked = torch.where(marked.any(dim=1, keepdim=True), marked, in_prompt)
        plan.pool = marked[:, computed : computed + scheduled]
    return plan


def plan_latched(
    mask: Tensor, *, replace: str, prompt_len: int, computed: int
) -> QueryPlan | LatchedPlan | None:
    """Plan a forward after the prompt: which rows the latched answers replace, None if none.

    With a KV cache only `replace="all"` reaches the new tokens. Without one the whole sequence is
    computed anew, so the prompt's rows are replaced again.

    Args:
        mask: `[B, L]` bool, as for `plan_queries`, which raises what this raises.
    """
    if computed >= prompt_len:
        return LatchedPlan(len(mask)) if replace == "all" else None
    plan = plan_queries(mask, replace=replace, prompt_len=prompt_len, computed=computed)
    plan.latched = True
    return plan


def pooled_mean(hidden: Tensor, marked: Tensor) -> Tensor:
    """Average the marked rows of each sequence.

    The sum is fp32 and runs over ascending positions, one addition at a time, so it has the same
    bits for every batch and every padding.

    Args:
        hidden: `[B, T, D]`, fp32, fp16 or bf16.
        marked: `[B, T]` bool, at least one per row that matters (0/0 gives NaN, which never hits).

    Returns:
        `[B, D]` in the dtype of `hidden`.
    """
    total = hidden.new_zeros((hidden.shape[0], hidden.shape[2]), dtype=torch.float32)
    for t in range(hidden.shape[1]):
        # where, not a product: padding may hold anything, NaN included.
        total = torch.where(marked[:, t, None], total + hidden[:, t].float(), total)
    return (total / marked.sum(dim=1, keepdim=True)).to(hidden.dtype)
