"""The forwards of a training: the same prompts and targets, and another value each time.

Only what a value changes is run: in a cut forward, what comes after the layer's answer; where the
prompts are long enough to pay for it, of their last tokens and the targets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from ..families.base import Begun
from .cutting import CutForward
from .values import log_odds

Logits = tuple[Tensor, Tensor]

_WORTH = 64
"""Tokens before the last ones of all prompts from which on they are run by themselves first."""

_NEAR = 0.05
"""Nats by which the log odds of the target's tokens may differ then, in single precision.

Not their logits, nor a part of these: what is added to all logits of a token changes nothing, and a
model whose logits are large would be allowed to differ by more than a target may lead."""

_NEAR_IN_HALF = 0.5
"""The same with fewer bits: half of the lead with which a value is proven among others."""


class Lessons:
    """Runs prompts with their targets, answered by values.

    A context: what was run stays until it is left.

    Args:
        family: of the attached model, inside `working`.
        asked: prompts and targets, token ids.
        begins: long prompts may be run up to their last tokens first.
    """

    def __init__(
        self, family: Family, asked: Sequence[tuple[list[int], list[int]]], *, begins: bool = True
    ) -> None:
        self._family = family
        self._prompts = [prompt for prompt, _ in asked]
        self._targets = [target for _, target in asked]
        self._cut = CutForward(family)
        self._begun: Begun | None = None
        self._begins, self._tried = begins, False

    def __enter__(self) -> Lessons:
        self._cut.__enter__()
        before = sum(len(prompt) - 1 for prompt in self._prompts)
        if self._begins and before >= _WORTH and self._family.goes_on is not None:
            self._begun = self._family.begin(self._prompts, max(map(len, self._targets)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._begun = None
        self._cut.__exit__(*error)

    @property
    def begun(self) -> Begun | None:
        """The prompts, if forwards go on from what was run of them; after the first forward."""
        return self._begun

    def only(self, rows: Sequence[int]) -> None:
        """Go on with some of the prompts."""
        self._prompts = [self._prompts[b] for b in rows]
        self._targets = [self._targets[b] for b in rows]
        self._begun = None if self._begun is None else self._begun.only(rows)
        self._cut.__exit__()
        self._cut.__enter__()

    def target_logits(self, values: Tensor) -> Logits:
        """Return what `Family.target_logits` does, of all prompts answered by `values [B, V]`."""
        begun = self._begun
        if begun is not None and not self._tried:
            self._tried = True
            if not self._goes_on(begun, values.detach()):
                self._family.goes_on = self._begun = begun = None
        if begun is None:
            return self._run(lambda f: f.target_logits(self._prompts, self._targets, values))
        return self._run(lambda f: begun.target_logits(f, self._targets, values))

    def _run(self, forward: Callable[[Family], Logits]) -> Logits:
        wanted: Tensor | None = None

        def logits_of(family: Family) -> Tensor:
            nonlocal wanted
            logits, wanted = forward(family)
            return logits

        logits = self._cut.run(logits_of)
        assert wanted is not None
        return logits, wanted

    @torch.no_grad()
    def _goes_on(self, begun: Begun, values: Tensor) -> bool:
        """Say whether what was begun leads to about the log odds of whole forwards.

        Seen once for each length and padding that is longer than any before, as windows and biases
        of attention may count padding, at the rows with the most of either.
        """
        seen = self._family.goes_on
        if seen is None:
            return False
        sizes = begun.ran
        most = (max(tokens for tokens, _ in sizes), max(padding for _, padding in sizes))
        if most[0] <= seen[0] and most[1] <= seen[1]:
            return True
        numbers = range(len(sizes))
        longest = sorted(numbers, key=lambda b: sizes[b])[-2:]
        padded = sorted(numbers, key=lambda b: sizes[b][::-1])[-2:]
        rows = sorted({*longest, *padded})
        prompts, targets = [self._prompts[b] for b in rows], [self._targets[b] for b in rows]
        whole = log_odds(*self._cut.family.target_logits(prompts, targets, values[rows]))
        every = log_odds(*begun.target_logits(self._cut.family, self._targets, values))
        each = every.split([len(target) for target in self._targets])
        found = torch.cat([each[b] for b in rows])
        near = _NEAR if values.dtype in (torch.float32, torch.float64) else _NEAR_IN_HALF
        same = bool((found - whole).abs().max() <= near)
        if same:
            self._family.goes_on = (max(most[0], seen[0]), max(most[1], seen[1]))
        return same
