"""Learning one value: one fp32 row, Adam, early stop, and the proof that it works as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family


@dataclass
class Fit:
    """A trained value.

    Args:
        value: `[V]` in the dtype of the layer's output, as it will be stored.
        reached: every target was produced by the model itself, answered by this value.
        loss_start, loss_end: mean cross entropy of the target tokens, nats.
        steps: Adam steps taken.
        reason: why the target was not reached; empty if it was.
    """

    value: Tensor
    reached: bool
    loss_start: float
    loss_end: float
    steps: int
    reason: str = ""


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
        margin: logits by which every target token must lead before the value is verified.
        early_stop: stop at the first value that passes; else take `max_steps` steps.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    value = start.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([value], lr=lr)
    first = loss_now = float("nan")
    reached = False
    steps = 0
    wanted_margin = margin
    while True:
        with torch.enable_grad():
            stored = value.to(dtype)
            answers = stored.expand(len(prompts), -1)
            logits, wanted = family.target_logits(prompts, targets, answers)
            loss = torch.nn.functional.cross_entropy(logits, wanted)
        loss_now = float(loss.detach())
        if loss_now != loss_now or loss_now == float("inf"):
            raise FloatingPointError(f"the loss must be finite, got {loss_now} at step {steps}")
        first = loss_now if steps == 0 else first
        last_step = steps == max_steps
        if (early_stop and _lead(logits.detach(), wanted) >= wanted_margin) or last_step:
            reached = _verified(family, prompts, targets, stored.detach())
            # Led by the margin in one pass over the text and still not produced freely: ask more.
            wanted_margin += margin + 0.1
        if reached or last_step:
            break
        (value.grad,) = torch.autograd.grad(loss, [value])
        optimizer.step()
        steps += 1
    reason = "" if reached else f"target not produced after {steps} steps (loss {loss_now:.3g})"
    return Fit(stored.detach(), reached, first, loss_now, steps, reason)


def _lead(logits: Tensor, wanted: Tensor) -> float:
    """Return the smallest lead of a wanted token over the best other one, in logits."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    others = logits.scatter(1, wanted[:, None], float("-inf")).amax(dim=1)
    return float((own - others).min())


def _verified(
    family: Family, prompts: Sequence[list[int]], targets: Sequence[list[int]], stored: Tensor
) -> bool:
    # One prompt at a time: the way each was served when its query was recorded.
    return all(
        family.produces([prompt], [target], stored[None])[0]
        for prompt, target in zip(prompts, targets, strict=True)
    )
