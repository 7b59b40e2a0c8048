"""Generations from prompts that were run before: below the layer a prompt runs once per edit.

An edit runs its prompt for its query, and again when a value is proven by generation. The second
time what lies below the layer is handed out from the first, with what it had put into the cache.
The bits are those of a generation that runs everything: this is tried once per attached layer, for
the logits of the prompt and of a token after it, and otherwise left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adaptor.state import Captured
from ..adaptor.torch_private import is_compiled
from ..families import Family
from ..families.base import in_pieces
from ..families.projection import logits_seen
from .cutting import Kept, Twin

_TOGETHER = 5
"""Prompts of a length that are worth it to be run together, as three of them run alone as well."""


class Prefills:
    """Runs prompts and generates from them.

    Args:
        family: of the attached model, inside `working`.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._twin: Twin | None = None
        self._kept: dict[tuple[int, ...], Kept] = {}
        self._ahead: dict[tuple[int, ...], Captured] = {}

    def read_ahead(self, prompts: Sequence[list[int]]) -> None:
        """Run prompts together, and hand out by `capture` what was seen.

        Those of the same length, as long as the first, the middle and the last of them gave the
        bits that they give alone, in what the layer sees and in all that is kept of them; the
        others are not compared. Else each runs alone, when it is asked for.

        Under `query="text"` keys need no run, and the layer's output is no more than where a value
        starts from: there all run padded, nothing is compared, and nothing is kept for proofs.
        """
        distinct = sorted(map(list, dict.fromkeys(map(tuple, prompts))), key=len)
        if self._family.adaptor.text is not None:
            for piece in in_pieces([len(prompt) for prompt in distinct]):
                if len(distinct[piece]) > 1:
                    self._hand_out(distinct[piece], self._family.capture(distinct[piece]))
            return
        for _, group in itertools.groupby(distinct, key=len):
            alike = list(group)
            for piece in in_pieces([len(prompt) for prompt in alike]):
                if len(alike[piece]) >= _TOGETHER and not self._read(alike[piece]):
                    return

    def _read(self, prompts: list[list[int]]) -> bool:
        seen, kept = self._run(prompts)
        rows = len(prompts)
        theirs = [kept.row(b, rows) for b in range(rows)]
        for b in (0, rows // 2, rows - 1):
            alone, own = self._run([prompts[b]])
            same = torch.equal(alone.queries, seen.queries[b : b + 1])
            same = same and torch.equal(alone.outputs, seen.outputs[b : b + 1])
            if not (same and own.equals(theirs[b])):
                return False
        self._hand_out(prompts, seen)
        for prompt, its in zip(prompts, theirs, strict=True):
            self._keep(prompt, its)
        return True

    def _hand_out(self, prompts: list[list[int]], seen: Captured) -> None:
        each = zip(seen.queries.split(1), seen.outputs.split(1), strict=True)
        for prompt, (query, output) in zip(prompts, each, strict=True):
            self._ahead[tuple(prompt)] = Captured(query, output)

    def capture(self, prompt: list[int]) -> Captured:
        """Return what the layer sees of a prompt, as `Family.capture` does, and keep the rest."""
        seen = self._ahead.get(tuple(prompt))
        if seen is None:
            seen, kept = self._run([prompt])
            self._keep(prompt, kept)
        return seen

    def _run(self, prompts: list[list[int]]) -> tuple[Captured, Kept]:
        family = self._family
        whole = not family.generates or is_compiled(family.model)
        # A generation has to pass the layers below that may answer too, and keep what they say.
        if whole or family.adaptor.others or _tried(family) is False:
            return family.capture(prompts), Kept()
        if self._twin is None:
            self._twin = Twin(family)
        found = self._twin.record(lambda twin: twin.capture(prompts))
        family.runs_once = True
        return found

    def _keep(self, prompt: list[int], kept: Kept) -> None:
        if kept.caches and not kept.partly:
            self._kept[tuple(prompt)] = kept

    def produces(self, prompt: list[int], target: list[int], value: Tensor) -> bool:
        """Say whether the model produces a target by itself, answered by `value [V]`."""
        kept, family = self._kept.get(tuple(prompt)), self._family
        if kept is None or self._twin is None:
            return family.produces([prompt], [target], value[None])[0]

        def produce(family: Family) -> bool:
            return family.produces([prompt], [target], value[None])[0]

        if _tried(family) is None:
            wanted = [*target, target[0]]  # a token after the prompt, at least
            whole = _logits(self._twin.family, prompt, wanted, value)
            cut = self._twin.replay(
                lambda twin: _logits(twin, prompt, wanted, value), kept, fills=True
            )
            alike = len(cut) == len(whole) and all(map(torch.equal, cut, whole))
            # The first token ended it: what the cache holds has not been read.
            if not alike or len(whole) > 1:
                family.prefills = (family.adaptor, alike)
            if not alike:
                self._kept.clear()
                return produce(family)
        return self._twin.replay(produce, kept, fills=True)


def _tried(family: Family) -> bool | None:
    """Return whether the bits were the same, None: not tried with the layer that is wrapped now."""
    adaptor, alike = family.prefills or (None, False)
    return alike if adaptor is family.adaptor else None


def _logits(family: Family, prompt: list[int], target: list[int], value: Tensor) -> list[Tensor]:
    """Return what the output projection gives while a target is generated."""
    with logits_seen(family.model) as found:
        family.produces([prompt], [target], value[None])
    return found
