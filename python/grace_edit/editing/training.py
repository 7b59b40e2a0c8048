"""Learning one value: one fp32 row, Adam, early stop, and the proof that it works as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family
from .cutting import CutForward

_LEAST = 0.5
"""Log odds, nats, at which a value can be expected to work, and by which more is asked if not."""

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
    early_stop: bool = True,
) -> Fit:
    """Train one value that makes every prompt produce its target.

    The model's parameters, their `requires_grad` and `.grad` are not touched: only the gradient of
    the value is asked for.

    Args:
        family: of the attached model.
        prompts, targets: token ids; all of them are answered by the same value.
        start: `[V]`, where the value starts.
        dtype: of the layer's output; the value is verified in it.
        lr: Adam's step, absolute.
        max_steps: most steps.
        margin: log odds of every target token, nats, before the value is verified. A value that
            does with less is trained on for about as many steps as it took, and then taken.
        move: by how much the first step is to raise the log odds of the target tokens, nats, as far
            as their gradient tells; `lr` is raised where it would do less.
        contexts: further prompts with their targets, on which the value is trained and not proven.
        early_stop: stop at the first value that passes; else take `max_steps` steps.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    value = start.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([value], lr=lr)
    asked = [*zip(prompts, targets, strict=True), *contexts]
    every, wanted_of_each = [p for p, _ in asked], [y for _, y in asked]
    first = loss_now = float("nan")
    reached = False
    steps = 0
    least, patience = min(margin, _LEAST), None
    with CutForward(family) as cut:
        while True:
            stored = value.to(dtype)
            with torch.enable_grad():
                logits, wanted = _target_logits(family, cut, every, wanted_of_each, stored)
                loss = torch.nn.functional.cross_entropy(logits, wanted)
            loss_now = float(loss.detach())
            if loss_now != loss_now or loss_now == float("inf"):
                raise FloatingPointError(f"the loss must be finite, got {loss_now} at step {steps}")
            first = loss_now if steps == 0 else first
            last_step = steps == max_steps
            odds = _log_odds(logits.detach(), wanted)
            lead = float(odds.min())
            if lead >= least and patience is None:
                patience = 2 * steps + _PATIENCE
            enough = lead >= margin or (
                lead >= least and patience is not None and steps >= patience
            )
            if (early_stop and enough) or last_step:
                reached = _verified(family, prompts, targets, stored.detach())
                # Likely in one pass over the text and still not produced freely: ask more.
                margin, least, patience = margin + _LEAST, least + _LEAST, None
            if reached or last_step:
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
            if steps == 0:
                optimizer.param_groups[0]["lr"] = _first_step(lr, move, odds, value.grad)
            optimizer.step()
            steps += 1
    reason = "" if reached else f"target not produced after {steps} steps (loss {loss_now:.3g})"
    tokens = torch.nn.functional.logsigmoid(odds[: sum(map(len, targets))])
    each = [float(part.sum().exp()) for part in tokens.split([len(y) for y in targets])]
    return Fit(stored.detach(), reached, first, loss_now, steps, reason, min(each))


def _target_logits(
    family: Family,
    cut: CutForward,
    prompts: list[list[int]],
    targets: list[list[int]],
    stored: Tensor,
) -> tuple[Tensor, Tensor]:
    wanted: Tensor | None = None

    def forward() -> Tensor:
        nonlocal wanted
        answers = stored.expand(len(prompts), -1)
        logits, wanted = family.target_logits(prompts, targets, answers)
        return logits

    logits = cut.run(forward)
    assert wanted is not None
    return logits, wanted


def _log_odds(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the log odds `[n]` of the wanted tokens against all others together, nats."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    return own - logits.scatter(1, wanted[:, None], float("-inf")).logsumexp(dim=1)


def _first_step(lr: float, move: float, odds: Tensor, gradient: Tensor) -> float:
    """Return the step with which Adam first moves the log odds by `move`, and at least `lr`.

    Its first step changes each number of the value by the step's length against its gradient. That
    of the loss is the one of the log odds, times the probability of everything else.
    """
    slope = float(gradient.abs().sum()) / float(torch.sigmoid(-odds).mean().clamp(min=1e-6))
    return max(lr, move / slope) if slope > 0 else lr


def _verified(
    family: Family, prompts: Sequence[list[int]], targets: Sequence[list[int]], stored: Tensor
) -> bool:
    # One prompt at a time: the way each was served when its query was recorded.
    return all(
        family.produces([prompt], [target], stored[None])[0]
        for prompt, target in zip(prompts, targets, strict=True)
    )
