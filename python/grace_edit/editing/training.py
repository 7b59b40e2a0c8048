"""Learning values: each an fp32 row, Adam, early stop, and the proof that it works as stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from .adam import Adam
from .lessons import Lessons
from .prefills import Prefills
from .proofs import Proof, prove

_LEAST = 0.5
"""Log odds, nats, at which a value can be expected to work, and by which more is asked if not."""

_QUICK, _USUAL = (0.5, 0.99), (0.9, 0.999)
"""Betas of Adam. The usual ones look back over more steps than most values take."""

_PATIENCE = 8
"""Further steps, beside as many as it took, in which a value that works is to gain the margin."""


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
    """

    value: Tensor
    reached: bool
    loss_start: float
    loss_end: float
    steps: int
    reason: str = ""
    probability: float = 0.0


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


def fit_value(
    family: Family,
    prompts: Sequence[list[int]],
    targets: Sequence[list[int]],
    start: Tensor,
    dtype: torch.dtype,
    *,
    lr: float,
    max_steps: int,
    margin: float,
    move: float = 0.0,
    contexts: Sequence[tuple[list[int], list[int]]] = (),
    prefills: Prefills | None = None,
    early_stop: bool = True,
) -> Fit:
    """Train one value that makes every prompt produce its target.

    Args and raises: as `Task` and `fit_values`.
    """
    task = Task(prompts, targets, start, lr, contexts, prefills)
    settings: dict[str, Any] = {"max_steps": max_steps, "margin": margin, "move": move}
    return fit_values(family, [task], dtype, early_stop=early_stop, **settings)[0]


def fit_values(
    family: Family,
    tasks: Sequence[Task],
    dtype: torch.dtype,
    *,
    max_steps: int,
    margin: float,
    move: float = 0.0,
    early_stop: bool = True,
) -> list[Fit]:
    """Train a value for each task, all in the same forwards.

    Each has its own loss, Adam state, patience and proof, and none depends on another, but for the
    last bits of a forward of several rows. One that is done stays in the forward, so that what was
    kept of it can be used, until half of them are done.

    The model's parameters, their `requires_grad` and `.grad` are not touched: only the gradients of
    the values are asked for.

    Args:
        family: of the attached model.
        tasks: what each value is to do; all rows are in memory at once.
        dtype: of the layer's output; values are verified in it.
        max_steps: most steps.
        margin: log odds of every target token, nats, before a value is verified. One that does with
            less is trained on for about as many steps as it took, and then taken.
        move: by how much the first step is to raise the log odds of the target tokens, nats, as far
            as the gradient tells; `lr` is raised where it would do less.
        early_stop: stop at the first value that passes; else take `max_steps` steps.

    Raises:
        FloatingPointError: a loss became NaN or infinite.
    """
    settings = _Settings(max_steps, margin, move, early_stop)
    everything = [_Training(task, settings) for task in tasks]
    if not everything:
        return []
    asked = [pair for training in everything for pair in training.task.asked]
    # The published recipe runs everything, as published.
    with Lessons(family, asked, begins=early_stop) as lessons:
        together = _Together.begin(everything, dtype, settings)
        while running := [n for n, own in enumerate(together.of) if not own.done]:
            if 2 * len(running) <= len(together.of):
                lessons.only(together.rows_of(running))
                together = together.only(running)
            _step(family, lessons, together)
    return [training.fit for training in everything]


