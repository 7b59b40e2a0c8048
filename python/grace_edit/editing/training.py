"""Learning values: each an fp32 row, Adam, early stop, and the proof that it works as stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from .fitting import Fit, Settings, Task, Training
from .lessons import Lessons
from .prefills import Prefills
from .proofs import prove
from .values import Values


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

    Args: as `Task` and `fit_values`.

    Raises:
        FloatingPointError: the loss or the value became NaN or infinite.
    """
    task = Task(prompts, targets, start, lr, contexts, prefills)
    settings: dict[str, Any] = {"max_steps": max_steps, "margin": margin, "move": move}
    fit = fit_values(family, [task], dtype, early_stop=early_stop, **settings)[0]
    if not fit.finite:
        raise FloatingPointError(fit.reason)
    return fit


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
    kept of it can be used, until half of them are done. So does one that became NaN or infinite:
    its rows are never added to those of others.

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

    Returns:
        A fit for each task. One whose loss or value became NaN or infinite says so by `finite` and
        its reason.
    """
    settings = Settings(max_steps, margin, move, early_stop)
    everything = [Training(task, settings) for task in tasks]
    if not everything:
        return []
    asked = [pair for training in everything for pair in training.task.asked]
    # The published recipe runs everything, as published.
    with Lessons(family, asked, begins=early_stop) as lessons:
        together = Values.begin(everything, dtype, settings)
        while running := [n for n, own in enumerate(together.trainings) if not own.done]:
            if 2 * len(running) <= len(together.trainings):
                lessons.only(together.rows_of(running))
                together = together.only(running)
            _step(family, lessons, together)
    return [training.fit for training in everything]


def _step(family: Family, lessons: Lessons, together: Values) -> None:
    """Run one forward, prove what may be proven, and let the others take a step.

    Values that may be proven wait until they are half of those that are not done: many proofs cost
    less together.
    """
    running = [own for own in together.trainings if not own.done]
    with torch.enable_grad():
        stored = together.stored()
        logits, wanted = lessons.target_logits(together.answers(stored))
        odds, entropies = together.look(logits, wanted)
        early = together.settings.early_stop
        losses = _shortfall(odds, together.margins(odds)) if early else entropies
    finite = torch.isfinite(stored).all(dim=1).tolist()
    numbers, values = odds.detach().cpu(), stored.detach().clone()
    seen = zip(entropies.tolist(), numbers, values, finite, strict=True)
    for own, what in zip(together.trainings, seen, strict=True):
        if not (own.done or own.waits):
            own.look(*what)
    asking = [n for n, own in enumerate(together.trainings) if own.waits]
    if 2 * len(asking) >= len(running):
        proofs = [together.trainings[n].proof(together.starts[n]) for n in asking]
        for n, works in zip(asking, prove(family, proofs, lessons.begun), strict=True):
            together.trainings[n].judge(works)
    moving = [n for n, own in enumerate(together.trainings) if not (own.done or own.waits)]
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


def _shortfall(odds: Tensor, margins: Tensor) -> Tensor:
    """Return by how much log odds `[N, T]` miss margins `[N, 1]`, nats, as one number for each row.

    It is a mean in which what misses more weighs more: the tokens that lack most decide. Cross
    entropy would hardly move a token that is likely already, and creep towards the margin.
    """
    missing = torch.nn.functional.softplus(margins - odds)
    # Where all are far beyond the margin, nothing is missing and nothing moves.
    weights = missing.detach() / missing.detach().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (missing * weights).sum(dim=1)
