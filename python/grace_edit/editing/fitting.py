"""One value: what it is to do, how far it has come, and what has become of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prefills import Prefills
from .proofs import Proof

_LEAST = 0.5
"""Log odds, nats, at which a value can be expected to work, and by which more is asked if not."""

_PATIENCE = 8
"""Further steps, beside as many as it took, in which a value that works is to gain the margin."""


@dataclass(frozen=True)
class Task:
    """What one value is to do.

    Args:
        prompts, targets: token ids; all of them are answered by the same value.
        start: `[V]`, where the value starts.
        lr: Adam's step, absolute.
        contexts: further prompts with their targets, on which the value is trained and not proven.
        prefills: which some of the prompts were run in; None: none was.
    """

    prompts: Sequence[list[int]]
    targets: Sequence[list[int]]
    start: Tensor
    lr: float
    contexts: Sequence[tuple[list[int], list[int]]] = ()
    prefills: Prefills | None = None

    @property
    def asked(self) -> list[tuple[list[int], list[int]]]:
        """Every prompt with its target, contexts last."""
        return [*zip(self.prompts, self.targets, strict=True), *self.contexts]


@dataclass
class Fit:
    """A trained value.

    Args:
        value: `[V]` in the dtype of the layer's output, as it will be stored.
        reached: every target was produced by the model itself, answered by this value.
        loss_start, loss_end: mean cross entropy of the target tokens, nats.
        steps: Adam steps taken.
        reason: why the target was not reached; empty if it was.
        probability: of the whole target behind its prompt, answered by this value; of several
            prompts the least.
        finite: neither the loss nor the value became NaN or infinite.
    """

    value: Tensor
    reached: bool
    loss_start: float
    loss_end: float
    steps: int
    reason: str = ""
    probability: float = 0.0
    finite: bool = True


@dataclass(frozen=True)
class Settings:
    """How values are trained, see `fit_values`."""

    max_steps: int
    margin: float
    move: float
    early_stop: bool


class Training:
    """How far a value has come, and what is asked of it next."""

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        self.done = False
        self.waits = False  # for a proof of the value that answered last
        self.steps = 0
        self.margin = settings.margin
        self._least, self._patience = min(settings.margin, _LEAST), -1
        self._reached, self._finite = False, True
        self._first = self._loss = float("nan")

    @property
    def tokens(self) -> int:
        """How many tokens it is to make likely."""
        return sum(len(target) for _, target in self.task.asked)

    def look(self, entropy: float, odds: Tensor, stored: Tensor, finite: bool) -> None:
        """Note what a forward said; where that is not finite, the value is done.

        Args:
            entropy: mean over all tokens, nats.
            odds: log odds of the tokens, nats, on the CPU; further ones are inf.
            stored: `[V]`, the value that answered.
            finite: it is.
        """
        self._loss = entropy
        self._first = entropy if self.steps == 0 else self._first
        self._odds, self.stored = odds[: self.tokens], stored
        if not (entropy < math.inf and finite):
            self._finite, self.done = False, True
            return
        self.waits = self._may_work or self._is_last

    @property
    def lead(self) -> float:
        """The least log odds of all its tokens, nats."""
        return float(self._odds.min())

    @property
    def _is_last(self) -> bool:
        return self.steps == self.settings.max_steps

    @property
    def _may_work(self) -> bool:
        if not (self.settings.early_stop and self.lead >= self._least):
            return False
        if self._patience < 0:
            self._patience = 2 * self.steps + _PATIENCE
        return self.lead >= self.margin or self._patience <= self.steps

    def proof(self, first: int) -> Proof:
        """Return what is to be proven of the value that answered last.

        Args:
            first: its first row in a forward.
        """
        task = self.task
        return Proof(task.prompts, task.targets, self.stored, self.lead, first, task.prefills)

    def judge(self, proven: bool) -> None:
        """Note what the proof said; the value may be done."""
        self._reached, self.done, self.waits = proven, proven or self._is_last, False
        # Likely in one pass over the text and still not produced freely: ask more.
        self.margin, self._least = self.margin + _LEAST, self._least + _LEAST
        self._patience = -1

    @property
    def move(self) -> float:
        """By how much its first step is to lessen what it is trained on, nats."""
        return self.settings.move * float(torch.sigmoid(self.margin - self._odds).mean())

    @property
    def is_hopeless(self) -> bool:
        """Whether it is far from its target after a third of its steps."""
        tried = max(_PATIENCE, self.settings.max_steps // 3)
        return self.steps == tried and self.lead < _LEAST

    @property
    def fit(self) -> Fit:
        """What has become of the value, once it is done."""
        steps, loss = self.steps, self._loss
        value = self.stored.clone()  # not what is stored of all
        if not self._finite:
            what, bad = ("the value", "NaN or infinity") if loss < math.inf else ("the loss", loss)
            reason = f"{what} must be finite, got {bad} at step {steps}"
            return Fit(value, False, self._first, loss, steps, reason, finite=False)
        reason = f"target not produced after {steps} steps (loss {loss:.3g})"
        sizes = [len(y) for y in self.task.targets]
        tokens = torch.nn.functional.logsigmoid(self._odds[: sum(sizes)])
        least = min(float(part.sum().exp()) for part in tokens.split(sizes))
        reason = "" if self._reached else reason
        return Fit(value, self._reached, self._first, loss, steps, reason, least)
