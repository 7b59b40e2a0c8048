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
from torch import Tensor

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
        prompts: token ids, whole.
        mask: `[B, P]` int64, 1 at the tokens that ran, 0 at padding.
        cache: holds their keys and values; it is copied before it is used.
    """

    prompts: list[list[int]]
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
        return BegunPrompts([self.prompts[b] for b in rows], self.mask[rows], cache)

    def target_logits(
        self, family: Family, targets: Sequence[list[int]], values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits and wanted tokens as `Family.target_logits` of the whole prompts does.

        Args:
            family: of the model that began the prompts, or of its twin.
            targets: token ids; their last tokens do not run, as nothing follows them.
            values: `[B, V]`, answer the prompts; they may require grad.
        """
        pairs = zip(self.prompts, targets, strict=True)
        rows = [[prompt[-1], *target[:-1]] for prompt, target in pairs]
        batch = family.inputs(rows)
        row, column = batch["attention_mask"].nonzero(as_tuple=True)
        one = torch.ones(len(rows), dtype=torch.long, device=self.mask.device)
        with family.teaching(values, batch, [], one), rows_alone(family.model, row, column):
            given = _behind(family, batch, self.mask, _copied(self.cache))
            logits = family.model(**given).logits
        wanted = torch.tensor([token for y in targets for token in y], device=row.device)
        return (logits if logits.ndim == 2 else logits[row, column]).float(), wanted

    def produces(self, family: Family, targets: Sequence[list[int]], values: Tensor) -> list[bool]:
        """Say whether the model produces each target by itself, answered by `values [B, V]`."""
        ran, ids = self.mask.shape[1], family.inputs(self.prompts, left=True)["input_ids"]
        # As wide as the cache. Tokens before the last are not read, so they may stand where the
        # cache has padding.
        ids = torch.nn.functional.pad(ids, (ran + 1 - ids.shape[1], 0), value=family.pad_id)
        mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        with family.answering(values):
            length, cache = max(map(len, targets)), _copied(self.cache)
            produced = family.go_on(ids, mask, length, past_key_values=cache)
        new = produced[:, ran + 1 :].tolist()
        return [n[: len(y)] == list(y) for n, y in zip(new, targets, strict=True)]


@torch.no_grad()
def begin(family: Family, prompts: Sequence[Sequence[int]], most: int) -> BegunPrompts | None:
    """Run prompts up to their last tokens; None: the model keeps nothing that can be gone on from.

    Args:
        family: of a causal model, inside `working` and unedited for the time of this call.
        prompts: token ids.
        most: columns that the cache may have, as some models have tables for no more.
    """
    accepted = inspect.signature(type(family.model).forward).parameters
    if any(name not in accepted for name in _KEEPS):
        return None
    rows = [list(prompt[:-1]) for prompt in prompts]
    if max(map(len, rows)) > most:
        return None
    shared, cache = _shared(rows, most), None
    mask = torch.zeros((len(rows), 0), dtype=torch.long, device=family.device)
    if any(shared):
        starts = [list(start) for start in dict.fromkeys(map(tuple, shared)) if start]
        batch = family.inputs(starts, left=True)
        cache = _cache_of(family.run_prompts(_behind(family, batch, mask[: len(starts)], None)))
        if cache is None:
            return None
        if any(type(layer).__name__ != _PLAIN for layer in cache.layers):
            # A window counts columns: no padding may lie between the tokens in it.
            shared, cache = [[] for _ in rows], None
        else:
            # A row that shares nothing takes any of them, masked.
            of_row = [starts.index(start) if start else 0 for start in shared]
            takes = torch.tensor([[int(bool(start))] for start in shared], device=mask.device)
            mask = batch["attention_mask"][of_row] * takes
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[of_row], layer.values[of_row]
    rest = [row[len(start) :] for row, start in zip(rows, shared, strict=True)]
    if any(rest):
        batch = family.inputs(rest, left=True)
        cache = _cache_of(family.run_prompts(_behind(family, batch, mask, cache)))
        mask = torch.cat([mask, batch["attention_mask"]], dim=1)
    if cache is None:
        return None
    return BegunPrompts([list(prompt) for prompt in prompts], mask, cache)


def _shared(rows: Sequence[list[int]], most: int) -> list[list[int]]:
    """Return the part of each row, from its first token on, that is run once for several of them.

    Rows that begin alike are put together so that the fewest tokens run. Nothing is shared where
    that saves too little, or where the longest part and the longest rest are more than `most`.
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
    end = len(rows)
    while end:
        first = start[end]
        length = min(alike[first : end - 1], default=0)
        for row in order[first:end]:
            found[row] = rows[row][:length]
        end = first
    rests = [len(row) - len(start) for row, start in zip(rows, found, strict=True)]
    fits = max(map(len, found)) + max(rests) <= most
    return found if saved[-1] >= _PAYS and fits else [[] for _ in rows]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _behind(family: Family, batch: dict[str, Tensor], before: Tensor, cache: Any) -> dict[str, Any]:
    """Return the arguments of a forward over a batch of `Family.inputs` behind a cache.

    Args:
        before: `[B, P]`, the mask of what the cache holds.
        cache: is added to; None: it holds nothing yet.
    """
    mask = torch.cat([before, batch["attention_mask"]], dim=1)
    given = {**batch, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if family.takes_positions:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given["position_ids"] = positions[:, before.shape[1] :]
    return given


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
