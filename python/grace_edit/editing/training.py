"""Learning values: each an fp32 row, Adam, early stop, and the proof that it works as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from .lessons import Lessons
from .prefills import Prefills

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
    settings = _Settings(dtype, max_steps, margin, move, early_stop)
    everything = [_Training(family, task, settings) for task in tasks]
    running = everything
    together: list[_Training] = everything
    asked = [pair for training in everything for pair in training.asked]
    # The published recipe runs everything, as published.
    with Lessons(family, asked, begins=early_stop) as lessons:
        while running:
            if 2 * len(running) <= len(together):
                stays = [training in running for training in together for _ in training.asked]
                lessons.only([row for row, stay in enumerate(stays) if stay])
                together = running
            running = _step(lessons, together)
    return [training.fit for training in everything]


def _step(lessons: Lessons, together: list[_Training]) -> list[_Training]:
    """Run one forward, and let those that need it take a step; return the ones that go on."""
    running = [training for training in together if not training.done]
    with torch.enable_grad():
        stored = [training.store() for training in together]
        pairs = zip(stored, together, strict=True)
        values = torch.cat([value.expand(len(own.asked), -1) for value, own in pairs])
        logits, wanted = lessons.target_logits(values)
        sizes = [sum(len(y) for _, y in training.asked) for training in together]
        parts = zip(together, logits.split(sizes), wanted.split(sizes), strict=True)
        losses = {
            id(training): training.look(own, tokens)
            for training, own, tokens in parts
            if not training.done
        }
    for training in running:
        training.judge()
    running = [training for training in running if not training.done]
    if running:
        total = sum(losses[id(training)] for training in running)
        values = [training.value for training in running]
        gradients = torch.autograd.grad(total, values, allow_unused=True)
        for training, gradient in zip(running, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    "the model must let gradients pass above the wrapped layer, got a model that "
                    "gives none, as of layers that are quantised for inference only; quantise it "
                    "with torchao, quanto or bitsandbytes, or edit it unquantised"
                )
            training.step(gradient)
    return running


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype
    max_steps: int
    margin: float
    move: float
    early_stop: bool


class _Training:
    """A value that is being trained, and how far it has come."""

    def __init__(self, family: Family, task: Task, settings: _Settings) -> None:
        self.family, self.task, self.settings = family, task, settings
        self.asked = task.asked
        self.value = task.start.detach().float().clone().requires_grad_(True)
        self.done = False
        self._optimizer = self._adam(_QUICK if settings.early_stop else _USUAL)
        self._steps = 0
        self._margin = settings.margin
        self._least, self._patience = min(settings.margin, _LEAST), -1
        self._reached = False
        self._first = self._loss = float("nan")

    def _adam(self, betas: tuple[float, float]) -> torch.optim.Adam:
        return torch.optim.Adam([self.value], lr=self.task.lr, betas=betas)

    def store(self) -> Tensor:
        """Return the value as it will be stored."""
        self._stored = self.value.to(self.settings.dtype)
        return self._stored.detach() if self.done else self._stored

    def look(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Return what is to become less, of `logits [n, classes]` at the tokens wanted.

        What they say is kept.
        """
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        self._loss = now = float(loss.detach())
        if now != now or now == float("inf"):
            raise FloatingPointError(f"the loss must be finite, got {now} at step {self._steps}")
        self._first = now if self._steps == 0 else self._first
        odds = _log_odds(logits, wanted)
        self._odds = odds.detach()
        return _shortfall(odds, self._margin) if self.settings.early_stop else loss

    def judge(self) -> None:
        """Say whether the value is done: proven, or out of steps."""
        last_step = self._steps == self.settings.max_steps
        lead = float(self._odds.min())
        if lead >= self._least and self._patience < 0:
            self._patience = 2 * self._steps + _PATIENCE
        waited = 0 <= self._patience <= self._steps
        enough = lead >= self._margin or (lead >= self._least and waited)
        if (self.settings.early_stop and enough) or last_step:
            task = self.task
            self._reached = _verified(self.family, task, self._stored.detach())
            # Likely in one pass over the text and still not produced freely: ask more.
            self._margin, self._least = self._margin + _LEAST, self._least + _LEAST
            self._patience = -1
        self.done = self._reached or last_step

    def step(self, gradient: Tensor) -> None:
        """Take a step of Adam; far from the target after a third of them, start over more slowly.

        Steps as long as the first gradient tells, which soon forget the ones before, may leap over
        what they look for again and again.
        """
        self.value.grad = gradient
        group = self._optimizer.param_groups[0]
        if self._steps == 0:
            weight = float(torch.sigmoid(self._margin - self._odds).mean())
            group["lr"] = _first_step(self.task.lr, self.settings.move * weight, gradient)
        hopeless = self._steps == max(_PATIENCE, self.settings.max_steps // 3)
        if hopeless and group["lr"] > self.task.lr and float(self._odds.min()) < _LEAST:
            with torch.no_grad():
                self.value.copy_(self.task.start)
            self._optimizer = self._adam(_USUAL)
        else:
            self._optimizer.step()
        self._steps += 1

    @property
    def fit(self) -> Fit:
        """What has become of the value, once it is done."""
        steps, loss = self._steps, self._loss
        reason = f"target not produced after {steps} steps (loss {loss:.3g})"
        sizes = [len(y) for y in self.task.targets]
        tokens = torch.nn.functional.logsigmoid(self._odds[: sum(sizes)])
        least = min(float(part.sum().exp()) for part in tokens.split(sizes))
        reason = "" if self._reached else reason
        return Fit(self._stored.detach(), self._reached, self._first, loss, steps, reason, least)


def _log_odds(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the log odds `[n]` of the wanted tokens against all others together, nats."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    return own - logits.scatter(1, wanted[:, None], float("-inf")).logsumexp(dim=1)


def _shortfall(odds: Tensor, margin: float) -> Tensor:
    """Return by how much log odds `[n]` miss a margin, nats: their mean, weighted by itself.

    The tokens that lack most decide. Cross entropy would hardly move a token that is likely
    already, and creep towards the margin.
    """
    missing = torch.nn.functional.softplus(margin - odds)
    # Where all are far beyond the margin, nothing is missing and nothing moves.
    weights = missing.detach() / missing.detach().sum().clamp(min=1e-30)
    return (missing * weights).sum()


def _first_step(lr: float, move: float, gradient: Tensor) -> float:
    """Return the step with which Adam first moves the log odds by `move`, and at least `lr`.

    Its first step changes each number of the value by the step's length against its gradient. That
    of a log odds counts the less the farther it is beyond the margin; `move` is given as so much.
    """
    slope = float(gradient.abs().sum())
    return max(lr, move / slope) if slope > 0 else lr


def _verified(family: Family, task: Task, stored: Tensor) -> bool:
    # One prompt at a time: the way each was served when its query was recorded.
    prefills = task.prefills or Prefills(family)
    return all(
        prefills.produces(prompt, target, stored)
        for prompt, target in zip(task.prompts, task.targets, strict=True)
    )