def _step(family: Family, lessons: Lessons, together: _Together) -> None:
    """Run one forward, prove what may be proven, and let the others take a step.

    Values that may be proven wait until they are half of those that are not done: many proofs cost
    less together.
    """
    running = [own for own in together.of if not own.done]
    with torch.enable_grad():
        stored = together.stored()
        logits, wanted = lessons.target_logits(together.answers(stored))
        odds, entropies = together.look(logits, wanted)
        early = together.settings.early_stop
        losses = _shortfall(odds, together.margins()) if early else entropies
    seen = zip(entropies.tolist(), odds.detach().cpu(), stored.detach().clone(), strict=True)
    for own, (entropy, its_odds, its_value) in zip(together.of, seen, strict=True):
        if not (own.done or own.waits):
            own.look(entropy, its_odds, its_value)
    asking = [n for n, own in enumerate(together.of) if own.waits]
    if 2 * len(asking) >= len(running):
        proofs = [together.of[n].proof(together.starts[n]) for n in asking]
        for n, works in zip(asking, prove(family, proofs, lessons.begun), strict=True):
            together.of[n].judge(works)
    moving = [n for n, own in enumerate(together.of) if not (own.done or own.waits)]
    if moving:
        with torch.enable_grad():
            total = losses[moving].sum()
        (gradients,) = torch.autograd.grad(total, [together.values], allow_unused=True)
        if gradients is None:
            raise ValueError(
                "the model must let gradients pass above the wrapped layer, got a model that "
                "gives none, as of layers that are quantised for inference only; quantise it "
                "with torchao, quanto or bitsandbytes, or edit it unquantised"
            )
        together.step(gradients, moving)


@dataclass(frozen=True)
class _Settings:
    max_steps: int
    margin: float
    move: float
    early_stop: bool


