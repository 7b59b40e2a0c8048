"""Prompts that a causal model has run up to their last token, and forwards that go on from there.

What comes before the last token of a prompt does not depend on what answers it under
`replace="last"`. So its keys and values are computed once, and what several prompts begin with once
for all of them. Each forward of a training then computes the last token and the target alone. Its
numbers are those of a whole forward but for the order of sums, as those of `generate` with a cache.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .base import Begun, Family
from .projection import rows_alone

_KEEPS = ("past_key_values", "use_cache", "attention_mask")
"""Arguments of a forward that can keep what it has computed."""

_PAYS = 32
"""Tokens that must be saved for one more forward."""

_PLAIN = "DynamicLayer"
_LAYERS = (_PLAIN, "DynamicSlidingWindowLayer")
"""Layers of a cache that add tokens to a new tensor and leave the one they had."""


@dataclass(frozen=True)
class BegunPrompts(Begun):
    """What a model keeps of prompts without their last tokens.

    Args:
        last: `[B]`, the last token of each prompt.
        mask: `[B, P]`, True at the tokens that ran, False at padding.
        cache: holds their keys and values; it is copied before it is used.
    """

    last: Tensor
    mask: Tensor
    cache: Any

    @property
    def ran(self) -> list[tuple[int, int]]:
        """How many columns of each prompt hold tokens, and how many padding."""
        return [(tokens, self.mask.shape[1] - tokens) for tokens in self.mask.sum(1).tolist()]

    def only(self, rows: Sequence[int]) -> BegunPrompts:
        """Return some of these prompts."""
        rows, cache = list(rows), _copied(self.cache)
        for layer in cache.layers:  # a list: they may be on several devices
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        return BegunPrompts(self.last[rows], self.mask[rows], cache)

    def target_logits(
        self, family: Family, targets: Sequence[list[int]], values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits and wanted tokens as `Family.target_logits` of the whole prompts does.

        Args:
            family: of the model that began the prompts, or of its twin.
            targets: token ids; their last tokens do not run, as nothing follows them.
            values: `[B, V]`, answer the prompts; they may require grad.
        """
        ids, own = _padded([[0, *target[:-1]] for target in targets], family.pad_id)
        ids, own = ids.to(self.last.device), own.to(self.last.device)
        ids[:, 0] = self.last
        mask = torch.cat([self.mask, own], dim=1)
        row, column = own.nonzero(as_tuple=True)
        plain = {"attention_mask": own, "input_ids": ids}
        with (
            family.teaching(values, plain, [], torch.ones_like(self.last)),
            rows_alone(family.model, row, column),
        ):
            logits = _forward(family.model, ids, mask, _copied(self.cache)).logits
        wanted = torch.tensor([token for y in targets for token in y], device=ids.device)
        return (logits if logits.ndim == 2 else logits[row, column]).float(), wanted


@torch.no_grad()
def begin(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    most: int,
) -> BegunPrompts | None:
    """Run prompts up to their last tokens; None: the model keeps nothing that can be gone on from.

    Args:
        model: a causal one in eval mode, unedited for the time of this call.
        prompts: token ids.
        pad_id: fills rows up.
        device: of the model.
        most: columns that the cache may have, as some models have tables for no more.
    """
    accepted = inspect.signature(type(model).forward).parameters
    if any(name not in accepted for name in _KEEPS):
        return None
    rows = [list(prompt[:-1]) for prompt in prompts]
    shared = _shared(rows)
    pairs = list(zip(rows, shared, strict=True))
    if max(map(len, shared)) + max(len(row) - len(start) for row, start in pairs) > most:
        shared = [[] for _ in rows]
    if max(map(len, rows)) > most:
        return None
    cache: Any = None
    before = torch.zeros((len(rows), 0), dtype=torch.bool, device=device)
    if any(shared):
        starts = [list(start) for start in dict.fromkeys(map(tuple, shared)) if start]
        # A row that shares nothing takes any of them, masked.
        of_row = [starts.index(start) if start else 0 for start in shared]
        ids, own = _padded(starts, pad_id, left=True)
        ids, own = ids.to(device), own.to(device)
        cache = _cache_of(_forward(model, ids, own, None, narrow=True))
        if cache is None:
            return None
        if any(type(layer).__name__ != _PLAIN for layer in cache.layers):
            # A window counts columns: no padding may lie between the tokens in it.
            shared, cache = [[] for _ in rows], None
        else:
            before = own[of_row] & torch.tensor([[bool(start)] for start in shared], device=device)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[of_row], layer.values[of_row]
    pairs = list(zip(rows, shared, strict=True))
    ids, own = _padded([row[len(start) :] for row, start in pairs], pad_id, left=True)
    ids, own = ids.to(device), own.to(device)
    mask = torch.cat([before, own], dim=1)
    if ids.shape[1]:
        cache = _cache_of(_forward(model, ids, mask, cache, narrow=True))
    if cache is None:
        return None
    return BegunPrompts(torch.tensor([p[-1] for p in prompts], device=device), mask, cache)


def _shared(rows: Sequence[list[int]]) -> list[list[int]]:
    """Return the part of each row, from its first token on, that is run once for several of them.

    Rows that begin alike are put together so that the fewest tokens run.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    alike = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    # Of the first `end` rows in order: tokens saved, and where the last group of them starts.
    saved, start = [0] * (len(rows) + 1), [0] * (len(rows) + 1)
    for end in range(1, len(rows) + 1):
        saved[end], start[end] = saved[end - 1], end - 1
        length = sys.maxsize
        for first in range(end - 2, -1, -1):
            length = min(length, alike[first])
            if not length:
                break
            gain = saved[first] + (end - first - 1) * length
            if gain > saved[end]:
                saved[end], start[end] = gain, first
    found: list[list[int]] = [[] for _ in rows]
    end = len(rows) if saved[-1] >= _PAYS else 0
    while end:
        first = start[end]
        length = min(alike[first : end - 1], default=0)
        for row in order[first:end]:
            found[row] = rows[row][:length]
        end = first
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _padded(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]` and where they are tokens, bool, of rows of token ids."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    own = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        span = slice(width - len(row), None) if left else slice(0, len(row))
        ids[b, span] = torch.tensor(list(row), dtype=torch.long)
        own[b, span] = True
    return ids, own


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, *, narrow: bool = False
) -> Any:
    """Run `ids [B, T]` behind what a cache holds.

    Args:
        mask: `[B, L]` bool, of the cache and of the ids.
        narrow: logits are wanted of nobody.
    """
    accepted = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in accepted:
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        given["position_ids"] = positions[:, mask.shape[1] - ids.shape[1] :]
    if narrow and "logits_to_keep" in accepted:
        given["logits_to_keep"] = 1
    return model(**given, past_key_values=cache, use_cache=True)


def _cache_of(output: Any) -> Any:
    """Return the cache that a forward gave back; None: it is not one that can be gone on from."""
    cache = getattr(output, "past_key_values", None)
    # Caches of a model's own hold more than their layers.
    if cache is None or type(cache).__name__ != "DynamicCache":
        return None
    holds = [type(one).__name__ in _LAYERS and one.keys is not None for one in cache.layers]
    return cache if holds and all(holds) else None


def _copied(cache: Any) -> Any:
    """Return a cache that holds the same, into which tokens can go without changing this one."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made