class _Together:
    """Values `[N, V]` that are trained in the same forwards."""

    def __init__(
        self, of: Sequence[_Training], dtype: torch.dtype, settings: _Settings, adam: Adam
    ) -> None:
        self.of, self.settings = list(of), settings
        self._dtype, self._adam = dtype, adam
        # The same memory, which the optimizer writes.
        self.values = adam.values.detach().requires_grad_(True)
        # Its first row in a forward, of each value, and how many rows there are.
        self.starts = [0, *itertools.accumulate(len(own.task.asked) for own in self.of)]
        sizes = [own.tokens for own in self.of]
        # Where in `[N, most tokens of one value]` each token of the forwards stands.
        self._most = max(sizes)
        places = [n * self._most + at for n, size in enumerate(sizes) for at in range(size)]
        self._places = torch.tensor(places, device=self.values.device)
        self._sizes = torch.tensor(sizes, device=self.values.device)

    @staticmethod
    def begin(of: Sequence[_Training], dtype: torch.dtype, settings: _Settings) -> _Together:
        """Start all values where their tasks say."""
        values = torch.stack([own.task.start.detach().float() for own in of])
        betas = _QUICK if settings.early_stop else _USUAL
        return _Together(of, dtype, settings, Adam(values, [own.task.lr for own in of], betas))

    def only(self, rows: Sequence[int]) -> _Together:
        """Return some of the values, which go on."""
        of = [self.of[n] for n in rows]
        return _Together(of, self._dtype, self.settings, self._adam.only(rows))

    def rows_of(self, values: Sequence[int]) -> list[int]:
        """Return which rows of a forward belong to some of the values."""
        return [row for n in values for row in range(self.starts[n], self.starts[n + 1])]

    def stored(self) -> Tensor:
        """Return the values as they will be stored."""
        return self.values.to(self._dtype)

    def answers(self, stored: Tensor) -> Tensor:
        """Return which value `[rows, V]` answers each row of a forward."""
        counts = [len(own.task.asked) for own in self.of]
        if len(set(counts)) == 1:
            return stored[:, None].expand(-1, counts[0], -1).flatten(0, 1)
        # Sums of gradients have an order, which those of repeated indices have not on every device.
        each = zip(stored.split(1), counts, strict=True)
        return torch.cat([value.expand(count, -1) for value, count in each])

    def look(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return log odds `[N, T]` of the wanted tokens, inf behind them, and mean cross entropies.

        Args:
            logits: `[n, classes]`, at the tokens wanted `[n]`, of all values in order.
        """
        odds = _log_odds(logits, wanted)
        entropy = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        sums = self._spread(entropy, 0.0).sum(dim=1)
        return self._spread(odds, float("inf")), sums / self._sizes

    def _spread(self, of_tokens: Tensor, rest: float) -> Tensor:
        spread = of_tokens.new_full((len(self.of) * self._most,), rest)
        return spread.scatter(0, self._places, of_tokens).view(-1, self._most)

    def margins(self) -> Tensor:
        """Return the margin `[N, 1]` that each value is to reach, nats."""
        return self.values.new_tensor([own.margin for own in self.of])[:, None]

    def step(self, gradients: Tensor, moving: Sequence[int]) -> None:
        """Take a step of Adam; far from the target after a third of them, start over more slowly.

        Steps as long as the first gradient tells, which soon forget the ones before, may leap over
        what they look for again and again.
        """
        adam, begins = self._adam, [n for n in moving if self.of[n].steps == 0]
        slopes = gradients.abs().sum(dim=1).tolist() if begins else []
        for n in begins:
            adam.lr[n] = _first_step(self.of[n].task.lr, self.of[n].move, slopes[n])
        goes_on = []
        for n in moving:
            task = self.of[n].task
            if self.of[n].is_hopeless and adam.lr[n] > task.lr:
                adam.restart(n, task.start.float(), task.lr, _USUAL)
            else:
                goes_on.append(n)
            self.of[n].steps += 1
        adam.step(gradients, goes_on)


class _Training:
    """How far a value has come, and what is asked of it next."""

    def __init__(self, task: Task, settings: _Settings) -> None:
        self.task, self.settings = task, settings
        self.done = False
        self.waits = False  # for a proof of the value that answered last
        self.steps = 0
        self.margin = settings.margin
        self._least, self._patience = min(settings.margin, _LEAST), -1
        self._reached = False
        self._first = self._loss = float("nan")

    @property
    def tokens(self) -> int:
        """How many tokens it is to make likely."""
        return sum(len(target) for _, target in self.task.asked)

    def look(self, entropy: float, odds: Tensor, stored: Tensor) -> None:
        """Note what a forward said.

        Args:
            entropy: mean over all tokens, nats.
            odds: log odds of the tokens, nats, on the CPU; further ones are inf.
            stored: `[V]`, the value that answered.
        """
        if not entropy < math.inf:
            raise FloatingPointError(f"the loss must be finite, got {entropy} at step {self.steps}")
        self._loss = entropy
        self._first = entropy if self.steps == 0 else self._first
        self._odds, self.stored = odds, stored
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
        odds = self._odds[: self.tokens]
        return self.settings.move * float(torch.sigmoid(self.margin - odds).mean())

    @property
    def is_hopeless(self) -> bool:
        """Whether it is far from its target after a third of its steps."""
        tried = max(_PATIENCE, self.settings.max_steps // 3)
        return self.steps == tried and self.lead < _LEAST

    @property
    def fit(self) -> Fit:
        """What has become of the value, once it is done."""
        steps, loss = self.steps, self._loss
        reason = f"target not produced after {steps} steps (loss {loss:.3g})"
        sizes = [len(y) for y in self.task.targets]
        tokens = torch.nn.functional.logsigmoid(self._odds[: sum(sizes)])
        least = min(float(part.sum().exp()) for part in tokens.split(sizes))
        reason = "" if self._reached else reason
        value = self.stored.clone()  # not what is stored of all
        return Fit(value, self._reached, self._first, loss, steps, reason, least)


def _log_odds(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the log odds `[n]` of the wanted tokens against all others together, nats."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    return own - logits.scatter(1, wanted[:, None], float("-inf")).logsumexp(dim=1)


def _shortfall(odds: Tensor, margins: Tensor) -> Tensor:
    """Return by how much log odds `[N, T]` miss margins `[N, 1]`, nats: means, weighted by itself.

    Of each row the tokens that lack most decide. Cross entropy would hardly move a token that is
    likely already, and creep towards the margin.
    """
    missing = torch.nn.functional.softplus(margins - odds)
    # Where all are far beyond the margin, nothing is missing and nothing moves.
    weights = missing.detach() / missing.detach().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (missing * weights).sum(dim=1)


def _first_step(lr: float, move: float, slope: float) -> float:
    """Return the step with which Adam first moves the log odds by `move`, and at least `lr`.

    Its first step changes each number of the value by the step's length against its gradient. That
    of a log odds counts the less the farther it is beyond the margin; `move` is given as so much.

    Args:
        slope: sum of the gradient's absolute values.
    """
    return max(lr, move / slope) if slope > 0 else lr
